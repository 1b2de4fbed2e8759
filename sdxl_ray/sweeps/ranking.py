"""What the trials of a sweep came to, read from what each left on disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_ray.errors import storage_errors
from sdxl_ray.run_folder import checkpoint_name
from sdxl_ray.tracking.metrics import read_metrics


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. `best_loss` is its lowest eval loss after training began, at `best_step`."""

    name: str
    folder: Path
    parameters: Mapping[str, Any]
    outcome: str  # "finished", "stopped early", "failed"
    last_step: int
    best_step: int
    best_loss: float | None
    problem: str = ""


def write_trial(folder: Path, parameters: Mapping[str, Any], *, problem: str = "") -> None:
    """A .json beside the trial's folder: what it tries, and why it failed if it did."""
    with storage_errors("writing down a trial", folder, "Free some space, then use --resume."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"parameters": dict(parameters), "problem": problem}, indent=2)
        folder.with_suffix(".json").write_text(text, encoding="utf-8")


def read_trials(folder: Path, *, max_steps: int) -> list[Trial]:
    """Every trial below `folder`, as its files tell it."""
    return [_read_trial(path, max_steps) for path in sorted(folder.glob("*.json"))]


def _read_trial(description_path: Path, max_steps: int) -> Trial:
    description = json.loads(description_path.read_text(encoding="utf-8"))
    folder = description_path.with_suffix("")
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    # a checkpoint is needed to hand back the LoRA; the evaluation before the first step has none
    evaluations = [(line["eval/loss"], int(line["step"])) for line in lines if "eval/loss" in line and line["step"] > 0]
    saved = [each for each in evaluations if (folder / "checkpoints" / checkpoint_name(each[1])).exists()]
    best_loss, best_step = min(saved, default=(None, 0))
    last_step = int(max((line["step"] for line in lines), default=0))
    outcome = "failed" if description["problem"] else "finished" if last_step >= max_steps else "stopped early"
    return Trial(
        folder.name, folder, description["parameters"], outcome, last_step, best_step, best_loss, description["problem"]
    )


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """Best first; those without any evaluation last."""
    return sorted(
        trials,
        key=lambda trial: (
            trial.best_loss is None,
            trial.best_loss if trial.best_loss is not None else 0.0,
            trial.name,
        ),
    )


def as_table(trials: Sequence[Trial]) -> str:
    """Aligned text, best first."""
    return _aligned(
        [["rank", *_header(trials)], *([str(place), *_row(trial)] for place, trial in enumerate(trials, 1))]
    )


def as_csv(trials: Sequence[Trial]) -> str:
    """The same for spreadsheets."""
    text = io.StringIO()
    csv.writer(text).writerows(
        [["rank", *_header(trials)], *([place, *_row(trial)] for place, trial in enumerate(trials, 1))]
    )
    return text.getvalue()


def _header(trials: Sequence[Trial]) -> list[str]:
    parameters = list(trials[0].parameters) if trials else []
    return ["eval/loss", "at step", "steps", *parameters, "outcome", "trial"]


def _row(trial: Trial) -> list[str]:
    loss = "" if trial.best_loss is None else f"{trial.best_loss:.5f}"
    values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.parameters.values()]
    return [loss, str(trial.best_step), str(trial.last_step), *values, trial.outcome, trial.name]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows
    )
