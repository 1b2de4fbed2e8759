"""datasets/<name>-<digest>/: what a run counts on. What lies there never changes, because its name says what it is.

    begin ─▶ encode ─▶ finish ─▶ in_use while it is trained with

index.parquet   before anything is encoded, with the names of the shards to come: so `--prune` of another process
                leaves alone what this one counts on
manifest.json   what it was made with, and where the embeddings of the prompts are; when everything is encoded, or
                at once with cache.mode = "ondemand", where the run waits for each shard
skipped.csv     what was left out, as the last run saw it
used            its date says when a run last needed all this

Other images, captions, settings or prompts make another folder beside it, and a second run over the same ones comes to
the same folder. So of two jobs over one dataset neither takes away what the other is about to read; what nobody has
used for long, `--prune` deletes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_ray.cache import index
from sdxl_ray.cache.foreseen import index_tables
from sdxl_ray.cache.skipped import FILE_NAME as SKIPPED
from sdxl_ray.cache.skipped import is_listed, write_skipped
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.storage import Folder, open_folder

if TYPE_CHECKING:
    from sdxl_ray.cache.planning import CachePlan

MANIFEST = "manifest.json"
_USED = "used"
FILES = (index.FILE_NAME, MANIFEST, SKIPPED, _USED)
_MARK_EVERY_S = 3600.0  # `--prune` keeps what was used within a day, whatever it is told
_NOT_MARKED = (
    "{} cannot be marked as in use here (read-only): a --prune of its owner does not see this run, and may delete what "
    "it reads once nobody else has used it for --keep-days"
)


def begin(plan: CachePlan) -> Folder | None:
    """Before encoding: write the index. Its folder, unless it was there already.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    if _has_index(plan):
        _mark_used(plan.folder)
        return None
    index.write_index(plan.index_path, index_tables(plan))
    return plan.folder


def finish(plan: CachePlan, begun: Folder | None = None) -> tuple[str, ...]:
    """After encoding: index, list of skipped images and manifest. Where all are there, only their date is new, and
    whoever may only read them leaves them as they are.

    Args:
        begun: what `begin` has made for this plan. Images that turned out damaged have made it another plan since.

    Returns:
        what a person may want to know.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    folder, notes = plan.folder, tuple[str, ...]()
    if _is_finished(plan):
        try:
            _mark_used(folder)
        except StorageError:
            notes = (_NOT_MARKED.format(folder.path),)
    else:
        if not _has_index(plan):
            index.write_index(plan.index_path, index_tables(plan))
        write_skipped(plan)
        folder.write(MANIFEST, plan.content.manifest)  # last: nobody trains without it
    if begun is not None and begun.path != folder.path:
        with contextlib.suppress(OSError, StorageError):
            _discard(begun)
    return notes


@contextlib.contextmanager
def in_use(index_path: str) -> Iterator[None]:
    """Renew the date every hour: encoding and training may take longer than unused collections are kept."""
    folder, done = open_folder(index_path.rpartition("/")[0]), threading.Event()

    def work() -> None:
        while not done.wait(_MARK_EVERY_S):
            with contextlib.suppress(OSError, StorageError):  # `finish` has told who cannot write
                if folder.exists(index.FILE_NAME):
                    _mark_used(folder)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _discard(begun: Folder) -> None:
    """Unless another process has finished it, or counts on it: of a folder that it finds, `begin` marks the use."""
    if begun.exists(MANIFEST) or begun.exists(_USED):
        return
    for name in FILES:
        begun.delete(name)
    if begun.local is not None:
        begun.local.rmdir()


def _is_finished(plan: CachePlan) -> bool:
    """Whether everything is there, as this plan needs it."""
    try:
        if plan.folder.read(MANIFEST) != plan.content.manifest or not is_listed(plan):
            return False
    except (OSError, StorageError):
        return False
    return _has_index(plan)


def _has_index(plan: CachePlan) -> bool:
    """Whether the index is there and whole: it is read, because nobody would write a damaged one anew."""
    try:
        return index.digest_of(index.read_tables(plan.index_path)) == plan.content.index
    except (CacheError, StorageError):
        return False


def _mark_used(folder: Folder) -> None:
    folder.write(_USED, b"The date of this file says when a run last needed what lies beside it.\n")
