"""Arrow tables made of many pieces: in memory while they are small, then in a temporary file that is memory-mapped.

What lies in such a file takes address space and no memory of its own: the system reads what is touched and lets go of
it when something else needs the room. So ten million images fit on a driver with a few GiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from sdxl_ray.errors import storage_errors

ROWS_IN_MEMORY = 500_000
BYTES_IN_MEMORY = 256 * 2**20
PIECE = 100_000  # rows at a time, where each is a Python object for a while


def gather(pieces: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """One table, in the order of its pieces.

    Raises:
        StorageError: the folder for temporary files is full.
    """
    held: list[pa.Table] = []
    num_rows = num_bytes = 0
    pieces = iter(pieces)
    for piece in pieces:
        held.append(piece)
        num_rows += len(piece)
        num_bytes += piece.nbytes
        if num_rows > ROWS_IN_MEMORY or num_bytes > BYTES_IN_MEMORY:
            break
    else:
        return pa.concat_tables([schema.empty_table(), *held]).unify_dictionaries()
    # Deleted at once; the mapping keeps it alive as long as the table is.
    with (
        storage_errors("planning", tempfile.gettempdir(), "Free some space there, or set TMPDIR to another folder."),
        tempfile.NamedTemporaryFile(prefix="sdxl-ray-", suffix=".arrow") as file,
    ):
        with pa.ipc.new_stream(file, schema) as writer:
            while held:
                writer.write_table(held.pop(0))
            for piece in pieces:
                writer.write_table(piece)
        file.flush()
        mapped = pa.memory_map(file.name, "r")
        return pa.ipc.open_stream(mapped).read_all().unify_dictionaries()


def find_rows(identities: np.ndarray, wanted: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """The row of each wanted identity among millions, -1 where there is none.

    Args:
        identities: bytes of one width, sorted; or, with the `order` that sorts them, as they come.
    """
    if not len(identities):
        return np.full(len(wanted), -1)
    rows = np.minimum(np.searchsorted(identities, wanted, sorter=order), len(identities) - 1)
    rows = rows if order is None else order[rows]
    return np.where(identities[rows] == wanted, rows, -1)


def fixed_bytes(values: pa.Array, width: int) -> np.ndarray:
    """A FixedSizeBinaryArray as NumPy bytes, without a copy."""
    if not len(values):
        return np.empty(0, f"S{width}")
    start = values.offset * width
    return np.frombuffer(values.buffers()[1], np.uint8)[start : start + len(values) * width].view(f"S{width}")


def fixed_column(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """The same of all pieces of a column."""
    return np.concatenate([np.empty(0, f"S{width}"), *(fixed_bytes(chunk, width) for chunk in column.chunks)])
