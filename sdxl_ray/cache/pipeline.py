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

import numpy as np
import ray
import ray.data

from sdxl_ray.cache.images import UnreadableImage, load_pixels
from sdxl_ray.cache.planning import (
    CachePlan,
    Skipped,
    TextShard,
    check_readable,
    drop_undecodable,
    find_missing,
    plan_cache,
    write_skipped,
)
from sdxl_ray.cache.scan import ScannedFile, scan_file, scan_images
from sdxl_ray.cache.shards import write_index, write_shard
from sdxl_ray.errors import CacheError, SdxlRayError, StorageError, storage_errors
from sdxl_ray.records import ImageRecord
from sdxl_ray.sdxl.components import resolve_model

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

# Below this many new files, threads on the driver are done before Ray has started.
SCAN_ON_RAY_FROM = 5_000

Progress = Callable[[str, int, int], None]  # stage ("text", "images"), done, total


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
    config: Config, *, progress: Progress = lambda *_: None, connect: Callable[[], None] | None = None
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
    connect = connect or _connect_locally
    model_path = resolve_model(config.model.path)
    plan = plan_cache(
        config.dataset,
        config.model,
        config.cache,
        model_path=model_path,
        prompts=(*config.validation.prompts, config.validation.negative_prompt),
        scan=lambda *args, **kwargs: _scan(connect, *args, **kwargs),
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


def _connect_locally() -> None:
    if not ray.is_initialized():
        ray.init(include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)


# ---- (1) scan: CPU tasks, for folders that are worth it --------------------------------------------------------------


def _scan(connect: Callable[[], None], files: Sequence[Any], *, memo: Any, max_pixels: int) -> list[ScannedFile]:
    unknown = [file for file in files if file not in memo]
    if len(unknown) < SCAN_ON_RAY_FROM:
        return scan_images(files, memo=memo, max_pixels=max_pixels)
    connect()
    chunks = [unknown[start : start + 500] for start in range(0, len(unknown), 500)]
    _quiet()
    dataset = ray.data.from_items([{"files": json.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks))
    rows = dataset.map(_ScanChunk(max_pixels), num_cpus=1).iter_rows()
    scanned = {
        file.identity: file for row in rows for file in (ScannedFile(**item) for item in json.loads(row["scanned"]))
    }
    return [memo.get(file) or scanned[file] for file in files]


class _ScanChunk:
    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        scanned = [
            asdict(scan_file((path, size, mtime), self.max_pixels)) for path, size, mtime in json.loads(row["files"])
        ]
        return {"scanned": json.dumps(scanned)}


# ---- (2) text --------------------------------------------------------------------------------------------------------


def _encode_text(config: Config, plan: CachePlan, progress: Progress) -> int:
    if not plan.missing_text:
        return 0
    items = [{"shard": json.dumps(asdict(shard))} for shard in plan.missing_text]
    _quiet()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        WriteTextShard,
        fn_constructor_kwargs={**_encoder_arguments(config, plan), "fingerprint": plan.text_fingerprint},
        batch_size=1,
        **_encoder_resources(config, len(items)),
    )
    done = 0
    for row in _results(dataset):
        done += int(row["num"])
        progress("text", done, plan.num_missing_text)
    return done


class WriteTextShard:
    """Ray Data actor: captions of one shard to embeddings, written."""

    def __init__(self, *, cache: str, fingerprint: str, **encoder: Any) -> None:
        from sdxl_ray.cache.encode import TextEncoder
        from sdxl_ray.sdxl.devices import best_device

        self.cache, self.fingerprint = Path(cache), fingerprint
        encoder.pop("dtype")
        self.encoder = TextEncoder(device=best_device(), **encoder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard = TextShard(**json.loads(str(batch["shard"][0])))
        try:
            tensors, num_tokens = self.encoder.encode(shard.captions)
            extra = {"encoder": self.fingerprint, "num_tokens": json.dumps(num_tokens)}
            write_shard(self.cache, shard.name, shard.keys, tensors, extra)
        except SdxlRayError as error:
            return _row(0, error=error)
        return _row(len(shard.keys))


# ---- (3) images: decode on CPUs, encode where there is an accelerator ------------------------------------------------


def _encode_latents(config: Config, plan: CachePlan, progress: Progress) -> tuple[int, list[Skipped]]:
    if not plan.missing_latents:
        return 0, []
    items = [{"shard": json.dumps(asdict(shard))} for shard in plan.missing_latents]
    _quiet()
    cpus = ray.cluster_resources().get("CPU", 1)
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(decode_shard, num_cpus=1 if cpus >= 2 else 0.4)
        .map_batches(
            WriteLatentShard,
            fn_constructor_kwargs={**_encoder_arguments(config, plan), "fingerprint": plan.vae_fingerprint},
            batch_size=1,
            **_encoder_resources(config, len(items)),
        )
    )
    done, skipped = 0, []
    for row in _results(dataset):
        skipped += [Skipped(**item) for item in json.loads(str(row["skipped"]))]
        done += int(row["num"])
        progress("images", done, plan.num_missing_latents - len(skipped))
    return done, skipped


def decode_shard(row: dict[str, Any]) -> dict[str, Any]:
    """Ray Data task: the pixels of one shard, (N, H, W, 3) uint8; N is smaller where images are damaged."""
    shard = json.loads(str(row["shard"]))
    pixels, keys, paths, skipped = [], [], [], []
    for key, fields in zip(shard["keys"], shard["records"], strict=True):
        record = _record(fields)
        try:
            pixels.append(load_pixels(record))
        except UnreadableImage as error:
            skipped.append({"path": record.path, "reason": str(error)})
            continue
        keys.append(key)
        paths.append(record.path)
    height, width = shard["records"][0]["bucket_hw"]
    stacked = np.stack(pixels) if pixels else np.zeros((0, height, width, 3), np.uint8)
    header = {"name": shard["name"], "keys": keys, "paths": paths, "skipped": skipped}
    return {"header": json.dumps(header), "pixels": stacked}


class WriteLatentShard:
    """Ray Data actor: pixels of one shard to the VAE's posterior, written."""

    def __init__(self, *, cache: str, fingerprint: str, **encoder: Any) -> None:
        from sdxl_ray.cache.encode import LatentEncoder
        from sdxl_ray.sdxl.devices import best_device

        self.cache, self.fingerprint = Path(cache), fingerprint
        self.encoder = LatentEncoder(device=best_device(), **encoder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        header = json.loads(str(batch["header"][0]))
        if header["keys"]:
            try:
                tensors = self.encoder.encode(list(batch["pixels"][0]), header["paths"])
                write_shard(self.cache, header["name"], header["keys"], tensors, {"encoder": self.fingerprint})
            except SdxlRayError as error:
                return _row(0, error=error)
        return _row(len(header["keys"]), skipped=header["skipped"])


def _record(fields: dict[str, Any]) -> ImageRecord:
    pairs = {name: tuple(fields[name]) for name in ("original_hw", "bucket_hw", "resized_hw", "crop_top_left")}
    return ImageRecord(fields["path"], fields["image_hash"], captions=tuple(fields["captions"]), **pairs)


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


def _encoder_resources(config: Config, num_items: int) -> dict[str, Any]:
    """Actors never take every CPU: decoding would wait for them and they for it, silently (ray issue 44687)."""
    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 1)
    num_actors = min(config.cache.num_encoders, num_items)
    if gpus and config.cluster.accelerator != "cpu":
        needs: dict[str, Any] = {"num_gpus": config.cache.gpus_per_encoder, "num_cpus": min(0.5, cpus / 4)}
        num_actors = max(1, min(num_actors, int(gpus / config.cache.gpus_per_encoder)))
    else:
        needs = {"num_cpus": 1 if cpus >= 2 else 0.4}
        num_actors = max(1, min(num_actors, int(cpus) - 1))
    return {"compute": ray.data.ActorPoolStrategy(size=num_actors), **needs}


def _row(num: int, *, skipped: Sequence[Any] = (), error: SdxlRayError | None = None) -> dict[str, Any]:
    """Errors travel as rows: raised inside an actor they would come back wrapped three times."""
    described = json.dumps([type(error).__name__, str(error)]) if error else ""
    return {"num": np.array([num]), "skipped": np.array([json.dumps(list(skipped))]), "error": np.array([described])}


def _results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in dataset.iter_rows():
        if row["error"]:
            kind, text = json.loads(str(row["error"]))
            raise {"StorageError": StorageError}.get(kind, CacheError)(text)
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
    manifest = {
        "dataset": config.dataset.model_dump(mode="json"),
        "model": config.model.path,
        "vae_fingerprint": plan.vae_fingerprint,
        "text_fingerprint": plan.text_fingerprint,
        "vae_dtype": config.cache.vae_dtype,
        "num_samples": len(plan.samples),
        "prompts": {prompt: asdict(locations[key]) for prompt, key in plan.prompts.items()},
    }
    path = plan.folder / "manifest.json"
    with storage_errors("writing the manifest", path, "Free some space and run again."):
        temporary = path.with_name(".tmp-manifest")
        temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
