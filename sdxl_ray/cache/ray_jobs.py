"""The Ray Data jobs of stage 1: scan, captions, images. Each hands its results back as they come.

from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ rows

A decode task may die of an image (too little memory, a fault in a decoder's C code), and an image may be gone since it
was scanned. So a shard of which no row came back is looked into, and then encoded without the images at fault.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ray
import ray.data
from ray.data import ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from sdxl_ray import connection
from sdxl_ray.cache.actors import (
    ScanChunk,
    WriteLatentShard,
    WriteTextShard,
    decode_shard,
    failure,
    files_as_row,
    raise_error,
    scanned_files,
)
from sdxl_ray.cache.lost_shards import Undecodable, look_into
from sdxl_ray.cache.planning import CachePlan
from sdxl_ray.cache.pools import Node, Share, share_cluster
from sdxl_ray.cache.scan import ScannedFile, scan_each
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.errors import CacheError, ClusterError
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

# Below this many new files, threads on the driver are done before Ray has started.
SCAN_ON_RAY_FROM = 5_000
# Shards of one Ray Data job. The work items of millions of images at once would fill the object store.
_SHARDS_AT_ONCE = 2_048
# What encoders of captions and images and their decode tasks take at least (`share_cluster`).
_SPARE_CPUS = 0.5
# Of one Ray Data job, shards whose decode task may die before the job ends. More of them are no accident.
_LOST_AT_MOST = 100
# How often Ray tries again what has died: for ever, if it is not told. Nodes that were preempted do not count.
_TASK_RETRIES = 3
_ACTOR_RETRIES = 10

Progress = Callable[[str, int, int], None]  # stage ("scan", "text", "images"), done, total
Item = TypeVar("Item")


class Reserved(NamedTuple):
    """What training has; only beside a training run."""

    cpus: float = 0.0
    gpus: float = 0.0


class Clock:
    """Seconds of each stage, and what was done in them."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.stages: dict[str, float] = {}
        self.workers: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()  # "captions", "long" of them, "images", "tiled" of them

    def stage(self, name: str) -> None:
        now = time.monotonic()
        self.stages[name] = self.stages.get(name, 0.0) + now - self._last
        self._last = now


# ---- (1) scan: CPU tasks, for folders that are worth it --------------------------------------------------------------


def scan_on_ray(
    connect: Callable[[], None],
    progress: Progress,
    files: Sequence[Listed],
    *,
    max_pixels: int,
    by_listing: Sequence[bool],
) -> Iterator[ScannedFile]:
    """`scan_each`; where many files are new, as CPU tasks on all machines."""
    if len(files) < SCAN_ON_RAY_FROM:
        yield from scan_each(
            files,
            max_pixels=max_pixels,
            by_listing=by_listing,
            progress=lambda done, total: progress("scan", done, total),
        )
        return
    connect()
    quiet()
    starts = range(0, len(files), 500)
    items = [files_as_row(start, files[start : start + 500], by_listing[start : start + 500]) for start in starts]
    listed = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = listed.map(ScanChunk(max_pixels), num_cpus=1, max_retries=_TASK_RETRIES)
    come: dict[int, list[ScannedFile]] = {}  # rows come in any order
    done = first = 0
    for row in _rows(dataset, "scanning failed", "What was found is kept"):
        come[int(row["first"])] = scanned_files(row, files, max_pixels)
        done += len(come[int(row["first"])])
        progress("scan", done, len(files))
        while first in come:
            found = come.pop(first)
            yield from found
            first += len(found)


# ---- (2) text --------------------------------------------------------------------------------------------------------


def encode_text(
    config: Config, plan: CachePlan, progress: Progress, clock: Clock, reserved: Reserved | None = None
) -> int:
    """Every caption that is missing; how many were encoded."""
    total, done = plan.num_missing_text, 0
    if not total:
        return 0
    progress("text", 0, total)  # the encoders take some seconds to start
    share = _share(config, len(plan.missing_text), reserved, text=True)
    arguments = {
        "cache": config.cache.path,
        "fingerprint": plan.text_fingerprint,
        "num_chunks": plan.num_chunks,
        **encoder_arguments(config, plan, share),
    }
    for items in _waves({"shard": json.dumps(asdict(shard))} for shard in plan.text_shards()):
        dataset = _from_items(items, reserved)
        dataset = dataset.map_batches(
            WriteTextShard, fn_constructor_kwargs=arguments, batch_size=1, **_pool(config, share)
        )
        for row in _results(dataset):
            done += int(row["num"])
            clock.counts["long"] += int(row["long"])
            clock.workers["encode_text"] += float(row["encode_s"])
            progress("text", done, total)
    return done


# ---- (3) images: decode on CPUs, encode where there is an accelerator ------------------------------------------------


def encode_latents(
    config: Config,
    plan: CachePlan,
    progress: Progress,
    clock: Clock,
    undecodable: list[Undecodable],
    reserved: Reserved | None = None,
) -> int:
    """Every image that is missing; how many were encoded. Those that cannot be decoded are added to `undecodable`."""
    total, done = plan.num_missing_latents, 0
    if not total:
        return 0
    progress("images", 0, total)
    share = _share(config, len(plan.missing_latents), reserved, text=False)
    arguments = {
        "cache": config.cache.path,
        "fingerprint": plan.vae_fingerprint,
        "dtype": config.cache.vae_dtype,
        "compile": config.cache.compile,
        "write_empty": reserved is not None,
        **encoder_arguments(config, plan, share),
    }
    for wave in _waves((shard.name, json.dumps(asdict(shard))) for shard in plan.latent_shards()):
        left, may_lose = dict(wave), _LOST_AT_MOST
        while left:
            dataset = _from_items([{"shard": shard} for shard in left.values()], reserved)
            dataset.context.max_errored_blocks = may_lose
            dataset = dataset.map(decode_shard, num_cpus=share.cpus_per_decode, max_retries=_TASK_RETRIES)
            dataset = dataset.map_batches(
                WriteLatentShard, fn_constructor_kwargs=arguments, batch_size=1, **_pool(config, share)
            )
            again: dict[str, str] = {}
            for row in _results(dataset):
                name = str(row["name"])
                shard = left.pop(name)
                if row["unreadable"]:  # looked into now: where a node does not see the folder, all others wait in vain
                    again[name] = look_into(shard, undecodable, told=json.loads(str(row["unreadable"])))
                    continue
                found = json.loads(str(row["skipped"]))
                undecodable += [
                    Undecodable(
                        item["key"], item["image_hash"], Skipped(item["path"], item["reason"], kind=item["kind"])
                    )
                    for item in found
                ]
                done += int(row["num"])
                clock.workers["encode"] += float(row["encode_s"])
                clock.workers["decode"] += float(row["decode_s"])
                clock.counts["tiled"] += int(row["tiled"])
                progress("images", done, total - len(undecodable))
            if may_lose:
                num_cpus = share.cpus_per_decode
                again |= {name: look_into(shard, undecodable, num_cpus=num_cpus) for name, shard in left.items()}
            left, may_lose = again, 0
    return done


# ---- shared by text and images ---------------------------------------------------------------------------------------


def encoder_arguments(config: Config, plan: CachePlan, share: Share | None = None) -> dict[str, Any]:
    """What both encoding actors are made with."""
    return {
        "model": plan.model,
        "batch_size": config.cache.batch_size,
        "revision": config.model.revision,
        "variant": config.model.variant,
        **({"device": share.device, "threads": share.threads} if share else {}),
    }


def _waves(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while wave := list(itertools.islice(iterator, _SHARDS_AT_ONCE)):
        yield wave


def _from_items(items: Sequence[dict[str, str]], reserved: Reserved | None) -> ray.data.Dataset:
    quiet()
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    if reserved is not None:
        dataset.context.execution_options.exclude_resources = ExecutionResources(cpu=reserved.cpus, gpu=reserved.gpus)
    return dataset


def _pool(config: Config, share: Share) -> dict[str, Any]:
    needs: dict[str, Any] = {
        "num_cpus": share.cpus_per_actor,
        "max_restarts": _ACTOR_RETRIES,
        "max_task_retries": _ACTOR_RETRIES,
    }
    if share.device == "cpu":
        # Threads of torch that wait for each other by spinning would take the cores from decoding.
        needs["runtime_env"] = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    if share.gpus_per_actor:
        needs["num_gpus"] = share.gpus_per_actor
        if config.cache.accelerator_type:
            needs["accelerator_type"] = config.cache.accelerator_type
    return {"compute": ray.data.ActorPoolStrategy(min_size=share.num_actors, max_size=share.max_actors), **needs}


def check_spare(reserved: Reserved) -> None:
    """Refuse what would wait for ever: training for entries, and their encoder for a core that training has taken.

    Raises:
        ClusterError: this machine has no core left beside the training workers. A cluster may still grow.
    """
    total = ray.cluster_resources().get("CPU", 0)
    if connection.is_local() and total - reserved.cpus < _SPARE_CPUS:
        raise ClusterError(
            f'cache.mode = "ondemand" needs a CPU core beside the training workers, which take {reserved.cpus:g} of '
            f'{total:g}. Lower train.num_workers or cluster.cpus_per_worker, or set cache.mode = "disk" or "off".'
        )


def _share(config: Config, num_items: int, reserved: Reserved | None, *, text: bool) -> Share:
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
        found = ", ".join(sorted({name for node in nodes for name in node.accelerators})) or "none"
        raise ClusterError(
            f'cache.accelerator_type = "{cache.accelerator_type}": no node has it; there are: {found}. '
            "Leave it empty to take any."
        )
    if config.cluster.accelerator == "gpu":
        connection.check_room(1, {"GPU": cache.gpus_per_encoder}, growing=not connection.is_local())
    of_training = reserved or Reserved()
    return share_cluster(
        nodes,
        num_items,
        num_encoders=(cache.num_text_encoders or cache.num_encoders) if text else cache.num_encoders,
        max_encoders=cache.max_encoders,
        gpus_per_encoder=(cache.gpus_per_text_encoder or cache.gpus_per_encoder) if text else cache.gpus_per_encoder,
        accelerator=config.cluster.accelerator,
        accelerator_type=cache.accelerator_type,
        reserved_cpus=of_training.cpus,
        reserved_gpus=of_training.gpus,
        num_pools=2 if reserved is not None else 1,
    )


def _results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """
    Raises:
        SdxlRayError: what an encoder has said.
        CacheError: anything else that went wrong on a node.
    """
    for row in _rows(dataset, "encoding failed", "Finished shards are kept"):
        raise_error(str(row["error"]))
        yield row


def _rows(dataset: ray.data.Dataset, failed: str, kept: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        reason = reason_of(error)
        memory = reason.startswith("MemoryError") or isinstance(error, ray.exceptions.OutOfMemoryError)
        raise CacheError(failure(failed, reason, kept, memory=memory)) from error


def reason_of(error: ray.exceptions.RayError) -> str:
    """The line that says what went wrong.

    Of what Ray itself found, the first. What a task raised comes as text: tracebacks, each the cause of the next one,
    and last Ray Data's own exception, which says nothing about it.
    """
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ray.exceptions.UserCodeException):
        return text.splitlines()[0].rstrip(".")
    raised = text.split("\n\nThe above exception was the direct cause")[-2:][0].splitlines()
    last_frame = max((number for number, line in enumerate(raised) if line.startswith('  File "')), default=0)
    return next((line for line in raised[last_frame:] if line and not line[0].isspace()), raised[-1]).rstrip(".")


def quiet() -> None:
    """Progress is ours to show, and so are errors: those of Ray Data are raised with all that it would log."""
    # Of `max_retries` and `max_restarts` ("Use the named remote parameters instead", of which none is for these), and
    # of `ExecutionOptions.exclude_resources` ("Use `ExecutionOptions.label_selector`", which cannot keep cores of one
    # machine free). They go with Ray 2.64 and after January 2027; Ray is pinned.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning, module=r"sdxl_ray\.")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
