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

    Corruption and comparison are in float32; only the U-Net computes in its own precision. Where the batch has masks,
    the error of a latent pixel is multiplied by its mask before the mean over all pixels: what is masked out teaches
    nothing, and a sample counts for as much as it shows.
    Source: DDPM eq. 14 (arXiv:2006.11239) for epsilon.
    """
    noisy_latents = objective.corrupt(batch.latents, noise, timesteps)
    prediction = denoise(noisy_latents, timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.add_time_ids)
    target = objective.target(batch.latents, noise, timesteps)
    squared_error = (prediction.float() - target.float()) ** 2
    if batch.masks is not None:
        squared_error = squared_error * batch.masks  # (B, 1, h, w): the same for all four channels
    return squared_error.flatten(1).mean(1) * objective.weight(timesteps)
