"""Caption files and headers of tar files in buckets, so that a second run over unchanged ones only lists them.

Remembered by (address, stamp). As with memo.py, nothing depends on it: a damaged one is as good as none, and of two
jobs that write one at once the later wins. Files of this machine are read again each time, which takes no longer.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_ray.cache.tables import PIECE, fixed_column, gather
from sdxl_ray.storage import Folder, open_arrow

FILE_NAME = "texts.parquet"
_ID_BYTES = 16
_SCHEMA = pa.schema([("identity", pa.binary(_ID_BYTES)), ("text", pa.string())])


class TextMemo:
    """The memo of a cache folder. It is read when it is first asked. Safe to share between threads."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._table: pa.Table | None = None
        self._identities = np.empty(0, f"S{_ID_BYTES}")
        self._order = np.empty(0, np.int64)  # that sorts them
        self._new: list[pa.Table] = []
        self._lock = threading.Lock()

    def find(self, files: Sequence[tuple[str, str]]) -> dict[str, str]:
        """Address -> text of those files, given as (address, stamp), that are known and have not changed."""
        if not files:
            return {}
        table = self._read()
        if not len(table):
            return {}
        wanted = _identities(files)
        places = np.minimum(np.searchsorted(self._identities, wanted, sorter=self._order), len(self._identities) - 1)
        rows = self._order[places]
        hits = np.flatnonzero(self._identities[rows] == wanted)
        texts = _take(table.column("text"), rows[hits])
        return {files[at][0]: text for at, text in zip(hits.tolist(), texts, strict=True)}

    def add(self, files: Sequence[tuple[str, str]], texts: Sequence[str]) -> None:
        """Remember the texts of files, given as (address, stamp)."""
        if files:
            identities = pa.array(_identities(files).tolist(), pa.binary(_ID_BYTES))
            self._new.append(pa.table([identities, pa.array(texts, pa.string())], schema=_SCHEMA))

    def write(self) -> None:
        """Replace the file in one move, if there is anything new.

        Raises:
            StorageError: the disk is full or read-only, or the bucket refuses.
        """
        if not self._new:
            return
        pieces = [self._read(), *self._new]

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
                for piece in pieces:
                    writer.write_table(piece, row_group_size=PIECE)

        cure = "Free some space; nothing encoded is lost."
        self.folder.write_by(FILE_NAME, write, doing="writing the list of texts in buckets", cure=cure)
        self._new = []

    def _read(self) -> pa.Table:
        with self._lock:
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
            batches = file.iter_batches(PIECE, columns=_SCHEMA.names)
            return gather((pa.Table.from_batches([batch]).cast(_SCHEMA) for batch in batches), _SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{folder.path}/{FILE_NAME}: {reason}; what is in buckets is read again", stacklevel=2)
        return _SCHEMA.empty_table()


def _identities(files: Sequence[tuple[str, str]]) -> np.ndarray:
    names = (f"{address}\0{stamp}" for address, stamp in files)
    digests = (hashlib.blake2b(name.encode(), digest_size=_ID_BYTES).digest() for name in names)
    return np.frombuffer(b"".join(digests), f"S{_ID_BYTES}")


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> list[str]:
    """Values of these rows, piece by piece: `column.take` would first copy all of them."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    pieces = np.searchsorted(ends, rows, side="right")
    found = np.empty(len(rows), object)
    for piece in np.unique(pieces):
        here = np.flatnonzero(pieces == piece)
        chunk = column.chunk(int(piece))
        found[here] = chunk.take(pa.array(rows[here] - (ends[piece] - len(chunk)))).to_pylist()
    return list(found)
