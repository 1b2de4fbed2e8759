"""What the U-Net is told besides the noisy latents, and the one place that calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdxl_ray.records import MicroConditioning


def add_time_ids(conditionings: Sequence[MicroConditioning]) -> Tensor:
    """(B, 6) float32 pixels: original_hw, crop_top_left, target_hw, each (height, width). SDXL section 2.2."""
    return torch.tensor([conditioning.as_time_ids() for conditioning in conditionings], dtype=torch.float32)


def predict(
    unet: nn.Module,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    add_time_ids: Tensor,
) -> Tensor:
    """The U-Net's raw prediction (B, 4, h, w), in the U-Net's dtype. Every forward pass of training goes through here.

    Args:
        unet: an SDXL U-Net, bare, compiled or wrapped by DDP, with or without an adapter.
        noisy_latents: (B, 4, h, w); this and the embeddings are cast to the U-Net's dtype.
        timesteps: (B,) int64.
        prompt_embeds: (B, 77, 2048).
        pooled_prompt_embeds: (B, 1280).
        add_time_ids: (B, 6), kept in fp32.
    """
    dtype = unet_dtype(unet)
    return unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=prompt_embeds.to(dtype),
        added_cond_kwargs={
            "text_embeds": pooled_prompt_embeds.to(dtype),
            # fp32 on purpose: bf16 keeps 8 significant bits, so 1365 px would reach the U-Net as 1368
            "time_ids": add_time_ids.to(torch.float32),
        },
        return_dict=False,
    )[0]


def unet_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype the U-Net computes in.

    Read at its first convolution, which is neither quantised nor usually adapted; diffusers' own `unet.dtype` would
    report the fp32 of an adapter inside a bf16 model.
    """
    bare = unet.module if isinstance(unet, nn.parallel.DistributedDataParallel) else unet
    return bare.conv_in.weight.dtype  # type: ignore[union-attr, return-value]


def zero_prompts(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Both embeddings with zeros in the rows where `drop` (B,) bool is true: an untold caption.

    SDXL base was trained on zeros rather than on an encoded "" (`force_zeros_for_empty_prompt` in model_index.json).
    """
    kept = ~drop.to(prompt_embeds.device)
    # where, not a product: 0 * inf would be NaN
    return (
        torch.where(kept[:, None, None], prompt_embeds, torch.zeros_like(prompt_embeds)),
        torch.where(kept[:, None], pooled_prompt_embeds, torch.zeros_like(pooled_prompt_embeds)),
    )
