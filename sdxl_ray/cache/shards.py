"""Encoded tensors as content-addressed `.safetensors` files, and the index that says which row is whose.

    <cache>/latents/832x1216/<shard>.safetensors    mean, std               one bucket a folder
    <cache>/text/<shard>.safetensors                prompt_embeds, pooled_prompt_embeds
    <cache>/datasets/<name>/index.parquet           one row per sample, no tensors
    <cache>/datasets/<name>/manifest.json           what the index was made with

A shard's name is a hash of the keys it holds, so two jobs that write the same shard write the same content. Its header
holds the keys in row order and a CRC-32 per row, so the index can be rebuilt from the shards alone and a flipped bit is
found when the row is read. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import CacheError, storage_errors
from sdxl_ray.records import EncodedSample

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "1"  # in every key: a new format never reads an old shard by mistake
_STALE_TEMPORARY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Location:
    """A row of a shard. `shard` is relative to the cache folder."""

    shard: str
    row: int


def latent_key(
    image_hash: str,
    bucket_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    crop_top_left: tuple[int, int],
    vae_fingerprint: str,
) -> str:
    """Everything that a latent depends on, hashed: the image's bytes, the transform, the VAE."""
    parts = ("latent", FORMAT_VERSION, image_hash, bucket_hw, resized_hw, crop_top_left, "lanczos", vae_fingerprint)
    return _digest(repr(parts))


def text_key(caption: str, text_fingerprint: str) -> str:
    """Everything that an embedding depends on, hashed: the caption, both encoders and tokenizers."""
    return _digest(repr(("text", FORMAT_VERSION, caption, text_fingerprint)))


def shard_name(kind: str, keys: Sequence[str], bucket: str = "") -> str:
    """The path below the cache, from the keys alone: the same gap is always filled by the same file."""
    folder = f"latents/{bucket}" if kind == "latents" else "text"
    return f"{folder}/{_digest(repr(tuple(keys)))}.safetensors"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_shard(
    cache: Path, name: str, keys: Sequence[str], tensors: Mapping[str, torch.Tensor], extra: Mapping[str, str]
) -> None:
    """Write one shard whole or not at all.

    Args:
        keys: one per row of every tensor.
        extra: more strings for the header, such as the encoder's fingerprint.

    Raises:
        StorageError: the disk is full or read-only; no half-written file is left.
    """
    from safetensors.torch import save

    checksums = [_row_checksum({key: tensor[row] for key, tensor in tensors.items()}) for row in range(len(keys))]
    metadata = {
        "format": "pt",
        "sdxl_ray.version": FORMAT_VERSION,
        "sdxl_ray.keys": json.dumps(list(keys)),
        "sdxl_ray.crc32": json.dumps(checksums),
        **{f"sdxl_ray.{key}": value for key, value in extra.items()},
    }
    # Not `save_file`: it makes files that only their owner can read, and hides a full disk in an error of its own.
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata)
    path = cache / name
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    with storage_errors("writing encoded tensors", path, "Free some space and run again: finished shards are kept."):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a shard with its metadata, or None where the file is cut short or no shard of ours."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 0 < length <= size - 8:
                return None
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header["__metadata__"]
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        num_rows = {len(json.loads(metadata[f"sdxl_ray.{name}"])) for name in ("keys", "crc32")}
        num_rows |= {tensor["shape"][0] for tensor in tensors}
        is_whole = size == 8 + length + max(tensor["data_offsets"][1] for tensor in tensors)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return header if is_whole and len(num_rows) == 1 and metadata["sdxl_ray.version"] == FORMAT_VERSION else None


class ShardStore:
    """What a cache folder holds: key -> location. Built from the shards' headers, which cannot be out of date."""

    def __init__(self, cache: str | Path) -> None:
        self.cache = Path(cache)
        self.locations: dict[str, Location] = {}
        self.num_tokens: dict[str, int] = {}  # of captions, for the warning about long ones
        self.damaged: list[Path] = []
        self.refresh()

    def refresh(self) -> None:
        """Read all headers again."""
        self.locations.clear()
        self.damaged.clear()
        for path in self._shard_files():
            header = read_header(path)
            if header is None:
                self.damaged.append(path)
                continue
            metadata = header["__metadata__"]
            name = path.relative_to(self.cache).as_posix()
            keys = json.loads(metadata["sdxl_ray.keys"])
            self.locations.update({key: Location(name, row) for row, key in enumerate(keys)})
            if "sdxl_ray.num_tokens" in metadata:
                self.num_tokens.update(zip(keys, json.loads(metadata["sdxl_ray.num_tokens"]), strict=True))

    def remove_stale_temporaries(self) -> int:
        """Delete what killed jobs left behind a day ago or earlier; younger ones may still be being written."""
        removed = 0
        # Only where we write: a search through everything below a large shared folder takes minutes.
        written_to = ("", "latents/*/", "text/", "datasets/*/")
        for path in (path for folder in written_to for path in self.cache.glob(f"{folder}.tmp-*")):
            with contextlib.suppress(FileNotFoundError):  # another job was faster
                if time.time() - path.stat().st_mtime > _STALE_TEMPORARY_S:
                    path.unlink()
                    removed += 1
        return removed

    def _shard_files(self) -> Iterator[Path]:
        yield from sorted(self.cache.glob("latents/*/*.safetensors"))
        yield from sorted(self.cache.glob("text/*.safetensors"))


class ShardReader:
    """Rows of memory-mapped shards, checked against their CRC. Safe to share between prefetch threads.

    The shards read last stay open, at most `max_open`: Linux allows a process 65,530 memory maps.
    """

    def __init__(self, cache: str | Path, *, max_open: int = 4096) -> None:
        self.cache = Path(cache)
        self.max_open = max_open
        self._open: OrderedDict[str, tuple[Any, list[int]]] = OrderedDict()  # the one read last comes last
        self._lock = threading.Lock()

    def read(self, location: Location) -> dict[str, torch.Tensor]:
        """The tensors of one row, without the row dimension.

        Raises:
            CacheError: the shard is gone or damaged.
        """
        file, checksums = self._file(location.shard)
        tensors = {name: file.get_slice(name)[location.row] for name in file.keys()}  # noqa: SIM118  (not a dict)
        found = _row_checksum(tensors)
        if found != checksums[location.row]:
            raise CacheError(
                f"{self.cache / location.shard}: row {location.row} is damaged (checksum {found:08x}, expected "
                f"{checksums[location.row]:08x}). Delete this file and run `sdxl-ray cache`: only it is encoded again."
            )
        return tensors

    def _file(self, shard: str) -> tuple[Any, list[int]]:
        from safetensors import SafetensorError, safe_open

        with self._lock:
            if shard not in self._open:
                path = self.cache / shard
                try:
                    file = safe_open(path, "pt")
                    checksums = json.loads(file.metadata()["sdxl_ray.crc32"])
                except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                    raise CacheError(
                        f"{path}: cannot be read ({error}). Run `sdxl-ray cache`: only what is missing is encoded."
                    ) from None
                self._open[shard] = (file, checksums)
                if len(self._open) > self.max_open:
                    self._open.popitem(last=False)  # unmapped once no thread reads from it any more
            self._open.move_to_end(shard)
            return self._open[shard]


def _row_checksum(row: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over the bytes of a row's tensors, in the order of their names."""
    import torch

    checksum = 0
    for name in sorted(row):
        checksum = zlib.crc32(row[name].contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


# ---- the index -------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A Parquet file, whole or as it was before: written beside its name, then renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(path: Path, samples: Sequence[EncodedSample], locations: Mapping[str, Location]) -> None:
    """One row per sample, plain columns: open it with pandas or DuckDB."""
    rows = [
        {
            "sample_id": sample.sample_id,
            "path": sample.path,
            "image_hash": sample.image_hash,
            "bucket": sample.bucket,
            "original_height": sample.original_hw[0],
            "original_width": sample.original_hw[1],
            "crop_top": sample.crop_top_left[0],
            "crop_left": sample.crop_top_left[1],
            "captions": list(sample.captions),
            "repeats": sample.repeats,
            "latent_key": sample.latent_key,
            "latent_shard": locations[sample.latent_key].shard,
            "latent_row": locations[sample.latent_key].row,
            "text_keys": list(sample.text_keys),
            "text_shards": [locations[key].shard for key in sample.text_keys],
            "text_rows": [locations[key].row for key in sample.text_keys],
        }
        for sample in samples
    ]
    with storage_errors("writing the index", path, "Free some space and run again: finished shards are kept."):
        write_table(path, rows)


def read_index(path: str | Path) -> tuple[list[EncodedSample], dict[str, Location]]:
    """The samples in their order, and where the tensors of each key lie.

    Raises:
        CacheError: the index is not there or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).exists():
        raise CacheError(f"{path}: no index. Run `sdxl-ray cache` with this config first.")
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path}: is damaged ({error}). Run `sdxl-ray cache`: the index is written anew.") from None
    samples, locations = [], {}
    for row in rows:
        height, width = row["bucket"].split("x")
        sample = EncodedSample(
            sample_id=row["sample_id"],
            path=row["path"],
            image_hash=row["image_hash"],
            original_hw=(row["original_height"], row["original_width"]),
            crop_top_left=(row["crop_top"], row["crop_left"]),
            target_hw=(int(height), int(width)),
            captions=tuple(row["captions"]),
            latent_key=row["latent_key"],
            text_keys=tuple(row["text_keys"]),
            repeats=row["repeats"],
        )
        samples.append(sample)
        locations[sample.latent_key] = Location(row["latent_shard"], row["latent_row"])
        for key, shard, number in zip(row["text_keys"], row["text_shards"], row["text_rows"], strict=True):
            locations[key] = Location(shard, number)
    return samples, locations
