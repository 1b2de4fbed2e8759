"""One rank of a Ray Train run: build everything, call the loop, export. Ray Train starts `train_worker` on every rank,
and again after a failure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from sdxl_ray.cache.store import LATE_S
from sdxl_ray.config.schema import Config
from sdxl_ray.errors import CacheError, SdxlRayError, TrainingError
from sdxl_ray.run_folder import checkpoint_name
from sdxl_ray.sdxl.adapters import adapter_disabled
from sdxl_ray.sdxl.components import load_vae, objective_warning, resolve_model
from sdxl_ray.tracking.metrics import MetricsFile
from sdxl_ray.tracking.trackers import TensorBoardTracker, Tracker, WandbTracker
from sdxl_ray.train.checkpoints import save_checkpoint
from sdxl_ray.train.data import load_data, run_identity
from sdxl_ray.train.finish import export_run
from sdxl_ray.train.loop import run
from sdxl_ray.train.setup import Training, build_training, validation_prompts
from sdxl_ray.train.state import TrainState, Workers
from sdxl_ray.train.validation import draw_share, read_prompts

_STOP_POLL_S = 0.5
_TELL_S = 60.0


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Train as one rank; rank 0 returns {"finished", "step", "eval_loss", "exports"}.

    Args:
        settings: "config" (a dumped Config), "index_path", "run_folder", "resume_from" (a checkpoint or ""),
            "monitor" (actor handle), "export" (whether to write LoRA files at the end).
    """
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size())
    monitor = settings["monitor"]
    if ray.get(monitor.fatal_error.remote()):
        return None  # Ray restarts workers after every error; this one would only come again, and the driver knows it
    try:
        try:
            return _train(config, workers, settings)
        except torch.OutOfMemoryError as error:
            raise TrainingError(_out_of_memory(config, workers, error)) from error
    except SdxlRayError as error:
        ray.get(monitor.report_fatal.remote(type(error).__name__, str(error)))
        raise


def _train(config: Config, workers: Workers, settings: dict[str, Any]) -> dict[str, Any] | None:
    run_folder = Path(settings["run_folder"])
    started_at = time.time()
    monitor = settings["monitor"]
    data = load_data(
        config, settings["index_path"], wait=_Waiting(monitor) if config.cache.mode == "ondemand" else None
    )
    checkpoint = _latest(settings["resume_from"], ray.train.get_checkpoint())
    if workers.world_rank == 0:
        monitor.post.remote(json.dumps({"event": "line", "text": f"loading {config.model.path}"}))
    training = build_training(
        config,
        data,
        workers=workers,
        device=get_device(),
        checkpoint=checkpoint,
        report=lambda text: monitor.post.remote(json.dumps({"event": "line", "text": f"note: {text}"})),
    )
    report = RayReporter(config, training, run_folder, monitor)
    try:
        report.started(checkpoint)
        finished = run(
            training.state,
            training.plan,
            training.batches(),
            training.objective,
            report,
            training.evaluate if data.held_out else None,
            training.form,
        )
        exports: Sequence[Any] = []
        if finished and settings["export"] and workers.world_rank == 0:  # nothing collective from here on
            report.post(event="line", text="exporting and verifying the LoRA")
            exports = export_run(
                config,
                training,
                run_folder / "export",
                name=config.run.name,
                sample_folder=run_folder / "samples" / checkpoint_name(training.state.step),
                started_at=started_at,
            )
    finally:
        report.close()
    if workers.world_rank != 0:
        return None
    return {
        "finished": finished,
        "step": training.state.step,
        "eval_loss": training.state.last_eval_loss,
        "exports": [dataclasses.asdict(file) | {"path": str(file.path)} for file in exports],
    }


class _Waiting:
    """Called again and again while a shard is still to be encoded (cache.mode = "ondemand")."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self._since: dict[str, float] = {}
        self._told: set[str] = set()

    def __call__(self, shard: str) -> None:
        """Go on waiting, or hear that it is in vain.

        Raises:
            CacheError: encoding has failed; or it is over, and the shard is not where this worker looks for it.
        """
        waited = time.monotonic() - self._since.setdefault(shard, time.monotonic())
        fatal, done = ray.get(self.monitor.encoding_state.remote())
        if fatal:
            raise CacheError(f"{shard} will not come: {fatal[1]}")
        if done and waited > LATE_S:
            raise CacheError(
                f"everything is encoded, and {shard} is not there for the worker on {socket.gethostname()}. Is "
                "cache.path the same folder on all machines, and has nobody deleted from it?"
            )
        if waited > _TELL_S and shard not in self._told:
            self._told.add(shard)
            text = f"waiting for {shard} to be encoded"
            self.monitor.post.remote(json.dumps({"event": "line", "text": text}))


def _out_of_memory(config: Config, workers: Workers, error: Exception) -> str:
    train = config.train
    cures = ['train.gradient_checkpointing = "transformer" or "full"', "a smaller dataset.resolution"]
    if train.micro_batch_size > 1:
        smaller = f"train.micro_batch_size = {train.micro_batch_size // 2}"
        cures.insert(0, f"{smaller} with train.accumulation = {2 * train.accumulation}")
    return (
        f"worker {workers.world_rank} ran out of memory on its accelerator with train.micro_batch_size = "
        f'{train.micro_batch_size}, train.gradient_checkpointing = "{train.gradient_checkpointing}", '
        f"dataset.resolution = {config.largest_edge}. Try {', or '.join(cures)}. Images drawn while training "
        f"need memory too (validation.prompts). {str(error).splitlines()[0]}"
    )


def _latest(resume_from: str, from_ray: Checkpoint | None) -> Path | None:
    """The later of the checkpoint that the driver found and the one that Ray kept over a restart of the workers.

    By name, reading neither: every rank comes to the same answer, and the earlier one may have been deleted by now.
    """
    candidates = [Path(path) for path in (resume_from, from_ray.path if from_ray else "") if path]
    return max(candidates, key=lambda path: int(path.name.removeprefix("step_")), default=None)


class RayReporter:
    """The loop's results to metrics.jsonl, trackers, the driver's display, and Ray Train.

    `ray.train.report` is a barrier that takes up to one poll of the controller, so it is called at evaluations and
    checkpoints only; numbers go straight to their files.
    """

    def __init__(self, config: Config, training: Training, run_folder: Path, monitor: Any) -> None:
        self.config = config
        self.training = training
        self.run_folder = run_folder
        self.monitor = monitor
        self.workers = training.state.workers
        self.is_first = self.workers.world_rank == 0
        self.identity = run_identity(config, training.data)
        self.prompts = None if training.state.text else validation_prompts(config, training.data)
        self.vae: Any = None
        self.last_eval: dict[str, float] = {}
        self.metrics_file: MetricsFile | None = None
        self.trackers: list[Tracker] = []
        self._stop = threading.Event()
        self._closed = threading.Event()
        if self.is_first:
            self.metrics_file = MetricsFile(run_folder / "metrics.jsonl", resume_step=training.state.step or -1)
            self.trackers = _open_trackers(config, run_folder)
            threading.Thread(target=self._watch_for_stop, daemon=True).start()

    # ---- the loop's side

    def started(self, checkpoint: Path | None) -> None:
        """Before the first step: where it begins; the base model's own loss and images, to compare. Collective."""
        state, plan = self.training.state, self.training.plan
        self.post(
            event="started",
            step=state.step,
            max_steps=plan.max_steps,
            checkpoint=str(checkpoint) if checkpoint else "",
            memory_total_gib=_memory_total_gib(state.device),
            num_train=len(self.training.data.train),
            num_held_out=len(self.training.data.held_out),
            num_left_out=self.training.data.num_left_out,
        )
        warning = objective_warning(self.config.loss.objective, self.training.scheduler_config)
        if warning:
            self.post(event="line", text=f"note: {warning}")
        if state.step > 0:
            return
        if self.training.data.held_out:
            self._write(0, self.training.evaluate())
        if self.config.validation.prompts:
            with self._base_model():
                self._draw(self.run_folder / "samples" / "base", 0)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._write(step, values)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.last_eval = values
        self._write(step, values)
        if not self.training.plan.save.due(step):  # else the checkpoint's report carries the numbers
            ray.train.report({"step": step, **values})

    def images(self, step: int) -> None:
        self._draw(self.run_folder / "samples" / checkpoint_name(step), step)

    def checkpoint(self, step: int, state: TrainState) -> None:
        saved = None
        if self.is_first:
            folder = self.run_folder / "checkpoints"
            saved = Checkpoint(str(save_checkpoint(folder, state, self.identity)))
            self.post(event="checkpoint", step=step)
        # Already in its place, whole, by a rename; Ray only keeps the list and deletes old ones.
        ray.train.report(
            {"step": step, **self.last_eval},
            checkpoint=saved,
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def asked_to_stop(self) -> bool:
        return self._stop.is_set()

    # ---- inside

    def post(self, **event: Any) -> None:
        """To the driver's display; nobody waits for it."""
        if self.is_first:
            self.monitor.post.remote(json.dumps(event))

    def close(self) -> None:
        self._closed.set()
        for tracker in self.trackers:
            tracker.close()

    @contextlib.contextmanager
    def _base_model(self) -> Iterator[None]:
        """Where the U-Net itself is trained, it is the base model before the first step."""
        state = self.training.state
        with contextlib.ExitStack() as stack:
            if self.config.adapter.kind != "full":
                stack.enter_context(adapter_disabled(state.unet))
            if state.text is not None:
                stack.enter_context(state.text.disabled())
            yield

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.metrics_file is not None:
            self.metrics_file.write(step, values)
            for tracker in self.trackers:
                tracker.log(step, values)
            self.post(event="metrics", step=step, max_steps=self.training.plan.max_steps, values=values)

    def _draw(self, folder: Path, step: int) -> None:
        """Each rank its share of the prompts; then all wait, so that rank 0 can show every image. Collective."""
        settings, state = self.config.validation, self.training.state
        prompts = self.prompts
        if state.text is not None:  # what they say about the prompts changes while they learn
            prompts = read_prompts(settings.prompts, settings.negative_prompt, state.text.prompt)
        assert prompts is not None
        if self.vae is None:
            model, revision = resolve_model(self.config.model.path), self.config.model.revision or None
            # fp32: a single small forward pass, and some SDXL VAEs overflow below it
            variant = self.config.model.variant or None
            self.vae = load_vae(model, dtype=torch.float32, device=state.device, revision=revision, variant=variant)
        draw_share(
            state.unet,
            self.vae,
            self.training.scheduler_config,
            prompts,
            folder,
            world_rank=self.workers.world_rank,
            world_size=self.workers.world_size,
            height_width=(settings.height, settings.width),
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
            prediction_type=self.config.loss.objective,
        )
        self.workers.sum(torch.zeros(1, device=state.device))
        paths = sorted(folder.glob("*.png"))
        for tracker in self.trackers:
            tracker.log_images(step, paths)
        self.post(event="images", step=step, folder=str(folder), count=len(paths))

    def _watch_for_stop(self) -> None:
        while not self._closed.wait(_STOP_POLL_S):
            try:
                if ray.get(self.monitor.stop_requested.remote(), timeout=10):
                    self._stop.set()
                    return
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                continue
            except ray.exceptions.RayActorError:  # nobody hears of this run any more
                self._stop.set()
                return
            except ray.exceptions.RayError:  # the driver is gone; Ray is about to end this worker too
                return


def _open_trackers(config: Config, run_folder: Path) -> list[Tracker]:
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(run_folder / "tensorboard"))
    if config.tracking.wandb_project:
        trackers.append(
            WandbTracker(
                config.tracking.wandb_project,
                name=config.run.name,
                run_id=json.loads((run_folder / "environment.json").read_text())["run_id"],
                folder=run_folder,
                config=config.model_dump(mode="json"),
            )
        )
    return trackers


def _memory_total_gib(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
