"""sha256 of model files, each read once per machine rather than once per process: SDXL has 7 to 14 GB of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from sdxl_ray.sdxl.hub import cached_sha256

_REMEMBER_FROM = 16 * 2**20  # bytes: a smaller file is read faster than the memo
_RACY_NS = 2 * 10**9  # a file changed twice within a tick of its clock would keep its time


def file_sha256(path: Path) -> str:
    """64 hex digits over the file's bytes: from its name in the Hub's cache, from the memo, or by reading it."""
    status = path.stat()
    return cached_sha256(path) or _file_sha256(str(path.absolute()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    memo_file = _memo_file()
    remembered = _read_memo(memo_file).get(path) if size >= _REMEMBER_FROM else None
    if remembered and remembered[:2] == [size, mtime_ns]:
        return str(remembered[2])
    with Path(path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= _REMEMBER_FROM and time.time_ns() - mtime_ns > _RACY_NS:
        _remember(memo_file, path, [size, mtime_ns, sha256])
    return sha256


def _memo_file() -> Path:
    root = os.environ.get("SDXL_RAY_HOME") or os.path.expanduser("~/.cache/sdxl-ray")  # noqa: PTH111  (never raises)
    return Path(root) / "fingerprints.json"


def _read_memo(memo_file: Path) -> dict[str, list[int | str]]:
    """path -> [size, mtime_ns, sha256]. Never needed for correctness, so a damaged one is as good as none."""
    try:
        memo = json.loads(memo_file.read_text(encoding="utf-8"))
        return {path: entry for path, entry in memo.items() if len(entry) == 3 and len(bytes.fromhex(entry[2])) == 32}
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}


def _remember(memo_file: Path, path: str, entry: list[int | str]) -> None:
    """In one move; of two processes that write at once the later wins, and nothing but time is lost."""
    memo = {known: old for known, old in _read_memo(memo_file).items() if Path(known).exists()} | {path: entry}
    temporary = memo_file.with_name(f".tmp-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # a home that cannot be written to
        memo_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(memo, indent=1), encoding="utf-8")
            temporary.replace(memo_file)
        finally:
            temporary.unlink(missing_ok=True)
