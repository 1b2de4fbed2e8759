"""index.parquet: one row per sample, plain columns. Open it with pandas or DuckDB.

In memory it stays columns: a million samples as Python objects would take two gigabytes in every worker. A row becomes
an `EncodedSample` when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdxl_ray.cache.tables import PIECE, ROWS_IN_MEMORY, gather
from sdxl_ray.errors import CacheError
from sdxl_ray.records import EncodedSample, bucket_key, parse_bucket_key
from sdxl_ray.storage import open_arrow, open_folder

FILE_NAME = "index.parquet"
_NAMES = pa.dictionary(pa.int32(), pa.string())  # few different values
_FEW_VALUES = ["dataset", "bucket"]
# What a sample is, the same in a collection (`collection.SCHEMA`) and in its index.
PLACED = pa.schema(
    [
        ("dataset", _NAMES),
        ("path", pa.string()),
        ("address", pa.string()),
        ("verify", pa.bool_()),
        ("bucket", _NAMES),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("resized_width", pa.int32()),
        ("crop_tops", pa.list_(pa.int32())),  # as SDXL is told
        ("crop_lefts", pa.list_(pa.int32())),
        ("flip", pa.bool_()),
        ("mask", pa.string()),
        ("mask_hash", pa.string()),
        ("scaled_jpeg", pa.bool_()),
        ("captions", pa.list_(pa.string())),
        ("caption_bases", pa.list_(pa.int32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_hash", pa.string()),
        *PLACED,
        ("latent_keys", pa.list_(pa.string())),
        ("latent_shards", pa.list_(pa.string())),
        ("text_keys", pa.list_(pa.string())),
        ("text_shards", pa.list_(pa.string())),
    ]
)


# Columns that indexes of earlier versions, of which a run has its copy, do not have -> what stands for them.
_ADDED = {"mask_hash": ""}


def write_index(path: str, tables: Iterable[pa.Table]) -> None:
    """One file from pieces of `SCHEMA`, whole or as it was before.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    plain = pa.schema(
        [pa.field(name, pa.string()) if name in _FEW_VALUES else SCHEMA.field(name) for name in SCHEMA.names]
    )

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, plain, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(plain))

    folder, _, name = path.rpartition("/")
    cure = "Free some space and run again: finished shards are kept."
    open_folder(folder).write_by(name, write, doing="writing the index", cure=cure)


def read_tables(path: str | Path) -> Iterator[pa.Table]:
    """The file in pieces of `SCHEMA`. Raises what `Index.read` raises."""
    try:
        with open_arrow(str(path)) as source:
            metadata = pq.read_metadata(source)
            there = set(metadata.schema.to_arrow_schema().names)
            names = [name for name in SCHEMA.names if name in there]
            missing = ", ".join(name for name in SCHEMA.names if name not in there and name not in _ADDED)
            if not missing:
                with pq.ParquetFile(source, metadata=metadata, read_dictionary=_FEW_VALUES) as file:
                    yield from map(_completed, file.iter_batches(PIECE, columns=names))
    except FileNotFoundError:
        raise CacheError(f"{path}: no index. Run `sdxl-ray cache` with this config first.") from None
    except (pa.ArrowException, OSError) as error:
        text = f"{path}: is damaged ({' '.join(str(error).split())})."
        raise CacheError(f"{text} Run `sdxl-ray cache`: the index is written anew.") from None
    if missing:
        text = f"{path}: is of another version of sdxl-ray, it lacks {missing}."
        raise CacheError(f"{text} Run `sdxl-ray cache`: the index is written anew.")


def _completed(batch: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([batch])
    for name, value in _ADDED.items():
        if name not in table.schema.names:
            table = table.append_column(name, pa.repeat(value, len(table)))
    return table.select(SCHEMA.names).cast(SCHEMA)


def digest_of(tables: Iterable[pa.Table]) -> str:
    """A hash of what the rows say, wherever they are read: how they are cut into pieces and how the values of a
    dictionary are numbered changes nothing.

    Args:
        tables: pieces of `SCHEMA`.
    """
    parts: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for table in tables:
        for name in SCHEMA.names:
            for chunk in table.column(name).chunks:
                for part, content in _content(name, chunk):
                    parts[part].update(content)
    return hashlib.sha256(repr([(part, parts[part].hexdigest()) for part in sorted(parts)]).encode()).hexdigest()


def _content(name: str, values: pa.Array) -> Iterator[tuple[str, Any]]:
    """The bytes of a column's piece that say what is in it, each under a name of its own."""
    if not len(values):
        return
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_list(values.type):
        yield f"{name} lengths", values.value_lengths().to_numpy()
        yield from _content(f"{name} values", values.flatten())
    elif pa.types.is_string(values.type):
        yield f"{name} lengths", pc.binary_length(values).to_numpy()
        _, offsets, text = values.buffers()
        start, end = np.frombuffer(offsets, np.int32)[[values.offset, values.offset + len(values)]]
        yield name, text[start:end] if text else b""
    else:
        yield name, np.ascontiguousarray(values.to_numpy(zero_copy_only=False))


class Index:
    """The rows of index.parquet."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks() if len(table) <= ROWS_IN_MEMORY else table
        self._columns = [column.chunk(0) if column.num_chunks == 1 else column for column in self.table.columns]
        self._names = self.table.schema.names

    @classmethod
    def read(cls, path: str | Path) -> Index:
        """The samples of a finished `sdxl-ray cache`.

        Raises:
            CacheError: the index is not there or damaged.
            StorageError: the bucket cannot be reached.
        """
        return cls(gather(read_tables(path), SCHEMA))

    @classmethod
    def of(cls, samples: Iterable[EncodedSample]) -> Index:
        """For tests and notebooks."""
        rows = [
            {
                **{name: getattr(sample, name) for name in _SAME_NAME},
                "bucket": bucket_key(sample.target_hw),
                "original_height": sample.original_hw[0],
                "original_width": sample.original_hw[1],
                "resized_height": sample.resized_hw[0],
                "resized_width": sample.resized_hw[1],
                "crop_tops": [top for top, _ in sample.crops],
                "crop_lefts": [left for _, left in sample.crops],
            }
            for sample in samples
        ]
        return cls(pa.Table.from_pylist(rows, SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> EncodedSample:
        values: dict[str, Any] = {
            name: column[row].as_py() for name, column in zip(self._names, self._columns, strict=True)
        }
        same: dict[str, Any] = {
            name: tuple(value) if isinstance(value := values[name], list) else value for name in _SAME_NAME
        }
        return EncodedSample(
            **same,
            original_hw=(values["original_height"], values["original_width"]),
            target_hw=parse_bucket_key(values["bucket"]),
            resized_hw=(values["resized_height"], values["resized_width"]),
            crops=tuple(zip(values["crop_tops"], values["crop_lefts"], strict=True)),
        )

    def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
        """(int32 code of each row, the sorted values that the codes stand for) of a column such as "bucket"."""
        values = self.table.column(column)
        if not pa.types.is_dictionary(values.type):
            values = values.dictionary_encode()
        encoded = values.combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = pa.concat_arrays(encoded.unify_dictionaries().chunks) if encoded.num_chunks else None
        if encoded is None or not len(encoded):
            return np.empty(0, np.int32), []
        names = encoded.dictionary.to_pylist()
        order = np.argsort(names, kind="stable")
        rank = np.empty(len(names), np.int32)
        rank[order] = np.arange(len(names), dtype=np.int32)
        return rank[encoded.indices.to_numpy(zero_copy_only=False)], [names[number] for number in order]

    def sample_ids(self) -> np.ndarray:
        """As bytes strings of one length ('S..')."""
        return _as_bytes(self.table.column("sample_id"))

    def image_hashes(self) -> np.ndarray:
        """'S64'"""
        return _as_bytes(self.table.column("image_hash"))

    def num_images(self) -> dict[str, int]:
        """How many different images each dataset has."""
        codes, names = self.codes("dataset")
        # 8 bytes of each hash: all of it would take four times the memory.
        images = _as_bytes(pc.utf8_slice_codeunits(self.table.column("image_hash"), 0, 16))
        return {name: len(np.unique(images[codes == code])) for code, name in enumerate(names)}

    def num_crops(self) -> np.ndarray:
        """(rows,) int32: how many latents each sample has."""
        return np.asarray(pc.list_value_length(self.table.column("latent_keys")).to_numpy(), dtype=np.int32)

    def flags(self, column: str) -> np.ndarray:
        """A column of booleans, such as "flip"."""
        return np.asarray(self.table.column(column).to_numpy(), dtype=bool)


_SAME_NAME = (
    "sample_id", "dataset", "path", "address", "image_hash", "verify", "flip", "mask", "mask_hash", "scaled_jpeg",
    "captions", "caption_bases", "latent_keys", "latent_shards", "text_keys", "text_shards",
)  # fmt: skip


def _as_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """Strings without Python objects: padded to one length, then seen as NumPy bytes."""
    if not len(column):
        return np.empty(0, "S1")
    width = pc.max(pc.binary_length(column)).as_py() or 1
    padded = pc.ascii_rpad(column, width, padding="\0").combine_chunks()
    chunks = padded.chunks if isinstance(padded, pa.ChunkedArray) else [padded]
    return np.concatenate([_fixed_width(chunk, width) for chunk in chunks])


def _fixed_width(chunk: pa.Array, width: int) -> np.ndarray:
    start = chunk.offset * width
    return np.frombuffer(chunk.buffers()[2], np.uint8)[start : start + len(chunk) * width].view(f"S{width}")
