"""The noise of one sample: white, or with more of it in what is coarse. Every draw has a key of its own.

Offset noise      one value for each channel, so that the mean of an image is learnt too.
                  www.crosslabs.org/blog/diffusion-with-offset-noise
Multires noise    noise of coarser and coarser grain on top. "Multi-resolution noise for diffusion model training",
                  wandb.ai/johnowhitaker/multires_noise, as in kohya's scripts (--multires_noise_discount).
Perturbation      noise that the U-Net sees and is not asked for, against exposure bias: arXiv:2301.11706.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_ray.diffusion.randomness import keyed_normal, keyed_uniform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoiseRecipe:
    """What the noise is made of. The neutral recipe gives white noise, to the bit the same as without any recipe.

    offset              standard deviation of the offset; white noise has 1
    offset_probability  share of the samples that get one
    multires_discount   each coarser level has this times the amplitude of the one before; 0: no multires noise
    multires_levels     how many coarser levels there are at most
    perturbation        standard deviation of the noise that is only seen, before it falls (`perturbation_amount`)
    """

    offset: float = 0.0
    offset_probability: float = 1.0
    multires_discount: float = 0.0
    multires_levels: int = 6
    perturbation: float = 0.0


def draw_noise(shape: Sequence[int], recipe: NoiseRecipe, key: tuple[object, ...]) -> torch.Tensor:
    """The noise of the sample with this key, (4, h, w) float32 on the CPU. A pure function of its arguments.

    The offset comes last, on noise of unit standard deviation, so that its size means the same with multires noise.
    """
    noise = keyed_normal(shape, *key, "noise")
    if recipe.multires_discount > 0:
        noise = _multires(noise, recipe, key)
    if recipe.offset > 0 and keyed_uniform(*key, "noise offset chosen") < recipe.offset_probability:
        noise = noise + recipe.offset * keyed_normal((shape[0], 1, 1), *key, "noise offset")
    return noise


def draw_perturbation(shape: Sequence[int], amount: float, key: tuple[object, ...]) -> torch.Tensor | None:
    """White noise of standard deviation `amount`, independent of the sample's noise: (4, h, w) float32; None for 0."""
    if amount == 0:
        return None
    return amount * keyed_normal(shape, *key, "noise perturbation")


def perturbation_amount(amount: float, step: int, end_step: int) -> float:
    """`amount` at step 0, falling linearly to 0 at `end_step` and 0 from there on; with end_step = 0 it stays."""
    if end_step == 0:
        return amount
    return amount * max(0.0, 1 - step / end_step)


def _multires(white: torch.Tensor, recipe: NoiseRecipe, key: tuple[object, ...]) -> torch.Tensor:
    """White noise plus levels of coarser and coarser grain, scaled to a standard deviation of 1 over the sample.

    Level i has 1 / r^i times the height and width of the one before, r uniform in [2, 4), and the amplitude discount^i;
    it is brought to full size bilinearly. The last one is that which has a height or width of 1. In the source level 0
    is a second white noise of amplitude 1, hence the factor sqrt(2) here: the same distribution from one draw.
    """
    import torch.nn.functional as F

    channels, *full_hw = white.shape
    height, width = full_hw
    noise = white * 2**0.5
    for level in range(1, recipe.multires_levels + 1):
        shrink = (2 + 2 * keyed_uniform(*key, "noise multires shrink", level)) ** level
        height, width = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = keyed_normal((channels, height, width), *key, "noise multires", level)
        upsampled = F.interpolate(coarse[None], size=full_hw, mode="bilinear", align_corners=False)[0]
        noise = noise + recipe.multires_discount**level * upsampled
        if height == 1 or width == 1:
            break
    return noise / noise.std()
