"""The driver of a run: cache what is missing, start Ray Train, hand back the LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from sdxl_ray import errors
from sdxl_ray.cache.generations import in_use
from sdxl_ray.cache.jobs.ray_jobs import Reserved, check_spare
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.config.load import load_config, with_overrides
from sdxl_ray.config.schema import Config
from sdxl_ray.connection import check_room, connect, is_local, worker_resources
from sdxl_ray.errors import Interrupted
from sdxl_ray.records import ExportedFile
from sdxl_ray.run_folder import find_checkpoint, list_checkpoints
from sdxl_ray.train.checkpoints import check_resumable, read_progress
from sdxl_ray.train.data import load_data, run_identity
from sdxl_ray.train.folder import claim_folder, inspect_folder, keep_index, prune_checkpoints
from sdxl_ray.train.on_demand import order_of_need
from sdxl_ray.train.preflight import check_methods
from sdxl_ray.train.try_out import from_earlier_run, with_batch_size
from sdxl_ray.train.watching import Event, RunMonitor, run_and_watch


@dataclass(frozen=True)
class FitResult:
    """What a run has left behind."""

    run_folder: Path
    step: int
    eval_loss: float | None
    exports: tuple[ExportedFile, ...]


def train_worker(settings: Event) -> Event | None:
    """What Ray Train calls on every rank.

    Driver, trial and controller import this module too, and need not import the models' libraries, which takes 5 s.
    """
    from sdxl_ray.train import worker

    return worker.train_worker(settings)


def fit(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    index_path: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_folder: Callable[[], None] = lambda: None,
    callbacks: Sequence[Any] = (),
    export: bool = True,
    keep_best: str = "",
) -> FitResult:
    """Train a LoRA. Encodes what the cache lacks first.

    Args:
        resume: continue the run of this name from its last checkpoint.
        overwrite: delete the run of this name first.
        address: of a Ray cluster; None: $RAY_ADDRESS, or Ray on this machine.
        index_path: of a cache that is known to be complete (a sweep's trials); None: build it.
        on_event: called on this process with {"event": "cache" | "started" | "metrics" | "images" | ...}.
        on_folder: called once the run's folder is ready to be written to.
        callbacks: of Ray Train, such as Tune's.
        export: whether to write the LoRA files at the end.
        keep_best: a metric whose best checkpoint is kept as well as the last ones; lower is better.

    Raises:
        InputError: before any work.
        Interrupted: SIGINT or SIGTERM; the state is saved, `resume=True` continues.
        RunError: the run failed; checkpoints are kept.
    """
    run_folder = Path(config.run.output) / config.run.name
    latest = inspect_folder(run_folder, resume=resume, overwrite=overwrite)
    check_methods(config)
    if config.train.micro_batch_size == 0:
        config = from_earlier_run(config, run_folder) if latest else _with_batch_size_found(config, address, on_event)
    background, collection = None, ""
    position = read_progress(latest)["position"] if latest else 0
    if index_path is None:
        cache = build_cache(
            config,
            progress=lambda stage, done, total: on_event(
                {"event": "progress", "stage": stage, "done": done, "total": total}
            ),
            connect=lambda: connect(address),
            order_of=lambda index: order_of_need(config, index, position),
        )
        on_event({"event": "cache", "result": cache})
        collection = index_path = cache.index_path
        background = cache.background
    if latest is not None:
        data = load_data(config, index_path)
        check_resumable(read_progress(latest).get("identity", {}), run_identity(config, data), run_folder)
    connect(address)
    resources = worker_resources(config.cluster.accelerator, config.cluster.cpus_per_worker)
    check_room(config.train.num_workers, resources, growing=not is_local())
    reserved_cpus, reserved_gpus = (config.train.num_workers * resources.get(kind, 0.0) for kind in ("CPU", "GPU"))
    if background is not None:
        check_spare(Reserved(reserved_cpus, reserved_gpus))
    claim_folder(run_folder, config, resume=resume)
    on_folder()
    index_path = keep_index(run_folder, index_path)

    on_event({"event": "line", "text": f"starting {config.train.num_workers} workers"})
    monitor: Any = ray.remote(num_cpus=0)(RunMonitor).remote()
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # its result comes back in `return_value`
        train_loop_config={
            "config": config.model_dump(mode="json", exclude_none=True),
            "index_path": str(index_path),
            "run_folder": str(run_folder),
            "resume_from": str(latest) if latest else "",
            "monitor": monitor,
            "export": export,
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the config of Ray Train's version 1
            name="checkpoints",  # so that a checkpoint lies in runs/<name>/checkpoints/step_000500
            storage_path=str(run_folder),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=config.cluster.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoint.keep,
                checkpoint_score_attribute=keep_best or None,
                checkpoint_score_order="min",
            ),
            callbacks=list(callbacks) or None,
            worker_runtime_env={"env_vars": _worker_environment()},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    if background is not None:
        background.reserve(cpus=reserved_cpus, gpus=reserved_gpus)
        ray.get(monitor.set_encoded.remote(False))
    try:
        with in_use(collection) if collection else nullcontext():  # of a trial it is the sweep that says so
            returned = run_and_watch(trainer, monitor, on_event, background)
    finally:
        if background is not None:
            background.stop(lambda text: on_event({"event": "line", "text": text}))
    if not keep_best:
        prune_checkpoints(run_folder, config.checkpoint.keep)
    if not returned["finished"]:
        raise Interrupted(
            f"stopped at step {returned['step']}; everything is saved in {run_folder}. Continue with --resume."
        )
    return FitResult(
        run_folder=run_folder,
        step=returned["step"],
        eval_loss=returned["eval_loss"],
        exports=tuple(ExportedFile(**{**file, "path": Path(file["path"])}) for file in returned["exports"]),
    )


def _with_batch_size_found(config: Config, address: str | None, on_event: Callable[[Event], None]) -> Config:
    """What fits is tried out by a task on one of the cluster's GPUs."""
    connect(address)
    on_event({"event": "line", "text": "trying out how many images fit on a GPU"})
    resources = worker_resources("gpu", config.cluster.cpus_per_worker)
    check_room(1, resources, growing=not is_local())

    def find(settings: Event) -> tuple[int, str]:
        from sdxl_ray.train.try_out import find_micro_batch_size

        try:
            return find_micro_batch_size(Config.model_validate(settings)), ""
        except errors.ConfigError as error:
            return 0, str(error)

    task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources["GPU"], max_retries=0)(find)
    found, problem = ray.get(task.remote(config.model_dump(mode="json", exclude_none=True)))
    if problem:
        raise errors.ConfigError(problem)
    config = with_batch_size(config, found)
    text = f"train.micro_batch_size = {config.train.micro_batch_size}, train.accumulation = {config.train.accumulation}"
    on_event({"event": "line", "text": text})
    return config


def _worker_environment() -> dict[str, str]:
    return {
        # Ray Train sets CUDA_VISIBLE_DEVICES for all GPUs of the node while Ray Core sets HIP_VISIBLE_DEVICES to one of
        # them, and HIP wins: "invalid device ordinal" on nodes with several AMD GPUs (ray issue 49260).
        "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Forty bucket shapes fragment the allocator's fixed segments until it runs out although there is room.
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }


def export_lora(run: str | Path, *, step: int | None = None, formats: Sequence[str] = ()) -> tuple[ExportedFile, ...]:
    """Write and verify the LoRA of a run's checkpoint, in this process.

    Args:
        run: the run's folder, or one of its checkpoints.
        step: of the checkpoint; None: the last.
        formats: "kohya", "diffusers"; empty: as the run's config says.

    Raises:
        CheckpointError: no such checkpoint.
        ExportError: a file does not reproduce the trained model.
    """
    from sdxl_ray.sdxl.devices import best_device
    from sdxl_ray.train.finish import export_run
    from sdxl_ray.train.setup import build_training
    from sdxl_ray.train.state import Workers

    run_folder, checkpoint = find_checkpoint(run, step)
    config = load_config(run_folder / "config.toml")
    if formats:
        config = with_overrides(config, {"export.formats": list(formats)})
    data = load_data(config, str(run_folder / "data" / "index.parquet"))
    device = best_device(config.cluster.accelerator)
    training = build_training(config, data, workers=Workers(), device=device, checkpoint=checkpoint)
    is_last = checkpoint == list_checkpoints(run_folder / "checkpoints")[-1]
    name = config.run.name if is_last else f"{config.run.name}-{checkpoint.name}"
    samples = run_folder / "samples" / checkpoint.name
    return tuple(export_run(config, training, run_folder / "export", name=name, sample_folder=samples, started_at=None))
