"""Pixels to latents and back. A latent is kept as its posterior, so that every epoch can draw afresh."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdxl_ray.sdxl.tiling import decode_in_tiles, encode_in_tiles

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class NonFiniteLatents(ArithmeticError):
    """The VAE gave NaN or infinity for the images at `indices` of the batch. SDXL's own does so in fp16."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"non-finite latents for images {indices} of the batch; encode them with the VAE in fp32")
        self.indices = indices


@torch.no_grad()
def encode_posterior(vae: AutoencoderKL, pixel_values: Tensor, *, tile: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each image's latents, computed in the VAE's dtype.

    Args:
        pixel_values: (B, 3, H, W) in [-1, 1], any dtype and device; H and W multiples of 8.
        tile: encode overlapping tiles of at most this many latent pixels across, for want of memory; 0: whole.

    Returns:
        mean and std, each (B, 4, H/8, W/8) float32 on the VAE's device, already times `scaling_factor`.

    Raises:
        NonFiniteLatents: some rows are NaN or infinite. Zeros in their place would train the model on grey.
    """

    def encode(part: Tensor) -> Tensor:
        return vae.encode(part).latent_dist.parameters.float()

    pixel_values = pixel_values.to(vae.device, vae.dtype)
    parameters = encode_in_tiles(encode, pixel_values, tile=tile, overlap=tile // 4) if tile else encode(pixel_values)
    # Before the clamp below, which would hide an infinite log variance.
    finite = parameters.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise NonFiniteLatents((~finite).nonzero().flatten().tolist())
    mean, log_variance = parameters.chunk(2, dim=1)
    shift, scale = _normalisation(vae, mean.device)
    # In fp32: exp() in bf16 would cost two digits. Clamped as by diffusers' DiagonalGaussianDistribution.
    std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return (mean - shift) * scale, std * scale


def sample_latents(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """One draw from the posterior: mean + std * noise, all (B, 4, h, w)."""
    return mean + std * noise


def pixels_from_uint8(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to pixel_values: float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """latents (B, 4, h, w), times `scaling_factor`, to uint8 images (B, 8h, 8w, 3) on the VAE's device.

    Whole; in tiles of 512² where the accelerator has no room for that.
    """
    shift, scale = _normalisation(vae, vae.device)
    unscaled = (latents.to(vae.device, torch.float32) / scale + shift).to(vae.dtype)

    def decode(part: Tensor) -> Tensor:
        return vae.decode(part).sample.float()

    pixel_values = None
    with contextlib.suppress(torch.OutOfMemoryError):
        pixel_values = decode(unscaled)
    if pixel_values is None:  # after the `with`: the error's traceback holds what filled the memory
        pixel_values = decode_in_tiles(decode, unscaled)
    return ((pixel_values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _normalisation(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale) such that latents = (z - shift) * scale; a few SDXL models carry per-channel statistics.

    Source: diffusers, StableDiffusionXLPipeline.__call__ ("denormalize with the mean and std if available").
    """
    scale = torch.tensor(vae.config.scaling_factor, device=device)
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return torch.zeros((), device=device), scale
    return (
        torch.tensor(mean, device=device).view(1, -1, 1, 1),
        scale / torch.tensor(std, device=device).view(1, -1, 1, 1),
    )
