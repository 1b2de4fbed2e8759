"""train.micro_batch_size = "auto": the largest that fits, found out on one of the GPUs before the run.

A step on made-up images of the largest size that may come, with everything that takes memory in a real one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.config.load import load_config, with_overrides
from sdxl_ray.errors import ConfigError
from sdxl_ray.run_folder import CONFIG_FILE
from sdxl_ray.train.batch_size import global_batch, largest_micro_batch

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


def with_batch_size(config: Config, micro_batch_size: int) -> Config:
    """The config with numbers for "auto": accumulation follows, so that a step has train.global_batch_size images.

    Raises:
        ConfigError: the workers cannot share the global batch alike.
    """
    train = config.train
    micro_batch_size, accumulation = global_batch(micro_batch_size, train.num_workers, train.global_batch_size)
    return with_overrides(
        config,
        {
            "train.micro_batch_size": micro_batch_size,
            "train.accumulation": accumulation,
            "train.global_batch_size": 0,
        },
    )


def from_earlier_run(config: Config, run_folder: Path) -> Config:
    """The config with the micro-batch that the run began with, which a resumed run has to have too.

    Raises:
        ConfigError: the workers, of which there may be others now, cannot share the global batch in such pieces.
    """
    before, train = load_config(run_folder / CONFIG_FILE).train.micro_batch_size, config.train
    changed = with_batch_size(config, before)
    if changed.train.micro_batch_size != before:
        raise ConfigError(
            f"train.global_batch_size = {train.global_batch_size} cannot be shared by train.num_workers = "
            f"{train.num_workers} in micro-batches of {before}, with which {run_folder} began. Set "
            f"train.global_batch_size to a multiple of {before * train.num_workers}, or the number of workers back."
        )
    return changed


def find_micro_batch_size(config: Config) -> int:
    """The largest that fits on this process's GPU, at most what one worker has to do in a step.

    Raises:
        ConfigError: there is no GPU, or not even one image fits.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            'train.micro_batch_size = "auto" tries out what fits on a GPU, and there is none here. Give a number.'
        )
    limit = max(1, config.train.global_batch_size // config.train.num_workers)
    found = largest_micro_batch(_Trial(config, torch.device("cuda")), limit=limit)
    if not found:
        raise ConfigError(
            "not even one image fits into the memory of the GPU. Try train.gradient_checkpointing = "
            f'"full", model.quantize = "int8", or a smaller dataset.resolution than {config.largest_edge}.'
        )
    return found


class _Trial:
    """Whether a training step with so many images fits. The model is loaded once."""

    def __init__(self, config: Config, device: Any) -> None:
        from sdxl_ray.train.setup import build_state

        self.config = config
        self.device = device
        self.state = build_state(with_batch_size(config, 1), device)

    def __call__(self, micro_batch_size: int) -> bool:
        from sdxl_ray.train.batch_size import fits_on_cuda

        return fits_on_cuda(lambda: self.step(micro_batch_size))

    def step(self, micro_batch_size: int) -> None:
        from sdxl_ray.diffusion.loss import diffusion_loss
        from sdxl_ray.diffusion.objectives import Epsilon
        from sdxl_ray.diffusion.schedule import NoiseSchedule
        from sdxl_ray.train.order import MicroBatch
        from sdxl_ray.train.synthetic import synthetic_batch

        for parameter in self.state.masters.parameters.values():  # of a try that ended half-way
            parameter.grad = None
        edge = 64 * math.ceil(self.config.largest_edge / 64)
        rows = tuple(range(micro_batch_size))
        micro_batch = MicroBatch(number=0, epoch=0, rows=rows, repeats=(0,) * micro_batch_size)
        batch = synthetic_batch(
            self.state.unet.config,
            micro_batch,
            resolution_hw=(edge, edge),
            num_chunks=self.config.cache.caption_chunks,
            encodes_text=self.state.text is not None,
        ).to(self.device)
        objective = Epsilon(NoiseSchedule.from_config({}).to(self.device))
        batch = self.state.conditioned(batch)
        losses = diffusion_loss(self.state.denoise, batch, objective, timesteps=batch.timesteps, noise=batch.noise)
        losses.sum().backward()
        self.state.masters.accumulate()
        self.state.optimizer.step()
        self.state.masters.zero()
