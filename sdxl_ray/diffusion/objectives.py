"""What the U-Net is asked to predict. An objective fixes the corruption, the target and the weight of a noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import Weighting


class Objective(Protocol):
    """Tensors are (B, 4, h, w) float32, timesteps (B,) int64."""

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """noisy_latents"""
        ...

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the prediction is compared with."""
        ...

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float32"""
        ...


@dataclass(frozen=True)
class Epsilon:
    """Predict the noise: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, target eps. DDPM, arXiv:2006.11239 eq. 4 and 14."""

    schedule: NoiseSchedule
    weighting: Weighting | None = None  # None: every noise level counts the same

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal_scale, noise_scale = self.schedule.signal_and_noise(timesteps, latents)
        return signal_scale * latents + noise_scale * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.weighting is None:
            return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
        return self.weighting(self.schedule.snr(timesteps))


@dataclass(frozen=True)
class VPrediction(Epsilon):
    """The same corruption, target v = sqrt(abar) eps - sqrt(1 - abar) x_0. arXiv:2202.00512, appendix D."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal_scale, noise_scale = self.schedule.signal_and_noise(timesteps, latents)
        return signal_scale * noise - noise_scale * latents


@dataclass(frozen=True)
class Sample(Epsilon):
    """The same corruption, target x_0 itself. arXiv:2202.00512, section 4, "predicting x"."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents


OBJECTIVES: dict[str, type[Epsilon]] = {"epsilon": Epsilon, "v_prediction": VPrediction, "sample": Sample}
