"""Metrics, declared once: lowercase `group/name_unit`. metrics.jsonl is always written; everything else is a copy."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from sdxl_ray.errors import storage_errors

METRICS: dict[str, str] = {
    "train/loss": "weighted loss of the step, over the global batch",
    "train/loss_scale": "with fp16: what the loss is multiplied by before the backward pass",
    "train/grad_norm": "norm of the adapter's gradient before clipping",
    "train/learning_rate": "of this step",
    "train/epoch": "passes over the training images so far",
    "perf/images_per_s": "of all workers together, since the last line",
    "perf/step_s": "seconds per optimizer step",
    "perf/data_wait_share": "share of the time that rank 0 waited for data",
    "memory/peak_gib": "most memory that the accelerator of rank 0 has held",
    "eval/loss": "mean over the held-out images at fixed noise and noise levels",
    "eval/loss_t000_250": "the same, nearly clean images only",
    "eval/loss_t250_500": "the same",
    "eval/loss_t500_750": "the same",
    "eval/loss_t750_1000": "the same, nearly pure noise only",
}


class MetricsFile:
    """metrics.jsonl: one JSON object a line, with `step` and `time`. On resume, lines after the checkpoint go."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        temporary = path.with_name(f".tmp-{path.name}")
        with storage_errors("opening metrics.jsonl", path, "Free some space and use --resume."):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:  # moved over the old one only when whole: a full disk must not cost the run its history
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with storage_errors("writing metrics.jsonl", self.path, "Free some space and use --resume."):  # noqa: SIM117
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def progress_line(step: int, max_steps: int, values: Mapping[str, float], *, memory_total_gib: float = 0.0) -> str:
    """One fixed-width line that a person can grep:
    `step  120/2000 | loss 0.1123 | grad 0.83 | lr 1.0e-04 | 3.1 img/s | data 2% | mem 21.4/79.1 GiB | eta 14m02s`"""
    width = len(str(max_steps))
    parts = [
        f"step {step:>{width}}/{max_steps}",
        f"loss {values['train/loss']:.4f}",
        f"grad {values['train/grad_norm']:.2f}",
        f"lr {values['train/learning_rate']:.1e}",
        f"{values['perf/images_per_s']:.1f} img/s",
        f"data {values['perf/data_wait_share']:.0%}",
    ]
    if "memory/peak_gib" in values:
        total = f"/{memory_total_gib:.1f}" if memory_total_gib else ""
        parts.append(f"mem {values['memory/peak_gib']:.1f}{total} GiB")
    parts.append(f"eta {duration((max_steps - step) * values['perf/step_s'])}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`48s`, `14m02s`, `3h07m`"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
