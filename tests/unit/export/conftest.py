"""A tiny SDXL pipeline whose U-Net can be given an adapter that looks trained."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_ray.export.formats import AdapterSpec
from sdxl_ray.export.verify import make_probe, probe_output
from sdxl_ray.sdxl.adapters import adapter_state_dict, attach_adapter


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    return StableDiffusionXLPipeline.from_pretrained(tiny_model)


@pytest.fixture
def unet(pipeline):
    yield pipeline.unet
    pipeline.unet.unload_lora()


@pytest.fixture
def train(unet):
    """`train(rank=4, alpha=8.0)` attaches an adapter, moves it away from zero, and tells what is to be exported."""

    def attach_and_move(*, targets="attention", rank=4, alpha=8.0, strength=0.1):
        attach_adapter(unet, rank=rank, alpha=alpha, targets=targets)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
        return AdapterSpec("lora", rank, alpha, targets), adapter_state_dict(unet), probe_output(unet, make_probe(unet))

    return attach_and_move
