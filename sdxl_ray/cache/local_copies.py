"""Shards of a cloud address, copied to this machine's disk and read from there; the least recently used go first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections import defaultdict
from pathlib import Path

from sdxl_ray.errors import storage_errors
from sdxl_ray.storage import Folder

GIB = 2**30
_BEING_OPENED_NS = 10**9  # between `fetch` and opening what it returned


class LocalCopies:
    """A folder of copies, shared by the processes of a machine. Safe to share between threads.

    A copy that another process removes while this one has it mapped stays readable: Linux keeps the data until then.
    """

    def __init__(self, folder: Folder, path: str, *, limit_gib: float) -> None:
        self.folder = folder
        # Two caches may have shards of the same name.
        self.root = Path(path).expanduser() / hashlib.sha256(folder.path.encode()).hexdigest()[:12]
        self.limit_bytes = int(limit_gib * GIB)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._bytes = sum(size for _, size, _ in self._held())

    def fetch(self, name: str) -> Path:
        """The copy's path; copied now if it is not there.

        Raises:
            FileNotFoundError, StorageError: the original cannot be read, or this disk is full.
        """
        path = self.root / name
        with self._lock:
            lock = self._locks[name]
        with lock:  # two threads that need one shard copy it once
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # used just now
                return path
            content = self.folder.read(name)
            temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
            with storage_errors("copying a shard", path, "Free some space, or set cache.local_path, cache.local_gib."):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    temporary.write_bytes(content)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        with self._lock:
            self._bytes += len(content)
            if self._bytes > self.limit_bytes:
                self._make_room(keep=path)
        return path

    def remove(self, name: str) -> None:
        """Forget a copy that is not as it should be: the next `fetch` makes a new one."""
        path = self.root / name
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            with self._lock:
                self._bytes -= size

    def _make_room(self, keep: Path) -> None:
        """Delete the least recently used until nine tenths of the limit are left."""
        held = self._held()
        self._bytes = sum(size for _, size, _ in held)
        if self._bytes <= self.limit_bytes:
            return  # another process has made room
        in_use_since_ns = time.time_ns() - _BEING_OPENED_NS
        for used_ns, size, path in sorted(held):
            if self._bytes <= 0.9 * self.limit_bytes or used_ns > in_use_since_ns:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                self._bytes -= size

    def _held(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of each copy."""
        held = []
        for path in self.root.rglob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                status = path.stat()
                held.append((status.st_mtime_ns, status.st_size, path))
        return held
