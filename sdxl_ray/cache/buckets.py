"""Which bucket an image goes to, how it is resized to cover it, and what is cut away: exact numbers, no pixels."""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_ray.records import bucket_key

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

# The 40 sizes (height, width) that SDXL was trained with: appendix I of arXiv:2307.01952.
SDXL_BUCKETS: tuple[tuple[int, int], ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip

MAX_ASPECT = 4.0  # SDXL's own table ends there
# Without enlarging, the shortest edge of a bucket, or half of the resolution where that is less: SDXL draws little that
# can be recognised below it, and micro-conditioning of such sizes was hardly trained.
MIN_OWN_EDGE = 256


@dataclass(frozen=True)
class Geometry:
    """The settings of one dataset at one resolution that decide about size and crop."""

    buckets: tuple[tuple[int, int], ...]  # (height, width)
    step: int  # pixels; edges of a bucket of the image's own size are multiples of it
    min_own_edge: int  # pixels; of such a bucket. 0: there are none, only `buckets` count
    upscale: bool = True
    min_size: int = 0
    max_size: int = 0
    min_aspect: float = 0.0
    max_aspect: float = 0.0
    max_upscale: float = 0.0
    max_cut: float = 1.0
    crop: str = "center"
    crop_variants: int = 1

    @staticmethod
    def of(section: DatasetSection) -> tuple[Geometry, ...]:
        """One for each resolution; of those that come out equal, one."""
        geometries = []
        for resolution in section.resolution:
            buckets, min_own_edge = _buckets_of(section, resolution)
            geometries.append(
                Geometry(
                    buckets=buckets,
                    step=section.bucket_step,
                    min_own_edge=min_own_edge,
                    upscale=section.upscale,
                    min_size=section.min_size,
                    max_size=section.max_size,
                    min_aspect=section.min_aspect,
                    max_aspect=section.max_aspect,
                    max_upscale=section.max_upscale,
                    max_cut=section.max_cut,
                    crop=section.crop,
                    crop_variants=section.crop_variants if section.crop == "random" else 1,
                )
            )
        return tuple(dict.fromkeys(geometries))

    @functools.cached_property
    def _hash(self) -> int:
        # Numbers only: they hash alike in all processes, so this may travel along when the object is pickled.
        return hash((self.buckets, self.step, self.min_own_edge, self.upscale, self.crop_variants))

    def __hash__(self) -> int:  # kept, because hashing forty buckets takes longer than placing an image
        return self._hash

    @functools.cached_property
    def by_aspect(self) -> tuple[list[float], list[tuple[int, int]]]:
        """Log aspects (height / width), ascending, and their buckets."""
        return _by_aspect(self.buckets)

    @functools.cached_property
    def max_area(self) -> int:
        """In pixels, of the largest bucket."""
        return max(height * width for height, width in self.buckets)


@dataclass(frozen=True, slots=True)
class Placement:
    """An image's bucket, the size to which it is resized so that it covers it, and the crops (top, left) in that."""

    bucket_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    crops: tuple[tuple[int, int], ...]  # at least one, all different


@dataclass(frozen=True, slots=True)
class Unfit:
    """The image is left out; why, for the list of skipped images."""

    reason: str


# ---- the buckets -----------------------------------------------------------------------------------------------------


def make_buckets(resolution: float, step: int) -> tuple[tuple[int, int], ...]:
    """All buckets (height, width) for about `resolution`² pixels, edges multiples of `step`, as tall ones as wide ones.

    SDXL's own table at 1024, which alone is not symmetric (it has 704x1344, but not 1344x704); elsewhere the sizes that
    cannot grow by one step without exceeding `resolution`² pixels.
    """
    if (resolution, step) == (1024, 64):
        return SDXL_BUCKETS
    area = round(resolution * resolution)  # half a megapixel is 724.08² and just has room for 512x1024
    edges = range(step, int(resolution * math.sqrt(MAX_ASPECT)) + step, step)
    return tuple(
        (height, width)
        for height in edges
        for width in edges
        if height * width <= area < min((height + step) * width, height * (width + step))
        and max(height, width) <= MAX_ASPECT * min(height, width)
    )


def make_shorter_side_buckets(edge: int, step: int) -> tuple[tuple[int, int], ...]:
    """All buckets (height, width) with a shorter edge of `edge`; the longer one grows by `step`, to four times that."""
    longer = range(edge, int(edge * MAX_ASPECT) + 1, step)
    return tuple((edge, width) for width in reversed(longer)) + tuple((height, edge) for height in longer[1:])


def _buckets_of(section: DatasetSection, resolution: float) -> tuple[tuple[tuple[int, int], ...], int]:
    """The buckets of one resolution, and the shortest edge of a bucket of an image's own size, 0 for none."""
    if section.own_buckets:
        return tuple(dict.fromkeys(section.own_buckets)), 0
    unit, step = section.resolution_unit, section.bucket_step
    edge = 1024 * math.sqrt(resolution) if unit == "megapixels" else resolution
    if unit == "shorter_side":
        buckets, square = make_shorter_side_buckets(int(edge), step), int(edge)
    else:
        buckets, square = make_buckets(edge, step), int(edge // step * step)
    if section.buckets:  # "square"
        return ((square, square),), 0
    return buckets, max(step, min(MIN_OWN_EDGE, int(edge / 2)))


# ---- an image's place ------------------------------------------------------------------------------------------------


def place_all(
    original_hw: tuple[int, int],
    image_hash: str,
    geometries: Sequence[Geometry],
    focus_yx: tuple[float, float] | None = None,
) -> list[Placement] | Unfit:
    """The image's place at each resolution that it fits, each place once; `Unfit` when it fits none.

    A small image that must not be enlarged has the same place at several resolutions.
    """
    places = [place(original_hw, image_hash, geometry, focus_yx) for geometry in geometries]
    found = list(dict.fromkeys(place for place in places if isinstance(place, Placement)))
    if found:
        return found
    return Unfit("; ".join(dict.fromkeys(place.reason for place in places if isinstance(place, Unfit))))


def place(
    original_hw: tuple[int, int],
    image_hash: str,
    geometry: Geometry,
    focus_yx: tuple[float, float] | None = None,
) -> Placement | Unfit:
    """The image's place at one resolution, or why it has none.

    Args:
        image_hash: decides about random crops, together with their number, and about nothing else.
        focus_yx: for crop = "focus", the point to keep in the middle, as shares of height and width; None: the centre.
    """
    found = _place_fixed(original_hw, geometry)
    if geometry.crop not in ("random", "focus") or isinstance(found, Unfit) or found.bucket_hw == found.resized_hw:
        return found
    if geometry.crop == "random":
        crops = _random_crops(found.resized_hw, found.bucket_hw, image_hash, geometry.crop_variants)
    elif focus_yx is not None and all(map(math.isfinite, focus_yx)):
        crops = (_focus_crop(found.resized_hw, found.bucket_hw, focus_yx),)
    else:
        return found
    return Placement(found.bucket_hw, found.resized_hw, crops)


@functools.lru_cache(maxsize=65536)  # a million images have few sizes
def _place_fixed(original_hw: tuple[int, int], geometry: Geometry) -> Placement | Unfit:
    """The place with the crop in its corner, or else in the middle: what depends on the image's size alone."""
    refusal = _refusal(original_hw, geometry)
    if refusal:
        return Unfit(refusal)
    bucket_hw = _nearest(original_hw, geometry.by_aspect)
    if not geometry.upscale and not _covers(original_hw, bucket_hw):
        smaller = _bucket_without_upscale(original_hw, geometry)
        if isinstance(smaller, Unfit):
            return smaller
        bucket_hw = smaller
    resized_hw = cover(original_hw, bucket_hw)
    refusal = _too_much(original_hw, resized_hw, bucket_hw, geometry)
    if refusal:
        return Unfit(refusal)
    top, left = resized_hw[0] - bucket_hw[0], resized_hw[1] - bucket_hw[1]
    if geometry.crop in ("center", "random", "focus"):
        top, left = top // 2, left // 2
    else:
        top, left = top * geometry.crop.startswith("bottom"), left * geometry.crop.endswith("right")
    return Placement(bucket_hw, resized_hw, ((top, left),))


def _refusal(original_hw: tuple[int, int], geometry: Geometry) -> str:
    """Which limit the image breaks, and by what; empty: none."""
    height, width = original_hw
    if min(height, width) < geometry.min_size:
        return f"its shorter edge has {min(height, width)} pixels, dataset.min_size is {geometry.min_size}"
    if geometry.max_size and max(height, width) > geometry.max_size:
        return f"its longer edge has {max(height, width)} pixels, dataset.max_size is {geometry.max_size}"
    if width < geometry.min_aspect * height:
        return f"its width / height is {width / height:.3g}, dataset.min_aspect is {geometry.min_aspect:g}"
    if geometry.max_aspect and width > geometry.max_aspect * height:
        return f"its width / height is {width / height:.3g}, dataset.max_aspect is {geometry.max_aspect:g}"
    return ""


def _too_much(
    original_hw: tuple[int, int], resized_hw: tuple[int, int], bucket_hw: tuple[int, int], geometry: Geometry
) -> str:
    """Whether it would be enlarged or cut beyond recognition, in words; empty: no."""
    scale = max(bucket / original for bucket, original in zip(bucket_hw, original_hw, strict=True))
    if geometry.max_upscale and scale > geometry.max_upscale:
        return f"it would be enlarged {scale:.4g} times, dataset.max_upscale is {geometry.max_upscale:g}"
    cut = 1 - math.prod(bucket_hw) / math.prod(resized_hw)
    if cut > geometry.max_cut:
        text = f"{bucket_key(bucket_hw)} would leave {1 - cut:.1%} of it, dataset.max_cut is {geometry.max_cut:g}"
        return f"{text} ({1 - geometry.max_cut:.0%} are left)"
    return ""


def _covers(original_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> bool:
    return original_hw[0] >= bucket_hw[0] and original_hw[1] >= bucket_hw[1]


def _bucket_without_upscale(original_hw: tuple[int, int], geometry: Geometry) -> tuple[int, int] | Unfit:
    """Of one's own buckets the nearest that the image covers; else its own size, rounded down to the step.

    Like all buckets, that one is at most four times as long as wide, and not larger than the largest of them.
    """
    size = f"it is only {original_hw[0]}x{original_hw[1]} pixels (height x width), and dataset.upscale is false: "
    if not geometry.min_own_edge:
        covered = tuple(bucket for bucket in geometry.buckets if _covers(original_hw, bucket))
        return nearest_bucket(original_hw, covered) if covered else Unfit(size + "it covers none of dataset.buckets")
    step = geometry.step
    shorter, longer = (edge // step * step for edge in sorted(original_hw))
    if shorter < geometry.min_own_edge:
        return Unfit(size + f"the edges of a bucket are at least {geometry.min_own_edge}")
    longer = min(longer, int(shorter * MAX_ASPECT) // step * step, geometry.max_area // shorter // step * step)
    shorter, longer = sorted((shorter, longer))  # `longer` may have come out the shorter by a step
    return (longer, shorter) if original_hw[0] > original_hw[1] else (shorter, longer)


def nearest_bucket(original_hw: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket nearest in log aspect, so that 2:1 and 1:2 are equally far from 1:1. Ties go to the larger area."""
    return _nearest(original_hw, _by_aspect(buckets))


def _by_aspect(buckets: Sequence[tuple[int, int]]) -> tuple[list[float], list[tuple[int, int]]]:
    """Log aspects, ascending, and their buckets; of several with one aspect the largest."""
    largest = {height / width: (height, width) for height, width in sorted(buckets, key=math.prod)}
    return [math.log(aspect) for aspect in sorted(largest)], [largest[aspect] for aspect in sorted(largest)]


def _nearest(original_hw: tuple[int, int], by_aspect: tuple[list[float], list[tuple[int, int]]]) -> tuple[int, int]:
    aspects, buckets = by_aspect
    aspect = math.log(original_hw[0] / original_hw[1])
    at = bisect.bisect(aspects, aspect)
    if at in (0, len(buckets)):
        return buckets[min(at, len(buckets) - 1)]
    wider, taller = buckets[at - 1], buckets[at]
    farther = round(aspect - aspects[at - 1], 9) - round(aspects[at] - aspect, 9)  # the wider one, by how much
    if farther == 0:
        return min(wider, taller, key=lambda hw: (-math.prod(hw), hw))
    return taller if farther > 0 else wider


def cover(original_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the image's aspect, to a pixel, that covers the bucket: at least one edge fits exactly."""
    height, width = original_hw
    scale = max(bucket_hw[0] / height, bucket_hw[1] / width)
    return max(bucket_hw[0], round(height * scale)), max(bucket_hw[1], round(width * scale))


# ---- crops -----------------------------------------------------------------------------------------------------------


def _focus_crop(
    resized_hw: tuple[int, int], bucket_hw: tuple[int, int], focus_yx: tuple[float, float]
) -> tuple[int, int]:
    """(top, left) of the crop with the point in its middle, as far as the image goes."""
    top, left = (
        min(max(round(share * resized - edge / 2), 0), resized - edge)
        for share, resized, edge in zip(focus_yx, resized_hw, bucket_hw, strict=True)
    )
    return top, left


# Steps around a circle that spread any number of points evenly: no fraction comes near them. One for each axis, because
# equal ones would keep to a diagonal.
_STEPS = ((math.sqrt(5) - 1) / 2, math.sqrt(2) - 1)


def _random_crops(
    resized_hw: tuple[int, int], bucket_hw: tuple[int, int], image_hash: str, variants: int
) -> tuple[tuple[int, int], ...]:
    """(top, left) of up to `variants` crops, all different; fewer where there are fewer places.

    The first is anywhere, by the image's content alone. Each further one is the same step further along, and around the
    end, so that they are spread evenly; asking for more leaves the first ones as they are, and so cached.
    """
    spare = (resized_hw[0] - bucket_hw[0], resized_hw[1] - bucket_hw[1])
    digest = hashlib.sha256(f"crop/{image_hash}".encode()).digest()
    draws = [int.from_bytes(digest[start : start + 8], "big") / 2**64 for start in (0, 8)]
    num_places = (spare[0] + 1) * (spare[1] + 1)
    crops: dict[tuple[int, int], None] = {}
    turn = 0
    while len(crops) < min(variants, num_places):
        top, left = (
            min(int((draw + turn * step) % 1 * (most + 1)), most)
            for draw, step, most in zip(draws, _STEPS, spare, strict=True)
        )
        crops[top, left] = None
        turn += 1
    return tuple(crops)
