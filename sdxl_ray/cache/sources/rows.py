"""Single values of Parquet and Arrow files, without reading the whole file.

The smallest piece of a table that can be read is one column of a row group (Parquet) or one record batch (Arrow). The
pieces read last stay in memory, up to 256 MiB in a process, so that neighbouring rows cost one read.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol

from sdxl_ray import storage
from sdxl_ray.errors import ConfigError

MAX_BYTES = 256 * 2**20
_MAX_OPEN = 32  # tables; each keeps an open file and its footer
_IPC_MARK = b"ARROW1\0\0"


class _Table(Protocol):
    """A table in pieces of consecutive rows."""

    starts: list[int]  # the first row of each piece, and at the end the number of rows
    names: list[str]

    def piece(self, number: int, column: str) -> Any:
        """The column of a piece, as a pyarrow array."""

    def piece_bytes(self, number: int, column: str) -> int:
        """How large this is, about, told without reading it."""


class _ParquetTable:
    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(storage.open_arrow(path))
        metadata = self._file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.starts = list(itertools.accumulate(groups, initial=0))
        self._metadata = metadata
        self.names = self._file.schema_arrow.names
        self._lock = threading.Lock()  # pyarrow's reader serves one thread at a time

    def piece(self, number: int, column: str) -> Any:
        with self._lock:
            return self._file.read_row_group(number, columns=[column]).column(column)

    def piece_bytes(self, number: int, column: str) -> int:
        return group_bytes(self._metadata, number, column)


def warn_of_large_groups(path: str, metadata: Any, column: str) -> None:
    """Say so where a Parquet file's images can only be had many at a time."""
    size = max((group_bytes(metadata, number, column) for number in range(metadata.num_row_groups)), default=0)
    if size > MAX_BYTES:
        warnings.warn(
            f'{path}: up to {size / 2**20:,.0f} MiB of its column "{column}" are read for one image, which is slow '
            "where images come in random order. Rewrite it with smaller row groups: "
            "pyarrow.parquet.write_table(..., row_group_size=256)",
            stacklevel=2,
        )


def group_bytes(metadata: Any, number: int, column: str) -> int:
    """How large a column of a row group of a Parquet file is in memory, about."""
    group = metadata.row_group(number)
    chunks = [group.column(at) for at in range(group.num_columns)]
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
    )


class ArrowTable:
    """An Arrow file, with or without a footer, as `save_to_disk` of Hugging Face writes it.

    Its messages are walked by their headers. A local file is mapped, so that only what is looked at is read. For one
    thread at a time.

    Raises:
        pyarrow.ArrowInvalid: it is none, or damaged.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        local = storage.local_path(path)
        self._mapped = local is not None
        if local is not None:
            storage.open_local(local).close()  # refuses a pipe, for whose writer a mapping would wait
        self._file = pa.memory_map(os.fspath(local)) if local is not None else storage.open_arrow(path)
        self._size = self._file.size()
        start = self._file.read_at(min(8, self._size), 0)
        self.starts, self._batches = [0], []
        self.schema: Any = None
        for kind, num_rows, at, length in self._messages(8 if bytes(start) == _IPC_MARK else 0):
            if kind == _SCHEMA:
                self.schema = pa.ipc.read_schema(pa.ipc.read_message(self._file.read_at(length, at)))
            elif kind == _RECORD_BATCH:
                self.starts.append(self.starts[-1] + num_rows)
                self._batches.append((at, length))
            elif kind == _DICTIONARY:
                raise pa.ArrowInvalid("columns that are dictionaries (pandas: categories) are read from Parquet only")
        if self.schema is None:
            raise pa.ArrowInvalid("no Arrow schema at its start")
        self.names = self.schema.names

    def _messages(self, at: int) -> Iterator[tuple[int, int, int, int]]:
        """(kind, number of rows, offset, length) of each: arrow.apache.org/docs/format/Columnar.html, IPC."""
        import pyarrow as pa

        while at + 8 <= self._size:
            mark, size = struct.unpack("<Ii", self._file.read_at(8, at))
            if mark != 0xFFFFFFFF:
                raise pa.ArrowInvalid(f"no Arrow message at byte {at}")
            if size == 0:  # the end of the stream
                return
            try:
                kind, num_rows, body = _read_header(bytes(self._file.read_at(size, at + 8)))
            except struct.error:
                raise pa.ArrowInvalid(f"damaged Arrow message at byte {at}") from None
            length = 8 + size + body
            if at + length > self._size:
                raise pa.ArrowInvalid(f"ends at byte {self._size}, in the middle of a message that starts at {at}")
            yield kind, num_rows, at, length
            at += length

    def batch(self, number: int) -> Any:
        """A record batch with all columns."""
        import pyarrow as pa

        at, length = self._batches[number]
        self._file.seek(at)
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._file.read_buffer(length)), self.schema)

    def piece(self, number: int, column: str) -> Any:
        return self.batch(number).column(column)

    def piece_bytes(self, number: int, column: str) -> int:
        return 0 if self._mapped else self._batches[number][1]  # all columns come along


_SCHEMA, _DICTIONARY, _RECORD_BATCH = 1, 2, 3


def _read_header(message: bytes) -> tuple[int, int, int]:
    """(kind, number of rows, length of the body) from a message's flatbuffer (Message.fbs of Apache Arrow).

    pyarrow reads the body along with the header, which may be hundreds of megabytes of images.
    """

    def field(table: int, number: int) -> int:
        """Where a field of a flatbuffer's table lies; 0 where it has its default."""
        virtual = table - int(struct.unpack_from("<i", message, table)[0])
        (virtual_size,) = struct.unpack_from("<H", message, virtual)
        place = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", message, virtual + place) if place < virtual_size else (0,)
        return table + offset if offset else 0

    def number_at(place: int, kind: str) -> int:
        return int(struct.unpack_from(kind, message, place)[0]) if place else 0

    (root,) = struct.unpack_from("<I", message, 0)
    kind, header, body = number_at(field(root, 1), "<B"), field(root, 2), number_at(field(root, 3), "<q")
    table = header + number_at(header, "<I")
    return kind, number_at(field(table, 0), "<q") if kind == _RECORD_BATCH else 0, body


class _Cache:
    """Open tables and the pieces read last. Safe to share between threads; two that need one piece read it once."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, str], _Table] = OrderedDict()
        self._pieces: OrderedDict[tuple[str, str, int, str], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}  # of tables
        self._large = threading.Lock()  # one piece above MAX_BYTES is read at a time

    def value(self, path: str, row: int, column: str) -> Any:
        """
        Raises:
            LookupError: no such row or column.
        """
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock:
            version = _version(path)
            table = self._table(path, version)
            if not 0 <= row < table.starts[-1] or column not in table.names:
                raise LookupError
            number = bisect.bisect_right(table.starts, row) - 1
            piece = self._piece(table, (path, version, number, column))
        return piece[row - table.starts[number]].as_py()

    def _table(self, path: str, version: str) -> _Table:
        with self._lock:
            if (path, version) in self._tables:
                self._tables.move_to_end((path, version))
                return self._tables[path, version]
        table: _Table = _ParquetTable(path) if path.lower().endswith(".parquet") else ArrowTable(path)
        with self._lock:
            self._tables[path, version] = table
            if len(self._tables) > _MAX_OPEN:
                self._tables.popitem(last=False)
        return table

    def _piece(self, table: _Table, key: tuple[str, str, int, str]) -> Any:
        with self._lock:
            if key in self._pieces:
                self._pieces.move_to_end(key)
                return self._pieces[key]
        expected = table.piece_bytes(key[2], key[3])
        with self._large if expected > MAX_BYTES else contextlib.nullcontext():
            with self._lock:
                self._make_room(expected)  # before it is read: two large ones may be more than the machine has
            piece = table.piece(key[2], key[3])
            with self._lock:
                self._make_room(piece.nbytes)
                self._pieces[key] = piece  # however large
                self._bytes += piece.nbytes
        return piece

    def _make_room(self, num_bytes: int) -> None:
        while self._pieces and self._bytes + num_bytes > MAX_BYTES:
            _, gone = self._pieces.popitem(last=False)
            self._bytes -= gone.nbytes


def _version(path: str) -> str:
    """Of a local file: one that was replaced is opened anew."""
    local = storage.local_path(path)
    if local is None:
        return ""
    status = local.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


_cache = _Cache()


def read_row(container: str, row: int, column: str, within: str = "") -> bytes | str:
    """The bytes of an image in a table, or the address of the file that the row names. `within`: as for `beside`.

    Raises:
        OSError, StorageError: the table cannot be read.
        ValueError: the cell is empty, is not there, or holds no image, or names what it may not; or the table is
            damaged.
    """
    import pyarrow as pa

    where = f"row {row} (counted from 0) of {container}"
    value = None
    if container.lower().endswith((".parquet", ".arrow", ".feather")):
        try:
            with storage.reading_errors(container):
                value = _cache.value(container, row, column)
        except LookupError:
            raise ValueError(f'there is no column "{column}" in {where}') from None
        except pa.ArrowException as error:
            raise ValueError(f"{container} is damaged: {error}") from None
    if isinstance(value, dict):  # Hugging Face: {bytes, path}
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        raise ValueError(f'the column "{column}" is empty in {where}')
    if isinstance(value, str):
        return beside(container, value, within)
    if not isinstance(value, bytes):
        raise ValueError(f'the column "{column}" holds no image in {where}')
    return value


def beside(container: str, name: str, within: str = "") -> str:
    """The address of a file that a table names: as it stands where it is complete, else beside the table.

    Whoever made a table decides what is read; so one that was downloaded may not ask for files all over this machine.

    Args:
        within: the folder that files of this machine must be in, judged by their names, as the Hub's own cache is made
            of links; empty: anywhere.

    Raises:
        ValueError: the table may not name this; the text says why.
    """
    container = storage.normalized(container)
    scheme, mark, rest = name.partition("://")
    if storage.is_uri(name) and scheme.lower() in ("http", "https"):
        return scheme.lower() + mark + rest
    if storage.is_uri(name) and scheme.lower() != "file":
        try:
            storage.check_address(name)
        except ConfigError as error:
            raise ValueError(f"the table {container} names {error}") from None
        return storage.normalized(name)
    name = storage.normalized(name)
    if storage.is_uri(container):
        return _in_store(container, name)
    path = os.path.join(container.rpartition("/")[0], name.removeprefix("./"))  # noqa: PTH118  (a Path changes the name)
    if within and not is_inside(path, within):
        raise ValueError(
            f"the table {container} names {name}, which is outside of {within}. If you trust it, set dataset.path to "
            "the table itself"
        )
    return path


def is_inside(path: str, folder: str) -> bool:
    """By their names alone."""
    folder = os.path.abspath(folder)  # noqa: PTH100  (for every row)
    return f"{os.path.abspath(path)}/".startswith(folder.rstrip("/") + "/")  # noqa: PTH100


def _in_store(container: str, name: str) -> str:
    """A store knows no ".."."""
    if name.startswith("/"):
        raise ValueError(f"the table {container} names {name}, and a table in a store may not name files of a machine")
    scheme, _, rest = container.partition("://")
    parts = rest.split("/")[:-1]
    first = 3 if scheme == "hf" else 1  # datasets/org/name, or the bucket
    for part in PurePosixPath(name).parts:
        if part != "..":
            parts.append(part)
        elif len(parts) > first:
            parts.pop()
        else:
            raise ValueError(f"the table {container} names {name}, which is outside of {scheme}://{'/'.join(parts)}")
    return f"{scheme}://{'/'.join(parts)}"
