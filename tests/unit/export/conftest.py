"""A tiny SDXL pipeline whose models can be given adapters that look trained."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_ray.export.probe import probe_models
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter, detach_adapter, trained_modules

# peft takes 3 ms for each module
FEW = ("attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    return StableDiffusionXLPipeline.from_pretrained(tiny_model)


@pytest.fixture
def models(pipeline):
    """`{part: model}`, bare before and after."""
    found = {part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    before = {
        part: {name: tensor.clone() for name, tensor in model.state_dict().items()} for part, model in found.items()
    }
    yield found
    pipeline.unload_lora_weights()
    for part, model in found.items():
        detach_adapter(model)
        model.load_state_dict(before[part])


@pytest.fixture
def unet(models):
    return models["unet"]


def move(model, *, strength=0.1, seed=1):
    """Each trained tensor away from where it began: zeros become noise, magnitudes change by some per cent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * strength * noise)
            elif "lora_B" in name:
                parameter.copy_(strength * noise)
            elif "lora_A" not in name:
                parameter.copy_(strength**0.5 * noise)


@pytest.fixture
def train(models):
    """`train(kind="dora", rank=4)` attaches adapters that look trained and tells (spec, parts, answers)."""

    def attach_and_move(*, kind="lora", targets=FEW, rank=4, alpha=8.0, strength=0.1, text=(), text_rank=2, **options):
        attach_adapter(models["unet"], kind=kind, rank=rank, alpha=alpha, targets=targets, **options)
        move(models["unet"], strength=strength)
        for number, part in enumerate(text):
            attach_adapter(models[part], rank=text_rank, alpha=6.0, targets="all-linear")
            move(models[part], strength=strength, seed=2 + number)
        used = {part: models[part] for part in ("unet", *text)}
        spec = AdapterSpec(kind, rank, alpha, targets, rank_stabilized=options.get("rank_stabilized", False))
        return spec, {part: trained_modules(model) for part, model in used.items()}, probe_models(used)

    return attach_and_move


@pytest.fixture
def strip(models):
    """Take all adapters off."""
    return lambda: [detach_adapter(model) for model in models.values()]
