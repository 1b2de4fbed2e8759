"""Captions to embeddings, as SDXL was trained: both CLIPs, penultimate layers, no final norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_ray.sdxl.components import TextEncoders


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass, and these go into training
def encode_prompts(encoders: TextEncoders, captions: Sequence[str]) -> tuple[Tensor, Tensor, list[int]]:
    """What the U-Net reads for each caption, equal to diffusers' `StableDiffusionXLPipeline.encode_prompt`.

    Returns:
        prompt_embeds (B, 77, 768 + 1280) and pooled_prompt_embeds (B, 1280), in the encoders' dtype and on their
        device, and the number of tokens in each caption with its two markers: above 77 the rest was not read.
    """
    embeds: list[Tensor] = []
    pooled = torch.empty(0)
    num_tokens = [0] * len(captions)
    for tokenizer, encoder in (
        (encoders.tokenizer, encoders.text_encoder),
        (encoders.tokenizer_2, encoders.text_encoder_2),
    ):
        whole = tokenizer(list(captions), truncation=False, padding=False).input_ids
        num_tokens = [max(before, len(ids)) for before, ids in zip(num_tokens, whole, strict=True)]
        input_ids = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        # No attention mask: SDXL was trained to read the padding too, and encoder 2 pads with "!" (id 0).
        output = encoder(input_ids.to(encoder.device), output_hidden_states=True)
        embeds.append(output.hidden_states[-2])
        if encoder is encoders.text_encoder_2:
            pooled = output.text_embeds
    return torch.cat(embeds, dim=-1), pooled, num_tokens
