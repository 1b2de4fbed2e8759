"""Rows of tables, in pieces.

Of Parquet and Arrow only the columns that are needed are read: the images' bytes stay where they are.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdxl_ray import storage
from sdxl_ray.cache.sources.rows import ArrowTable, warn_of_large_groups
from sdxl_ray.cache.sources.values import json_value
from sdxl_ray.errors import DatasetError, SdxlRayError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_ROWS = 8192  # read at once
_MASKS = 64  # the same, where their bytes are read
_LFS_POINTER = b"version https://git-lfs"
_MAX_CELL = 2**24  # characters; the csv module stops at 131072, where a row has lost its closing quote or is long


@dataclass(frozen=True)
class Columns:
    """Which columns to read. `bytes_in`: those whose cells hold the image itself, or {bytes, path}; of such a mask the
    rows have {path}, and None where there is no mask.
    """

    image: str
    mask: str
    wanted: tuple[str, ...]
    names: tuple[str, ...]  # of all columns
    bytes_in: frozenset[str] = frozenset()


Piece = tuple[Columns, int, list[dict[str, Any]]]  # (columns, number of the first row, rows)


def read_pieces(section: DatasetSection, path: str) -> Iterator[Piece]:
    """The rows of one table, in order. Cells that hold an image's bytes are left out.

    Raises:
        DatasetError: the table is damaged, or has no column for the image.
        StorageError: a store refuses.
    """
    kind = _kind(path)
    if kind == "csv":
        yield from _in_pieces(section, path, _csv_rows(section, path))
    elif kind == "json":
        yield from _in_pieces(section, path, _json_rows(path))
    else:
        with _arrow_errors(path):
            yield from _each_read(path, _parquet(section, path) if kind == "parquet" else _arrow(section, path))


def _kind(path: str) -> str:
    suffix = path.rpartition(".")[2].lower()
    return {"tsv": "csv", "jsonl": "json", "ndjson": "json"}.get(suffix, suffix)


def _each_read(path: str, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same, with `storage.reading_errors` around each piece alone: what is done with it in between takes long."""
    while True:
        with storage.reading_errors(path):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def names_in(section: DatasetSection, path: str) -> Iterator[Iterable[str]]:
    """The columns of a table; of JSON lines those of each row."""
    kind = _kind(path)
    if kind == "csv":
        yield _header(section, path, next(_csv_lines(path), (0, []))[1])
    elif kind == "json":
        yield from _json_rows(path)
    else:
        with _arrow_errors(path):
            yield _schema(path).names


def names_of_columns(path: str) -> tuple[str, ...]:
    """The columns of what may be a table, of JSON lines those of the first row; none where it cannot be read as one."""
    kind = _kind(path)
    with contextlib.suppress(SdxlRayError, OSError):
        if kind == "csv":
            return tuple(name.strip() for name in next(_csv_lines(path), (0, []))[1])
        if kind == "json":
            return tuple(next(_json_rows(path), {}))
        with _arrow_errors(path):
            return tuple(_schema(path).names)
    return ()


@contextlib.contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        hint = "Copy or download it again, or take it out."
        if storage.read_bytes(path, 0, len(_LFS_POINTER)) == _LFS_POINTER:
            hint = "It is only a note of Git LFS; fetch the files with `git lfs pull`."
        raise DatasetError(f"{path} is no whole {_kind(path).capitalize()} file: {error}. {hint}") from None


def _schema(path: str) -> Any:
    import pyarrow.parquet as pq

    with storage.reading_errors(path):
        if _kind(path) != "parquet":
            return ArrowTable(path).schema
        with storage.open_arrow(path) as source:
            return pq.read_schema(source)


def _parquet(section: DatasetSection, path: str) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    with storage.open_arrow(path) as source:
        file = pq.ParquetFile(source)
        columns = _columns_of_schema(section, path, file.schema_arrow)
        for name in columns.bytes_in:
            warn_of_large_groups(path, file.metadata, name)
        has_mask = _filled(file, columns.mask) if columns.mask in columns.bytes_in else None
        start = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=_leaves(columns, file.schema_arrow)):
            rows = batch.to_pylist()
            if has_mask is not None:
                _note_masks(rows, columns.mask, itertools.islice(has_mask, batch.num_rows))
            yield columns, start, rows
            start += batch.num_rows


def _filled(file: Any, column: str) -> Iterator[bool]:
    """Whether each row of a Parquet file has bytes in this column: from its statistics where all rows of a group have
    them or none has, else by reading a few at a time.
    """
    kind = file.schema_arrow.field(column).type
    leaf = column if _is_bytes(kind) else f"{column}.bytes"
    number_of_leaf = next(at for at in range(len(file.schema)) if file.schema.column(at).path == leaf)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        statistics = group.column(number_of_leaf).statistics
        num_nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if num_nulls in (0, group.num_rows):
            yield from itertools.repeat(num_nulls == 0, group.num_rows)
            continue
        for batch in file.iter_batches(batch_size=_MASKS, row_groups=[number], columns=[leaf]):
            yield from _with_bytes(batch.column(0))


def _with_bytes(column: Any) -> list[bool]:
    """Whether each cell of a column of bytes, or of {bytes, path}, has bytes."""
    import pyarrow.compute as pc

    inner = column if _is_bytes(column.type) else pc.struct_field(column, "bytes")
    return inner.is_valid().to_pylist()


def _note_masks(rows: list[dict[str, Any]], column: str, has_bytes: Iterable[bool]) -> None:
    """None in place of a mask that is not there."""
    for row, is_there in zip(rows, has_bytes, strict=True):
        path = (row.get(column) or {}).get("path")
        row[column] = {"path": path} if is_there or path else None


def _arrow(section: DatasetSection, path: str) -> Iterator[Piece]:
    table = ArrowTable(path)
    columns = _columns_of_schema(section, path, table.schema)
    names = [name for name in _leaves(columns, table.schema) if "." not in name or name in table.names]
    paths = [name for name in columns.bytes_in if f"{name}.path" in _leaves(columns, table.schema)]
    for number, start in enumerate(table.starts[:-1]):
        batch = table.batch(number)
        rows = batch.select(names).to_pylist()
        for name in paths:  # without the bytes beside them
            column = batch.column(name)
            shown = zip(column.is_valid().to_pylist(), column.field("path").to_pylist(), strict=True)
            rows = [
                row | {name: {"path": text} if valid else None} for row, (valid, text) in zip(rows, shown, strict=True)
            ]
        if columns.mask in columns.bytes_in:
            _note_masks(rows, columns.mask, _with_bytes(batch.column(columns.mask)))
        yield columns, start, rows


def _columns_of_schema(section: DatasetSection, path: str, schema: Any) -> Columns:
    import pyarrow as pa

    columns = _choose(section, path, schema.names)
    bytes_in = set()
    for name in filter(None, (columns.image, columns.mask)):
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if _is_bytes(kind) or (pa.types.is_struct(kind) and "bytes" in kind.names):
            bytes_in.add(name)
        elif not any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
            raise DatasetError(
                f'{path}: the column "{name}" is {kind}, expected bytes, a path or URL, or {{bytes, path}} as Hugging '
                "Face has it. Set dataset.image_column or dataset.mask_column."
            )
    return replace(columns, bytes_in=frozenset(bytes_in))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _leaves(columns: Columns, schema: Any) -> list[str]:
    """The columns to read, with "image.path" in place of an image's {bytes, path}, and its bytes left out."""
    import pyarrow as pa

    names = []
    for name in columns.wanted:
        kind = schema.field(name).type
        if name not in columns.bytes_in:
            names.append(name)
        elif pa.types.is_struct(kind) and "path" in kind.names:
            names.append(f"{name}.path")
    return names


def _choose(section: DatasetSection, path: str, names: Sequence[str]) -> Columns:
    image = section.image_column
    if image not in names and "file_name" in names:  # what Hugging Face's folders of images call it
        image = "file_name"
    if image not in names:
        raise DatasetError(
            f'{path} has no column "{image}" for the image. It has {", ".join(names) or "none"}. '
            "Set dataset.image_column to one of these."
        )
    mask = section.mask_column if section.mask == "file" and section.mask_column in names else ""
    others = (*section.caption_columns, *section.size_columns, *section.focus_columns)
    wanted = dict.fromkeys([image, *([mask] if mask else []), *(name for name in others if name in names)])
    return Columns(image, mask, tuple(wanted), tuple(names))


# ---- text ------------------------------------------------------------------------------------------------------------


def _in_pieces(section: DatasetSection, path: str, rows: Iterator[dict[str, Any]]) -> Iterator[Piece]:
    names: dict[str, None] = {}
    start = 0
    while piece := list(itertools.islice(rows, _ROWS)):
        # JSON's rows need not have the same columns, and a column may come first late in the file.
        names.update(dict.fromkeys(name for row in piece for name in row))
        yield _choose(section, path, list(names)), start, piece
        start += len(piece)


def _csv_rows(section: DatasetSection, path: str) -> Iterator[dict[str, Any]]:
    lines = _csv_lines(path)
    names = _header(section, path, next(lines, (0, []))[1])  # also where no row follows
    for number, row in lines:
        if len(row) != len(names) and row:
            raise DatasetError(
                f"{path}: line {number} has {len(row)} columns, the first line {len(names)}. "
                "Put texts with commas or line breaks in double quotes."
            )
        if row:
            yield dict(zip(names, row, strict=True))


def _header(section: DatasetSection, path: str, cells: Sequence[str]) -> list[str]:
    """The names of a text table's columns.

    Raises:
        DatasetError: two have one name, the lines are separated by another sign, or there is no column for the image.
    """
    names = [name.strip() for name in cells]
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        raise DatasetError(
            f'{path}: its first line has "{repeated[0]}" more than once. Give each column a name of its own.'
        )
    used, expected = ("\t", "tabs") if path.lower().endswith(".tsv") else (",", "commas")
    other = next((sign for sign in ";\t|," if sign != used and len(names) == 1 and sign in names[0]), "")
    if other:
        shown = "tabs" if other == "\t" else f'"{other}"'
        raise DatasetError(f"{path}: its columns seem to be separated by {shown}. Save it with {expected}.")
    if names:
        _choose(section, path, names)
    return names


def _csv_lines(path: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells) of each, the first with the names of the columns."""
    csv.field_size_limit(_MAX_CELL)
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with io.TextIOWrapper(storage.open_buffered(path), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise DatasetError(f"{path}: line {rows.line_num}: {error}. Correct it, or take it out.") from None
        except UnicodeDecodeError as error:
            raise DatasetError(_not_utf8(path, rows.line_num + 1, error)) from None


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    with storage.open_buffered(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json_value(line)
            except UnicodeDecodeError as error:
                raise DatasetError(_not_utf8(path, number, error)) from None
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{path}: line {number} is no JSON: {error}. Correct it, or take it out.") from None
            if not isinstance(row, dict):
                raise DatasetError(f'{path}: line {number} is no JSON object, expected {{"image": ..., "text": ...}}.')
            yield row


def _not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    return f"{path}: near line {line}: not UTF-8, byte 0x{error.object[error.start]:02x}. Save it as UTF-8."
