"""Which bucket an image goes to, how it is resized to cover it, and what is cut away: exact numbers, no pixels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

from sdxl_ray.records import ImageRecord

# The 40 sizes (height, width) that SDXL was trained with: appendix I of arXiv:2307.01952.
SDXL_BUCKETS: tuple[tuple[int, int], ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip

MAX_ASPECT = 4.0  # SDXL's own table ends there


def make_buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """All buckets (height, width) for about `resolution`² pixels, edges multiples of `step`, as tall ones as wide ones.

    SDXL's own table at 1024, which alone is not symmetric (it has 704x1344, but not 1344x704); elsewhere the sizes that
    cannot grow by one step without exceeding `resolution`² pixels.
    """
    if (resolution, step) == (1024, 64):
        return SDXL_BUCKETS
    area = resolution * resolution
    edges = range(step, int(resolution * math.sqrt(MAX_ASPECT)) + step, step)
    return tuple(
        (height, width)
        for height in edges
        for width in edges
        if height * width <= area < min((height + step) * width, height * (width + step))
        and max(height, width) <= MAX_ASPECT * min(height, width)
    )


def nearest_bucket(original_hw: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket nearest in log aspect, so that 2:1 and 1:2 are equally far from 1:1. Ties go to the larger area."""
    return _nearest_bucket(original_hw, tuple(buckets))


@functools.lru_cache(maxsize=65536)  # a million images have few sizes
def _nearest_bucket(original_hw: tuple[int, int], buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    aspect = math.log(original_hw[0] / original_hw[1])
    return min(buckets, key=lambda hw: (round(abs(math.log(hw[0] / hw[1]) - aspect), 9), -hw[0] * hw[1], hw))


def cover(original_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the image's aspect, to a pixel, that covers the bucket: at least one edge fits exactly."""
    height, width = original_hw
    scale = max(bucket_hw[0] / height, bucket_hw[1] / width)
    return max(bucket_hw[0], round(height * scale)), max(bucket_hw[1], round(width * scale))


def crop_offset(resized_hw: tuple[int, int], bucket_hw: tuple[int, int], crop: str, image_hash: str) -> tuple[int, int]:
    """(top, left) of the crop in the resized image, in pixels. "random" depends on the image's content alone."""
    spare = (resized_hw[0] - bucket_hw[0], resized_hw[1] - bucket_hw[1])
    if crop == "center":
        return spare[0] // 2, spare[1] // 2
    digest = hashlib.sha256(f"crop/{image_hash}".encode()).digest()
    draws = [int.from_bytes(digest[start : start + 8], "big") / 2**64 for start in (0, 8)]
    return int(draws[0] * (spare[0] + 1)), int(draws[1] * (spare[1] + 1))


def assign_bucket(record: ImageRecord, buckets: Sequence[tuple[int, int]], crop: str) -> ImageRecord:
    """The record with bucket, resize and crop filled in."""
    bucket_hw = nearest_bucket(record.original_hw, buckets)
    resized_hw = cover(record.original_hw, bucket_hw)
    return dataclasses.replace(
        record,
        bucket_hw=bucket_hw,
        resized_hw=resized_hw,
        crop_top_left=crop_offset(resized_hw, bucket_hw, crop, record.image_hash),
    )
