"""Pixels to the VAE's posterior, captions to embeddings: plain classes that hold a model, usable without Ray.

The posterior's mean and standard deviation are kept, not one draw from it, so that every epoch draws afresh.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.components import load_text_encoders, load_vae
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.sdxl.text import encode_prompts
from sdxl_ray.sdxl.vae import NonFiniteLatents, encode_posterior, pixels_from_uint8


class LatentEncoder:
    """The VAE on one device."""

    def __init__(
        self, model: str, *, dtype: str, device: torch.device, batch_size: int, revision: str, variant: str
    ) -> None:
        self.vae = load_vae(
            model, dtype=DTYPES[dtype], device=device, revision=revision or None, variant=variant or None
        )
        self.device = device
        self.batch_size = batch_size

    def encode(self, pixels: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """N uint8 images (H, W, 3) of one size -> "mean", "std" (N, 4, H/8, W/8) bf16 CPU, times the scaling factor.

        Raises:
            CacheError: the latent of an image is not finite, also in fp32.
        """
        means, stds = [], []
        for start in range(0, len(pixels), self.batch_size):
            images = torch.from_numpy(np.stack(pixels[start : start + self.batch_size]))
            mean, std = self._encode_batch(pixels_from_uint8(images.to(self.device)), names[start:])
            means.append(mean.to(torch.bfloat16).cpu())
            stds.append(std.to(torch.bfloat16).cpu())
        return {"mean": torch.cat(means), "std": torch.cat(stds)}

    def _encode_batch(self, pixel_values: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return encode_posterior(self.vae, pixel_values)
        except torch.OutOfMemoryError:
            if len(pixel_values) == 1:
                raise
            half = len(pixel_values) // 2
            first = self._encode_batch(pixel_values[:half], names[:half])
            second = self._encode_batch(pixel_values[half:], names[half:])
            return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
        except NonFiniteLatents:
            return self._encode_in_fp32(pixel_values, names)

    def _encode_in_fp32(self, pixel_values: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """A last try: some images overflow in half precision only."""
        dtype = self.vae.dtype
        try:
            return encode_posterior(self.vae.to(torch.float32), pixel_values)
        except NonFiniteLatents as error:
            bad = ", ".join(names[index] for index in error.indices)
            raise CacheError(
                f"the VAE gives latents that are not finite, in {dtype} and in float32, for {bad}. "
                "Check that model.path has a sound VAE; or take these images out."
            ) from None
        finally:
            self.vae.to(dtype)


class TextEncoder:
    """Both CLIP text encoders on one device."""

    def __init__(self, model: str, *, device: torch.device, batch_size: int, revision: str, variant: str) -> None:
        # fp32 on the CPU, where bf16 brings no speed; bf16 is what the shards hold anyway.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.encoders = load_text_encoders(
            model, dtype=dtype, device=device, revision=revision or None, variant=variant or None
        )
        self.batch_size = batch_size

    def encode(self, captions: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """N captions -> "prompt_embeds" (N, 77, 2048), "pooled_prompt_embeds" (N, 1280) bf16 CPU; the token counts."""
        embeds, pooled, num_tokens = [], [], []
        for start in range(0, len(captions), self.batch_size):
            batch = list(captions[start : start + self.batch_size])
            prompt_embeds, pooled_prompt_embeds, counts = encode_prompts(self.encoders, batch)
            embeds.append(prompt_embeds.to(torch.bfloat16).cpu())
            pooled.append(pooled_prompt_embeds.to(torch.bfloat16).cpu())
            num_tokens += counts
        return {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}, num_tokens
