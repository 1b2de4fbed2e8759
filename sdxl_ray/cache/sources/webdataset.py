"""WebDataset: tar files whose members belong together where their names are the same up to the first dot.

    000.tar/cat.jpg    the image
    000.tar/cat.txt    its caption
    000.tar/cat.json   more captions, height, width
    000.tar/cat.mask.png

Only headers are read, and the .json members. An image's bytes are read later, from its place in the tar file.
"""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from sdxl_ray import storage
from sdxl_ray.cache.sources.address import tar_address
from sdxl_ray.cache.sources.columns import AskedFor
from sdxl_ray.cache.sources.files import (
    IMAGE_SUFFIXES,
    PACKED_TARS,
    ahead,
    printable,
    setting_of,
    stamp_of,
    without_masks,
)
from sdxl_ray.cache.sources.values import focus_of, json_value, size_of, texts_of
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.cache.text_memo import TextMemo
    from sdxl_ray.config.schema import DatasetSection

MAX_JSON_BYTES = 2**20
_AHEAD = 8  # tar files
_BLOCK = 512
_IMAGE_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


def list_tars(
    section: DatasetSection, files: Sequence[tuple[str, FileEntry]], memo: TextMemo | None = None
) -> Iterator[Listed]:
    """Every image of these tar files, given as (path, entry): in their order, within each by name.

    Args:
        memo: headers of those in cloud storage that earlier runs have read.

    Raises:
        DatasetError: a file is compressed, damaged or cut short; or there is no image, or nowhere a mask or a name in
            the .json members that the settings ask for.
        StorageError: a store refuses.
    """
    for path, _ in files:
        refuse_packed(section, path)
    asked = AskedFor(section, mask_in_column=False)
    found = has_masks = False
    left_out = _LeftOut()
    for listed, names, others in ahead(lambda file: _list_tar(section, *file, memo), files, _AHEAD):
        asked.see(names)
        left_out.add(others)
        found = found or bool(listed)
        has_masks = has_masks or any(image.mask_file for image in listed)
        yield from listed
    where = files[0][0] + (f" and {len(files) - 1} more tar files" if len(files) > 1 else "")
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{setting_of(section)}: no images in {where}. Looked for members that end in {kinds}")
    if section.mask == "file" and not has_masks:
        raise without_masks(section, where, f"cat.{section.mask_suffix.lstrip('-_.')}")
    asked.check([path for path, _ in files])
    left_out.say(where)


def refuse_packed(section: DatasetSection, path: str) -> None:
    """
    Raises:
        DatasetError: it is a compressed tar file.
    """
    if path.lower().endswith(PACKED_TARS):
        raise DatasetError(
            f"{setting_of(section)}: {path} is compressed, so that no image in it can be read without all before it. "
            "Unpack it into a plain .tar; images hardly get smaller by it."
        )


@dataclass
class _Sample:
    """Members of one name: ending after the first dot -> (name, offset, size)."""

    members: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    notes: dict[str, dict[str, object]] = field(default_factory=dict)  # of the .json members, by their ending


_Samples = dict[str, _Sample]  # by the part of the name that their members share


@dataclass
class _LeftOut:
    """Members that end like an image, and are not listed as one."""

    num_others: int = 0  # beside the image of their name
    other: str = ""  # the first of them, and that image
    num_masks: int = 0
    mask: str = ""

    def add(self, more: _LeftOut) -> None:
        self.num_others += more.num_others
        self.num_masks += more.num_masks
        self.other, self.mask = self.other or more.other, self.mask or more.mask

    def say(self, where: str) -> None:
        if self.num_others:
            warnings.warn(
                f"{where}: {self.num_others} images are left out, such as {self.other}: members whose names are the "
                "same up to the first dot are one sample, and what has a word more is no picture of its own",
                stacklevel=2,
            )
        if self.num_masks:
            warnings.warn(
                f"{where}: {self.num_masks} images such as {self.mask} are masks of others by their names, and are "
                'left out. dataset.mask = "file" uses what is called cat.mask.png; if they are pictures, set another '
                "dataset.mask_suffix",
                stacklevel=2,
            )


def _list_tar(
    section: DatasetSection, path: str, entry: FileEntry, memo: TextMemo | None
) -> tuple[list[Listed], dict[str, None], _LeftOut]:
    """(its images by name, the names in its .json members, the other members that end like an image)"""
    if memo is None or not storage.is_uri(path):
        samples = _read_headers(section, path, entry)
    else:
        file = (path, stamp_of(entry))
        text = memo.find([file]).get(path)
        samples = _read_headers(section, path, entry) if text is None else _samples_from(text)
        if text is None:
            memo.add([file], [json.dumps({stem: [each.members, each.notes] for stem, each in samples.items()})])
    left_out = _LeftOut()
    _take_out_masks(section, samples, left_out)
    found = [listed for sample in samples.values() for listed in _images_of(section, path, entry, sample, left_out)]
    names = dict.fromkeys(name for sample in samples.values() for notes in sample.notes.values() for name in notes)
    return sorted(found, key=lambda listed: listed.path), names, left_out


def _take_out_masks(section: DatasetSection, samples: _Samples, left_out: _LeftOut) -> None:
    """Samples such as cat-mask.png beside cat.jpg: that is how a folder's masks are called."""
    stem, _, ending = section.mask_suffix.lower().partition(".")
    if not stem or not ending:  # the mask of cat.jpg is of its sample
        return
    for name in [name for name in samples if name.lower().endswith(stem)]:
        of, members = samples.get(name[: -len(stem)]), samples[name].members
        mask = next((member for member in members if member.lower() == ending), "")
        if mask and of is not None and any(other.lower().endswith(_IMAGE_ENDINGS) for other in of.members):
            left_out.add(_LeftOut(num_masks=1, mask=printable(members[mask][0])))
            del members[mask]


def _samples_from(text: str) -> _Samples:
    return {
        stem: _Sample({ending: tuple(member) for ending, member in members.items()}, notes)
        for stem, (members, notes) in json.loads(text).items()
    }


def _read_headers(section: DatasetSection, path: str, entry: FileEntry) -> _Samples:
    samples: _Samples = {}
    try:
        with storage.open_buffered(path) as file:
            for member in _members(file, entry.size):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not stem or not dot:  # hidden, or of no kind
                    continue
                sample = samples.setdefault(f"{folder}{slash}{stem}", _Sample())
                sample.members[ending] = (member.name, member.offset_data, member.size)
                if f".{ending}".lower().endswith(".json"):
                    sample.notes[ending] = _read_json(file, path, member)
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path}: {error}. Copy or download it again, or take it out of {setting_of(section)}."
        ) from None
    return samples


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. `tarfile` takes a damaged header in the middle for the end; here it is an error."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.offset_data + member.size > size and member.isreg():
                raise tarfile.ReadError(f"is cut short: it has {size} bytes, and {printable(member.name)} ends beyond")
            if member.isreg() and not member.issparse():
                yield member
            tar.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
        file.seek(tar.offset)
        block = file.read(_BLOCK)
        if len(block) not in (0, _BLOCK):
            raise tarfile.ReadError(f"is cut short: it ends at byte {size}, in the middle of a header")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"is damaged: no tar header at byte {tar.offset}")


def _read_json(file: BinaryIO, path: str, member: tarfile.TarInfo) -> dict[str, object]:
    where = f"{path}: {printable(member.name)}"
    if member.size > MAX_JSON_BYTES:
        raise DatasetError(f"{where} has {member.size} bytes, and captions at most {MAX_JSON_BYTES}. Is it one?")
    file.seek(member.offset_data)
    try:
        notes = json_value(file.read(member.size))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8, or lists in lists without end
        raise DatasetError(f"{where} is no JSON: {error}. Correct it, or leave it out.") from None
    return notes if isinstance(notes, dict) else {}


def _images_of(
    section: DatasetSection, path: str, entry: FileEntry, sample: _Sample, left_out: _LeftOut
) -> Iterator[Listed]:
    mask_ending = section.mask_suffix.lstrip("-_.") if section.mask == "file" else ""
    masks = {ending for ending in sample.members if mask_ending and _part(ending, mask_ending) is not None}
    images = [ending for ending in sample.members if ending.lower() in _IMAGE_ENDINGS and ending not in masks]
    with_dots = tuple(f".{known}" for known in _IMAGE_ENDINGS)  # photo.v2.jpg
    others = [ending for ending in sample.members if ending.lower().endswith(with_dots) and ending not in masks]
    if not images:
        images, others = others, []
    if others:
        first, main = (printable(sample.members[ending][0]) for ending in (others[0], images[0]))
        left_out.add(_LeftOut(len(others), f"{first} beside {main}"))
    extension = section.caption_extension.lstrip(".")
    tag_separator = section.tag_separator if section.caption_lists == "tags" else ""
    for image in images:
        name, offset, size = sample.members[image]
        before = image.rpartition(".")[0]  # "v2" of v2.jpg, and empty of jpg
        caption = _belonging(sample, before, extension) if "textfile" in section.captions else ""
        mask = _belonging(sample, before, mask_ending) if mask_ending else ""
        notes = sample.notes.get(_belonging(sample, before, "json"), {})
        original_hw = size_of(notes, section.size_columns)
        texts = texts_of(notes, section.caption_columns, tag_separator)
        beside = []
        if "textfile" in section.captions and not caption and not texts:
            known = {*images, *masks, *sample.notes}
            beside = [member for ending, (member, _, _) in sample.members.items() if ending not in known]
        yield Listed(
            path=storage.join(path, printable(name)),
            stamp=_stamp(entry, sample, image),
            address=tar_address(path, offset, size),
            original_hw=original_hw,
            text_file=_address(path, sample, caption),
            text_stamp=_stamp(entry, sample, caption) if caption and storage.is_uri(path) else "",
            texts=texts,
            mask_file=_address(path, sample, mask),
            mask_stamp=_stamp(entry, sample, mask) if mask else "",
            focus_yx=focus_of(notes, section.focus_columns, original_hw),
            columns=() if caption or texts else tuple(notes),
            beside=tuple(sorted(printable(member.rpartition("/")[2]) for member in beside)),
        )


def _stamp(entry: FileEntry, sample: _Sample, ending: str) -> str:
    """Of a member: its size and place, and the tar file's date."""
    _, offset, size = sample.members[ending]
    return f"{size}-{entry.mtime_ns}-{offset}"


def _part(ending: str, wanted: str) -> str | None:
    """What is before `wanted` in an ending: "" in mask.png, "v2" in v2.mask.png; None where it does not end so."""
    if ending == wanted:
        return ""
    return ending.removesuffix(f".{wanted}") if ending.endswith(f".{wanted}") else None


def _belonging(sample: _Sample, before: str, wanted: str) -> str:
    """The ending of the member that goes with an image: v2.txt, else txt, with v2.jpg; in capitals where there is no
    other.
    """
    in_capitals = {ending.lower(): ending for ending in sample.members}
    for ending in (f"{before}.{wanted}" if before else wanted, wanted):
        if ending in sample.members:
            return ending
        if ending.lower() in in_capitals:
            return in_capitals[ending.lower()]
    return ""


def _address(path: str, sample: _Sample, ending: str) -> str:
    if not ending:
        return ""
    _, offset, size = sample.members[ending]
    return tar_address(path, offset, size)
