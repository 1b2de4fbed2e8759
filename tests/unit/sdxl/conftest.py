"""Parts of the tiny SDXL, and inputs that fit its U-Net."""

from collections.abc import Iterator

import pytest
import torch

from sdxl_ray.records import MicroConditioning
from sdxl_ray.sdxl.components import load_text_encoders, load_unet, load_vae
from sdxl_ray.sdxl.conditioning import add_time_ids


@pytest.fixture
def unet(tiny_model):
    """Its own copy per test: adapters are attached to it."""
    return load_unet(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="session")
def vae(tiny_model):
    return load_vae(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="session")
def encoders(tiny_model):
    return load_text_encoders(tiny_model, dtype=torch.float32)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two samples of 64x48 pixels."""
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy_latents": torch.randn(2, 4, 8, 6, generator=generator),
        "timesteps": torch.tensor([10, 700]),
        "prompt_embeds": torch.randn(2, 77, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
        "add_time_ids": add_time_ids([MicroConditioning((1365, 1023), (0, 170), (64, 48))] * 2),
    }


@pytest.fixture(scope="session")
def pipeline(tiny_model) -> Iterator:
    """diffusers' own pipeline: what our functions are compared with."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
