"""Stage 1 on Ray Data: encode what is missing, and write the index.

    from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ progress

One work item is one shard, so whatever dies takes at most the shards in its hands, and running again does the rest.
Decoding and encoding are separate stages of one streaming pipeline: while an accelerator encodes a shard, the CPUs
decode the next ones, as many as Ray's memory budget allows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources

from sdxl_ray import connection
from sdxl_ray.cache.actors import (
    ScanChunk,
    WriteLatentShard,
    WriteTextShard,
    decode_shard,
    files_as_row,
    raise_error,
    scanned_files,
)
from sdxl_ray.cache.collection import Skipped
from sdxl_ray.cache.index import Index, write_index
from sdxl_ray.cache.manifest import write_manifest
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.planning import CachePlan, check_readable, drop_undecodable, find_missing, plan_cache, write_skipped
from sdxl_ray.cache.pools import Node, Share, share_cluster
from sdxl_ray.cache.scan import ScannedFile, scan_images
from sdxl_ray.errors import CacheError, ClusterError, SdxlRayError
from sdxl_ray.records import Listed
from sdxl_ray.sdxl.components import resolve_model
from sdxl_ray.storage import open_folder

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

# Below this many new files, threads on the driver are done before Ray has started.
SCAN_ON_RAY_FROM = 5_000
# Shards of one Ray Data job. The work items of millions of images at once would fill the object store.
_SHARDS_AT_ONCE = 2_048

Progress = Callable[[str, int, int], None]  # stage ("scan", "text", "images"), done, total


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
        order_of: ranks of the rows in which a training run will need them. With cache.mode = "ondemand" nothing is
            encoded now then, but handed back as `CacheResult.background`.

    Raises:
        DatasetError, ModelError: before anything is encoded.
        CacheError, StorageError: while encoding; finished shards are kept.
    """
    clock = _Clock()
    plan = plan_cache(
        config.datasets,
        config.model,
        config.cache,
        model_path=resolve_model(config.model.path),
        prompts=(*config.validation.prompts, config.validation.negative_prompt),
        scan=lambda *args, **kwargs: _scan(connect, progress, *args, **kwargs),
    )
    clock.stage("scan")
    plan.store.remove_stale_temporaries()
    background = None
    if config.cache.mode == "ondemand" and order_of is not None:
        find_missing(plan, in_order=order_of(Index(pa.concat_tables(plan.index_tables()))))
        if plan.missing_text or plan.missing_latents:
            background = Background(config, plan)
    elif plan.missing_text or plan.missing_latents:
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
        background=background,
    )


def encode_missing(config: Config, plan: CachePlan, progress: Progress, clock: _Clock | None = None) -> None:
    """Everything that the plan lacks; images that cannot be decoded leave the plan.

    Raises:
        CacheError, StorageError: finished shards are kept.
    """
    clock = clock or _Clock()
    clock.counts["captions"] = _encode_text(config, plan, progress, clock)
    clock.stage("text")
    clock.counts["images"], undecodable = _encode_latents(config, plan, progress, clock)
    clock.stage("images")
    if undecodable:
        _remember(config, undecodable)
        drop_undecodable(plan, {key: item for key, item, _ in undecodable})
    plan.store.refresh()
    find_missing(plan)
    if plan.missing_text or plan.missing_latents:
        raise CacheError(
            f"{plan.num_missing_latents} latents and {plan.num_missing_text} captions are still missing after "
            f"encoding. Is {config.cache.path} the same folder on all machines? Run `sdxl-ray doctor`."
        )


class _Clock:
    """Seconds of each stage, and what was done in them."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.stages: dict[str, float] = {}
        self.workers: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def stage(self, name: str) -> None:
        now = time.monotonic()
        self.stages[name] = now - self._last
        self._last = now


class Background:
    """With cache.mode = "ondemand": a thread for captions and one for images, beside a training run."""

    def __init__(self, config: Config, plan: CachePlan) -> None:
        self.config, self.plan = config, plan
        self.error: SdxlRayError | None = None
        self.skipped: list[Skipped] = []
        self.progress: dict[str, tuple[int, int]] = {}  # stage -> done, total
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, *, reserved_cpus: float, reserved_gpus: float) -> None:
        """Begin; what the training workers need stays free."""
        self._reserved = (reserved_cpus, reserved_gpus)
        self._threads = [
            threading.Thread(target=self._work, args=(work,), daemon=True) for work in (self._text, self._latents)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish the shards that are being encoded, and no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _work(self, work: Callable[[], None]) -> None:
        try:
            with contextlib.suppress(_Stopped):
                work()
        except SdxlRayError as error:
            self.error = error
        except Exception as error:  # the run that waits for the entries has to hear of it, whatever it is
            self.error = CacheError(f"encoding on demand failed: {str(error).strip().splitlines()[-1]}")

    def _text(self) -> None:
        _encode_text(self.config, self.plan, self._progress, _Clock(), background=self)

    def _latents(self) -> None:
        _, undecodable = _encode_latents(self.config, self.plan, self._progress, _Clock(), background=self)
        self.skipped = [item for _, item, _ in undecodable]
        if undecodable:
            _remember(self.config, undecodable)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.progress[stage] = (done, total)
        if self._stop.is_set():
            raise _Stopped

    def limit(self, dataset: ray.data.Dataset) -> None:
        """Keep Ray Data away from what training has."""
        cpus, gpus = self._reserved
        dataset.context.execution_options.exclude_resources = ExecutionResources(cpu=cpus, gpu=gpus)

    @property
    def reserved(self) -> tuple[float, float]:
        return self._reserved


class _Stopped(Exception):
    """Nobody needs the rest."""


# ---- (1) scan: CPU tasks, for folders that are worth it --------------------------------------------------------------


def _scan(
    connect: Callable[[], None],
    progress: Progress,
    files: Sequence[Listed],
    *,
    max_pixels: int,
    by_listing: Sequence[bool],
) -> list[ScannedFile]:
    if len(files) < SCAN_ON_RAY_FROM:
        return scan_images(
            files,
            max_pixels=max_pixels,
            by_listing=by_listing,
            progress=lambda done, total: progress("scan", done, total),
        )
    connect()
    _quiet()
    starts = range(0, len(files), 500)
    items = [files_as_row(start, files[start : start + 500], by_listing[start : start + 500]) for start in starts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    scanned: list[ScannedFile | None] = [None] * len(files)
    done = 0
    for row in dataset.map(ScanChunk(max_pixels), num_cpus=1).iter_rows():
        found = scanned_files(row, files, max_pixels)
        first = int(row["first"])
        scanned[first : first + len(found)] = found
        done += len(found)
        progress("scan", done, len(files))
    return [found for found in scanned if found is not None]


def _remember(config: Config, undecodable: Sequence[tuple[str, Skipped, str]]) -> None:
    """Damaged images are not tried again until they change. What was wrong only with a mask, or now, is."""
    problems = {digest: item.reason for _, item, digest in undecodable if item.reason.startswith("cannot be decoded")}
    if problems:
        Memo(open_folder(config.cache.path)).mark(problems)


# ---- (2) text --------------------------------------------------------------------------------------------------------


def _encode_text(
    config: Config, plan: CachePlan, progress: Progress, clock: _Clock, background: Background | None = None
) -> int:
    total, done = plan.num_missing_text, 0
    if not total:
        return 0
    progress("text", 0, total)  # the encoders take some seconds to start
    share = _share(config, len(plan.missing_text), background, text=True)
    arguments = {
        "cache": config.cache.path,
        "fingerprint": plan.text_fingerprint,
        "num_chunks": plan.num_chunks,
        **_encoder_arguments(config, plan, share),
    }
    for items in _waves({"shard": json.dumps(asdict(shard))} for shard in plan.text_shards()):
        dataset = _from_items(items, background)
        dataset = dataset.map_batches(
            WriteTextShard, fn_constructor_kwargs=arguments, batch_size=1, **_pool(config, share)
        )
        for row in _results(dataset):
            done += int(row["num"])
            clock.workers["encode_text"] += float(row["encode_s"])
            progress("text", done, total)
    return done


# ---- (3) images: decode on CPUs, encode where there is an accelerator ------------------------------------------------


def _encode_latents(
    config: Config, plan: CachePlan, progress: Progress, clock: _Clock, background: Background | None = None
) -> tuple[int, list[tuple[str, Skipped, str]]]:
    """(number encoded, (latent key, what to report, image hash) of each image that cannot be decoded)"""
    total, done, skipped = plan.num_missing_latents, 0, []
    if not total:
        return 0, []
    progress("images", 0, total)
    share = _share(config, len(plan.missing_latents), background, text=False)
    arguments = {
        "cache": config.cache.path,
        "fingerprint": plan.vae_fingerprint,
        "dtype": config.cache.vae_dtype,
        "compile": config.cache.compile,
        "write_empty": background is not None,
        **_encoder_arguments(config, plan, share),
    }
    for items in _waves({"shard": json.dumps(asdict(shard))} for shard in plan.latent_shards()):
        dataset = (
            _from_items(items, background)
            .map(decode_shard, num_cpus=share.cpus_per_decode)
            .map_batches(WriteLatentShard, fn_constructor_kwargs=arguments, batch_size=1, **_pool(config, share))
        )
        for row in _results(dataset):
            found = json.loads(str(row["skipped"]))
            skipped += [(item["key"], Skipped(item["path"], item["reason"]), item["image_hash"]) for item in found]
            done += int(row["num"])
            clock.workers["encode"] += float(row["encode_s"])
            clock.workers["decode"] += float(row["decode_s"])
            progress("images", done, total - len(skipped))
    return done, skipped


# ---- shared by text and images ---------------------------------------------------------------------------------------


def _encoder_arguments(config: Config, plan: CachePlan, share: Share | None = None) -> dict[str, Any]:
    return {
        "model": plan.model,
        "batch_size": config.cache.batch_size,
        "revision": config.model.revision,
        "variant": config.model.variant,
        **({"device": share.device, "threads": share.threads} if share else {}),
    }


def _waves(items: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    iterator = iter(items)
    while wave := list(itertools.islice(iterator, _SHARDS_AT_ONCE)):
        yield wave


def _from_items(items: Sequence[dict[str, str]], background: Background | None) -> ray.data.Dataset:
    _quiet()
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    if background is not None:
        background.limit(dataset)
    return dataset


def _pool(config: Config, share: Share) -> dict[str, Any]:
    needs: dict[str, Any] = {"num_cpus": share.cpus_per_actor}
    if share.gpus_per_actor:
        needs["num_gpus"] = share.gpus_per_actor
        if config.cache.accelerator_type:
            needs["accelerator_type"] = config.cache.accelerator_type
    sizes = {"min_size": share.num_actors, "max_size": share.max_actors}
    return {"compute": ray.data.ActorPoolStrategy(**sizes), **needs}


def _share(config: Config, num_items: int, background: Background | None, *, text: bool) -> Share:
    nodes = [
        Node(
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            accelerators=tuple(
                name.removeprefix("accelerator_type:")
                for name in node["Resources"]
                if name.startswith("accelerator_type:")
            ),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    cache = config.cache
    if cache.accelerator_type and not any(cache.accelerator_type in node.accelerators for node in nodes):
        there = ", ".join(sorted({name for node in nodes for name in node.accelerators})) or "none"
        text = f'cache.accelerator_type = "{cache.accelerator_type}": no node has it; there are: {there}.'
        raise ClusterError(f"{text} Leave it empty to take any.")
    if config.cluster.accelerator == "gpu":
        connection.check_room(1, {"GPU": cache.gpus_per_encoder}, growing=not connection.is_local())
    reserved_cpus, reserved_gpus = background.reserved if background else (0.0, 0.0)
    return share_cluster(
        nodes,
        num_items,
        num_encoders=(cache.num_text_encoders or cache.num_encoders) if text else cache.num_encoders,
        max_encoders=cache.max_encoders,
        gpus_per_encoder=(cache.gpus_per_text_encoder or cache.gpus_per_encoder) if text else cache.gpus_per_encoder,
        accelerator=config.cluster.accelerator,
        accelerator_type=cache.accelerator_type,
        reserved_cpus=reserved_cpus,
        reserved_gpus=reserved_gpus,
        num_pools=2 if background else 1,
    )


def _results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in dataset.iter_rows():
        raise_error(str(row["error"]))
        yield row


def _quiet() -> None:
    """Progress is ours to show; Ray Data's goes to its log files."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _write_index(config: Config, plan: CachePlan) -> None:
    write_index(plan.index_path, plan.index_tables())
    write_skipped(plan)
    made_with = {
        "datasets": [dataset.model_dump(mode="json") for dataset in config.datasets],
        "model": config.model.path,
        "vae_fingerprint": plan.vae_fingerprint,
        "text_fingerprint": plan.text_fingerprint,
        "vae_dtype": config.cache.vae_dtype,
        "caption_chunks": plan.num_chunks,
        "num_samples": plan.num_samples,
    }
    write_manifest(plan.folder, made_with, plan.prompts, plan.place_of_prompt)
