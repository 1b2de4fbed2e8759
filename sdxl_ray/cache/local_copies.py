"""Shards of a cloud address, copied to this machine's disk and read from there; the least recently used go first."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from sdxl_ray.errors import ConfigError
from sdxl_ray.storage import Folder

GIB = 2**30
_BEING_OPENED_NS = 10**9  # between `fetch` and opening what it returned
_COUNT_EVERY_S = 60.0
_STALE_TEMPORARY_NS = 24 * 3600 * 10**9
_CACHE_FOLDER = re.compile("[0-9a-f]{12}")  # nothing else below `path` is ours


class LocalCopies:
    """A folder of copies, shared by the processes of a machine. Safe to share between threads.

    The limit is for the copies of all caches together. What is there is counted on the disk, since other processes copy
    and delete too: once a minute, and so often that eight processes together stay below the limit.

    A copy that another process removes while this one has it mapped stays readable: Linux keeps the data until then.
    Copies of another user may be read, and count, but stay where they are.
    """

    def __init__(self, folder: Folder, path: str, *, limit_gib: float, report: Callable[[str], None]) -> None:
        """
        Args:
            report: told once where this disk takes no more copies, and once where those of others leave no room.
        """
        self.folder = folder
        self.report = report
        self.path = Path(path).expanduser()
        # Two caches may have shards of the same name.
        self.root = self.path / hashlib.sha256(folder.path.encode()).hexdigest()[:12]
        self.limit_bytes = int(limit_gib * GIB)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._bytes_to_count = 0  # that may be written before the next count
        self._counted = 0.0
        self._kept_by_others: set[str] = set()  # damaged copies that cannot be removed
        self._is_usable = False  # whether a copy has been seen in `path`
        self._has_reported = self._has_reported_others = False

    def fetch(self, name: str) -> Path | bytes:
        """The copy's path; copied now if it is not there. What is in the shard, where this disk does not take it.

        Raises:
            FileNotFoundError, StorageError: the original cannot be read.
            ConfigError: `path` cannot be written at all, so that every read would fetch a whole shard.
        """
        path = self.root / name
        with self._lock:
            lock = self._locks[name]
        with lock:  # two threads that need one shard copy it once
            if name not in self._kept_by_others and _is_there(path):
                self._is_usable = True
                return path
            content = self.folder.read(name)
            if name in self._kept_by_others:
                return content
            try:
                _write_whole(path, content)
            except OSError as error:
                self._note_refusal(error)
                return content
            self._is_usable = True
        with self._lock:
            self._bytes_to_count -= len(content)
            if self._bytes_to_count < 0 or time.monotonic() - self._counted > _COUNT_EVERY_S:
                self._make_room(keep=path)
        return path

    def _note_refusal(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        here = f"cache.local_path = {self.path} on {socket.gethostname()}"
        if not self._is_usable and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{here}: cannot be written ({reason}). Shards of {self.folder.path} are copied there before they are "
                "read: make it writable, or set it to a folder on a local disk of every machine."
            ) from None
        if not self._has_reported:
            self._has_reported = True
            self.report(
                f"{here}: takes no more copies ({reason}). Shards of {self.folder.path} are read without them, whole "
                "ones each time, which is slow: free some space, or lower cache.local_gib."
            )

    def remove(self, name: str) -> None:
        """Forget a copy that is not as it should be: the next `fetch` makes a new one, or does without."""
        if not _removed(self.root / name):
            self._kept_by_others.add(name)

    def _make_room(self, keep: Path) -> None:
        """Where there is more than the limit, delete the least recently used until nine tenths of it are left."""
        held = self._held()
        num_bytes = sum(size for _, size, _ in held)
        kept_by_others = 0  # bytes
        if num_bytes > self.limit_bytes:
            in_use_since_ns = time.time_ns() - _BEING_OPENED_NS
            for used_ns, size, path in sorted(held):
                if num_bytes <= 0.9 * self.limit_bytes or used_ns > in_use_since_ns:
                    break
                if path == keep:
                    continue
                if _removed(path):
                    num_bytes -= size
                else:
                    kept_by_others += size
        self._counted = time.monotonic()
        self._bytes_to_count = min(self.limit_bytes // 20, (self.limit_bytes - num_bytes) // 8)
        if kept_by_others and num_bytes > 0.9 * self.limit_bytes:
            self._bytes_to_count = max(self._bytes_to_count, self.limit_bytes // 80)  # another count finds the same
            self._note_others(kept_by_others)

    def _note_others(self, num_bytes: int) -> None:
        if not self._has_reported_others:
            self._has_reported_others = True
            self.report(
                f"cache.local_path = {self.path} on {socket.gethostname()}: {num_bytes / GIB:.1f} GiB of copies there "
                f"cannot be deleted, probably another user's, and leave little of cache.local_gib = "
                f"{self.limit_bytes / GIB:g}. Shards are read again from {self.folder.path}, which is slow: raise "
                "cache.local_gib, or set cache.local_path to a folder of your own."
            )

    def _held(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of each copy of any cache. Deletes what killed processes left a day ago."""
        held = []
        with contextlib.suppress(OSError):
            caches = [entry.path for entry in os.scandir(self.path) if _CACHE_FOLDER.fullmatch(entry.name)]
            for folder, _, names in (found for cache in caches for found in os.walk(cache)):
                for path in (Path(folder, name) for name in names):
                    with contextlib.suppress(OSError):  # another process made room; another user's folder
                        status = path.stat()
                        if path.suffix == ".safetensors":
                            held.append((status.st_mtime_ns, status.st_size, path))
                        elif path.name.startswith(".tmp-") and _is_stale(status.st_mtime_ns):
                            path.unlink()
        return held


def _is_stale(written_ns: int) -> bool:
    return time.time_ns() - written_ns > _STALE_TEMPORARY_NS


def _removed(path: Path) -> bool:
    """Whether it is gone now."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # of another user, or on a disk that is read-only by now
        return False
    return True


def _is_there(path: Path) -> bool:
    """Notes that it is used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # of another user, or on a disk that is read-only by now: its use cannot be noted
        return path.exists()
    return True


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
