"""A run's folder: whose it is, what is written down at the start, which checkpoints stay.

runs/my/config.toml        as resolved
        environment.json   versions, and the id that marks the folder as a run's
        data/              index and manifest as they were at the start, so that workers need no other copy
        checkpoints/       step_NNNNNN, and Ray Train's own list of them
"""

from __future__ import annotations

import json
import platform
import secrets
import shutil
from importlib.metadata import version
from pathlib import Path

import sdxl_ray
from sdxl_ray.cache.generations import MANIFEST
from sdxl_ray.config.load import dump_config
from sdxl_ray.config.schema import Config
from sdxl_ray.errors import CheckpointError, ConfigError, storage_errors
from sdxl_ray.run_folder import list_checkpoints
from sdxl_ray.storage import read_bytes
from sdxl_ray.train.checkpoints import read_progress

_RAY_NOTES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "safetensors", "numpy", "pillow")


def inspect_folder(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, or None for a new run. Touches nothing.

    Raises:
        CheckpointError: nothing to resume.
        ConfigError: the folder holds a run that would be lost, or something that is no run at all.
    """
    found = list_checkpoints(folder / "checkpoints")
    if resume:
        if not found:
            raise CheckpointError(
                f"{folder / 'checkpoints'}: no checkpoint to resume from. Leave out --resume to start the run."
            )
        return found[-1]
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise ConfigError(
            f"{folder} is not empty and not a run of sdxl-ray (no environment.json with a run_id), so nothing is "
            "written into it or deleted. Choose another run.name or run.output."
        )
    if found and not overwrite:
        step = read_progress(found[-1])["step"]
        raise ConfigError(
            f"{folder} holds a run with a checkpoint of step {step}. --resume continues it, "
            "--overwrite deletes it, run.name=... starts another."
        )
    return None


def is_ours(folder: Path) -> bool:
    """Whether an earlier run or sweep marked this folder as its own; nothing else may be deleted."""
    try:
        return "run_id" in json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def claim_folder(folder: Path, config: Config, *, resume: bool) -> None:
    """Make the folder this run's: what an earlier run of the name left goes, unless it is resumed.

    Called when everything that can be refused has been checked.
    """
    if not resume and is_ours(folder):
        shutil.rmtree(folder)
    if resume:
        # Ray insists that every checkpoint in its list still exists. Which one to continue from is ours to say, so it
        # starts a new list; retention of the old ones is `prune_checkpoints`.
        for name in _RAY_NOTES:
            (folder / "checkpoints" / name).unlink(missing_ok=True)
    record = folder / "environment.json"
    run_id = json.loads(record.read_text(encoding="utf-8"))["run_id"] if is_ours(folder) else secrets.token_hex(4)
    environment = {
        "run_id": run_id,
        "sdxl_ray": sdxl_ray.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    with storage_errors("starting the run", folder, "Free some space or choose another run.output."):
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(environment, indent=2), encoding="utf-8")
        (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")


def keep_index(folder: Path, index_path: str) -> str:
    """Copy index and manifest into the run's folder; the copy's path. Workers that restart, and exports years later,
    read what the run began with, also when the cache has forgotten it.
    """
    target = folder / "data"
    source, _, name = index_path.rpartition("/")
    with storage_errors("copying the index", target, "Free some space or choose another run.output."):
        target.mkdir(parents=True, exist_ok=True)
        for each in (name, MANIFEST):
            (target / each).write_bytes(read_bytes(f"{source}/{each}"))
    return str(target / name)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Ray deletes the checkpoints it knows; those from before a resume and orphans of a killed run are ours."""
    for path in list_checkpoints(folder / "checkpoints")[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
