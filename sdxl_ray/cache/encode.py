"""Pixels to the VAE's posterior, captions to embeddings: plain classes that hold a model, usable without Ray.

The posterior's mean and standard deviation are kept, not one draw from it, so that every epoch draws afresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.components import load_text_encoders, load_vae
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.sdxl.text import encode_prompts
from sdxl_ray.sdxl.vae import NonFiniteLatents, encode_posterior, pixels_from_uint8

Encoded = TypeVar("Encoded")


def in_halves_that_fit(
    encode: Callable[[int, int], Encoded], start: int, end: int, *, what: str, device: torch.device
) -> list[Encoded]:
    """`encode(start, end)`, halved for as long as the device's memory does not hold it; the parts in order.

    Raises:
        CacheError: not even a single `what` fits.
    """
    try:
        return [encode(start, end)]
    except torch.OutOfMemoryError:
        if end - start == 1:
            raise out_of_memory(f"encoding one {what}", device) from None
    # After the block, not inside it: the error being handled holds the failed attempt's tensors.
    _release_memory(device)
    middle = (start + end) // 2
    return [
        part
        for half in ((start, middle), (middle, end))
        for part in in_halves_that_fit(encode, *half, what=what, device=device)
    ]


def out_of_memory(doing: str, device: torch.device) -> CacheError:
    """`doing` completes "while ..."."""
    return CacheError(
        f"{device} has too little free memory while {doing}. If something else uses this GPU, stop it (`nvidia-smi` "
        "shows it); let fewer encoders share it (raise cache.gpus_per_encoder, at most 1); or lower dataset.resolution."
    )


@contextlib.contextmanager
def loading(what: str, device: torch.device) -> Iterator[None]:
    """Around the making of an encoder: a device without room for it is a `CacheError` with the cure."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise out_of_memory(f"loading {what}", device) from None


def _release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other encoders on this GPU cannot use what this process keeps in reserve


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
            CacheError: the latent of an image is not finite, also in fp32; or the memory does not hold one image.
        """

        def encode(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.from_numpy(np.stack(pixels[start:end])).to(self.device)
            mean, std = self._posterior(pixels_from_uint8(images), names[start:end])
            return mean.to(torch.bfloat16).cpu(), std.to(torch.bfloat16).cpu()

        what = "image of {}x{} pixels".format(*pixels[0].shape[:2])
        parts = [
            part
            for start in range(0, len(pixels), self.batch_size)
            for part in in_halves_that_fit(
                encode, start, min(start + self.batch_size, len(pixels)), what=what, device=self.device
            )
        ]
        return {"mean": torch.cat([mean for mean, _ in parts]), "std": torch.cat([std for _, std in parts])}

    def _posterior(self, pixel_values: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with contextlib.suppress(NonFiniteLatents):
            return encode_posterior(self.vae, pixel_values)
        return self._posterior_in_fp32(pixel_values, names)

    def _posterior_in_fp32(self, pixel_values: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
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
        self.device = device
        self.batch_size = batch_size

    def encode(self, captions: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """N captions -> "prompt_embeds" (N, 77, 2048), "pooled_prompt_embeds" (N, 1280) bf16 CPU; the token counts.

        Raises:
            CacheError: the memory does not hold one caption.
        """

        def encode(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
            prompt_embeds, pooled, counts = encode_prompts(self.encoders, captions[start:end])
            return prompt_embeds.to(torch.bfloat16).cpu(), pooled.to(torch.bfloat16).cpu(), counts

        parts = [
            part
            for start in range(0, len(captions), self.batch_size)
            for part in in_halves_that_fit(
                encode, start, min(start + self.batch_size, len(captions)), what="caption", device=self.device
            )
        ]
        embeds, pooled, counts = zip(*parts, strict=True)
        tensors = {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}
        return tensors, [count for part in counts for count in part]
