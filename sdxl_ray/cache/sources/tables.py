"""Tables with an image, or the name of one, in each row: Parquet, Arrow, CSV, TSV, JSON lines."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_ray import storage
from sdxl_ray.cache.sources.address import is_in_table, refused_address, row_address, row_name
from sdxl_ray.cache.sources.columns import AskedFor
from sdxl_ray.cache.sources.files import setting_of, stamp_of
from sdxl_ray.cache.sources.rows import beside
from sdxl_ray.cache.sources.stamps import Stamps
from sdxl_ray.cache.sources.table_rows import Columns, names_in, read_pieces
from sdxl_ray.cache.sources.values import focus_of, size_of, texts_of
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection


def list_tables(section: DatasetSection, files: Sequence[tuple[str, FileEntry]], within: str = "") -> Iterator[Listed]:
    """Every row of these tables, given as (path, entry), in order.

    A row whose image is a null is listed too, and one that names what it may not; reading it says so.

    Args:
        within: the folder that files of this machine must be in which the tables name; empty: anywhere.

    Raises:
        DatasetError: a table is damaged, or has no column for the image; or there is no row, or a column that the
            settings ask for is nowhere.
        StorageError: a store refuses.
    """
    _check_columns(section, [path for path, _ in files])
    found = False
    stamps = Stamps()
    for path, entry in files:
        for listed in _list_table(section, path, entry, within, stamps):
            found = True
            yield listed
    if not found:
        raise DatasetError(f"{setting_of(section)}: no rows in {', '.join(path for path, _ in files[:3])}.")


def _list_table(section: DatasetSection, path: str, entry: FileEntry, within: str, stamps: Stamps) -> Iterator[Listed]:
    tag_separator = section.tag_separator if section.caption_lists == "tags" else ""
    for columns, start, rows in read_pieces(section, path):
        cells = _Cells(path, columns, within)
        images = [cells.address(number, columns.image, row) for number, row in enumerate(rows, start)]
        masks = [cells.mask(number, row) for number, row in enumerate(rows, start)]
        named = [address for address in (*images, *masks) if address and not is_in_table(address)]
        known = stamps.of(named)
        for number, (row, address, mask) in enumerate(zip(rows, images, masks, strict=True), start):
            original_hw = size_of(row, section.size_columns)
            in_table = is_in_table(address)
            yield Listed(
                path=_shown(path, number, row.get(columns.image)) if in_table else address,
                stamp=known.get(address) or stamp_of(entry),
                address=address if in_table else "",
                original_hw=original_hw,
                texts=texts_of(row, section.caption_columns, tag_separator),
                mask_file=mask,
                mask_stamp=(known.get(mask) or stamp_of(entry)) if mask else "",
                focus_yx=focus_of(row, section.focus_columns, original_hw),
                columns=columns.names,
            )


def addresses_in(
    column: str, section: DatasetSection, files: Sequence[tuple[str, FileEntry]], within: str = ""
) -> Iterator[str]:
    """What these tables name in one column, whatever the settings use it for; of a table without it the images.

    Raises:
        StorageError: a store refuses.
    """
    no_others: dict[str, Any] = dict.fromkeys(("caption_columns", "size_columns", "focus_columns"), ())
    alone = section.model_copy(update={"image_column": column, "mask": "none", **no_others})
    for path, _ in files:
        with contextlib.suppress(DatasetError):  # a column of that name that holds something else
            for columns, start, rows in read_pieces(alone, path):
                cells = _Cells(path, columns, within)
                yield from (cells.address(number, columns.image, row) for number, row in enumerate(rows, start))


def _check_columns(section: DatasetSection, paths: Sequence[str]) -> None:
    """Before a long listing, and as a rule by the first file alone.

    Raises:
        DatasetError: no table has a column that the settings ask for.
    """
    asked = AskedFor(section, mask_in_column=True)
    if not any(asked.see(names) for path in paths for names in itertools.chain([()], names_in(section, path))):
        asked.check(paths)


class _Cells:
    """Addresses of what a table's cells hold or name."""

    def __init__(self, path: str, columns: Columns, within: str) -> None:
        self._path, self._columns, self._within = path, columns, within
        self._levels: int | None = None  # that the dataset's folder lies above the table's
        if within and not storage.is_uri(path):
            below = os.path.relpath(os.path.dirname(path), within)  # noqa: PTH120
            self._levels = 0 if below == "." else len(below.split("/"))

    def address(self, number: int, column: str, row: Mapping[str, Any]) -> str:
        value = row.get(column)
        if column in self._columns.bytes_in or not isinstance(value, str) or not value:
            return row_address(self._path, number, column, self._levels)
        try:
            return beside(self._path, value, self._within)
        except ValueError as error:
            return refused_address(str(error))

    def mask(self, number: int, row: Mapping[str, Any]) -> str:
        column = self._columns.mask
        return "" if not column or row.get(column) in (None, "") else self.address(number, column, row)


def _shown(path: str, number: int, value: Any) -> str:
    """For people: 00.parquet/00000017, and /cat.jpg after it where the cell tells the name."""
    name = value.get("path") if isinstance(value, dict) else None
    own = f"/{os.path.basename(name)}" if isinstance(name, str) and os.path.basename(name) else ""  # noqa: PTH119
    return row_name(path, number) + own
