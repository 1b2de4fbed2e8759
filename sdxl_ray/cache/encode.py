"""Pixels to the VAE's posterior, captions to embeddings: plain classes that hold a model, usable without Ray.

The posterior's mean and standard deviation are kept, not one draw from it, so that every epoch draws afresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.components import load_text_encoders, load_vae
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.sdxl.text import encode_prompts
from sdxl_ray.sdxl.tiling import PIXELS_PER_LATENT
from sdxl_ray.sdxl.vae import NonFiniteLatents, encode_posterior, pixels_from_uint8

Encoded = TypeVar("Encoded")

_MOST = 32  # more images or captions at once are no faster, and a shard has at most 64
_COMPILED_MOST = 8  # of a compiled VAE: fewer sizes to compile for, and 8 images of 1024² keep any GPU busy

# Live tensors of the VAE's encoder, in maps as large as the image and as wide as its first level (128 channels). Five
# are counted (operations traced with FakeTensor: 1.25 GiB for 1024² in bf16; a process on the CPU grows by 1.26), at
# the end of the first level's residual blocks. Three more are left for workspaces of convolutions and copies in
# another memory format, which were not measured. Where it is too few, batches are halved.
_LIVE_MAPS = 8
_SHARE_OF_FREE_MEMORY = 0.8

_TILES = (128, 64)  # latent pixels: 1024 and 512 in the image; the larger, the nearer to the whole image's latent


def in_halves_that_fit(
    encode: Callable[[int, int], Encoded],
    start: int,
    end: int,
    *,
    what: str,
    device: torch.device,
    in_parts: Callable[[int], Encoded] | None = None,
) -> list[Encoded]:
    """`encode(start, end)`, halved for as long as the device's memory does not hold it; the parts in order.

    Args:
        in_parts: another way for a single one that does not fit.

    Raises:
        CacheError: not even a single `what` fits.
    """
    try:
        return [encode(start, end)]
    except torch.OutOfMemoryError:
        if end - start == 1 and in_parts is None:
            raise out_of_memory(f"encoding one {what}", device) from None
    # After the block, not inside it: the error being handled holds the failed attempt's tensors.
    _release_memory(device)
    if end - start == 1:
        assert in_parts is not None
        return [in_parts(start)]
    middle = (start + end) // 2
    return [
        part
        for half in ((start, middle), (middle, end))
        for part in in_halves_that_fit(encode, *half, what=what, device=device, in_parts=in_parts)
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
    """The VAE on one device.

    Attributes:
        tiled: names of the images that were encoded in tiles since the list was last emptied: the device had no room
            for one of them whole. Their latents differ a little from what they should be.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        device: torch.device,
        batch_size: int,
        revision: str,
        variant: str,
        compile: bool = False,
    ) -> None:
        """
        Args:
            batch_size: images at once; 0: as many as fit, at most 32, and on the CPU one.
            compile: compile the VAE, once for each size of images and of batches.
        """
        self.vae = load_vae(
            model, dtype=DTYPES[dtype], device=device, revision=revision or None, variant=variant or None
        )
        if device.type in ("cuda", "cpu"):
            # What convolutions are fastest with. On the CPU, SDXL's own VAE takes 7.2 s for 512² instead of 9.7 in
            # fp32, and 3.6 instead of 4.1 in bf16 (one core, AMD EPYC).
            nn.Module.to(self.vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            self.vae.encoder.compile(dynamic=False)
        self.device = device
        self.batch_size = batch_size
        self.compile = compile
        self.tiled: list[str] = []
        self._sizes: dict[tuple[int, int], int] = {}  # height and width of images -> how many at once

    def encode(self, pixels: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """N uint8 images (H, W, 3) of one size -> "mean", "std" (N, 4, H/8, W/8) bf16 CPU, times the scaling factor.

        An image for which the memory is too small is encoded in tiles; `tiled` says so.

        Raises:
            CacheError: the latent of an image is not finite, also in fp32; or the memory does not hold one tile.
        """
        height, width = pixels[0].shape[:2]
        what = f"image of {height}x{width} pixels"

        def encode(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._encode(np.stack(pixels[start:end]), names[start:end])

        def in_tiles(at: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._encode_in_tiles(pixels[at], names[at], what)

        size = self._sizes.get((height, width)) or self.batch_size or self._automatic_batch_size(height, width)
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        start = 0
        while start < len(pixels):
            end = min(start + size, len(pixels))
            halves = in_halves_that_fit(encode, start, end, what=what, device=self.device, in_parts=in_tiles)
            if len(halves) > 1:  # from now on as many as fitted: each failed attempt costs as much as a batch
                size = max(len(mean) for mean, _ in halves)
            parts += halves
            start = end
        self._sizes[height, width] = size
        return {"mean": torch.cat([mean for mean, _ in parts]), "std": torch.cat([std for _, std in parts])}

    def _automatic_batch_size(self, height: int, width: int) -> int:
        if self.device.type == "cpu":
            return 1  # measured: two or four at once are no faster
        free = _free_memory(self.device)
        channels = self.vae.config.block_out_channels[0]
        elements = channels * height * width
        fitting = int(_SHARE_OF_FREE_MEMORY * free) // (_LIVE_MAPS * elements * self.vae.dtype.itemsize)
        # Below 2^31 elements in a tensor: with more, kernels change to slower 64-bit indices, or fail.
        most = min(_COMPILED_MOST if self.compile else _MOST, (2**31 - 1) // elements)
        return max(1, min(fitting, most))

    def _encode(self, images: np.ndarray, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, H, W, 3) uint8 -> mean and std, (n, 4, H/8, W/8) bf16 CPU."""
        num_images = len(images)
        if self.compile:
            # Up to a power of two, so that what is left of a shard is not compiled for each number of images.
            padding = (1 << (num_images - 1).bit_length()) - num_images
            images = np.concatenate([images, *[images[-1:]] * padding])
            names = [*names, *[names[-1]] * padding]
        with self._compiling():
            mean, std = self._posterior(self._pixel_values(images), names)
        return mean[:num_images].to(torch.bfloat16).cpu(), std[:num_images].to(torch.bfloat16).cpu()

    def _encode_in_tiles(self, image: np.ndarray, name: str, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = [tile for tile in _TILES if tile * PIXELS_PER_LATENT < max(image.shape[:2])]
        for tile in tiles:
            with contextlib.suppress(torch.OutOfMemoryError), self._not_compiling():
                mean, std = self._posterior(self._pixel_values(image[None]), [name], tile=tile)
                self.tiled.append(name)
                return mean.to(torch.bfloat16).cpu(), std.to(torch.bfloat16).cpu()
            _release_memory(self.device)
        raise out_of_memory(f"encoding one {what}{', even in tiles' if tiles else ''}", self.device)

    def _pixel_values(self, images: np.ndarray) -> torch.Tensor:
        return pixels_from_uint8(torch.from_numpy(images).to(self.device))  # channels_last as it is

    def _posterior(
        self, pixel_values: torch.Tensor, names: Sequence[str], *, tile: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with contextlib.suppress(NonFiniteLatents):
            return encode_posterior(self.vae, pixel_values, tile=tile)
        return self._posterior_in_fp32(pixel_values, names, tile)

    def _posterior_in_fp32(
        self, pixel_values: torch.Tensor, names: Sequence[str], tile: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A last try: some images overflow in half precision only."""
        dtype = self.vae.dtype
        try:
            nn.Module.to(self.vae, torch.float32)  # diffusers' own `to` warns of parts that other models have
            with self._not_compiling():
                return encode_posterior(self.vae, pixel_values, tile=tile)
        except NonFiniteLatents as error:
            bad = ", ".join(dict.fromkeys(names[index] for index in error.indices))
            raise CacheError(
                f"the VAE gives latents that are not finite, in {dtype} and in float32, for {bad}. "
                "Check that model.path has a sound VAE; or take these images out."
            ) from None
        finally:
            nn.Module.to(self.vae, dtype)

    def _compiling(self) -> contextlib.AbstractContextManager[object]:
        """torch gives up after 8 recompilations, which are fewer than there are buckets."""
        if not self.compile:
            return contextlib.nullcontext()
        from torch._dynamo import config  # here: it is slow to import

        # At each call, since what is set holds for one thread only.
        return config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)

    def _not_compiling(self) -> contextlib.AbstractContextManager[object]:
        """For what comes up rarely. Not asked of torch without need: it would import its compiler, for seconds."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()


def _free_memory(device: torch.device) -> int:
    """Bytes on an accelerator that are free, or kept by this process and not in use."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0


class TextEncoder:
    """Both CLIP text encoders on one device."""

    def __init__(
        self, model: str, *, device: torch.device, batch_size: int, revision: str, variant: str, num_chunks: int = 1
    ) -> None:
        """
        Args:
            batch_size: captions at once; 0: 32.
            num_chunks: pieces of 75 tokens that each caption is read in.
        """
        # fp32 on the CPU, where bf16 brings no speed; bf16 is what the shards hold anyway.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.encoders = load_text_encoders(
            model, dtype=dtype, device=device, revision=revision or None, variant=variant or None
        )
        self.device = device
        self.batch_size = batch_size or _MOST
        self.num_chunks = num_chunks

    def encode(self, captions: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """N captions -> "prompt_embeds" (N, 77 * num_chunks, 2048), "pooled_prompt_embeds" (N, 1280), bf16 CPU.

        And the number of tokens in each: see `encode_prompts`.

        Raises:
            CacheError: the memory does not hold one caption.
        """

        def encode(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
            prompt_embeds, pooled, counts = encode_prompts(self.encoders, captions[start:end], self.num_chunks)
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
