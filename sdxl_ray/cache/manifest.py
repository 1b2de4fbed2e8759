"""manifest.json beside an index: what the index was made with, and where the embeddings of prompts are.

Runs that differ only in their validation prompts share an index, so each adds its prompts to those that are there.
While what an index names is still being encoded, its manifest has no "prompts", or is missing: nobody trains with it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sdxl_ray.errors import storage_errors
from sdxl_ray.storage import Folder

FILE_NAME = "manifest.json"


def write_manifest(
    folder: Folder,
    made_with: Mapping[str, Any],
    prompts: Iterable[str],
    locate: Callable[[str], Mapping[str, str] | None],
) -> None:
    """Replace the manifest in one move. It holds `prompts`, and those of earlier runs that `locate` still finds.

    Args:
        locate: a prompt's {"shard", "key"}.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    with _one_at_a_time(folder):
        located = {prompt: locate(prompt) for prompt in (*_known_prompts(folder), *prompts)}
        places = {prompt: dict(place) for prompt, place in located.items() if place is not None}
        text = json.dumps({**made_with, "prompts": places}, indent=2, ensure_ascii=False)
        folder.write(FILE_NAME, text.encode())


def mark_unfinished(folder: Folder) -> None:
    """Take a manifest back, before the index beside it names shards that are still to come.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    with _one_at_a_time(folder):
        if folder.exists(FILE_NAME):
            text = json.dumps({"known_prompts": _known_prompts(folder)}, indent=2, ensure_ascii=False)
            folder.write(FILE_NAME, text.encode())


def _known_prompts(folder: Folder) -> list[str]:
    """What earlier runs needed. Nothing is lost for good: a run adds its own prompts each time it starts."""
    try:
        found = json.loads(folder.read(FILE_NAME))
        return list(found["prompts"] if "prompts" in found else found["known_prompts"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


@contextlib.contextmanager
def _one_at_a_time(folder: Folder) -> Iterator[None]:
    """A lock against another run that reads, adds and writes at the same moment; where there are no locks, without."""
    if folder.local is None:
        yield
        return
    path = folder.local / ".lock"
    with storage_errors("locking the manifest", path, "Free some space and run again: finished shards are kept."):
        folder.local.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        with contextlib.suppress(ImportError, OSError):  # Windows; a network drive without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
