"""Where images come from: folders, tar files, tables, Hugging Face; on disks, in buckets, behind URLs.

list_dataset(section)   every image of a dataset, unopened: layouts.py and splits.py tell what its path holds, then
                        folder.py, webdataset.py or tables.py lists it
read_bytes(address)     the bytes of one of them: address.py, with rows.py and web.py
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.address import read_bytes, read_start
from sdxl_ray.cache.sources.files import IMAGE_SUFFIXES, setting_of
from sdxl_ray.cache.sources.folder import list_entries, list_folder
from sdxl_ray.cache.sources.layouts import find_layout
from sdxl_ray.cache.sources.tables import list_tables
from sdxl_ray.cache.sources.webdataset import list_tars
from sdxl_ray.errors import DatasetError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection
    from sdxl_ray.records import Listed

__all__ = ["IMAGE_SUFFIXES", "list_dataset", "read_bytes", "read_start"]


def list_dataset(section: DatasetSection) -> Iterator[Listed]:
    """Every image of a dataset, each time in the same order: folder by folder, file by file, each sorted by name.

    Nothing is opened but tables and the headers of tar files, and no more is held in memory than one folder, a few tar
    files or a piece of a table; with `max_samples`, as many images as that.

    Raises:
        DatasetError: nothing is there, or what is there cannot be used.
        ConfigError: an address that can never work.
        StorageError: a store refuses or cannot be reached.
    """
    try:
        yield from _list(section.model_copy(update={"path": storage.normalized(section.path)}))
    except OSError as error:
        raise DatasetError(
            f"{setting_of(section)}: {error.filename or section.path} cannot be read: {error.strerror or error}."
        ) from error


def _list(section: DatasetSection) -> Iterator[Listed]:
    layout = find_layout(section)
    if layout.kind == "webdataset":
        listed = list_tars(section, layout.files)
    elif layout.kind == "table":
        listed = list_tables(section, layout.files, layout.within)
    elif layout.entries is not None:
        listed = list_entries(section, layout.root, layout.entries)
    else:
        listed = list_folder(section, layout.root)
    if section.max_samples:
        listed = _choose(listed, section.max_samples, layout.root)
    yield from listed


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
