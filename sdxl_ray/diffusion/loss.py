"""The loss of each sample. Training, the stable eval loss and the tests share this function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdxl_ray.diffusion.objectives import Objective
from sdxl_ray.records import Batch

# (noisy_latents, timesteps, prompt_embeds, pooled_prompt_embeds, add_time_ids) -> prediction; that is,
# `sdxl.conditioning.predict` with its U-Net filled in.
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def diffusion_loss(
    denoise: Denoiser, batch: Batch, objective: Objective, *, timesteps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Weighted mean squared error of each sample, (B,) float32. All randomness comes in as arguments.

    Corruption and comparison are in float32; only the U-Net computes in its own precision.
    Source: DDPM eq. 14 (arXiv:2006.11239) for epsilon.
    """
    noisy_latents = objective.corrupt(batch.latents, noise, timesteps)
    prediction = denoise(noisy_latents, timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.add_time_ids)
    target = objective.target(batch.latents, noise, timesteps)
    squared_error = (prediction.float() - target.float()) ** 2
    return squared_error.flatten(1).mean(1) * objective.weight(timesteps)
