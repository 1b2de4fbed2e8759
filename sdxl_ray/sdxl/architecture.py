"""SDXL at its true size without its weights: the configs of stabilityai/stable-diffusion-xl-base-1.0, from which the
network can be built at random. For what depends on shapes alone: memory, seconds, FLOPs, parameter counts.

    UNET_CONFIG            UNet2DConditionModel           2 567 463 684 parameters, 4.78 GiB in bf16
    VAE_CONFIG             AutoencoderKL                     83 653 863
    TEXT_ENCODER_CONFIG    CLIPTextModel                    123 060 480
    TEXT_ENCODER_2_CONFIG  CLIPTextModelWithProjection      694 659 840
    SCHEDULER_CONFIG       EulerDiscreteScheduler

Source: the `config.json` files of that repository. Left out is what they repeat of the classes' defaults and what
does not reach the network (`_diffusers_version`, `torch_dtype`, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],  # the number of heads, a name that diffusers kept; each has 64 channels
    "cross_attention_dim": 2048,  # both text encoders' hidden states, concatenated
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,  # channels per time id
    "projection_class_embeddings_input_dim": 2816,  # 6 time ids of 256 channels and the pooled vector's 1280
}

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}

# eos_token_id 2 is not <|endoftext|>: OpenAI's own config says so, and transformers then pools at the highest id.
TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

TEXT_ENCODER_2_CONFIG: dict[str, Any] = {
    **TEXT_ENCODER_CONFIG,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}

_POOL_SIZE = 4_194_301  # prime, so that no row of a matrix begins where another does


def build_unet(
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    config: Mapping[str, Any] = UNET_CONFIG,
) -> UNet2DConditionModel:
    """A frozen U-Net with random weights, in seconds and without a copy in another precision: 4.8 GiB in bf16.

    Weights are normal with the standard deviation of PyTorch's own start, 1/√(3 fan_in), norms are the identity and
    biases zero, so what comes out is finite and means nothing. A seed gives the same weights on every device. On
    "meta", where nothing is allocated, shapes and names are all there is.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns that parts of some models want fp32; this one's do not
    unet.to_empty(device=device)
    if torch.device(device).type != "meta":
        _initialise(unet, seed)
    return unet.requires_grad_(False).eval()


@torch.no_grad()
def _initialise(unet: nn.Module, seed: int) -> None:
    """Each weight is a stretch of one pool of normal numbers, from where the last ended, round and round.

    2.6 billion draws take the CPU's generator most of a minute; copying 4 million of them about takes two seconds.
    """
    first = next(unet.parameters())
    pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(seed)).to(first.device, first.dtype)
    start = 0
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:  # a norm
                parameter.fill_(1.0)
            else:
                start = _fill(parameter.view(-1), pool, start, scale=1 / math.sqrt(3 * parameter[0].numel()))


def _fill(flat: Tensor, pool: Tensor, start: int, *, scale: float) -> int:
    """Fill `flat` with scaled numbers of the pool from `start` on; return where the next weight begins."""
    filled = 0
    while filled < len(flat):
        count = min(len(pool) - start, len(flat) - filled)
        torch.mul(pool[start : start + count], scale, out=flat[filled : filled + count])
        filled += count
        start = (start + count) % len(pool)
    return start
