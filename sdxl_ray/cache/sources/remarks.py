"""What lies in a folder of images and is not what other programs make of it: said once, after the listing.

masks beside images         cat-mask.png is no picture, also where dataset.mask is "none"
images in a folder masks/   are pictures here
10_sks dog/                 kohya reads the number as repeats
a table                     is read where it is metadata.csv (.jsonl, .parquet) with a column file_name
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.files import printable
from sdxl_ray.cache.sources.table_rows import names_of_columns

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_REPEATS = re.compile(r"(\d{1,3})_.")  # of four digits it is a year
_MASKS = ("mask", "masks")  # folders
_NUM_OPENED = 8  # tables
_NUM_NAMED = 3
_TELLING = re.compile("file|image|img|path|url|caption|text|prompt|tag|desc", re.IGNORECASE)  # columns of images, words


class Remarks:
    """Of one dataset. `tables`: addresses of the first that seem to be of the images."""

    def __init__(self, section: DatasetSection, root: str) -> None:
        self.tables: list[str] = []
        self._section, self._root = section, root
        self._columns: dict[str, tuple[str, ...]] = {}  # of each of those
        self._num_opened = self._num_masks = 0
        self._mask = ""  # the first
        self._mask_folders: list[str] = []
        self._numbered: dict[str, int] = {}  # name of a folder -> the number

    def see(self, folder: str, num_images: int, tables: Sequence[str], masks: Sequence[str]) -> None:
        """A folder's content; `num_images` with the masks among them."""
        self._num_masks += len(masks)
        if masks and not self._mask:
            self._mask = printable(storage.join(folder, masks[0]))
        name = folder.rstrip("/").rpartition("/")[2]
        if num_images and folder != self._root:
            number = _REPEATS.match(name)
            if number:
                self._numbered[printable(name)] = int(number[1])
            if name.lower() in _MASKS:
                self._mask_folders.append(printable(folder))
        for table in sorted(tables):
            self._see_table(storage.join(folder, table))

    def _see_table(self, path: str) -> None:
        if self._num_opened >= _NUM_OPENED:
            return
        self._num_opened += 1
        columns = names_of_columns(path)
        if any(_TELLING.search(column) for column in columns):
            self._columns[printable(path)] = columns
            self.tables = [*self._columns][:_NUM_NAMED]

    def say(self) -> None:
        """As warnings, after the last folder."""
        where = printable(self._root)
        if self._num_masks:
            warnings.warn(
                f"{where}: {self._num_masks} images such as {self._mask} are masks of others by their names, and are "
                'left out. dataset.mask = "file" uses them; if they are pictures, set another dataset.mask_suffix',
                stacklevel=2,
            )
        for folder in self._mask_folders[:_NUM_NAMED]:
            warnings.warn(
                f"the images in {folder} are trained on as pictures. If they are masks, move the folder out of "
                f"dataset.path; a mask lies beside its image, as cat{self._section.mask_suffix} beside cat.jpg",
                stacklevel=2,
            )
        if set(self._numbered.values()) - {self._section.repeats}:
            names = [*self._numbered][:_NUM_NAMED]
            more = f" and {len(self._numbered) - len(names)} more" if len(self._numbered) > len(names) else ""
            shown = ", ".join(f'"{name}"' for name in names)
            warnings.warn(
                f"{where} has folders {shown}{more}: the number is not read as repeats. For them, give each folder a "
                f"[[dataset]] of its own with dataset.repeats = {self._numbered[names[0]]} and so on",
                stacklevel=2,
            )
        if self._columns:
            warnings.warn(self._of_tables(where), stacklevel=2)

    def _of_tables(self, where: str) -> str:
        paths = [*self._columns]
        if len(paths) > 1:
            alike = len({path.rpartition("/")[2] for path in paths}) == 1
            cure = (
                'dataset.format = "table" reads all of them' if alike else "set dataset.path to the one that is meant"
            )
            return (
                f"{where} holds images and tables, such as {paths[0]}, which are not read. For their captions, {cure}"
            )
        columns = self._columns[paths[0]]
        text = (
            f"{where} holds images and a table, {paths[0]}, which is not read. For its captions, set dataset.path to it"
        )
        if self._section.image_column in columns or "file_name" in columns:
            return text
        shown = ", ".join(columns[:30])
        return f"{text}, and dataset.image_column to the column that names the images (it has {shown})"
