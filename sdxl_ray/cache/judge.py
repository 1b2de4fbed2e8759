"""One image: is it used, and if not, why? What was listed, scanned and read of it comes in; nothing is read here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sdxl_ray.cache.buckets import Geometry, Placement, Unfit, place_all
from sdxl_ray.cache.captions import NO_CAPTION, CaptionRules, Captions, no_captions_error, several_captions_note
from sdxl_ray.cache.scan import ScannedFile
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.cache.sources import as_shares
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_NAMED = 10  # images without a caption, in the error


class Mask(NamedTuple):
    """What belongs to an image as its mask."""

    address: str = ""  # as `ImageRecord.mask`
    hash: str = ""  # of the file's bytes, hex; "alpha": the image's own transparency
    problem: str = ""  # why it cannot be used


@dataclass(frozen=True, slots=True)
class DatasetRules:
    """What a dataset's settings ask of its images, and make of them."""

    section: DatasetSection
    captions: CaptionRules
    geometries: tuple[Geometry, ...]
    flips: tuple[bool, ...]

    @classmethod
    def of(cls, section: DatasetSection) -> DatasetRules:
        rules, geometries = CaptionRules.of(section), Geometry.of(section)
        if section.role != "eval":
            return cls(section, rules, geometries, (False, True) if section.flip else (False,))
        # What is only evaluated is seen once, with its first crop: other ones would be encoded for nothing.
        once = tuple(dataclasses.replace(geometry, crop_variants=1) for geometry in geometries)
        return cls(section, rules, once, (False,))

    def identifies_by_listing(self, file: Listed) -> bool:
        """Whether the listing identifies the image, so that it need not be read."""
        by = self.section.identify_by
        return by == "listing" or (by == "auto" and file.original_hw is not None)


@dataclass(frozen=True, slots=True)
class Used:
    """An image that is used."""

    file: Listed
    image: ScannedFile
    mask: Mask
    captions: Captions
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Uncaptioned:
    """An image that would be used if it had a caption; the settings leave none out for that."""

    file: Listed


def judge(
    file: Listed, image: ScannedFile, captions: Captions, mask: Mask, rules: DatasetRules
) -> Used | Skipped | Uncaptioned:
    """Of several reasons to leave it out the first is told: what cannot be read, what does not fit, no caption."""
    name = rules.section.name
    problem = image.problem or captions.problem or mask.problem
    if problem:
        return Skipped(file.path, problem, name, kind=image.kind)
    original_hw = (image.height, image.width)
    focus_yx = as_shares(file.focus_yx, original_hw)
    placements = place_all(original_hw, image.image_hash, rules.geometries, focus_yx)
    if isinstance(placements, Unfit):
        return Skipped(file.path, placements.reason, name, by_choice=True)
    if not captions.texts and rules.captions.skips:
        return Skipped(file.path, NO_CAPTION, name, by_choice=True)
    if not captions.texts:  # after the sizes: what is left out needs no caption
        return Uncaptioned(file)
    return Used(file, image, mask, captions, tuple(placements))


@dataclass
class Tally:
    """What became of a dataset's images."""

    rules: DatasetRules
    images: int = 0
    used: int = 0
    masked: int = 0  # of these, with a mask file
    pointed: int = 0  # with a point of interest inside
    several: int = 0  # with more than one caption
    uncaptioned: int = 0
    captions: Counter[str] = field(default_factory=Counter)  # of images that are used, by source
    _named: list[Listed] = field(default_factory=list)

    def add(self, verdict: Used | Skipped | Uncaptioned) -> None:
        self.images += 1
        if isinstance(verdict, Uncaptioned):
            self.uncaptioned += 1
            self._named += [verdict.file] if len(self._named) < _NAMED else []
        elif isinstance(verdict, Used):
            self.used += 1
            self.masked += bool(verdict.file.mask_file)
            self.several += len(verdict.captions.texts) > 1
            self.captions[verdict.captions.source] += len(verdict.captions.texts)
            original_hw = (verdict.image.height, verdict.image.width)
            self.pointed += as_shares(verdict.file.focus_yx, original_hw) is not None

    def check_captions(self) -> None:
        """
        Raises:
            DatasetError: an image has none, and the settings do not say what then.
        """
        if self.uncaptioned:
            raise no_captions_error(self._named, self.uncaptioned, self.images, self.rules.captions)

    def notes(self) -> Iterator[str]:
        """What is not as the settings let one expect."""
        section = self.rules.section
        dataset = f'dataset "{section.name}"'
        if section.mask == "file" and self.masked < self.used:
            yield f"{dataset}: {self.masked} of {self.used} images have a mask; the others count whole"
        if section.crop == "focus" and self.pointed < self.used:
            yield (
                f"{dataset}: {self.pointed} of {self.used} images have a point of interest; the others are cut in "
                "the middle"
            )
        if self.several:
            yield f"{dataset}: {several_captions_note(self.several, self.used, self.rules.captions, self.captions)}"
        first = section.captions[0]
        if section.captions != type(section).model_fields["captions"].default and not self.captions[first]:
            found = ", ".join(f"{count} from {name}" for name, count in self.captions.items() if count)
            if found:
                yield f'{dataset}: no caption is from "{first}", the first of dataset.captions; {found}'
