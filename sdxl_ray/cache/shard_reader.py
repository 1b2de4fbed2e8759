"""Read entries from shards, by their keys, as training asks for them."""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdxl_ray.cache.local_copies import LocalCopies
from sdxl_ray.cache.shards import OtherVersion, parse_header, row_checksum
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.storage import open_folder

if TYPE_CHECKING:
    import torch

_POLL_S = 0.2
_OPEN_FILES = 4096
_OPEN_COPIES = 64  # what is deleted to make room takes its room until it is closed


class MissingEntry(CacheError):
    """The shard is there without this entry. With cache.mode = "ondemand", its image turned out damaged."""


class DamagedEntry(CacheError):
    """The entry's checksum does not fit its bytes."""


class UnreadableShard(CacheError):
    """The shard is gone, cut short, or not given by its disk or store."""


class ShardReader:
    """Entries of memory-mapped shards, checked against their CRC. Safe to share between prefetch threads.

    The shards read last stay open, at most `max_open`: Linux allows a process 65,530 memory maps. Shards of a cloud
    address are copied to `local_path` first, and of copies few stay open.
    """

    def __init__(
        self,
        cache: str | Path,
        *,
        max_open: int = 0,
        local_path: str = "",
        local_gib: float = 50.0,
        wait: Callable[[str], None] | None = None,
        report: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        """
        Args:
            max_open: 0: 4096 shards, or 64 copies.
            report: told in one line, once, where this machine's disk takes no more copies.
            wait: called again and again with the name of a shard that is not there yet, until it is; it raises where
                waiting is over. None: a shard that is not there is an error.
        """
        self.cache = str(cache)
        self.folder = open_folder(self.cache)
        self.report = report
        self.copies = (
            None
            if self.folder.local
            else LocalCopies(self.folder, local_path, limit_gib=local_gib, report=lambda text: self.report(text))
        )
        self.max_open = max_open or (_OPEN_FILES if self.copies is None else _OPEN_COPIES)
        self.wait = wait
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()  # the one read last is last
        self._fetched_again: set[str] = set()
        self._lock = threading.Lock()

    def read(self, shard: str, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one entry, on the CPU, without the row dimension.

        latents  mean, std (4, H/8, W/8) bf16, of the VAE's posterior, times the scaling factor; mask (H/8, W/8) uint8,
                 where the image has one
        text     prompt_embeds (77 for each chunk, 2048) bf16, pooled_prompt_embeds (1280,) bf16

        Raises:
            MissingEntry, DamagedEntry, UnreadableShard: see there.
            CacheError: a folder of shards is missing as a whole; or what `wait` raises.
            ConfigError: the folder for copies cannot be written.
        """
        opened = self._file(shard)
        if key not in opened.rows:
            raise MissingEntry(f"{self.cache}/{shard}: has no entry {key}. Run `sdxl-ray cache`.")
        row = opened.rows[key]
        tensors = opened.tensors(row)
        found, expected = row_checksum(tensors), opened.checksums[row]
        if found != expected:
            if self._drop_copy(shard, opened):
                return self.read(shard, key)
            raise DamagedEntry(
                f"{self.cache}/{shard}: entry {key} is damaged (checksum {found:08x}, expected {expected:08x}). "
                "`sdxl-ray cache --verify` finds all of them and encodes them again."
            )
        return tensors

    def _file(self, shard: str) -> _OpenShard:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = self._load(shard)  # outside the lock: other threads read on while this one waits or copies
        with self._lock:
            self._open[shard] = opened
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)  # unmapped once no thread reads from it any more
        return opened

    def _drop_copy(self, shard: str, damaged: _OpenShard) -> bool:
        """Whether a damaged entry is worth another look: the damage may be this disk's. Each copy is dropped once."""
        if self.copies is None:
            return False
        with self._lock:
            opened = self._open.get(shard)
            if shard in self._fetched_again:
                return opened is not damaged  # another thread was faster
            self._fetched_again.add(shard)
            self._open.pop(shard, None)
            self.copies.remove(shard)
        return True

    def _load(self, shard: str) -> _OpenShard:
        from safetensors import SafetensorError

        try:
            while self.wait is not None and not self.folder.exists(shard):
                self.wait(shard)
                time.sleep(_POLL_S)
            if self.folder.local is not None:
                return _open_shard(self.folder.local / shard)
            assert self.copies is not None
            try:
                return _open_shard(self.copies.fetch(shard))
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise  # it says nothing about the copy
                self.copies.remove(shard)  # cut short on this disk, perhaps, or removed by another process just now
                return _open_shard(self.copies.fetch(shard))
        except (OSError, StorageError, OtherVersion, SafetensorError, ValueError, KeyError, TypeError) as error:
            parent = None if self.folder.local is None else (self.folder.local / shard).parent
            if parent is not None and not parent.is_dir():
                raise CacheError(
                    f"{parent}: is not there. Is cache.path = {self.cache} the same folder on all machines? "
                    "If it was deleted, run `sdxl-ray cache`."
                ) from None
            raise UnreadableShard(
                f"{self.cache}/{shard}: cannot be read ({error}). "
                "Run `sdxl-ray cache`: only what is missing is encoded."
            ) from None


class _OpenShard(NamedTuple):
    tensors: Callable[[int], dict[str, torch.Tensor]]  # those of a row
    rows: dict[str, int]  # of each key
    checksums: list[int]  # of each row


def _open_shard(source: Path | bytes) -> _OpenShard:
    """A memory-mapped file, or what is in one."""
    from safetensors import safe_open
    from safetensors.torch import load

    tensors: Callable[[int], dict[str, torch.Tensor]]
    if isinstance(source, Path):
        with source.open("rb") as start:  # first, since its errors have numbers; those of `safe_open` have none
            file = safe_open(source, "pt")  # refuses what is no such file
            parse_header(start.read(int.from_bytes(start.read(8), "little")))
        names, metadata = list(file.keys()), file.metadata()

        def tensors(row: int) -> dict[str, torch.Tensor]:
            return {name: file.get_slice(name)[row] for name in names}
    else:
        loaded = load(source)
        metadata = parse_header(source[8 : 8 + int.from_bytes(source[:8], "little")])["__metadata__"]

        def tensors(row: int) -> dict[str, torch.Tensor]:
            return {name: tensor[row] for name, tensor in loaded.items()}

    rows = {key: row for row, key in enumerate(json.loads(metadata["sdxl_ray.keys"]))}
    return _OpenShard(tensors, rows, json.loads(metadata["sdxl_ray.crc32"]))
