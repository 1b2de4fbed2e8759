"""Stage 1 on Ray Data: encode what is missing, and write the index.

    from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ progress

One work item is one shard, so whatever dies takes at most the shards in its hands, and running again does the rest.
Decoding and encoding are separate stages of one streaming pipeline: while an accelerator encodes a shard, the CPUs
decode the next ones, as many as Ray's memory budget allows.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sdxl_ray import connection
from sdxl_ray.cache.foreseen import index_of
from sdxl_ray.cache.generations import begin, finish, in_use
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.jobs.lost_shards import Undecodable
from sdxl_ray.cache.jobs.ray_jobs import Clock, Progress, Reserved, encode_latents, encode_text, scan_on_ray
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.planning import CachePlan, drop_undecodable, find_missing, plan_cache
from sdxl_ray.cache.scan import scan_all
from sdxl_ray.cache.skipped import Skipped, check_readable, unreadable_of
from sdxl_ray.cache.store import LATE_S
from sdxl_ray.errors import CacheError, SdxlRayError
from sdxl_ray.sdxl.components import resolve_model
from sdxl_ray.storage import open_folder

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


_STOP_WITHIN_S = 60.0
_LOOK_EVERY_S = 3.0
_PASSES = 2  # the second for what others have deleted meanwhile


@dataclass(frozen=True)
class CacheResult:
    """What a `cache` run did."""

    index_path: str
    num_samples: int
    num_latents_encoded: int
    num_captions_encoded: int
    num_long_captions: int
    max_tokens: int
    skipped: Sequence[Skipped]
    skipped_path: str
    buckets: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float] = field(default_factory=dict)  # "scan", "text", "images"
    worker_seconds: dict[str, float] = field(default_factory=dict)  # "decode", "encode", summed over tasks and actors
    num_tiled: int = 0  # images for which the accelerator had too little memory to encode them whole
    num_tried: int = 0  # latents and captions that were missing; of images that turned out damaged, none was encoded
    num_there: int = 0  # of these, those that another job had written by then
    notes: tuple[str, ...] = ()  # what a person may want to know about the datasets
    background: Background | None = None  # with cache.mode = "ondemand": what is still missing, to be started


def build_cache(
    config: Config,
    *,
    progress: Progress = lambda *_: None,
    connect: Callable[[], None] = connection.connect,
    order_of: Callable[[Index], np.ndarray] | None = None,
) -> CacheResult:
    """Encode what is missing of the config's datasets, and write their index. Encodes nothing where nothing is missing.

    Args:
        progress: called on the driver with (stage, done, total).
        connect: called once before Ray is needed; a second run over a complete cache never needs it.
        order_of: ranks of the index's latents, row after row, in which a training run will need them. With
            cache.mode = "ondemand" nothing is encoded now then, but handed back as `CacheResult.background`.

    Raises:
        DatasetError, ModelError: before anything is encoded.
        CacheError, StorageError: while encoding; finished shards are kept.
    """
    clock = Clock()
    plan = plan_cache(
        config.datasets,
        config.model,
        config.cache,
        model_path=resolve_model(config.model.path),
        prompts=config.prompts,
        scan=scan_all(functools.partial(scan_on_ray, connect), progress),
    )
    clock.stage("scan")
    with contextlib.suppress(OSError):  # where nobody can write, nobody has left any
        plan.store.remove_stale_temporaries()
    background, begun, num_tried = None, None, 0
    if config.cache.mode == "ondemand" and order_of is not None:
        find_missing(plan, in_order=order_of(index_of(plan)))
        background = Background(config, plan) if plan.num_missing else None
    elif plan.num_missing:
        num_tried = plan.num_missing
        begun = begin(plan)
        with in_use(plan.index_path):
            connect()
            encode_missing(config, plan, progress, clock)
    notes = finish(plan, begun)
    return CacheResult(
        index_path=plan.index_path,
        num_samples=plan.num_samples,
        num_latents_encoded=clock.counts["images"],
        num_captions_encoded=clock.counts["captions"],
        num_long_captions=plan.num_long_captions(),
        max_tokens=plan.max_tokens,
        skipped=plan.skipped,
        skipped_path=plan.skipped_path,
        buckets=dict(plan.buckets),
        seconds=time.monotonic() - clock.started,
        stage_seconds=clock.stages,
        worker_seconds=dict(clock.workers),
        num_tiled=clock.counts["tiled"],
        num_tried=num_tried,
        num_there=clock.counts["there"],
        notes=(*plan.collection.notes, *notes),
        background=background,
    )


def encode_missing(config: Config, plan: CachePlan, progress: Progress, clock: Clock) -> None:
    """Everything that the plan lacks, and what was there at first but is not any more; images that cannot be decoded
    leave the plan.

    Raises:
        CacheError, StorageError, DatasetError: finished shards are kept.
    """
    for _ in range(_PASSES):
        tried, damaged = plan.missing_keys(), set(plan.store.damaged)
        _encode(config, plan, progress, clock)
        _find_again(plan, tried, damaged)
        if not plan.num_missing:
            return
    raise _still_missing(plan)


def _encode(config: Config, plan: CachePlan, progress: Progress, clock: Clock) -> None:
    clock.counts["captions"] += encode_text(config, plan, progress, clock)
    clock.stage("text")
    undecodable: list[Undecodable] = []
    clock.counts["images"] += encode_latents(config, plan, progress, clock, undecodable)
    clock.stage("images")
    if undecodable:
        without = {item.key: item.skipped for item in undecodable}
        # First: where most images fail, a machine or a mount is at fault, and none of them is to be remembered.
        check_readable(plan, config.datasets, also=unreadable_of(plan, without))
        _remember(config, plan, undecodable)
        drop_undecodable(plan, without)


def _find_again(plan: CachePlan, encoded: np.ndarray, damaged: set[str]) -> None:
    """Look what is missing now. A network drive may show late what another machine has written.

    Args:
        encoded: the keys that were encoded just now.
        damaged: the files that were damaged before.

    Raises:
        CacheError: what is encoded is not there.
    """
    deadline, told = time.monotonic() + LATE_S, False
    while True:
        plan.store.refresh()
        find_missing(plan)
        num_late = int(np.isin(plan.missing_keys(), encoded).sum())
        if not num_late or set(plan.store.damaged) - damaged:  # a file that has been damaged since is not late
            return
        if time.monotonic() > deadline:
            raise _still_missing(plan)
        if not told:
            told = True
            warnings.warn(
                f"{num_late} of the entries that were just encoded are not to be seen yet; a network drive may take "
                f"{LATE_S:.0f} s",
                stacklevel=2,
            )
        time.sleep(_LOOK_EVERY_S)


def _still_missing(plan: CachePlan) -> CacheError:
    return CacheError(
        f"{plan.num_missing_latents} latents and {plan.num_missing_text} captions are still missing after encoding. "
        f"Is {plan.store.folder.path} the same folder on all machines? Run `sdxl-ray doctor`. If something deletes "
        "from it, run again: only what is missing is encoded."
    )


class Background:
    """With cache.mode = "ondemand": a thread for captions and one for images, beside a training run."""

    def __init__(self, config: Config, plan: CachePlan) -> None:
        self.config, self.plan = config, plan
        self.error: SdxlRayError | None = None
        # Images that turned out damaged; they count nothing in the batches of the run.
        self.skipped: list[Skipped] = []
        self.num_long_captions = 0  # of those that were encoded; known once all of them are
        self.progress: dict[str, tuple[int, int]] = {}  # stage -> done, total
        self._undecodable: list[Undecodable] = []
        self._num_judged = 0  # of these
        self._reserved = Reserved()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def reserve(self, *, cpus: float, gpus: float) -> None:
        """What the training workers have stays theirs."""
        self._reserved = Reserved(cpus, gpus)

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._threads:
            return
        self._threads = [
            threading.Thread(target=self._work, args=(work,), daemon=True) for work in (self._text, self._latents)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Finish the shards that are being encoded, and no more; for a minute at most.

        Args:
            say: told in one line that this takes a while, if it does.
        """
        self._stop.set()
        if self.running:
            say(f"waiting for the shards that are being encoded, {_STOP_WITHIN_S:.0f} s at most")
        deadline = time.monotonic() + _STOP_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _work(self, work: Callable[[], None]) -> None:
        try:
            with contextlib.suppress(_Stopped):
                work()
        except SdxlRayError as error:
            self.error = error
        except Exception as error:  # a bug; the run that waits for the entries has to hear of it too
            self.error = CacheError(f"encoding on demand failed: {type(error).__name__}: {error}")

    def _text(self) -> None:
        clock = Clock()
        encode_text(self.config, self.plan, self._progress, clock, reserved=self._reserved)
        self.num_long_captions = clock.counts["long"]

    def _latents(self) -> None:
        # Not remembered as damaged, other than in a run of `cache`: they are rows of this run's index, and without them
        # the run could not be resumed.
        encode_latents(self.config, self.plan, self._progress, Clock(), self._undecodable, reserved=self._reserved)
        self._judge()

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.progress[stage] = (done, total)
        if self._stop.is_set():
            raise _Stopped
        # It looks at every key of the plan. So of few, after each; of thousands, now and then.
        if stage == "images" and len(self._undecodable) > 1.1 * self._num_judged:
            self._judge()

    def _judge(self) -> None:
        self._num_judged = len(self._undecodable)
        self.skipped = unreadable_of(self.plan, {item.key: item.skipped for item in self._undecodable})
        check_readable(self.plan, self.config.datasets, also=self.skipped)


class _Stopped(Exception):
    """Nobody needs the rest."""


def _remember(config: Config, plan: CachePlan, undecodable: Sequence[Undecodable]) -> None:
    """Damaged images are not tried again until they change. What was wrong only with a mask, or now, is."""
    problems = {item.image_hash: item.skipped.reason for item in undecodable if item.skipped.kind == "damaged"}
    keys = {item.key for item in undecodable if item.skipped.kind in ("changed", "other_size")}
    rows = plan.collection.rows(list(plan.collection.rows_with(keys))) if keys else []
    # Image or mask: a look at both tells.
    changed = {row["image_hash"].hex() for row in rows} | {row["mask_hash"] for row in rows if row["mask_hash"]}
    if problems or changed:
        memo = Memo(open_folder(config.cache.path))
        memo.mark(problems)
        memo.forget(changed)
