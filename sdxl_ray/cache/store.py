"""What a cache folder holds: key -> shard, for ten million entries."""

from __future__ import annotations

import binascii
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdxl_ray.cache.shards import DAMAGED_SUFFIX, KEY_BYTES, OtherVersion, read_header, read_marker
from sdxl_ray.storage import Folder, open_folder

KEY_DTYPE = f"S{KEY_BYTES}"
LATE_S = 60.0  # so late may a network drive show what another machine has written: NFS remembers folders for 30-60 s
_STALE_TEMPORARY_S = 24 * 3600


class ShardStore:
    """Which shard has which key. Built from the shards' headers, which cannot be out of date.

    22 bytes for each entry, so that ten million fit beside everything else on the driver.
    """

    def __init__(self, cache: str | Path) -> None:
        self.folder = open_folder(str(cache))
        self.names: list[str] = []  # of shards, relative to the cache
        self.sizes: list[int] = []  # of these, in bytes
        self.damaged: list[str] = []  # files that are no whole shards
        self.other_versions: list[str] = []  # shards that another version of this program can use
        self.marked: dict[str, set[str]] = {}  # keys (hex) that are noted as damaged, by shard
        self._keys = np.empty(0, KEY_DTYPE)  # sorted
        self._shards = np.empty(0, np.int32)
        self._tokens = np.empty(0, np.int16)
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Read all headers again.

        Raises:
            StorageError: a file cannot be read, which says nothing about what is in it.
        """
        self.names, self.sizes, self.damaged, self.other_versions = [], [], [], []
        entries = [*self.folder.list("latents"), *self.folder.list("text")]
        shards = [entry for entry in entries if entry.name.endswith(".safetensors")]
        self.marked = {
            entry.name.removesuffix(DAMAGED_SUFFIX): set(read_marker(self.folder, entry.name))
            for entry in entries
            if entry.name.endswith(DAMAGED_SUFFIX)
        }
        keys: list[bytes] = []
        tokens: list[np.ndarray] = [np.empty(0, np.int16)]
        lengths: list[int] = []
        with ThreadPoolExecutor(1 if self.folder.local else 32) as threads:
            headers = threads.map(lambda entry: _entries_of(self.folder, entry.name, entry.size), shards)
            for entry, found in zip(shards, headers, strict=True):
                if isinstance(found, str):
                    self.damaged += [entry.name] if found == "damaged" else []
                    self.other_versions += [entry.name] if found == "other version" else []
                    continue
                here, counts = found
                if entry.name in self.marked:
                    bad = self.marked[entry.name]
                    kept = [number for number, key in enumerate(here) if key.hex() not in bad]
                    here, counts = [here[number] for number in kept], counts[kept]
                self.names.append(entry.name)
                self.sizes.append(entry.size)
                lengths.append(len(here))
                keys.append(b"".join(here))
                tokens.append(counts)
        unsorted = np.frombuffer(b"".join(keys), KEY_DTYPE)
        order = np.argsort(unsorted, kind="stable")
        self._keys = unsorted[order]
        self._shards = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
        self._tokens = np.concatenate(tokens)[order]

    @property
    def keys(self) -> np.ndarray:
        """All of them, 'S16', sorted."""
        return self._keys

    @property
    def shard_numbers(self) -> np.ndarray:
        """The shard of each of `keys`, as a number in `names`."""
        return self._shards

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The shard of each key ('S16'), as a number in `names`; -1 where there is none."""
        return self._look_up(keys, self._shards, -1)

    def num_tokens(self, keys: np.ndarray) -> np.ndarray:
        """Of captions, for the warning about long ones; 0 for keys that are not there."""
        return self._look_up(keys, self._tokens, 0)

    def shard_of(self, key: str) -> str | None:
        """The name of the shard that holds the key."""
        number = int(self.find(keys_from_hex([key]))[0])
        return None if number < 0 else self.names[number]

    def _look_up(self, keys: np.ndarray, values: np.ndarray, default: int) -> np.ndarray:
        if not len(self._keys) or not len(keys):
            return np.full(len(keys), default, values.dtype)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, values[place], np.array(default, values.dtype))

    def remove_stale_temporaries(self) -> int:
        """Delete what killed jobs left behind a day ago or earlier; younger ones may still be being written."""
        local, removed = self.folder.local, 0
        if local is None:
            return 0  # an object appears whole or not at all
        # Only where we write: a search through everything below a large shared folder takes minutes.
        for path in (
            path for part in ("", "latents/*/", "text/", "datasets/*/") for path in local.glob(f"{part}.tmp-*")
        ):
            try:
                if time.time() - path.stat().st_mtime > _STALE_TEMPORARY_S:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:  # another job was faster
                continue
        return removed


def _entries_of(folder: Folder, name: str, size: int) -> tuple[list[bytes], np.ndarray] | str:
    """(keys, number of tokens of each), or why it has none for us: "damaged", "other version", "gone"."""
    try:
        header = read_header(folder, name, size)
    except FileNotFoundError:  # deleted since it was listed
        return "gone"
    except OtherVersion:
        return "other version"
    if header is None:
        return "damaged"
    metadata = header["__metadata__"]
    try:
        keys = [bytes.fromhex(key) for key in json.loads(metadata["sdxl_ray.keys"])]
        counts = json.loads(metadata.get("sdxl_ray.num_tokens", "null")) or [0] * len(keys)
        tokens = np.minimum(counts, np.iinfo(np.int16).max).astype(np.int16)
    except (ValueError, TypeError):
        return "damaged"
    # One key of another length, and each that follows would be read at the wrong place.
    is_sound = tokens.shape == (len(keys),) and all(len(key) == KEY_BYTES for key in keys)
    return (keys, tokens) if is_sound else "damaged"


def keys_from_hex(keys: Iterable[str]) -> np.ndarray:
    """Keys as `ShardStore` takes them."""
    return np.frombuffer(bytes.fromhex("".join(keys)), KEY_DTYPE)


def hex_strings(values: np.ndarray) -> pa.Array:
    """Keys as text."""
    width = 2 * values.dtype.itemsize
    offsets = np.arange(len(values) + 1, dtype=np.int64) * width
    text = binascii.hexlify(values.tobytes())
    return pa.LargeStringArray.from_buffers(len(values), pa.py_buffer(offsets.tobytes()), pa.py_buffer(text))
