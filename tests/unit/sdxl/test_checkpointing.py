import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.conditioning import predict


def test_gradients_are_the_same_and_memory_is_not(unet, inputs):
    attach_adapter(unet, rank=4, alpha=4)
    gradients, held = {}, {}
    for mode in ("none", "transformer", "full"):
        set_gradient_checkpointing(unet, mode)
        unet.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = predict(unet, **inputs).square().mean()
        held[mode] = sum(saved)
        loss.backward()
        gradients[mode] = torch.cat([p.grad.flatten() for p in adapter_parameters(unet).values()])
    assert gradients["none"].abs().max() > 0
    assert torch.equal(gradients["none"], gradients["transformer"])
    assert torch.equal(gradients["none"], gradients["full"])
    assert held["none"] > 1.5 * held["transformer"] > 1.5 * held["full"]


def test_transformer_mode_leaves_the_resnets_alone(unet):
    set_gradient_checkpointing(unet, "full")
    set_gradient_checkpointing(unet, "transformer")
    switches = {
        module: module.gradient_checkpointing for module in unet.modules() if hasattr(module, "gradient_checkpointing")
    }
    assert {type(module) for module, on in switches.items() if on} == {Transformer2DModel}
    set_gradient_checkpointing(unet, "none")
    assert not unet.is_gradient_checkpointing


def test_an_unknown_mode_names_the_known_ones(unet):
    with pytest.raises(ConfigError, match=r"gradient checkpointing 'half' is unknown. Known: none, transformer, full."):
        set_gradient_checkpointing(unet, "half")
