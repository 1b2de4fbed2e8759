"""Stage 1 on Ray Data: encode what is missing, then write the index.

    from_items(missing shards) ─▶ decode (CPU tasks) ─▶ encode and write (one actor per accelerator) ─▶ progress

One work item is one shard, so whatever dies takes at most the shards in its hands, and running again does the rest.
Decoding and encoding are separate stages of one streaming pipeline: while an accelerator encodes a shard, the CPUs
decode the next ones, as many as Ray's memory budget allows.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from sdxl_ray import connection
from sdxl_ray.cache.actors import ScanChunk, WriteLatentShard, WriteTextShard, decode_shard, raise_error, scanned_files
from sdxl_ray.cache.manifest import write_manifest
from sdxl_ray.cache.planning import (
    CachePlan,
    Skipped,
    check_readable,
    drop_undecodable,
    find_missing,
    plan_cache,
    write_skipped,
)
from sdxl_ray.cache.scan import ScannedFile, scan_images
from sdxl_ray.cache.shards import text_key, write_index
from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.components import resolve_model

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

# Below this many new files, threads on the driver are done before Ray has started.
SCAN_ON_RAY_FROM = 5_000

Progress = Callable[[str, int, int], None]  # stage ("scan", "text", "images"), done, total


@dataclass(frozen=True)
class CacheResult:
    """What a `cache` run did."""

    index_path: Path
    num_samples: int
    num_latents_encoded: int
    num_captions_encoded: int
    num_long_captions: int
    skipped: tuple[Skipped, ...]
    skipped_path: Path
    buckets: dict[str, int]
    seconds: float


def build_cache(
    config: Config, *, progress: Progress = lambda *_: None, connect: Callable[[], None] = connection.connect
) -> CacheResult:
    """Encode what is missing of the config's dataset, and write its index. Encodes nothing where nothing is missing.

    Args:
        progress: called on the driver with (stage, done, total).
        connect: called once before Ray is needed; a second run over a complete cache never needs it.

    Raises:
        DatasetError, ModelError: before anything is encoded.
        CacheError, StorageError: while encoding; finished shards are kept.
    """
    started = time.monotonic()
    model_path = resolve_model(config.model.path)
    plan = plan_cache(
        config.dataset,
        config.model,
        config.cache,
        model_path=model_path,
        prompts=(*config.validation.prompts, config.validation.negative_prompt),
        scan=lambda *args, **kwargs: _scan(connect, progress, *args, **kwargs),
    )
    plan.store.remove_stale_temporaries()
    num_latents, num_captions = 0, 0
    if plan.missing_text or plan.missing_latents:
        connect()
        num_captions = _encode_text(config, plan, progress)
        num_latents, undecodable = _encode_latents(config, plan, progress)
        if undecodable:
            drop_undecodable(plan, undecodable, Path(config.cache.path) / "scan.parquet")
        plan.store.refresh()
        find_missing(plan)
        if plan.missing_text or plan.missing_latents:
            raise CacheError(
                f"{plan.num_missing_latents} latents and {plan.num_missing_text} captions are still missing after "
                f"encoding. Is {config.cache.path} the same folder on all machines? Run `sdxl-ray doctor`."
            )
        check_readable(plan, config.dataset.max_unreadable)
    _write_index(config, plan)
    return CacheResult(
        index_path=plan.index_path,
        num_samples=len(plan.samples),
        num_latents_encoded=num_latents,
        num_captions_encoded=num_captions,
        num_long_captions=plan.num_long_captions(),
        skipped=tuple(plan.skipped),
        skipped_path=plan.skipped_path,
        buckets=dict(plan.buckets),
        seconds=time.monotonic() - started,
    )


# ---- (1) scan: CPU tasks, for folders that are worth it --------------------------------------------------------------


def _scan(
    connect: Callable[[], None], progress: Progress, files: Sequence[Any], *, memo: Any, max_pixels: int
) -> list[ScannedFile]:
    unknown = [file for file in files if file not in memo]
    if len(unknown) < SCAN_ON_RAY_FROM:
        return scan_images(
            files, memo=memo, max_pixels=max_pixels, progress=lambda done, total: progress("scan", done, total)
        )
    connect()
    chunks = [unknown[start : start + 500] for start in range(0, len(unknown), 500)]
    _quiet()
    dataset = ray.data.from_items([{"files": json.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks))
    scanned = {}
    for row in dataset.map(ScanChunk(max_pixels), num_cpus=1).iter_rows():
        scanned.update({file.identity: file for file in scanned_files(row, max_pixels)})
        progress("scan", len(scanned), len(unknown))
    return [memo.get(file) or scanned[file] for file in files]


# ---- (2) text --------------------------------------------------------------------------------------------------------


def _encode_text(config: Config, plan: CachePlan, progress: Progress) -> int:
    if not plan.missing_text:
        return 0
    progress("text", 0, plan.num_missing_text)  # the encoders take some seconds to start
    items = [{"shard": json.dumps(asdict(shard))} for shard in plan.missing_text]
    share = _share(config, len(items))
    _quiet()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        WriteTextShard,
        fn_constructor_kwargs={
            **_encoder_arguments(config, plan),
            "fingerprint": plan.text_fingerprint,
            "device": share.device,
        },
        batch_size=1,
        **share.actors(),
    )
    done = 0
    for row in _results(dataset):
        done += int(row["num"])
        progress("text", done, plan.num_missing_text)
    return done


# ---- (3) images: decode on CPUs, encode where there is an accelerator ------------------------------------------------


def _encode_latents(config: Config, plan: CachePlan, progress: Progress) -> tuple[int, list[Skipped]]:
    if not plan.missing_latents:
        return 0, []
    progress("images", 0, plan.num_missing_latents)
    items = [{"shard": json.dumps(asdict(shard))} for shard in plan.missing_latents]
    _quiet()
    share = _share(config, len(items))
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(decode_shard, num_cpus=share.cpus_per_decode)
        .map_batches(
            WriteLatentShard,
            fn_constructor_kwargs={
                **_encoder_arguments(config, plan),
                "fingerprint": plan.vae_fingerprint,
                "device": share.device,
            },
            batch_size=1,
            **share.actors(),
        )
    )
    done, skipped = 0, []
    for row in _results(dataset):
        skipped += [Skipped(**item) for item in json.loads(str(row["skipped"]))]
        done += int(row["num"])
        progress("images", done, plan.num_missing_latents - len(skipped))
    return done, skipped


# ---- shared by text and images ---------------------------------------------------------------------------------------


def _encoder_arguments(config: Config, plan: CachePlan) -> dict[str, Any]:
    return {
        "cache": config.cache.path,
        "model": plan.model,
        "dtype": config.cache.vae_dtype,
        "batch_size": config.cache.batch_size,
        "revision": config.model.revision,
        "variant": config.model.variant,
    }


@dataclass(frozen=True, slots=True)
class Share:
    """What encoding takes of the cluster."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_decode: float  # of each decode task
    device: str  # for `actors.torch_device`

    def actors(self) -> dict[str, Any]:
        needs = {"num_cpus": self.cpus_per_actor, **({"num_gpus": self.gpus_per_actor} if self.gpus_per_actor else {})}
        return {"compute": ray.data.ActorPoolStrategy(size=self.num_actors), **needs}


def share_cluster(
    nodes: Sequence[tuple[float, float]],
    num_items: int,
    *,
    num_encoders: int,
    gpus_per_encoder: float,
    accelerator: str,
) -> Share:
    """How many encoders, and what each reserves, so that a decode task always fits beside all of them.

    Actors are placed first and stay: with every CPU in their hands, decoding would wait for them and they for it,
    silently (ray issue 44687). So an encoder on a GPU reserves no CPU, which it hardly uses, and of those on CPUs there
    is one fewer than CPUs.

    Args:
        nodes: (CPUs, GPUs) of each node.
        num_encoders: as wished; 0 is one per GPU, without GPUs one.
    """
    # A fraction lies on one GPU: of encoders that take 0.4, two fit on each.
    num_gpus = sum(int(gpus) for _, gpus in nodes)
    if num_gpus and accelerator != "cpu":
        num_actors = min(num_encoders or num_gpus, num_gpus * int(1 / gpus_per_encoder), num_items)
        cpus_per_decode = 1 if max(cpus for cpus, _ in nodes) >= 1 else 0.4
        return Share(num_actors, 0, gpus_per_encoder, cpus_per_decode, "cuda")
    device = "mps" if accelerator != "cpu" and len(nodes) == 1 else "cpu"  # Ray does not count Apple's GPU
    num_cpus = sum(int(cpus) for cpus, _ in nodes)
    if num_cpus < 2:
        return Share(1, 0.4, 0, 0.4, device)
    return Share(min(num_encoders or 1, num_cpus - 1, num_items), 1, 0, 1, device)


def _share(config: Config, num_items: int) -> Share:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_cluster(
        [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes],
        num_items,
        num_encoders=config.cache.num_encoders,
        gpus_per_encoder=config.cache.gpus_per_encoder,
        accelerator=config.cluster.accelerator,
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
    locations = plan.store.locations
    write_index(plan.index_path, plan.samples, locations)
    write_skipped(plan)
    made_with = {
        "dataset": config.dataset.model_dump(mode="json"),
        "model": config.model.path,
        "vae_fingerprint": plan.vae_fingerprint,
        "text_fingerprint": plan.text_fingerprint,
        "vae_dtype": config.cache.vae_dtype,
        "num_samples": len(plan.samples),
    }
    write_manifest(
        plan.folder / "manifest.json",
        made_with,
        plan.prompts,
        locate=lambda prompt: locations.get(text_key(prompt, plan.text_fingerprint)),
    )
