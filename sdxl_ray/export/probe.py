"""Fixed questions to a model: equal answers before and after an export mean that the file holds what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from sdxl_ray.sdxl.conditioning import predict


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed inputs for one forward pass, all float32 but the timesteps: B = 1.

    noisy_latents (1, 4, h, w), timesteps (1,) int64, prompt_embeds (1, 77, cross_attention_dim),
    pooled_prompt_embeds (1, projection_dim), add_time_ids (1, 6) pixels
    """

    noisy_latents: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    add_time_ids: Tensor


def make_probe(unet: diffusers.UNet2DConditionModel, *, seed: int = 0) -> Probe:
    """Inputs of the right shapes for this U-Net, the same on every machine; 256 px suffice to reach every weight."""
    config = unet.config
    generator = np.random.default_rng(seed)  # torch's generators differ between devices and versions

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    side = min(32, config.sample_size)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = float(8 * side)
    return Probe(
        noisy_latents=normal(1, config.in_channels, side, side),
        timesteps=torch.tensor([500]),
        prompt_embeds=normal(1, 77, config.cross_attention_dim),
        pooled_prompt_embeds=normal(1, pooled_width),
        add_time_ids=torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]),
    )


@torch.no_grad()
def probe_output(unet: diffusers.UNet2DConditionModel, probe: Probe) -> Tensor:
    """The prediction (1, 4, h, w) for the probe, float32 on the CPU, without dropout."""
    was_training = unet.training
    device = next(unet.parameters()).device  # diffusers' own property walks through all modules
    unet.eval()
    try:
        prediction = predict(
            unet,
            probe.noisy_latents.to(device),
            probe.timesteps.to(device),
            probe.prompt_embeds.to(device),
            probe.pooled_prompt_embeds.to(device),
            probe.add_time_ids.to(device),
        )
    finally:
        unet.train(was_training)
    return prediction.float().cpu()


@torch.no_grad()
def probe_text(encoder: Any, *, seed: int = 0) -> Tensor:
    """What a text encoder makes of fixed tokens, float32 on the CPU: all that SDXL takes from it, in one vector.

    The hidden states before the last layer, (1, 77, width), and of encoder 2 the pooled vector too.
    """
    tokens = np.random.default_rng(seed).integers(2, encoder.config.vocab_size - 1, size=(1, 77))
    tokens[0, -1] = encoder.config.vocab_size - 1  # the highest id, which is where CLIP pools
    was_training = encoder.training
    encoder.eval()
    try:
        found = encoder(torch.from_numpy(tokens).to(encoder.device), output_hidden_states=True)
    finally:
        encoder.train(was_training)
    answers = [found.hidden_states[-2], *([found.text_embeds] if "text_embeds" in found else [])]
    return torch.cat([answer.float().cpu().flatten() for answer in answers])


def probe_models(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The answers of the U-Net and, where they are given, the text encoders: `{part: answer}`."""
    return {
        part: probe_output(model, make_probe(model)) if part == "unet" else probe_text(model)
        for part, model in models.items()
    }


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference over largest answer, of the part where that is worst; NaN where an answer is NaN."""
    errors = [float((found[part] - expected[part]).abs().max() / expected[part].abs().max()) for part in expected]
    return next((error for error in errors if error != error), max(errors))
