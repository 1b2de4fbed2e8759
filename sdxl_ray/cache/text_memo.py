"""Caption files and headers of tar files in cloud storage, so that a second run over unchanged ones only lists them.

Remembered by (address, stamp). As with memo.py, nothing depends on it: a damaged one is as good as none, and of two
jobs that write one at once the later wins. Files of this machine are read again each time, which takes no longer.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_ray.cache.tables import find_rows, fixed_bytes, fixed_column, gather
from sdxl_ray.storage import Folder, open_arrow

FILE_NAME = "texts.parquet"
_VERSION = {b"sdxl_ray.texts": b"1"}  # another one when what is remembered means something else
_ADDRESS_BYTES, _ID_BYTES = 16, 24  # of a digest of the address, and of it with one of the stamp behind
_SCHEMA = pa.schema([("identity", pa.binary(_ID_BYTES)), ("text", pa.binary())], metadata=_VERSION)
_ROWS_AT_ONCE = 500  # the headers of a tar file are one row
_NEW_BYTES = 128 * 2**20  # in memory, before they are written


class TextMemo:
    """The memo of a cache folder. It is read when it is first asked. Safe to share between threads.

    Texts are compressed; those on disk lie in a memory-mapped file where they are many.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._table: pa.Table | None = None
        self._identities = np.empty(0, f"S{_ID_BYTES}")
        self._order = np.empty(0, np.int64)  # that sorts them
        self._new: dict[bytes, bytes] = {}  # identity -> compressed text
        self._new_bytes = 0
        self._lock = threading.RLock()

    def find(self, files: Sequence[tuple[str, str]]) -> dict[str, str]:
        """Address -> text of those files, given as (address, stamp), that are known and have not changed."""
        if not files:
            return {}
        keys = [_identity(*file) for file in files]
        with self._lock:
            table = self._read()
            found = {at: self._new[key] for at, key in enumerate(keys) if key in self._new}
            rows = find_rows(self._identities, np.frombuffer(b"".join(keys), f"S{_ID_BYTES}"), self._order)
            hits = np.flatnonzero(rows >= 0)
            found |= zip(hits.tolist(), _take(table.column("text"), rows[hits]), strict=True)
        return {files[at][0]: zlib.decompress(text).decode() for at, text in found.items()}

    def add(self, files: Sequence[tuple[str, str]], texts: Sequence[str]) -> None:
        """Remember the texts of files, given as (address, stamp).

        Raises:
            StorageError: see `write`; many are written before the end.
        """
        for file, text in zip(files, texts, strict=True):
            compressed = zlib.compress(text.encode(), 1)
            with self._lock:
                self._new[_identity(*file)] = compressed
                self._new_bytes += len(compressed) + 200
                if self._new_bytes > _NEW_BYTES:
                    self.write()

    def write(self) -> None:
        """Replace the file in one move, if there is anything new. What was known of changed files is left out.

        Raises:
            StorageError: the disk is full or read-only, or the bucket refuses.
        """
        with self._lock:
            if not self._new:
                return
            identities = np.frombuffer(b"".join(self._new), f"S{_ID_BYTES}")
            new = pa.table([_column(identities), pa.array(self._new.values(), pa.binary())], schema=_SCHEMA)
            old, changed = self._read(), _addresses(identities)

            def write(file: BinaryIO) -> None:
                with pq.ParquetWriter(file, _SCHEMA, compression="none") as writer:
                    for batch in old.to_batches():
                        known = _addresses(fixed_bytes(batch.column("identity"), _ID_BYTES))
                        kept = batch.filter(pa.array(~np.isin(known, changed)))
                        if len(kept):
                            writer.write_batch(kept)
                    writer.write_table(new, row_group_size=_ROWS_AT_ONCE)

            cure = "Free some space; nothing encoded is lost."
            self.folder.write_by(FILE_NAME, write, doing="writing the list of texts in cloud storage", cure=cure)
            self._new, self._new_bytes, self._table = {}, 0, None

    def _read(self) -> pa.Table:
        if self._table is None:
            self._table = _read_file(self.folder)
            self._identities = fixed_column(self._table.column("identity"), _ID_BYTES)
            self._order = np.argsort(self._identities, kind="stable")
        return self._table


def _read_file(folder: Folder) -> pa.Table:
    if not folder.exists(FILE_NAME):
        return _SCHEMA.empty_table()
    try:
        with open_arrow(f"{folder.path}/{FILE_NAME}") as source, pq.ParquetFile(source) as file:
            if not _VERSION.items() <= (file.schema_arrow.metadata or {}).items():
                return _SCHEMA.empty_table()
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=_SCHEMA.names)
            return gather((pa.Table.from_batches([batch]).cast(_SCHEMA) for batch in batches), _SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{folder.path}/{FILE_NAME}: {reason}; what is in cloud storage is read again", stacklevel=2)
        return _SCHEMA.empty_table()


def _identity(address: str, stamp: str) -> bytes:
    return (
        hashlib.blake2b(address.encode(), digest_size=_ADDRESS_BYTES).digest()
        + hashlib.blake2b(stamp.encode(), digest_size=_ID_BYTES - _ADDRESS_BYTES).digest()
    )


def _column(identities: np.ndarray) -> pa.Array:
    """From the bytes themselves: as Python objects they would lose zeros at their ends."""
    kind = pa.binary(_ID_BYTES)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(identities), [None, pa.py_buffer(identities.tobytes())])


def _addresses(identities: np.ndarray) -> np.ndarray:
    """The part that tells of the address."""
    parts = np.ascontiguousarray(identities).view(np.uint8).reshape(-1, _ID_BYTES)[:, :_ADDRESS_BYTES]
    return np.ascontiguousarray(parts).view(f"S{_ADDRESS_BYTES}").reshape(-1)


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> list[bytes]:
    """Values of these rows, piece by piece: `column.take` would first copy all of them."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    pieces = np.searchsorted(ends, rows, side="right")
    found = np.empty(len(rows), object)
    for piece in np.unique(pieces):
        here = np.flatnonzero(pieces == piece)
        chunk = column.chunk(int(piece))
        found[here] = chunk.take(pa.array(rows[here] - (ends[piece] - len(chunk)))).to_pylist()
    return list(found)
