"""Images drawn while training: the same prompts and first noise every time, from the cache's embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl_ray.errors import storage_errors
from sdxl_ray.sdxl.sampling import draw_images, file_stem


@dataclass(frozen=True)
class Prompts:
    """Validation prompts with their cached embeddings, so that no text encoder is loaded while training."""

    texts: tuple[str, ...]
    prompt_embeds: torch.Tensor  # (N, 77, 2048)
    pooled_prompt_embeds: torch.Tensor  # (N, 1280)
    negative_prompt_embeds: torch.Tensor  # (1, 77, 2048)
    negative_pooled_prompt_embeds: torch.Tensor  # (1, 1280)


def read_prompts(texts: Sequence[str], negative: str, read: Callable[[str], Mapping[str, torch.Tensor]]) -> Prompts:
    """The prompts' embeddings, one by one. An empty negative prompt is zeros, which is SDXL's own convention.

    Args:
        read: from a text to its "prompt_embeds" (77, 2048) and "pooled_prompt_embeds" (1280,).
    """
    rows = [read(text) for text in texts]
    negative_row = read(negative)
    if not negative:
        negative_row = {name: torch.zeros_like(tensor) for name, tensor in negative_row.items()}
    return Prompts(
        texts=tuple(texts),
        prompt_embeds=torch.stack([row["prompt_embeds"] for row in rows]),
        pooled_prompt_embeds=torch.stack([row["pooled_prompt_embeds"] for row in rows]),
        negative_prompt_embeds=negative_row["prompt_embeds"][None],
        negative_pooled_prompt_embeds=negative_row["pooled_prompt_embeds"][None],
    )


def draw_share(
    unet: Any,
    vae: Any,
    scheduler_config: dict[str, Any],
    prompts: Prompts,
    folder: Path,
    *,
    world_rank: int,
    world_size: int,
    height_width: tuple[int, int],
    num_steps: int,
    guidance_scale: float,
    seed: int,
    prediction_type: str,
) -> list[Path]:
    """Draw and save every `world_size`-th prompt from `world_rank` on. Not collective: ranks may differ in number.

    Afterwards the VAE is on the CPU: see `vae_on`.
    """
    written = []
    with vae_on(vae, unet.conv_in.weight.device):
        for number in range(world_rank, len(prompts.texts), world_size):
            image = draw_images(
                unet,
                vae,
                scheduler_config,
                prompt_embeds=prompts.prompt_embeds[number : number + 1],
                pooled_prompt_embeds=prompts.pooled_prompt_embeds[number : number + 1],
                negative_prompt_embeds=prompts.negative_prompt_embeds,
                negative_pooled_prompt_embeds=prompts.negative_pooled_prompt_embeds,
                height_width=height_width,
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                seeds=[seed + number],
                prediction_type=prediction_type,
            )[0]
            path = folder / f"{number:02d}_{file_stem(prompts.texts[number])}.png"
            with storage_errors("saving a validation image", path, "Free some space, then continue with --resume."):
                folder.mkdir(parents=True, exist_ok=True)
                image.save(path)
            written.append(path)
    return written


@contextlib.contextmanager
def vae_on(vae: Any, device: torch.device) -> Iterator[None]:
    """The VAE on `device` inside, on the CPU afterwards: between two drawings, training has its 0.3 GiB."""
    vae.to(device)
    try:
        yield
    finally:
        vae.to("cpu")
