"""The loss of each sample. Training, the stable eval loss and the tests share this function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdxl_ray.diffusion.distances import Distance, mse
from sdxl_ray.diffusion.objectives import Objective
from sdxl_ray.records import Batch

# (noisy_latents, timesteps, prompt_embeds, pooled_prompt_embeds, add_time_ids) -> prediction; that is,
# `sdxl.conditioning.predict` with its U-Net filled in.
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossForm:
    """How the error of each latent pixel becomes the loss of a sample.

    distance        of a prediction from its target, see distances.py
    mask_normalize  divide by the mean of the mask, so that a small mask teaches as much as a large one
    unmasked_share  how much a pixel counts that is masked out, 0 to 1
    """

    distance: Distance = mse
    mask_normalize: bool = False
    unmasked_share: float = 0.0


def diffusion_loss(
    denoise: Denoiser,
    batch: Batch,
    objective: Objective,
    *,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    form: LossForm = LossForm(),
    parent: Denoiser | None = None,
) -> torch.Tensor:
    """Weighted mean error of each sample, (B,) float32. All randomness comes in as arguments.

    Corruption and comparison are in float32; only the U-Net computes in its own precision. Where the batch has masks,
    the error of a latent pixel is multiplied by its mask before the mean over all pixels: what is masked out teaches
    nothing, and a sample counts for as much as it shows, unless `form` says otherwise.
    Source: DDPM eq. 14 (arXiv:2006.11239) for epsilon.

    Where the batch has a perturbation, the U-Net sees noise + perturbation and is asked for what belongs to the noise
    alone (arXiv:2301.11706, algorithm 1).

    Args:
        parent: the model as it was before training. Its prediction, for the same input and conditions, is the target
            of the rows in `batch.from_parent`. It is called at most once, on those rows only, and without gradient.
            Without it, or without such rows, nothing is computed.
    """
    corrupting_noise = noise if batch.perturbation is None else noise + batch.perturbation
    noisy_latents = objective.corrupt(batch.latents, corrupting_noise, timesteps)
    target = objective.target(batch.latents, noise, timesteps)
    if parent is not None and batch.from_parent is not None:
        # before the prediction that is trained, whose activations would be in memory beside the parent's
        target = _with_parent_targets(target, parent, batch, batch.from_parent, noisy_latents, timesteps)
    prediction = denoise(noisy_latents, timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.add_time_ids)
    error = form.distance(prediction, target, timesteps)
    losses = error.flatten(1).mean(1) if batch.masks is None else _masked_mean(error, batch.masks, form)
    return losses * objective.weight(timesteps)


def _with_parent_targets(
    target: torch.Tensor,
    parent: Denoiser,
    batch: Batch,
    from_parent: torch.Tensor,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """`target` in float32, with the parent's prediction in the rows that are to have it."""
    # from_parent lies on the CPU: the number of rows is known at once, and nobody waits for the device.
    rows = from_parent.nonzero().squeeze(1).to(target.device, non_blocking=True)
    if len(rows) == 0:
        return target
    with torch.no_grad():
        prediction = parent(
            noisy_latents[rows],
            timesteps[rows],
            batch.prompt_embeds[rows],
            batch.pooled_prompt_embeds[rows],
            batch.add_time_ids[rows],
        )
    return target.float().index_copy(0, rows, prediction.float())


def _masked_mean(error: torch.Tensor, masks: torch.Tensor, form: LossForm) -> torch.Tensor:
    """(B,) the mean of mask times error over all pixels, or over the mask's area; 0 where the mask is all zero.

    error (B, 4, h, w), masks (B, 1, h, w): the same for all four channels.
    """
    masks = form.unmasked_share + (1 - form.unmasked_share) * masks
    losses = (error * masks).flatten(1).mean(1)
    if not form.mask_normalize:
        return losses
    area = masks.flatten(1).mean(1)
    return losses / torch.where(area > 0, area, 1.0)
