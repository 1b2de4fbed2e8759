"""manifest.json beside an index: what the index was made with, and where the embeddings of prompts lie.

Runs that differ only in their validation prompts share an index, so each adds its prompts to those that are there.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdxl_ray.cache.shards import Location
from sdxl_ray.errors import storage_errors


def write_manifest(
    path: Path, made_with: Mapping[str, Any], prompts: Iterable[str], locate: Callable[[str], Location | None]
) -> None:
    """Replace the manifest in one move. It holds `prompts`, and those of earlier runs that `locate` still finds.

    Raises:
        StorageError: the disk is full or read-only.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    with storage_errors("writing the manifest", path, "Free some space and run again."), _one_at_a_time(path.parent):
        located = {prompt: locate(prompt) for prompt in (*_known_prompts(path), *prompts)}
        places = {prompt: asdict(location) for prompt, location in located.items() if location is not None}
        text = json.dumps({**made_with, "prompts": places}, indent=2, ensure_ascii=False)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _known_prompts(path: Path) -> list[str]:
    """What earlier runs needed. Nothing is lost for good: a run adds its own prompts each time it starts."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["prompts"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """A lock against another run that reads, adds and writes at the same moment; where there are no locks, without."""
    with (folder / ".lock").open("w") as lock:
        with contextlib.suppress(ImportError, OSError):  # Windows; a network drive without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
