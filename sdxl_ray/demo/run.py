"""`sdxl-ray demo`: every stage once, on a small model with random weights, without network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from sdxl_ray.config.load import config_from_dict
from sdxl_ray.config.schema import Config
from sdxl_ray.sdxl.sampling import side_by_side
from sdxl_ray.tracking.console import Console
from sdxl_ray.tracking.display import RunDisplay
from sdxl_ray.train.launch import FitResult, fit

PROMPTS = ("a cup of coffee on a table", "portrait of a cat")


def demo_config(folder: Path) -> Config:
    """The settings of configs/demo.toml, with everything below one folder."""
    settings: dict[str, Any] = {
        "run": {"name": folder.name, "output": str(folder.parent)},
        "model": {"path": "builtin:tiny", "dtype": "fp32"},
        "dataset": {"path": "builtin:photographs", "resolution": 128, "bucket_step": 32},
        "cache": {"path": str(folder.parent / f"{folder.name}-cache"), "vae_dtype": "fp32"},
        "adapter": {"rank": 8},
        "train": {"duration": "20 steps", "micro_batch_size": 2, "num_workers": 2, "log_every": 2},
        "optimizer": {"learning_rate": 5e-3},
        "eval": {"holdout": 0.15, "every": "10 steps"},
        "validation": {"prompts": PROMPTS, "every": "20 steps", "num_steps": 8, "height": 128, "width": 128},
        "checkpoint": {"every": "10 steps"},
        "cluster": {"accelerator": "cpu"},
    }
    return config_from_dict(settings)


def run_demo(folder: Path, *, console: Console, address: str | None = None) -> FitResult:
    """Cache, train on two workers, evaluate, draw with and without the LoRA, export, verify; say where it all is."""
    config = demo_config(folder.absolute())
    console.line("A small SDXL with random weights, 21 photographs, two workers on the CPU: every stage once.")
    console.line("What it draws is noise, because the model has never learnt anything.")
    console.line()
    run_folder = Path(config.run.output) / config.run.name
    result = fit(
        config,
        overwrite=True,  # a demo can be run again
        address=address,
        on_event=RunDisplay(console),
        on_folder=lambda: console.log_to(run_folder / "log.txt"),
    )
    comparison = _compare(run_folder, result.step)
    console.line()
    console.line("Everything is here:")
    for file in result.exports:
        note = "ComfyUI, A1111, Forge, InvokeAI" if file.format == "kohya" else "diffusers"
        console.line(f"  LoRA         {file.path}  ({note}; verified, relative error {file.relative_error:.1e})")
    console.line(f"  images       {comparison}  (without and with the LoRA)")
    console.line(f"  checkpoints  {run_folder / 'checkpoints'}")
    console.line(f"  metrics      {run_folder / 'metrics.jsonl'}  (or: tensorboard --logdir {run_folder})")
    console.line(f"  settings     {run_folder / 'config.toml'}")
    console.line(f"  cache        {config.cache.path}  (a second run encodes nothing)")
    console.line()
    activate = "" if shutil.which("sdxl-ray") else f", after `. {Path(sys.prefix) / 'bin' / 'activate'}`"
    console.line(f"Next, with your own images and a GPU{activate}:")
    console.line("  sdxl-ray init my.toml        # then set dataset.path in it")
    console.line("  sdxl-ray check my.toml       # what it would do and need")
    console.line("  sdxl-ray train my.toml")
    return result


def _compare(run_folder: Path, step: int) -> Path:
    """The validation images of the base model and of the last step, side by side."""
    from PIL import Image

    base = sorted((run_folder / "samples" / "base").glob("*.png"))
    trained = [run_folder / "samples" / f"step_{step:06d}" / path.name for path in base]
    rows = [[Image.open(before), Image.open(after)] for before, after in zip(base, trained, strict=True)]
    path = run_folder / "samples" / "comparison.png"
    side_by_side(rows, ["base model", "with the LoRA"], list(PROMPTS)).save(path)
    return path
