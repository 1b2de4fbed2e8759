"""What lies where in a run's folder, for those who write it and those who read it. No torch, no Ray.

runs/<name>/config.toml   environment.json   metrics.jsonl   report.html   export/   samples/step_000500/
            checkpoints/step_000500/   adapter.safetensors   optimizer.pt   state.json, written last
"""

from __future__ import annotations

import re
from pathlib import Path

from sdxl_ray.errors import CheckpointError

CONFIG_FILE = "config.toml"
CHECKPOINT_FOLDER = "checkpoints"
EXPORT_FOLDER = "export"

STATE_FILE = "state.json"
START_FILE = "start.safetensors"
AVERAGE_FILE = "averaged.safetensors"
ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


def checkpoint_name(step: int) -> str:
    """`step_000500`, so that names sort like steps."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int | None:
    """The step in a checkpoint's name; None for anything else, such as `step_foo` or a copy `step_000500 (1)`."""
    found = re.fullmatch(r"step_(\d{6,})", path.name)
    return int(found[1]) if found else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: those with a state.json, which is written last."""
    steps = {path: checkpoint_step(path) for path in folder.glob("step_*") if (path / STATE_FILE).is_file()}
    complete = [(step, path) for path, step in steps.items() if step is not None]
    return [path for _, path in sorted(complete)]


def find_checkpoint(run: str | Path, step: int | None = None) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a run's folder or of one of its checkpoints.

    Args:
        step: of the checkpoint; None: the last, or the one that `run` is.

    Raises:
        CheckpointError: there is none or it is not complete, with those that are.
    """
    path = Path(run).expanduser()
    run_folder = path.parent.parent if is_in_checkpoints(path) else path
    found = list_checkpoints(run_folder / CHECKPOINT_FOLDER)
    if is_in_checkpoints(path):
        if path in found and step in (None, checkpoint_step(path)):
            return run_folder, path
        wanted = f"no complete checkpoint {path.name}" + (f" of step {step}" if step is not None else "")
    else:
        fitting = [each for each in found if step is None or checkpoint_step(each) == step]
        if fitting:
            return run_folder, fitting[-1]
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    have = ", ".join(each.name for each in found) or "none"
    raise CheckpointError(f"{run_folder}: {wanted}. Found: {have}.")


def is_in_checkpoints(path: Path) -> bool:
    """Whether `path` is meant as one checkpoint of a run, rather than as the run."""
    return path.parent.name == CHECKPOINT_FOLDER and path.name.startswith("step_")
