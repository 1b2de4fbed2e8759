"""A folder of this disk that is used as if it were a bucket: no path, no locks, every access counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sdxl_ray.storage import FileEntry, Folder, open_folder


class RemoteFolder(Folder):
    """`calls` counts the names of its methods; `reads` the names of whole files that were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"s3://bucket{folder}")
        self.inner = open_folder(folder)
        self.calls: Counter[str] = Counter()
        self.reads: list[str] = []

    def read(self, name: str) -> bytes:
        self.calls["read"] += 1
        self.reads.append(name)
        return self.inner.read(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        self.calls["read_range"] += 1
        return self.inner.read_range(name, offset, length)

    def exists(self, name: str) -> bool:
        self.calls["exists"] += 1
        return self.inner.exists(name)

    def _write(self, name: str, content: bytes, doing: str, cure: str) -> None:
        self.calls["write"] += 1
        self.inner.write(name, content, doing=doing, cure=cure)

    def write_by(self, name: str, write: Callable[[BinaryIO], None], *, doing: str, cure: str) -> None:
        self.calls["write"] += 1
        self.inner.write_by(name, write, doing=doing, cure=cure)

    def delete(self, name: str) -> None:
        self.calls["delete"] += 1
        self.inner.delete(name)

    def list(self, prefix: str = "", suffix: str = "", *, hidden_folders: bool = False) -> list[FileEntry]:
        self.calls["list"] += 1
        return self.inner.list(prefix, suffix, hidden_folders=hidden_folders)
