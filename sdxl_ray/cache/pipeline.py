"""Stage 1 on Ray Data: encode what is missing, and write the index.

    from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ progress

One work item is one shard, so whatever dies takes at most the shards in its hands, and running again does the rest.
Decoding and encoding are separate stages of one streaming pipeline: while an accelerator encodes a shard, the CPUs
decode the next ones, as many as Ray's memory budget allows.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sdxl_ray import connection
from sdxl_ray.cache.foreseen import index_of, index_tables, place_of_prompt
from sdxl_ray.cache.index import Index, write_index
from sdxl_ray.cache.lost_shards import Undecodable
from sdxl_ray.cache.manifest import FILE_NAME as MANIFEST
from sdxl_ray.cache.manifest import mark_unfinished, write_manifest
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.planning import CachePlan, drop_undecodable, find_missing, plan_cache
from sdxl_ray.cache.ray_jobs import Clock, Progress, Reserved, encode_latents, encode_text, scan_on_ray
from sdxl_ray.cache.skipped import Skipped, check_readable, skipped_csv, unreadable_of, write_skipped
from sdxl_ray.errors import CacheError, SdxlRayError, StorageError
from sdxl_ray.sdxl.components import resolve_model
from sdxl_ray.storage import open_folder, read_bytes

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


_STOP_WITHIN_S = 60.0


@dataclass(frozen=True)
class CacheResult:
    """What a `cache` run did."""

    index_path: str
    num_samples: int
    num_latents_encoded: int
    num_captions_encoded: int
    num_long_captions: int
    max_tokens: int
    skipped: tuple[Skipped, ...]
    skipped_path: str
    buckets: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float] = field(default_factory=dict)  # "scan", "text", "images"
    worker_seconds: dict[str, float] = field(default_factory=dict)  # "decode", "encode", summed over tasks and actors
    num_tiled: int = 0  # images for which the accelerator had too little memory to encode them whole
    num_tried: int = 0  # latents and captions that were missing; of images that turned out damaged, none was encoded
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
        scan=lambda *args, **kwargs: scan_on_ray(connect, progress, *args, **kwargs),
    )
    clock.stage("scan")
    with contextlib.suppress(OSError):  # where nobody can write, nobody has left any
        plan.store.remove_stale_temporaries()
    background, num_tried = None, 0
    if config.cache.mode == "ondemand" and order_of is not None:
        find_missing(plan, in_order=order_of(index_of(plan)))
        if plan.missing_text or plan.missing_latents:
            background = Background(config, plan)
    elif plan.missing_text or plan.missing_latents:
        num_tried = plan.num_missing_latents + plan.num_missing_text
        # Now, so that `--prune` of another process sees what this one counts on.
        mark_unfinished(plan.folder)
        write_index(plan.index_path, index_tables(plan))
        connect()
        encode_missing(config, plan, progress, clock)
        check_readable(plan, config.datasets)
    _write_index(config, plan)
    return CacheResult(
        index_path=plan.index_path,
        num_samples=plan.num_samples,
        num_latents_encoded=clock.counts["images"],
        num_captions_encoded=clock.counts["captions"],
        num_long_captions=plan.num_long_captions(),
        max_tokens=plan.max_tokens,
        skipped=tuple(plan.skipped),
        skipped_path=plan.skipped_path,
        buckets=dict(plan.buckets),
        seconds=time.monotonic() - clock.started,
        stage_seconds=clock.stages,
        worker_seconds=dict(clock.workers),
        num_tiled=clock.counts["tiled"],
        num_tried=num_tried,
        notes=tuple(plan.collection.notes),
        background=background,
    )


def encode_missing(config: Config, plan: CachePlan, progress: Progress, clock: Clock | None = None) -> None:
    """Everything that the plan lacks, and what was there at first but is not any more; images that cannot be decoded
    leave the plan.

    Raises:
        CacheError, StorageError: finished shards are kept.
    """
    clock = clock or Clock()
    tried = _missing_keys(plan)
    _encode(config, plan, progress, clock)
    lost = _missing_keys(plan)
    if len(lost) and not np.isin(lost, tried).any():
        _encode(config, plan, progress, clock)
        lost = _missing_keys(plan)
    if len(lost):
        raise CacheError(
            f"{plan.num_missing_latents} latents and {plan.num_missing_text} captions are still missing after "
            f"encoding. Is {config.cache.path} the same folder on all machines? Run `sdxl-ray doctor`."
        )


def _encode(config: Config, plan: CachePlan, progress: Progress, clock: Clock) -> None:
    clock.counts["captions"] += encode_text(config, plan, progress, clock)
    clock.stage("text")
    undecodable: list[Undecodable] = []
    clock.counts["images"] += encode_latents(config, plan, progress, clock, undecodable)
    clock.stage("images")
    if undecodable:
        _remember(config, undecodable)
        drop_undecodable(plan, {item.key: item.skipped for item in undecodable})
    plan.store.refresh()
    find_missing(plan)


def _missing_keys(plan: CachePlan) -> np.ndarray:
    """'S16', of latents and captions."""
    latents, captions = plan.latent_keys()[0], plan.text_keys()[0]
    return np.concatenate(
        [
            *(latents[entries] for entries in plan.missing_latents),
            *(captions[entries] for entries in plan.missing_text),
            captions[:0],
        ]
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


def _remember(config: Config, undecodable: Sequence[Undecodable]) -> None:
    """Damaged images are not tried again until they change. What was wrong only with a mask, or now, is."""
    problems = {item.image_hash: item.skipped.reason for item in undecodable if item.skipped.kind == "damaged"}
    changed = {item.image_hash for item in undecodable if item.skipped.kind == "changed"}
    if problems or changed:
        memo = Memo(open_folder(config.cache.path))
        memo.mark(problems)
        memo.forget(changed)


def _write_index(config: Config, plan: CachePlan) -> None:
    """Also where it says the same already: its date tells `--prune` that it is in use.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses; what is there is not the same.
    """
    made_with = {
        "datasets": [dataset.model_dump(mode="json") for dataset in config.datasets],
        "model": config.model.path,
        "vae_fingerprint": plan.vae_fingerprint,
        "text_fingerprint": plan.text_fingerprint,
        "vae_dtype": config.cache.vae_dtype,
        "caption_chunks": plan.num_chunks,
        "num_samples": plan.num_samples,
    }
    try:
        write_index(plan.index_path, index_tables(plan))
        write_skipped(plan)
        write_manifest(plan.folder, made_with, plan.prompts, lambda prompt: place_of_prompt(plan, prompt))
    except StorageError:
        if not _is_written(plan):
            raise


def _is_written(plan: CachePlan) -> bool:
    """Whether index, list of skipped images and manifest are there as this plan needs them."""
    try:
        prompts = json.loads(plan.folder.read(MANIFEST))["prompts"]
        if any(prompts[prompt] != place_of_prompt(plan, prompt) for prompt in plan.prompts):
            return False
        if read_bytes(plan.skipped_path) != skipped_csv(plan):
            return False
        written = Index.read(plan.index_path).table
    except (SdxlRayError, OSError, ValueError, LookupError, TypeError):
        return False
    first = 0
    for piece in index_tables(plan):
        # As text: the numbers of the same names may be others.
        plain = pa.schema(
            [
                (column.name, pa.string() if pa.types.is_dictionary(column.type) else column.type)
                for column in piece.schema
            ]
        )
        if not written.slice(first, len(piece)).cast(plain).equals(piece.cast(plain)):
            return False
        first += len(piece)
    return first == len(written)
