"""What earlier scans found, so that a second run over unchanged files only lists them.

Remembered by (path, stamp); 70 bytes for each image. A memo is never needed for correctness: a damaged one is as good
as none, and of two jobs that write one at once the later wins. With another Pillow or other plug-ins for it, what was
wrong with an image is looked at again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import time
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdxl_ray.cache import formats
from sdxl_ray.cache.scan import ScannedFile
from sdxl_ray.cache.tables import find_rows, fixed_column
from sdxl_ray.records import Listed
from sdxl_ray.storage import Folder

FILE_NAME = "scan.parquet"
_WRITE_EVERY_S = 60.0
_READERS = b"sdxl_ray.readers"  # in the file's metadata: what images were looked at with
# Problems that may have gone without a change of the file: the limit may be another, a network drive may be back, this
# machine may have the package.
_MAY_BE_OVER = ("too_large", "unreadable", "needs_package")
_SCHEMA = pa.schema(
    [
        ("identity", pa.binary(16)),
        ("image_hash", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("problem", pa.dictionary(pa.int32(), pa.string())),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
    ]
)


class Memo:
    """The memo of a cache folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._table = _read_memo(folder)  # sorted by identity
        self._new: list[pa.Table] = []  # each sorted likewise; not on disk yet
        self._written, self._write_every_s = time.monotonic(), _WRITE_EVERY_S

    def find(self, files: Sequence[Listed], by_listing: Sequence[bool], max_pixels: int) -> list[ScannedFile | None]:
        """What is known of each file; None where it has to be looked at, once or again."""
        identities = _identities(files, by_listing)
        found: list[ScannedFile | None] = [None] * len(files)
        for table in (self._table, *self._new):  # the later counts
            rows = find_rows(_column(table), identities)
            hits = np.flatnonzero(rows >= 0)
            for place, row in zip(hits.tolist(), table.take(pa.array(rows[hits])).to_pylist(), strict=True):
                file = ScannedFile(row["image_hash"].hex(), row["height"], row["width"], row["problem"], row["kind"])
                is_sure = file.height * file.width <= max_pixels and file.kind not in _MAY_BE_OVER
                found[place] = file if is_sure else None
        return found

    def add(self, files: Sequence[Listed], by_listing: Sequence[bool], scanned: Sequence[ScannedFile]) -> None:
        """Remember; on disk now and then, so that a killed scan of a large collection has not been for nothing."""
        if not files:
            return
        self._new.append(_sorted(_table(_identities(files, by_listing), scanned)))
        if time.monotonic() - self._written > self._write_every_s:
            self.write()

    def write(self) -> None:
        """Replace the file in one move, unless it says the same already: the cache may lie where nobody can write.

        Raises:
            StorageError: the disk is full or read-only.
        """
        started = time.monotonic()
        if not all(self._has(table) for table in self._new):
            table = pa.concat_tables([*reversed(self._new), self._table]).unify_dictionaries()  # the later first
            self._replace(_sorted(table))
        self._new = []
        self._written = time.monotonic()
        # That of ten million images takes half a minute to write.
        self._write_every_s = max(_WRITE_EVERY_S, 10 * (self._written - started))

    def mark(self, problems: dict[str, str]) -> None:
        """Remember what turned out to be damaged about images with these hashes: not tried again until they change.

        Args:
            problems: hash of the image (hex) -> what is wrong with it.

        Raises:
            StorageError: the list cannot be written.
        """
        hashes = _column(self._table, "image_hash", 32)
        bad = np.array([bytes.fromhex(image_hash) for image_hash in problems], "S32")
        rows = np.flatnonzero(np.isin(hashes, bad))
        taken = self._table.take(pa.array(rows))
        found = [ScannedFile(row["image_hash"].hex(), row["height"], row["width"]) for row in taken.to_pylist()]
        marked = [dataclasses.replace(file, problem=problems[file.image_hash], kind="damaged") for file in found]
        self._new.append(_table(_column(taken), marked))  # sorted, as the table is
        self.write()

    def forget(self, hashes: Iterable[str]) -> None:
        """Look again at the images with these hashes: they have changed, although size and date may be the same.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self.write()
        gone = np.array([bytes.fromhex(image_hash) for image_hash in hashes], "S32")
        stays = ~np.isin(_column(self._table, "image_hash", 32), gone)
        if not stays.all():
            self._replace(self._table.filter(pa.array(stays)).combine_chunks())

    def _has(self, table: pa.Table) -> bool:
        """Whether all that a table says is known already."""
        rows = find_rows(_column(self._table), _column(table))
        if (rows < 0).any():
            return False
        same: bool = self._table.take(pa.array(rows)).to_pylist() == table.to_pylist()
        return same

    def _replace(self, table: pa.Table) -> None:
        self._table = table
        self.folder.write_by(
            FILE_NAME,
            lambda file: pq.write_table(
                table.replace_schema_metadata({_READERS: _readers()}), file, compression="zstd"
            ),
            doing="writing the list of scanned images",
            cure="Free some space; nothing encoded is lost.",
        )


def _readers() -> bytes:
    """What decides which images can be read: Pillow's version, and the plug-ins that are installed."""
    installed = [name for name, _ in formats.PLUGINS.values() if importlib.util.find_spec(name) is not None]
    return " ".join([f"Pillow {PIL.__version__}", *installed]).encode()


def _sorted(table: pa.Table) -> pa.Table:
    """By identity; of several rows for one the first stays."""
    _, first = np.unique(_column(table), return_index=True)
    return table.take(pa.array(first)).combine_chunks()


def _identities(files: Sequence[Listed], by_listing: Sequence[bool]) -> np.ndarray:
    names = (
        f"{file.address or file.path}\0{file.stamp}\0{trusted:d}"
        for file, trusted in zip(files, by_listing, strict=True)
    )
    digests = (hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names)
    return np.frombuffer(b"".join(digests), "S16")


def _table(identities: np.ndarray, scanned: Sequence[ScannedFile]) -> pa.Table:
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(identities), [None, pa.py_buffer(identities.tobytes())]
        ),
        pa.array([bytes.fromhex(file.image_hash) for file in scanned], pa.binary()),
        pa.array([file.height for file in scanned], pa.int32()),
        pa.array([file.width for file in scanned], pa.int32()),
        pa.array([file.problem for file in scanned], pa.string()).dictionary_encode(),
        pa.array([file.kind for file in scanned], pa.string()).dictionary_encode(),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _column(table: pa.Table, name: str = "identity", width: int = 16) -> np.ndarray:
    """Fixed-width bytes as NumPy; shorter ones (a missing hash) padded with zeros."""
    column = table.column(name)
    if pa.types.is_fixed_size_binary(column.type):
        return fixed_column(column, width)
    return np.array(column.to_pylist(), f"S{width}") if len(column) else np.empty(0, f"S{width}")


def _read_memo(folder: Folder) -> pa.Table:
    if not folder.exists(FILE_NAME):
        return _SCHEMA.empty_table()
    try:
        table = pq.read_table(io.BytesIO(folder.read(FILE_NAME)), read_dictionary=["problem", "kind"])
        with_others = (table.schema.metadata or {}).get(_READERS) != _readers()
        table = table.select(_SCHEMA.names).cast(_SCHEMA)
        return _sorted(table.filter(pc.equal(table.column("problem"), "")) if with_others else table)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{folder.path}/{FILE_NAME}: {reason}; the images are scanned again", stacklevel=2)
        return _SCHEMA.empty_table()
