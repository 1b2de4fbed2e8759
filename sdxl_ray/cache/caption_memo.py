"""Texts of caption files in buckets, so that a second run over unchanged ones only lists them.

Remembered by (address, stamp). As with memo.py, nothing depends on it: a damaged one is as good as none, and of two
jobs that write one at once the later wins. Files of this machine are read again each time, which takes no longer.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_ray.cache.tables import PIECE, fixed_column, gather
from sdxl_ray.records import Listed
from sdxl_ray.storage import Folder, open_arrow

FILE_NAME = "captions.parquet"
_LONGEST = 10_000  # characters; longer ones are rare, and read again
_ID_BYTES = 16
_SCHEMA = pa.schema([("identity", pa.binary(_ID_BYTES)), ("text", pa.string())])


class CaptionMemo:
    """The memo of a cache folder. It is read when the first caption file of a bucket is asked for."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._table: pa.Table | None = None
        self._identities = np.empty(0, f"S{_ID_BYTES}")
        self._order = np.empty(0, np.int64)  # that sorts them
        self._new: list[pa.Table] = []

    def find(self, images: Sequence[Listed]) -> dict[str, str]:
        """Address -> text of those images' caption files that are known and have not changed."""
        stamped = [image for image in images if image.text_stamp]
        if not stamped:
            return {}
        table = self._read()
        if not len(table):
            return {}
        wanted = _identities(stamped)
        places = np.minimum(np.searchsorted(self._identities, wanted, sorter=self._order), len(self._identities) - 1)
        rows = self._order[places]
        hits = np.flatnonzero(self._identities[rows] == wanted)
        texts = _take(table.column("text"), rows[hits])
        return {stamped[at].text_file: text for at, text in zip(hits.tolist(), texts, strict=True)}

    def add(self, images: Iterable[Listed], texts: Mapping[str, str]) -> None:
        """Remember `texts`, by address, as far as they are of files with a stamp."""
        new = [
            image
            for image in images
            if image.text_stamp and len(texts.get(image.text_file, "x" * (_LONGEST + 1))) <= _LONGEST
        ]
        if new:
            identities = pa.array(_identities(new).tolist(), pa.binary(_ID_BYTES))
            self._new.append(pa.table([identities, [texts[image.text_file] for image in new]], schema=_SCHEMA))

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
        self.folder.write_by(FILE_NAME, write, doing="writing the list of captions", cure=cure)
        self._new = []

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
            batches = file.iter_batches(PIECE, columns=_SCHEMA.names)
            return gather((pa.Table.from_batches([batch]).cast(_SCHEMA) for batch in batches), _SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{folder.path}/{FILE_NAME}: {reason}; the captions are read again", stacklevel=2)
        return _SCHEMA.empty_table()


def _identities(images: Sequence[Listed]) -> np.ndarray:
    names = (f"{image.text_file}\0{image.text_stamp}" for image in images)
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
