"""The Ray Data jobs of stage 1: scan, captions, images. Each hands its results back as they come.

from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ rows

A decode task may die of an image (too little memory, a fault in a decoder's C code), and an image may be gone since it
was scanned. So a shard of which no row came back is looked into, and then encoded without the images at fault.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from sdxl_ray import connection
from sdxl_ray.cache.jobs.actors import WriteLatentShard, WriteTextShard, decode_shard
from sdxl_ray.cache.jobs.lost_shards import LostShards, Undecodable
from sdxl_ray.cache.jobs.pools import Node, Share, share_cluster
from sdxl_ray.cache.jobs.ray_rows import InThread, quiet, reports_of, rows_of
from sdxl_ray.cache.jobs.reports import ShardReport
from sdxl_ray.cache.jobs.room import Begun, Reserved, Room, marked
from sdxl_ray.cache.jobs.scanning import ScanChunk, files_as_row, scanned_files
from sdxl_ray.cache.jobs.waves import Wave, dataset_of, waves_of
from sdxl_ray.cache.planning import CachePlan
from sdxl_ray.cache.scan import ScannedFile, scan_each
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.errors import ClusterError
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

# Below this many new files, threads on the driver are done before Ray has started.
SCAN_ON_RAY_FROM = 5_000
# What encoders of captions and images and their decode tasks take at least (`share_cluster`).
_SPARE_CPUS = 0.5
# Of one Ray Data job, shards whose decode task may die before the job ends. More of them are no accident.
_LOST_AT_MOST = 100
# How often Ray tries again what has died: for ever, if it is not told. For Ray, nodes that were preempted do not
# count; an encoder counts each of its starts (`Begun`).
_TASK_RETRIES = 3
_ACTOR_RETRIES = 10

Progress = Callable[[str, int, int], None]  # stage ("scan", "text", "images"), done, total


class Clock:
    """Seconds of each stage, and what was done in them."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.stages: dict[str, float] = {}
        self.workers: defaultdict[str, float] = defaultdict(float)
        # "captions", "long" of them, "images", "tiled" of them; "there": both, that others have written meanwhile
        self.counts: Counter[str] = Counter()

    def stage(self, name: str) -> None:
        now = time.monotonic()
        self.stages[name] = self.stages.get(name, 0.0) + now - self._last
        self._last = now

    def add(self, report: ShardReport, encoding: str) -> None:
        """What workers did for a shard. `encoding`: the name for the time of those that encode."""
        self.counts += Counter(there=report.num_there, long=report.long, tiled=report.tiled)
        self.workers[encoding] += report.encode_s
        if report.decode_s:
            self.workers["decode"] += report.decode_s


# ---- (1) scan: CPU tasks, for folders that are worth it --------------------------------------------------------------


def scan_on_ray(
    connect: Callable[[], None],
    files: Sequence[Listed],
    *,
    max_pixels: int,
    by_listing: Sequence[bool],
    progress: Callable[[int, int], None],
) -> Iterator[ScannedFile]:
    """`scan_each`; where many files are new, as CPU tasks on all machines."""
    if len(files) < SCAN_ON_RAY_FROM:
        yield from scan_each(files, max_pixels=max_pixels, by_listing=by_listing, progress=progress)
        return
    connect()
    quiet()
    starts = range(0, len(files), 500)
    items = [files_as_row(start, files[start : start + 500], by_listing[start : start + 500]) for start in starts]
    listed = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = listed.map(ScanChunk(max_pixels), num_cpus=1, max_retries=_TASK_RETRIES)
    come: dict[int, list[ScannedFile]] = {}  # rows come in any order
    done = first = 0
    for row in rows_of(dataset, "scanning failed", "What was found is kept"):
        come[int(row["first"])] = scanned_files(row, files, max_pixels)
        done += len(come[int(row["first"])])
        progress(done, len(files))
        while first in come:
            found = come.pop(first)
            yield from found
            first += len(found)


# ---- (2) text --------------------------------------------------------------------------------------------------------


def encode_text(
    config: Config, plan: CachePlan, progress: Progress, clock: Clock, reserved: Reserved | None = None
) -> int:
    """Every caption that is missing; how many were encoded. What another job has written meanwhile is not."""
    total = plan.num_missing_text
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

    def run(wave: Wave, dataset: ray.data.Dataset) -> Generator[ShardReport, None, None]:
        room = Room("text", share, reserved)
        return room.watched(reports_of(_written_by(WriteTextShard, arguments, dataset, room, config, len(wave))))

    reports = _each_report(waves_of(plan.text_shards(), share, reserved), run)
    return _counted(reports, lambda done: progress("text", done, total), clock, "encode_text")


# ---- (3) images: decode on CPUs, encode where there is an accelerator ------------------------------------------------


def encode_latents(
    config: Config,
    plan: CachePlan,
    progress: Progress,
    clock: Clock,
    undecodable: list[Undecodable],
    reserved: Reserved | None = None,
) -> int:
    """Every image that is missing; how many were encoded. What another job has written meanwhile is not.

    Images that cannot be decoded are added to `undecodable`.
    """
    total = plan.num_missing_latents
    if not total:
        return 0
    progress("images", 0, total)
    job = _LatentJob(config, plan, undecodable, reserved)
    reports = _each_report(waves_of(plan.latent_shards(), job.share, reserved), job.finished)
    return _counted(reports, lambda done: progress("images", done, total - len(undecodable)), clock, "encode")


class _LatentJob:
    """Waves of shards, each of them encoded in the end without the images at fault."""

    def __init__(
        self, config: Config, plan: CachePlan, undecodable: list[Undecodable], reserved: Reserved | None
    ) -> None:
        self.config, self.reserved, self.undecodable = config, reserved, undecodable
        self.share = _share(config, len(plan.missing_latents), reserved, text=False)
        self.arguments = {
            "cache": config.cache.path,
            "fingerprint": plan.vae_fingerprint,
            "dtype": config.cache.vae_dtype,
            "compile": config.cache.compile,
            "write_empty": reserved is not None,
            **encoder_arguments(config, plan, self.share),
        }
        self.lost = LostShards(undecodable, num_cpus=self.share.cpus_per_decode)

    def finished(self, wave: Wave, dataset: ray.data.Dataset) -> Generator[ShardReport, None, None]:
        """Of every shard of a wave the report with which it is done.

        Those with images at fault are encoded again after the others; where training waits for them, beside the
        others, in encoders of their own.

        Raises:
            SdxlRayError: what an encoder has said.
            CacheError: shards that are lost for no image's fault; a node that cannot read what the driver can.
        """
        left, again = dict(wave), Wave()
        places = {name: place for place, name in enumerate(wave)}
        beside: tuple[Wave, InThread[list[ShardReport]]] | None = None
        over = threading.Event()  # what runs beside the wave has to end with it, where that ends early
        with contextlib.ExitStack() as stack:
            stack.callback(over.set)
            reports = stack.enter_context(
                contextlib.closing(self._run(dataset, len(wave), _LOST_AT_MOST, is_wave=True))
            )
            for report in reports:
                if report.name not in left:  # it was given up too early
                    continue
                yield from self._done(left, again, [report])
                if self.reserved is not None:
                    again |= self._overtaken(left, places)
                if beside is not None and beside[1].done:
                    yield from self._done(beside[0], again, beside[1].result())
                    beside = None
                if again and beside is None and self.reserved is not None:
                    beside = again, InThread(functools.partial(list[ShardReport], self._run_again(again, over)))
                    again = Wave()
            if beside is not None:
                yield from self._done(beside[0], again, beside[1].result())
        again |= {name: self.lost.without_the_faulty(shard, None) for name, shard in left.items()}
        while again:
            items, again = again, Wave()
            yield from self._done(items, again, self._run_again(items))

    def _overtaken(self, left: Wave, places: Mapping[str, int]) -> Wave:
        """The first shard that is left, where so many others are done that it must have been lost; without the image
        that its decode task has died of."""
        first = next(iter(left), None)
        if first is None or len(places) - len(left) - places[first] < max(64, 4 * self.share.num_decoding):
            return {}
        return {first: self.lost.without_the_faulty(left.pop(first), None)}

    def _done(self, left: Wave, again: Wave, reports: Iterable[ShardReport]) -> Iterator[ShardReport]:
        """Take the reported shards out of `left`; those with an image at fault go into `again`, without it."""
        for report in reports:
            shard = left.pop(report.name)
            if report.unreadable:  # looked into now: where a node does not see the folder, all others wait in vain
                again[report.name] = self.lost.without_the_faulty(shard, report)
                continue
            self.lost.finished(report)
            self.undecodable += [
                Undecodable(item["key"], item["image_hash"], Skipped(item["path"], item["reason"], kind=item["kind"]))
                for item in report.skipped
            ]
            yield report

    def _run_again(self, items: Wave, over: threading.Event | None = None) -> Iterator[ShardReport]:
        """Where nobody wants the rest any more, `over` is set."""
        # Their dead images are known: if another task dies, that is an error.
        with contextlib.closing(self._run(dataset_of(items, self.reserved), len(items), 0)) as reports:
            for report in reports:
                if over is not None and over.is_set():
                    return
                yield report

    def _run(
        self, dataset: ray.data.Dataset, num_shards: int, may_lose: int, *, is_wave: bool = False
    ) -> Generator[ShardReport, None, None]:
        """Encode these shards, of which some may be lost: no report comes of them."""
        room = Room("images", self.share, self.reserved)
        dataset.context.max_errored_blocks = may_lose
        decode = functools.partial(decode_shard, cache=self.config.cache.path)
        dataset = dataset.map(
            marked(decode, room.decoding, name="decode_shard"),
            num_cpus=self.share.cpus_per_decode,
            max_retries=_TASK_RETRIES,
        )
        dataset = _written_by(WriteLatentShard, self.arguments, dataset, room, self.config, num_shards)
        reports = reports_of(dataset)
        yield from room.watched(reports) if is_wave else reports  # beside a wave, it waits until that is over


# ---- shared by text and images ---------------------------------------------------------------------------------------


def _each_report(
    waves: Generator[tuple[Wave, ray.data.Dataset], None, None],
    run: Callable[[Wave, ray.data.Dataset], Generator[ShardReport, None, None]],
) -> Generator[ShardReport, None, None]:
    """Of one wave after the other. Closed, it ends the job that runs, and no further wave is made."""
    with contextlib.closing(waves):
        for wave, dataset in waves:
            with contextlib.closing(run(wave, dataset)) as reports:
                yield from reports


def _counted(
    reports: Generator[ShardReport, None, None], progress: Callable[[int], None], clock: Clock, encoding: str
) -> int:
    """How many entries were encoded. `progress` is called with how many are done; `encoding`: as in `Clock.add`."""
    num_encoded = done = 0
    with contextlib.closing(reports):  # an error ends the job, and at once
        for report in reports:
            num_encoded += report.num
            done += report.num + report.num_there
            clock.add(report, encoding)
            progress(done)
    return num_encoded


def encoder_arguments(config: Config, plan: CachePlan, share: Share | None = None) -> dict[str, Any]:
    """What both encoding actors are made with."""
    return {
        "model": plan.model,
        "batch_size": config.cache.batch_size,
        "revision": config.model.revision,
        "variant": config.model.variant,
        **({"device": share.device, "threads": share.threads} if share else {}),
    }


def _written_by(
    writer: type, arguments: Mapping[str, Any], dataset: ray.data.Dataset, room: Room, config: Config, num_shards: int
) -> ray.data.Dataset:
    """The dataset's shards through a pool of such actors."""
    share = room.share
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
    num_actors, max_actors = (min(number, num_shards) for number in (share.num_actors, share.max_actors))
    return dataset.map_batches(
        writer,
        fn_constructor_kwargs={**arguments, "began": Begun(room.encoding), "max_starts": _ACTOR_RETRIES},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=num_actors, max_size=max_actors),
        **needs,
    )


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
