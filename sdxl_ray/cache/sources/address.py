"""Addresses of images, and the bytes behind them.

    /data/cat.jpg, s3://bucket/cat.jpg      a file
    tar:1536+20480:/data/00.tar             20480 bytes from byte 1536 on of a tar file
    row:17:image:/data/00.parquet           the column "image" of row 17, counted from 0; the column is %-encoded
    row:17:image+1:/data/a/00.parquet       the same; a file that this cell names must lie in /data, 1 folder further up
    https://example.org/cat.jpg             a download
    refused:the reason                      nothing: what a table names and may not

Read from the left, so that any name of a file fits at the end.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from sdxl_ray import storage
from sdxl_ray.cache.sources.rows import read_row
from sdxl_ray.cache.sources.web import read_url

_TAR = re.compile(r"tar:(\d+)\+(\d+):(.*)", re.DOTALL)
_ROW = re.compile(r"row:(\d+):([^:+]*)(?:\+(\d+))?:(.*)", re.DOTALL)
_REFUSED = "refused:"


def tar_address(container: str, offset: int, length: int) -> str:
    """Of a part of a file."""
    return f"tar:{offset}+{length}:{container}"


def tar_parts(address: str) -> tuple[int, int, str] | None:
    """(offset, length, container) of what `tar_address` made; None: another kind of address."""
    part = _TAR.fullmatch(address)
    return (int(part[1]), int(part[2]), part[3]) if part else None


def row_address(container: str, row: int, column: str, levels: int | None = None) -> str:
    """Of a value in a table. A file that it names must lie `levels` above the table's folder; None: anywhere."""
    limit = "" if levels is None else f"+{levels}"
    return f"row:{row}:{quote(column, safe='')}{limit}:{container}"


def is_in_table(address: str) -> bool:
    """Whether it says nothing without its table: a value in it, or what it names and may not."""
    return address.startswith(("row:", _REFUSED))


def row_name(container: str, row: int) -> str:
    """How people find a row: /data/00.parquet/00000017."""
    return storage.join(container, f"{row:08d}")


def shown(address: str) -> str:
    """An address for people: of a row its table and number, of a tar file's member the file and where in it."""
    row, part = _ROW.fullmatch(address), tar_parts(address)
    if row:
        return row_name(row[4], int(row[1]))
    if part:
        offset, _, container = part
        return f"at byte {offset} of {container}"
    return "of the table" if address.startswith(_REFUSED) else storage.shown(address)


def refused_address(reason: str) -> str:
    """Of what cannot be had; reading it says why."""
    return _REFUSED + reason


def read_bytes(address: str) -> bytes:
    """What is behind an address.

    Raises:
        OSError: this machine cannot read it now (FileNotFoundError, PermissionError, ...).
        StorageError: the same of a store.
        ValueError: the data is at fault: an empty cell, more than 500 MB, a tar file cut short, a file that a table may
            not name.
    """
    part = tar_parts(address)
    if part:
        offset, length, container = part
        content = storage.read_bytes(container, offset, length)
        if len(content) < length:
            raise ValueError(f"{container} ends at byte {offset + len(content)}, in the middle of this image")
        return content
    return _read(address, -1)


def read_start(address: str, length: int) -> bytes:
    """The first bytes, at most `length`. Raises what `read_bytes` raises."""
    part = tar_parts(address)
    if part:
        offset, whole, container = part
        return storage.read_bytes(container, offset, min(length, whole))
    return _read(address, length)


def _read(address: str, length: int) -> bytes:
    cell = _ROW.fullmatch(address)
    if cell:
        container = cell[4]
        within = "" if cell[3] is None else _above(container, int(cell[3]))
        value = read_row(container, int(cell[1]), unquote(cell[2]), within)
        # A table may hold paths in some rows and bytes in others.
        content = value if isinstance(value, bytes) else _read(value, length)
        return content if length < 0 else content[:length]
    if address.startswith(("http://", "https://")):
        return read_url(address, length)
    if address.startswith(_REFUSED):
        raise ValueError(address.removeprefix(_REFUSED))
    return storage.read_bytes(address, 0, length)


def _above(container: str, levels: int) -> str:
    """The folder this many levels above a file's own."""
    for _ in range(levels + 1):
        container = container.rpartition("/")[0]
    return container or "/"
