"""Addresses of images, and the bytes behind them.

    /data/cat.jpg, s3://bucket/cat.jpg      a file
    tar:1536+20480:/data/00.tar             20480 bytes from byte 1536 on of a tar file
    row:17:image:/data/00.parquet           the column "image" of row 17, counted from 0; the column is %-encoded
    https://example.org/cat.jpg             a download

Read from the left, so that any name of a file fits at the end.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from sdxl_ray import storage
from sdxl_ray.cache.sources.rows import read_row
from sdxl_ray.cache.sources.web import read_url

_TAR = re.compile(r"tar:(\d+)\+(\d+):(.*)", re.DOTALL)
_ROW = re.compile(r"row:(\d+):([^:]*):(.*)", re.DOTALL)


def tar_address(container: str, offset: int, length: int) -> str:
    """Of a part of a file."""
    return f"tar:{offset}+{length}:{container}"


def row_address(container: str, row: int, column: str) -> str:
    """Of a value in a table."""
    return f"row:{row}:{quote(column, safe='')}:{container}"


def read_bytes(address: str) -> bytes:
    """What is behind an address.

    Raises:
        OSError: this machine cannot read it now (FileNotFoundError, PermissionError, ...).
        StorageError: the same of a store.
        ValueError: the data is at fault: an empty cell, more than 500 MB, a tar file cut short.
    """
    part = _TAR.fullmatch(address)
    if part:
        offset, length, container = int(part[1]), int(part[2]), part[3]
        content = storage.read_bytes(container, offset, length)
        if len(content) < length:
            raise ValueError(f"{container} ends at byte {offset + len(content)}, in the middle of this image")
        return content
    return _read(address, -1)


def read_start(address: str, length: int) -> bytes:
    """The first bytes, at most `length`. Raises what `read_bytes` raises."""
    part = _TAR.fullmatch(address)
    if part:
        return storage.read_bytes(part[3], int(part[1]), min(length, int(part[2])))
    return _read(address, length)


def _read(address: str, length: int) -> bytes:
    cell = _ROW.fullmatch(address)
    if cell:
        value = read_row(cell[3], int(cell[1]), unquote(cell[2]))
        # A table may hold paths in some rows and bytes in others.
        content = value if isinstance(value, bytes) else _read(value, length)
        return content if length < 0 else content[:length]
    if address.startswith(("http://", "https://")):
        return read_url(address, length)
    return storage.read_bytes(address, 0, length)
