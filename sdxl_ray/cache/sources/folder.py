"""A folder of image files, searched recursively, each with its caption file and its mask.

One listing of each folder finds all three; nothing is opened but the first lines of tables (remarks.py), and no name is
asked for on its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.files import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    is_image,
    local_stamps,
    missing,
    not_a_dataset,
    printable,
    setting_of,
    stamp_of,
    without_masks,
)
from sdxl_ray.cache.sources.remarks import Remarks
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_AHEAD = 16  # folders of a store that are listed at once
_NOWHERE = "0-0"  # the stamp of a link that leads nowhere: it is reported when it is opened


@dataclass
class _Level:
    """One folder's content, as far as it matters. Names as the folder has them."""

    folder: str
    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)  # name with the extension as the settings have it -> name
    masks: dict[str, str] = field(default_factory=dict)  # name with dataset.mask_suffix as the settings have it -> name
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    stamps: dict[str, str] = field(default_factory=dict)  # of a store, whose listing has them; else asked for later


class _Rules:
    """Which file is what."""

    def __init__(self, section: DatasetSection) -> None:
        extension = section.caption_extension
        self.extension = extension if extension.startswith(".") else f".{extension}"
        self.captions = "textfile" in section.captions
        self.mask_suffix = section.mask_suffix
        self.masks = section.mask == "file"
        self.tables = section.format == "auto"  # with "folder" the user has said that no table counts

    def is_mask(self, name: str) -> bool:
        """By its end, in capitals or not."""
        return self.masks and _ends(name, self.mask_suffix)

    def is_caption(self, name: str) -> bool:
        """By its extension, in capitals or not."""
        return self.captions and _ends(name, self.extension)

    def sort_in(self, level: _Level, name: str) -> bool:
        """Whether it is an image, a mask or a caption file. It is in the level now."""
        if self.is_mask(name):
            _enter(level.masks, name, self.mask_suffix)
        elif is_image(name):
            level.images.append(name)
        elif self.is_caption(name):
            _enter(level.captions, name, self.extension)
        else:
            if self.tables and name.lower().endswith(TABLE_SUFFIXES):
                level.tables.append(name)
            elif self.captions:
                level.others.append(name)
            return False
        return True

    def take_out_masks(self, level: _Level) -> list[str]:
        """The images of a level that are masks of others there, whatever dataset.mask says. They are in it no more."""
        if self.masks:
            return []
        named = [name for name in level.images if _ends(name, self.mask_suffix)]
        if not named:
            return []
        stems = Counter(_stem(image) for image in level.images)
        found = dict.fromkeys(
            name
            for name in named
            if (whose := name[: -len(self.mask_suffix)]) and stems[whose] > (_stem(name) == whose)
        )
        level.images = [name for name in level.images if name not in found]
        return [*found]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122


def _ends(name: str, ending: str) -> bool:
    return name[-len(ending) :].lower() == ending.lower()


def _enter(names: dict[str, str], name: str, ending: str) -> None:
    """Of cat.txt and cat.TXT the first, as the settings have it; else the first by name."""
    key = name[: -len(ending)] + ending
    known = names.get(key)
    if known is None or name == key or (known != key and name < known):
        names[key] = name


def list_folder(section: DatasetSection, root: str) -> Iterator[Listed]:
    """Every image below `root`, sorted by path; hidden files and folders are left out.

    Links are followed; a folder reached twice, as in a loop of links, is read once. A file whose name is not UTF-8 is
    listed under an escaped name (`caf\\xe9.jpg`), which then "cannot be read": such a name fits in no index.

    Raises:
        DatasetError: the folder does not exist, is a file, or holds no image; a folder cannot be looked into; or a
            caption file could belong to several images, or no image has the mask that `mask = "file"` asks for,
            or a point for `crop = "focus"`.
        StorageError: a store refuses.
    """
    rules = _Rules(section)
    local = storage.local_path(root)
    if local is None:
        yield from _pair(section, rules, _cloud_levels(root, rules), root)
        return
    if not local.exists():
        raise missing(section)
    if not local.is_dir():
        raise not_a_dataset(section, root)
    levels = _local_levels(section, os.fspath(local), rules)
    yield from _pair(section, rules, levels, root)


def list_entries(section: DatasetSection, root: str, entries: Iterable[FileEntry]) -> Iterator[Listed]:
    """The images among files of `root` that are listed already."""
    rules = _Rules(section)
    levels: dict[str, _Level] = {}
    for entry in entries:
        folder, _, name = entry.name.rpartition("/")
        level = levels.setdefault(folder, _Level(storage.join(root, folder) if folder else root))
        if rules.sort_in(level, name):
            level.stamps[name] = stamp_of(entry)
    yield from _pair(section, rules, (levels[folder] for folder in sorted(levels)), root)


def _pair(section: DatasetSection, rules: _Rules, levels: Iterable[_Level], root: str) -> Iterator[Listed]:
    """Each image with its caption file and mask; captions that could belong to several images are collected first."""
    where = f"{root} or its subfolders"
    if section.crop == "focus":
        raise DatasetError(
            f'{setting_of(section, "crop")} is "focus", and {where} has no table that would tell the points '
            '(dataset.focus_columns). Give a table, or set dataset.crop = "center".'
        )
    shared: list[tuple[str, list[str]]] = []
    found = has_masks = False
    remarks = Remarks(section, root)
    for level in levels:
        level.images.sort()
        num_images = len(level.images)
        masks = rules.take_out_masks(level)
        remarks.see(level.folder, num_images, level.tables, masks)
        claims = _claims(level, rules)
        for file, images in claims.items():
            shared.append((printable(storage.join(level.folder, file)), [printable(image) for image in images]))
        found = found or bool(level.images)
        if not shared:  # else only the rest of the listing is wanted, for the error
            for listed in _listed(level, rules, remarks.tables):
                has_masks = has_masks or bool(listed.mask_file)
                yield listed
    if shared:
        raise DatasetError(_shared_text(shared, rules))
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{setting_of(section)}: no images in {where}. Looked for {kinds}")
    remarks.say()
    if rules.masks and not has_masks:
        raise without_masks(section, where, f"cat{rules.mask_suffix}")


def _caption_of(image: str, level: _Level, rules: _Rules) -> str:
    """`cat.jpg.txt` if it exists, else `cat.txt` if it exists."""
    for name in (image + rules.extension, _stem(image) + rules.extension):
        if name in level.captions:
            return level.captions[name]
    return ""


def _claims(level: _Level, rules: _Rules) -> dict[str, list[str]]:
    """The caption files that several images could mean."""
    shared: dict[str, list[str]] = {}
    taken: dict[str, str] = {}  # caption file -> the first image that means it
    for image in level.images if level.captions else []:
        caption = _caption_of(image, level, rules)
        if caption and taken.setdefault(caption, image) != image:
            shared.setdefault(caption, [taken[caption]]).append(image)
    return shared


def _listed(level: _Level, rules: _Rules, tables: Sequence[str]) -> Iterator[Listed]:
    """
    Args:
        tables: addresses of those that may have the captions.
    """

    def address(name: str) -> str:
        return printable(storage.join(level.folder, name)) if name else ""

    if level.stamps:
        stamps: Iterable[str] = (level.stamps[image] for image in level.images)
    else:
        stamps = _stamps_in_pieces(level, level.images)
    masks = [level.masks.get(_stem(image) + rules.mask_suffix, "") for image in level.images]
    used = [mask for mask in masks if mask]
    mask_stamps = level.stamps or dict(zip(used, _stamps_in_pieces(level, used), strict=True))
    captions = [_caption_of(image, level, rules) for image in level.images]
    others = _others(level, captions) if rules.captions and "" in captions else {}
    for image, stamp, caption, mask in zip(level.images, stamps, captions, masks, strict=True):
        yield Listed(
            path=address(image),
            stamp=stamp,
            text_file=address(caption),
            text_stamp=level.stamps.get(caption, ""),
            mask_file=address(mask),
            mask_stamp=mask_stamps.get(mask, ""),
            beside=() if caption else (*sorted(map(printable, others.get(image, ()))), *tables),
        )


def _others(level: _Level, captions: Iterable[str]) -> dict[str, list[str]]:
    """Image -> files that are called like it and nothing more, and are no other image's caption."""
    taken = set(captions)
    names = [name for name in itertools.chain(level.others, level.captions.values()) if name not in taken]
    images: dict[str, list[str]] = {}  # by what the name of a file of theirs may begin with
    for image in level.images if names else []:
        for beginning in (image, _stem(image)):
            images.setdefault(beginning, []).append(image)
    found: dict[str, list[str]] = {}
    for name in names:
        dots = [at for at, sign in enumerate(name) if sign == "." and at]
        whose = next((images[name[:at]] for at in reversed(dots) if name[:at] in images), [])
        for image in whose:
            found.setdefault(image, []).append(name)
    return found


def _stamps_in_pieces(level: _Level, names: Sequence[str], piece: int = 8192) -> Iterator[str]:
    for start in range(0, len(names), piece):
        paths = [storage.join(level.folder, name) for name in names[start : start + piece]]
        yield from local_stamps(paths, _NOWHERE)


def _shared_text(shared: list[tuple[str, list[str]]], rules: _Rules) -> str:
    shown = "\n".join(f"  {file} could belong to {' or '.join(images)}" for file, images in shared[:10])
    more = f"\n  and {len(shared) - 10} more" if len(shared) > 10 else ""
    return (
        f"{len(shared)} caption files could belong to several images:\n{shown}{more}\n"
        f'Name each after its whole image file ("cat.jpg{rules.extension}"), or remove the second image.'
    )


# ---- listing ---------------------------------------------------------------------------------------------------------


def _local_levels(section: DatasetSection, root: str, rules: _Rules) -> Iterator[_Level]:
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        level = _Level(folder)
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    _sort_in(level, rules, entry)
        except FileNotFoundError:  # deleted while we look
            continue
        except OSError as error:
            raise DatasetError(
                f"{setting_of(section)}: the folder {printable(folder)} cannot be read: {error.strerror}. "
                "Allow it, or move it out of dataset.path."
            ) from None
        pending += [storage.join(folder, name) for name in sorted(level.folders, reverse=True)]
        yield level


def _sort_in(level: _Level, rules: _Rules, entry: os.DirEntry[str]) -> None:
    if entry.name.startswith("."):
        return
    with contextlib.suppress(OSError):  # a link to itself: listed below if it is called like an image
        if entry.is_dir():
            level.folders.append(entry.name)
            if rules.is_caption(entry.name):
                rules.sort_in(level, entry.name)  # its image is skipped, with the reason, and not without a caption
            return
    # A link counts as caption or mask if it leads somewhere, as for `os.path.exists`.
    counts_anyway = is_image(entry.name) and not rules.is_mask(entry.name)
    if counts_anyway or not entry.is_symlink() or os.path.exists(entry.path):  # noqa: PTH110
        rules.sort_in(level, entry.name)


def _cloud_levels(root: str, rules: _Rules) -> Iterator[_Level]:
    """The next folders are listed while one is worked on: each listing waits for the network."""

    def look(folder: str) -> _Level:
        level = _Level(folder)
        folders, files = storage.list_level(folder)
        level.folders = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.name.startswith(".") and rules.sort_in(level, file.name):
                level.stamps[file.name] = stamp_of(file)
        return level

    yield from _walk_ahead(root, look)


def _walk_ahead(root: str, look: Callable[[str], _Level]) -> Iterator[_Level]:
    pending: deque[str] = deque([root])
    begun: dict[str, Future[_Level]] = {}
    with ThreadPoolExecutor(_AHEAD) as threads:
        try:
            while pending:
                for _, folder in zip(range(_AHEAD), pending, strict=False):
                    if folder not in begun:
                        begun[folder] = threads.submit(look, folder)
                level = begun.pop(pending.popleft()).result()
                pending.extendleft(storage.join(level.folder, name) for name in sorted(level.folders, reverse=True))
                yield level
        finally:
            for future in begun.values():
                future.cancel()
