"""Copies of the metrics for people who live in TensorBoard or Weights & Biases. Opened by rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sdxl_ray.errors import ConfigError


class Tracker(Protocol):
    """A place for numbers and images."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_images(self, step: int, paths: Sequence[Path]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_images(self, step: int, paths: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for path in paths:
            self.writer.add_image(f"validation/{path.stem}", np.asarray(Image.open(path)), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A run at Weights & Biases; its key is read from $WANDB_API_KEY or `wandb login`, never from the config."""

    def __init__(self, project: str, *, name: str, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f'tracking.wandb_project = "{project}" needs wandb: pip install "sdxl-ray[wandb]"'
            ) from None
        # The same id with resume="allow" continues one curve over restarts and --resume.
        self.run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def log_images(self, step: int, paths: Sequence[Path]) -> None:
        import wandb

        self.run.log({f"validation/{path.stem}": wandb.Image(str(path)) for path in paths}, step=step)

    def close(self) -> None:
        self.run.finish()
