"""What a run can continue from, written whole or not at all.

checkpoints/step_000500/adapter.safetensors   fp32 masters, by the module they belong to; those of text encoders begin
                                              with "text_encoder." or "text_encoder_2."
                        averaged.safetensors  the same of what is exported instead: the moving average, or what a
                                              schedule-free optimizer makes of the masters; only where there is one
                        start.safetensors     what PiSSA and OLoRA began with; only with these
                        optimizer.pt          torch state dict, read back with weights_only=True
                        state.json            step, position, and what the run was made with; written last
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import CheckpointError, ConfigError, storage_errors
from sdxl_ray.run_folder import ADAPTER_FILE, AVERAGE_FILE, OPTIMIZER_FILE, START_FILE, STATE_FILE, checkpoint_name

if TYPE_CHECKING:
    from sdxl_ray.train.state import TrainState


def save_checkpoint(folder: Path, state: TrainState, identity: Mapping[str, Any]) -> Path:
    """Write `folder`/step_NNNNNN and return it. The folder appears under its name only when every file is in it.

    Args:
        identity: settings that a resumed run has to share; see `check_resumable`.

    Raises:
        StorageError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    import safetensors.torch
    import torch

    saved = state.state_dict()
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    with storage_errors("saving a checkpoint", final, "Free some space, then continue with --resume."):
        try:
            temporary.mkdir(parents=True)
            # Into memory, then written by Python: on a full disk torch.save says "basic_ios::clear: iostream error" or
            # "unexpected pos 576 vs 534", and nothing tells that from another failure.
            optimizer = io.BytesIO()
            torch.save(saved["optimizer"], optimizer)
            progress = {**saved["progress"], "identity": dict(identity)}
            _write(temporary / ADAPTER_FILE, safetensors.torch.save(saved["adapter"]))
            for name, part in ((AVERAGE_FILE, "average"), (START_FILE, "start")):
                if saved[part] is not None:
                    _write(temporary / name, safetensors.torch.save(saved[part]))
            _write(temporary / OPTIMIZER_FILE, optimizer.getbuffer())
            _write(temporary / STATE_FILE, json.dumps(progress, indent=2).encode())
            if final.exists():  # the same step again, after a restart from an earlier one
                final.rename(folder / f".tmp-{uuid.uuid4().hex}")
            temporary.rename(final)
        finally:
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
    return final


def _write(path: Path, content: bytes | memoryview) -> None:
    """On the disk, not only in its cache, before the rename that says so: a power cut must not leave a hollow file."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `TrainState.load_state_dict` takes.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    progress = read_progress(path)
    try:
        return {
            "adapter": load_file(path / ADAPTER_FILE),
            "average": load_file(path / AVERAGE_FILE) if (path / AVERAGE_FILE).exists() else None,
            "start": load_file(path / START_FILE) if (path / START_FILE).exists() else None,
            "optimizer": torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True),
            "progress": progress,
        }
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: damaged or incomplete ({error}). Delete this folder to continue from the one before it."
        ) from None


def read_progress(path: Path) -> dict[str, Any]:
    """The contents of state.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no readable {STATE_FILE} ({error}); expected a checkpoint of sdxl-ray."
        ) from None
    return progress


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], run: Path) -> None:
    """A resumed run has to be the same run: what decides the data, the noise and the weights may not change.

    Raises:
        ConfigError: with every setting that differs.
    """
    changed = [key for key in {**current, **saved} if saved.get(key) != current.get(key)]
    if not changed:
        return

    def said(identity: Mapping[str, Any], key: str) -> str:
        return repr(identity[key]) if key in identity else "the default"

    lines = "\n".join(
        f"  {key}: the checkpoint has {said(saved, key)}, the config says {said(current, key)}" for key in changed
    )
    raise ConfigError(
        f"{run} cannot be resumed with these settings:\n{lines}\nSet them back, or start another run with run.name=..."
    )
