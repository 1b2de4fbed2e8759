"""The forward process: how much of the image and how much noise there is at each of the 1000 timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_ray.errors import ModelError


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: (T,) float32, from nearly 1 (clean) at t = 0 to nearly 0 (noise) at t = T - 1.

    It lies where the timesteps are, brought there once by `to`: a copy at every lookup would hold up the host.
    """

    alphas_cumprod: torch.Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """From the `scheduler_config.json` of a model. The same arithmetic as diffusers' DDPMScheduler, to the bit.

        Args:
            zero_terminal_snr: rescale the betas even where the model's own config does not say
                `rescale_betas_zero_snr`. Where it does, they are rescaled once, whatever this is.

        Raises:
            ModelError: a beta schedule that no SDXL model uses.
        """
        num_timesteps = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
        kind = config.get("beta_schedule", "scaled_linear")
        if kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, num_timesteps, dtype=torch.float32)
        else:
            raise ModelError(f'scheduler: beta_schedule = "{kind}", expected "scaled_linear" (SDXL) or "linear".')
        if zero_terminal_snr or config.get("rescale_betas_zero_snr", False):
            betas = _with_zero_terminal_snr(betas)
        return cls(torch.cumprod(1.0 - betas, dim=0))

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on another device."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), float32, shaped to multiply `like` (B, ...)."""
        alphas_cumprod = self.alphas_cumprod[timesteps]
        shape = (-1, *([1] * (like.ndim - 1)))
        return (alphas_cumprod**0.5).view(shape), ((1 - alphas_cumprod) ** 0.5).view(shape)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t) of each timestep, (B,) float32; 0 at the end of a rescaled one.

        Always of the schedule that corrupts: kohya's scripts keep the ratios from before the betas were rescaled.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return alphas_cumprod / (1 - alphas_cumprod)


def _with_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """sqrt(abar) shifted and scaled so that nothing of the image is left at T - 1: algorithm 1 of arXiv:2305.08891."""
    signal_scale = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal_scale[0].clone(), signal_scale[-1].clone()
    alphas_cumprod = ((signal_scale - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
