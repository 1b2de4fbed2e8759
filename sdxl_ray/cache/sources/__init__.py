"""Where images come from: folders, tar files, tables, Hugging Face; on disks, in cloud storage, behind URLs.

list_dataset(section)   every image of a dataset, unopened: layouts.py and splits.py tell what its path holds, then
                        folder.py, webdataset.py or tables.py (with table_rows.py) lists it
read_bytes(address)     the bytes of one of them: address.py, with rows.py and web.py
shown_address(address)  how it is printed
as_shares(focus_yx, hw) a point of interest, once the image's size is known
"""

from __future__ import annotations

import hashlib
import heapq
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.address import read_bytes, read_start
from sdxl_ray.cache.sources.address import shown as shown_address
from sdxl_ray.cache.sources.files import IMAGE_SUFFIXES, is_image, names_below, setting_of
from sdxl_ray.cache.sources.folder import list_entries, list_folder
from sdxl_ray.cache.sources.layouts import Layout, find_layout
from sdxl_ray.cache.sources.tables import addresses_in, list_tables
from sdxl_ray.cache.sources.values import as_shares
from sdxl_ray.cache.sources.webdataset import list_tars
from sdxl_ray.errors import DatasetError

if TYPE_CHECKING:
    from sdxl_ray.cache.text_memo import TextMemo
    from sdxl_ray.config.schema import DatasetSection
    from sdxl_ray.records import Listed

__all__ = ["IMAGE_SUFFIXES", "as_shares", "list_dataset", "read_bytes", "read_start", "shown_address"]


def list_dataset(section: DatasetSection, memo: TextMemo | None = None) -> Iterator[Listed]:
    """Every image of a dataset, each time in the same order: folder by folder, file by file, each sorted by name.

    Nothing is opened but tables and the headers of tar files, and no more is held in memory than one folder, a few tar
    files or a piece of a table; with `max_samples`, as many images as that.

    Args:
        memo: what earlier runs have read of tar files in cloud storage.

    Raises:
        DatasetError: nothing is there, or what is there cannot be used.
        ConfigError: an address that can never work.
        StorageError: a store refuses or cannot be reached.
    """
    try:
        yield from _list(section.model_copy(update={"path": storage.normalized(section.path)}), memo)
    except OSError as error:
        raise DatasetError(
            f"{setting_of(section)}: {error.filename or section.path} cannot be read: {error.strerror or error}."
        ) from error


def _list(section: DatasetSection, memo: TextMemo | None) -> Iterator[Listed]:
    layout = find_layout(section)
    if layout.kind == "webdataset":
        listed = list_tars(section, layout.files, memo)
    elif layout.kind == "table":
        listed = list_tables(section, layout.files, layout.within)
        if layout.for_all:
            listed = _with_note_of_others(listed, section, layout)
    elif layout.entries is not None:
        listed = list_entries(section, layout.root, layout.entries)
    else:
        listed = list_folder(section, layout.root)
    if section.max_samples:
        listed = _choose(listed, section.max_samples, layout.root)
    yield from listed


def _with_note_of_others(listed: Iterator[Listed], section: DatasetSection, layout: Layout) -> Iterator[Listed]:
    """The same; and a warning at the end, where images of the folder are not in its table, not even as masks."""
    named: set[int] = set()  # hashes: of a million names 60 MB
    for image in listed:
        named.update(hash(os.path.normpath(path)) for path in (image.path, image.mask_file) if path)
        yield image
    paths = (storage.join(layout.root, name) for name in names_below(layout.root) if is_image(name))
    others = Counter(of for path in paths if (of := hash(os.path.normpath(path))) not in named)
    if others and section.mask != "file":  # so far nobody has looked for masks
        for address in addresses_in(section.mask_column, section, layout.files, layout.within):
            others.pop(hash(os.path.normpath(address)), None)
    num_others = others.total()
    if num_others:
        warnings.warn(
            f"{num_others} images in {layout.root} are not in {layout.files[0][0]} and are left out", stacklevel=2
        )


def _choose(listed: Iterator[Listed], max_samples: int, root: str) -> Iterator[Listed]:
    """The images whose paths below `root` have the smallest hashes: the same ones wherever the dataset lies."""
    prefix = root.rstrip("/") + "/"
    chosen: list[tuple[int, int, Listed]] = []  # a heap with the largest hash first
    for number, image in enumerate(listed):
        digest = hashlib.sha256(image.path.removeprefix(prefix).encode("utf-8", "surrogateescape")).digest()
        item = (-int.from_bytes(digest, "big"), -number, image)
        if len(chosen) < max_samples:
            heapq.heappush(chosen, item)
        else:
            heapq.heappushpop(chosen, item)
    for _, _, image in sorted(chosen, key=lambda item: -item[1]):  # in the order of the listing
        yield image
