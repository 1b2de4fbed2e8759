"""The driver of a sweep: one cache, then trials that are plain `fit` runs under Ray Tune, stopped early by ASHA.

The cache is built before the first trial and none of the settings it depends on may vary, so no trial encodes anything.
Every evaluation of a trial comes with a checkpoint; the best one of each trial is kept. So the best LoRA of the sweep
is that of the best evaluation of all, also when its trial was stopped or went on to overfit.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from sdxl_ray.cache.generations import in_use
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.config.load import dump_config, with_overrides
from sdxl_ray.config.schema import Config
from sdxl_ray.connection import check_room, connect, is_local, sigterm_as_interrupt, worker_resources
from sdxl_ray.errors import CheckpointError, ConfigError, Interrupted, SdxlRayError, TrainingError, storage_errors
from sdxl_ray.records import ExportedFile
from sdxl_ray.run_folder import list_checkpoints
from sdxl_ray.sweeps.ranking import Trial, as_csv, as_table, rank, read_trials, write_trial
from sdxl_ray.sweeps.search_space import num_samples, to_tune
from sdxl_ray.train.data import build_plan, data_order, load_data
from sdxl_ray.train.folder import claim_folder, inspect_folder, keep_index
from sdxl_ray.train.launch import export_lora, fit

Event = dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has left behind, best trial first."""

    folder: Path
    trials: tuple[Trial, ...]
    best_config_path: Path
    exports: tuple[ExportedFile, ...]

    @property
    def best(self) -> Trial:
        return self.trials[0]

    def table(self) -> str:
        return as_table(self.trials)


def sweep(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> SweepResult:
    """Search the settings named in `config.sweep.parameters` and hand back the best LoRA.

    Args:
        resume: continue the interrupted sweep of this name: finished trials stay, others go on from their checkpoints.
        overwrite: delete the sweep of this name first.

    Raises:
        InputError: before any work.
        Interrupted: SIGINT or SIGTERM; `resume=True` continues.
        TrainingError: every trial failed.
    """
    if not config.sweep.parameters:
        raise ConfigError(
            "sweep.parameters is empty: nothing varies. Name settings by their path, such as\n"
            '  [sweep.parameters]\n  "optimizer.learning_rate" = { loguniform = [1e-5, 1e-3] }'
        )
    folder = Path(config.run.output) / config.run.name
    _inspect_folder(folder, resume=resume, overwrite=overwrite)
    cache = build_cache(
        config,
        progress=lambda stage, done, total: on_event(
            {"event": "progress", "stage": stage, "done": done, "total": total}
        ),
        connect=lambda: connect(address),
    )
    on_event({"event": "cache", "result": cache})
    max_steps = _max_steps(config, cache.index_path)
    connect(address)
    resources = worker_resources(config.cluster.accelerator, config.cluster.cpus_per_worker)
    check_room(config.train.num_workers * config.sweep.max_concurrent, resources, growing=not is_local())
    claim_folder(folder, config, resume=resume)
    tuner = _tuner(config, folder, keep_index(folder, cache.index_path), max_steps, resume=resume)
    _TrialLines.listener = staticmethod(on_event)
    # On Ctrl-C, Tune saves its state and stops its trials.
    with in_use(cache.index_path), sigterm_as_interrupt() as terminated:
        results = tuner.fit()
    trials = rank(read_trials(folder / "trials", max_steps=max_steps))
    if terminated.is_set() or results.num_terminated + results.num_errors < len(results):
        raise Interrupted(f"the sweep was stopped; what its trials have done is in {folder}. Continue with --resume.")
    with storage_errors("writing the ranked table", folder, "Free some space, then use --resume."):
        (folder / "trials.csv").write_text(as_csv(trials), encoding="utf-8")
    if not trials or trials[0].best_loss is None:
        problems = {trial.problem.strip().splitlines()[-1] for trial in trials if trial.problem}
        raise TrainingError(
            f"no trial got as far as an evaluation: {'; '.join(sorted(problems))}. See {folder / 'trials'}."
        )
    on_event({"event": "line", "text": "exporting and verifying the best LoRA"})
    return SweepResult(
        folder=folder,
        trials=tuple(trials),
        best_config_path=_write_best_config(config, trials[0], folder),
        exports=_export_best(config, trials[0], folder),
    )


def run_trial(parameters: dict[str, Any], *, base: dict[str, Any], index_path: str, folder: str) -> None:
    """One Tune trial: the driver of a plain `fit` run. Runs in an actor of Tune's."""
    trial_folder = Path(folder) / "trials" / tune.get_context().get_trial_id()
    config = with_overrides(
        Config.model_validate(base),
        {
            **parameters,
            "run.output": str(trial_folder.parent),
            "run.name": trial_folder.name,
            "checkpoint.every": base["eval"]["every"],  # so that every evaluation can be gone back to
            "checkpoint.keep": 1,
        },
    )
    write_trial(trial_folder, parameters)
    try:
        # After a restart of the sweep, the trial goes on from what it has.
        fit(
            config,
            index_path=index_path,
            resume=bool(list_checkpoints(trial_folder / "checkpoints")),
            callbacks=[TuneReportCallback()],
            export=False,
            keep_best=config.sweep.metric,
        )
    except SdxlRayError as error:
        write_trial(trial_folder, parameters, problem=str(error))
        raise


class _TrialLines(tune.Callback):
    """Results of trials as lines. Tune pickles its callbacks, so the listener is kept beside the instance."""

    listener: ClassVar[Callable[[Event], None]] = staticmethod(lambda event: None)

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self.metric in result:
            self._say(f"trial {trial.trial_id} | step {result['step']} | eval loss {result[self.metric]:.4f}", trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {trial.trial_id} | ended", trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {trial.trial_id} | failed, see trials/{trial.trial_id}", trials)

    def _say(self, text: str, trials: Sequence[Any]) -> None:
        running = sum(trial.status == "RUNNING" for trial in trials)
        ended = sum(trial.is_finished() for trial in trials)
        type(self).listener({"event": "line", "text": f"{text} | {ended} ended, {running} running"})


def _tuner(config: Config, folder: Path, index_path: str, max_steps: int, *, resume: bool) -> tune.Tuner:
    # Ray Tune's loggers write result.json, progress.csv and TensorBoard files of what the trials write already.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables, which verbose=0 does not silence
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            base=config.model_dump(mode="json", exclude_none=True),
            index_path=index_path,
            folder=str(folder),
        ),
        {"CPU": 0.01},  # the trial's own process only waits; its workers ask for what they need
    )
    if resume:
        return tune.Tuner.restore(str(folder / "tune"), trainable=trainable, resume_errored=True)
    settings = config.sweep
    return tune.Tuner(
        trainable,
        param_space=to_tune(settings.parameters),
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode="min",
            num_samples=num_samples(settings.parameters, settings.num_trials),
            # Workers are placed by each trial, not by Tune: without a limit, trials would start and wait for room.
            search_alg=BasicVariantGenerator(max_concurrent=settings.max_concurrent, random_state=config.run.seed),
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=max_steps,
                grace_period=min(settings.grace_steps, max_steps),
                reduction_factor=settings.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_TrialLines(settings.metric)],
        ),
    )


def _inspect_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and not (folder / "tune").exists():
        raise CheckpointError(f"{folder}: no sweep to resume. Leave out --resume to start it.")
    if not resume:
        inspect_folder(folder, resume=False, overwrite=overwrite)
    if not resume and not overwrite and (folder / "tune").exists():
        raise ConfigError(
            f"{folder} holds a sweep. --resume continues it, --overwrite deletes it, run.name=... starts another."
        )


def _max_steps(config: Config, index_path: str) -> int:
    data = load_data(config, index_path)
    if not data.held_out:
        raise ConfigError(
            "eval.holdout leaves no image to evaluate on, and sweep.metric needs an eval loss. Add images or raise it."
        )
    order = data_order(config, data)
    return build_plan(config, order, step=0, position=0, can_evaluate=True).max_steps


def _write_best_config(config: Config, best: Trial, folder: Path) -> Path:
    """The config with the best trial's settings in place of the search: `sdxl-ray train best.toml` repeats it."""
    path = folder / "best.toml"
    changes = {**best.parameters, "run.name": f"{config.run.name}-best", "sweep.parameters": {}}
    text = f"# sdxl-ray train {path.name}\n# eval/loss {best.best_loss:.5f} at step {best.best_step}\n\n"
    with storage_errors("writing the best settings", path, "Free some space, then use --resume."):
        path.write_text(text + dump_config(with_overrides(config, changes)), encoding="utf-8")
    return path


def _export_best(config: Config, best: Trial, folder: Path) -> tuple[ExportedFile, ...]:
    exported = []
    for file in export_lora(best.folder, step=best.best_step):
        suffix = file.path.name.removeprefix(best.name).removeprefix(f"-step_{best.best_step:06d}")
        target = folder / "export" / f"{config.run.name}{suffix}"
        with storage_errors("copying the best LoRA", target, f"Free some space; it is also at {file.path}."):
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.path.is_dir():
                shutil.copytree(file.path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(file.path, target)
        exported.append(dataclasses.replace(file, path=target))
    return tuple(exported)
