"""A small data set, cached without Ray, and training runs on it: what tests of stage 2 stand on.

`tiny_model` and `tiny_cache` in conftest.py are made of these once per session; `run_workers` starts real processes.
Heavy imports are inside the functions, since every worker process imports this file.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

# (height, width) in pixels: three aspect ratios, with crops, in buckets of 7, 4 and 2 images
IMAGE_SIZES = (
    ((80, 80), (64, 64), (90, 84), (70, 70), (128, 120), (66, 64), (64, 67))
    + ((60, 100), (75, 128)) * 2
    + (
        (130, 70),
        (80, 48),
    )
)
PROMPTS = ("a red house", "A cat, on the moon!", "trees")


def write_images(folder: Path) -> Path:
    """Images that a VAE can tell apart, each with one or two captions."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number, (height, width) in enumerate(IMAGE_SIZES):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        captions = [f"a photo of {number} cats"] + [f"{number} small dogs"] * (number % 2)
        (folder / f"{number:02d}.txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


def tiny_config(folder: Path, model: str, **overrides: Any) -> Any:
    """Settings for a run below `folder` that takes a second on one core. Keys of `overrides` have `__` for the dot."""
    from sdxl_ray.config.load import config_from_dict, with_overrides

    config = config_from_dict(
        {
            "run": {"name": "tiny", "output": str(folder / "runs"), "seed": 7},
            "model": {"path": model, "dtype": "fp32"},
            "dataset": {"path": str(folder / "images"), "resolution": 64, "bucket_step": 16},
            # batches of 1, so that encoding one image again gives the same bits
            "cache": {
                "path": str(folder / "cache"),
                "vae_dtype": "fp32",
                "batch_size": 1,
            },
            "adapter": {"rank": 2, "alpha": 4.0},
            "train": {"duration": "4 steps", "micro_batch_size": 2, "log_every": 1},
            "optimizer": {"learning_rate": 1e-2},
            "eval": {"holdout": 0.2},
            "validation": {"prompts": list(PROMPTS), "height": 64, "width": 72, "num_steps": 2},
        }
    )
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})


def cache_without_ray(config: Any) -> str:
    """Stage 1 in this process, with the classes that Ray Data would run as actors; the path of the index."""
    from sdxl_ray.cache.generations import finish
    from sdxl_ray.cache.planning import plan_cache
    from sdxl_ray.sdxl.components import resolve_model

    plan = plan_cache(
        config.datasets,
        config.model,
        config.cache,
        model_path=resolve_model(config.model.path),
        prompts=(*config.validation.prompts, config.validation.negative_prompt),
    )
    encode_without_ray(config, plan)
    finish(plan)
    return str(plan.index_path)


def encode_without_ray(config: Any, plan: Any) -> None:
    """Everything that the plan lacks. Images that cannot be decoded leave it, as in `pipeline.encode_missing`."""
    from sdxl_ray.cache.jobs import actors, ray_jobs, reports
    from sdxl_ray.cache.planning import drop_undecodable, find_missing
    from sdxl_ray.cache.skipped import Skipped

    arguments = {"cache": config.cache.path, **ray_jobs.encoder_arguments(config, plan)}
    write_text = actors.WriteTextShard(**arguments, fingerprint=plan.text_fingerprint, num_chunks=plan.num_chunks)
    write_latents = actors.WriteLatentShard(
        **arguments, fingerprint=plan.vae_fingerprint, dtype=config.cache.vae_dtype, compile=config.cache.compile
    )
    wait([write_text.loading, write_latents.loading])  # transformers' loading changes torch for as long as it lasts
    results = [write_text({"shard": [reports.packed(asdict(shard))]}) for shard in plan.text_shards()]
    for shard in plan.latent_shards():
        decoded = actors.decode_shard({"shard": reports.packed(asdict(shard))})
        results.append(write_latents({name: [value] for name, value in decoded.items()}))
    for result in results:
        reports.raise_error(reports.ShardReport.from_row(result).error)
    skipped = [item for result in results for item in reports.ShardReport.from_row(result).skipped]
    if skipped:
        drop_undecodable(plan, {item["key"]: Skipped(item["path"], item["reason"]) for item in skipped})
    plan.store.refresh()
    find_missing(plan)
    assert not plan.missing_text and not plan.missing_latents


# ---- training without Ray --------------------------------------------------------------------------------------------


@dataclass
class ListReporter:
    """The loop's results in lists. `stop_at`: asks to stop from this step on. `folder`: where checkpoints go."""

    folder: Path | None = None
    stop_at: int = 0
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    image_steps: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    num_asked: int = 0

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.evaluations.append((step, values))

    def images(self, step: int) -> None:
        self.image_steps.append(step)

    def checkpoint(self, step: int, state: Any) -> None:
        from sdxl_ray.train.checkpoints import save_checkpoint

        self.checkpoints.append(step)
        if self.folder is not None:
            save_checkpoint(self.folder, state, {})

    def asked_to_stop(self) -> bool:
        self.num_asked += 1
        return 0 < self.stop_at <= self.num_asked

    def losses(self) -> dict[int, float]:
        return {step: values["train/loss"] for step, values in self.logged}


def make_training(config: Any, index_path: str | Path, *, workers: Any = None, checkpoint: Path | None = None) -> Any:
    """One rank's `Training` on the CPU."""
    import torch

    from sdxl_ray.train.data import load_data
    from sdxl_ray.train.setup import build_training
    from sdxl_ray.train.state import Workers

    data = load_data(config, index_path)
    return build_training(config, data, workers=workers or Workers(), device=torch.device("cpu"), checkpoint=checkpoint)


def train(training: Any, report: Any = None) -> ListReporter:
    """Run the loop to its end with everything in it."""
    from sdxl_ray.train.loop import run

    report = report or ListReporter()
    evaluate = training.evaluate if training.data.held_out else None
    run(training.state, training.plan, training.batches(), training.objective, report, evaluate, training.form)
    return report


def snapshot(state: Any) -> dict[str, Any]:
    """The adapter and the optimizer's moments by name, as arrays that can be compared and sent between processes."""
    saved = state.state_dict()
    moments: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}.{key}", inner)
        elif value is not None:
            moments[name] = np.asarray(value)

    collect("optimizer", saved["optimizer"]["state"])
    average = {f"average.{name}": tensor.numpy() for name, tensor in (saved["average"] or {}).items()}
    return {name: tensor.numpy() for name, tensor in saved["adapter"].items()} | moments | average


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:5]}"


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


# ---- several workers as real processes -------------------------------------------------------------------------------


def run_workers(function: Callable[..., Any], world_size: int, *args: Any, time_limit_s: float = 90) -> list[Any]:
    """`function(workers, *args)` on `world_size` processes joined by gloo; what each returned, by rank.

    `function` is a module's own, so that it can be pickled. A worker that raises or hangs fails the test.
    """
    # The server imports torch once and forks; forking this process, which has threads, may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdxl_ray.train.setup", "sdxl_ray.train.loop"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(function, rank, world_size, folder, time_limit_s, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + time_limit_s
        try:
            while any(process.is_alive() for process in processes):
                failed = [process for process in processes if process.exitcode]
                assert not failed, _report(Path(folder), processes)
                assert time.monotonic() < deadline, f"workers hang after {time_limit_s} s"
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert not any(process.exitcode for process in processes), _report(Path(folder), processes)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _worker(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, time_limit_s: float, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from sdxl_ray.train.state import Workers

    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/rendezvous"
        timeout = timedelta(seconds=time_limit_s)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
        result = function(Workers(rank, world_size), *args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _report(folder: Path, processes: list[Any]) -> str:
    errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("error-*"))]
    return "\n".join([f"exit codes {[process.exitcode for process in processes]}", *errors])
