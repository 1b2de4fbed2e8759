import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl import checkpointing
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.architecture import UNET_CONFIG
from sdxl_ray.sdxl.checkpointing import dial_order, set_gradient_checkpointing
from sdxl_ray.sdxl.conditioning import predict

NUM_BLOCKS = 22  # of the tiny U-Net


def gradients_and_held_bytes(unet, inputs):
    """All gradients of the adapter, and the bytes of what the backward pass needed besides parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    held, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)  # or another could get its address
        if storage._cdata not in parameters:
            held[storage._cdata] = storage.nbytes()
        return tensor

    unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = predict(unet, **inputs).square().mean()
    num_bytes = sum(held.values())
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(unet).values()]), num_bytes


def test_gradients_are_the_same_and_memory_goes_down(unet, inputs):
    attach_adapter(unet, rank=4, alpha=4.0)
    gradients, held = {}, {}
    for mode in ("none", 0, 1, 5, 9, NUM_BLOCKS - 1, NUM_BLOCKS, "transformer", "full"):
        set_gradient_checkpointing(unet, mode)
        gradients[mode], held[mode] = gradients_and_held_bytes(unet, inputs)
        assert torch.equal(gradients["none"], gradients[mode]), mode
    assert gradients["none"].abs().max() > 0
    assert held["none"] == held[0]
    assert held[0] > held[1] > held[5] > held[9] > held[NUM_BLOCKS - 1] > held[NUM_BLOCKS]
    assert held[NUM_BLOCKS] == held["transformer"]
    assert held["none"] > 1.5 * held["transformer"] > 1.5 * held["full"]


def test_dropout_in_the_adapter_is_drawn_once(unet, inputs):
    attach_adapter(unet, rank=4, alpha=4.0, dropout=0.5)
    for parameter in adapter_parameters(unet).values():
        torch.nn.init.constant_(parameter, 0.1)
    unet.train()
    gradients = []
    for mode in ("none", 5):
        set_gradient_checkpointing(unet, mode)
        torch.manual_seed(3)
        gradients.append(gradients_and_held_bytes(unet, inputs)[0])
    assert torch.equal(*gradients)


def test_the_first_blocks_of_the_dial_are_computed_twice(unet, inputs):
    attach_adapter(unet, rank=4, alpha=4.0)
    calls = dict.fromkeys((name for name, _ in dial_order(unet)), 0)
    for name, block in dial_order(unet):
        # before and not after: the second time it stops as soon as it has what the backward pass needs
        block.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    set_gradient_checkpointing(unet, 4)
    predict(unet, **inputs).sum().backward()
    assert list(calls.values()) == [2] * 4 + [1] * (NUM_BLOCKS - 4)
    with torch.no_grad():
        predict(unet, **inputs)
    assert list(calls.values()) == [3] * 4 + [2] * (NUM_BLOCKS - 4)


def test_narrow_blocks_come_first_then_the_order_of_the_forward_pass():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIG)
    order = dial_order(unet)
    assert len(order) == 70
    parts = [(".".join(name.split(".")[:2]), block.norm1.normalized_shape[0]) for name, block in order]
    expected = [("down_blocks.1", 640)] * 4 + [("up_blocks.1", 640)] * 6 + [("down_blocks.2", 1280)] * 20
    assert parts == expected + [("mid_block.attentions", 1280)] * 10 + [("up_blocks.0", 1280)] * 30


def test_a_later_setting_replaces_an_earlier_one(unet):
    for first in ("full", 3):
        for later in ("transformer", 3):
            set_gradient_checkpointing(unet, first)
            set_gradient_checkpointing(unet, later)
            modules = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
            assert {type(module) for module in modules if module.gradient_checkpointing} == {Transformer2DModel}
    for first in ("full", 3):
        for off in ("none", 0):
            set_gradient_checkpointing(unet, first)
            set_gradient_checkpointing(unet, off)
            assert not unet.is_gradient_checkpointing


def test_never_the_reentrant_kind(unet, inputs, monkeypatch):
    """It needs inputs with requires_grad, and would train nothing in the first blocks."""
    seen = []
    original = checkpointing.checkpoint
    monkeypatch.setattr(
        checkpointing, "checkpoint", lambda *a, **k: seen.append(k["use_reentrant"]) or original(*a, **k)
    )
    attach_adapter(unet, rank=4, alpha=4.0)
    set_gradient_checkpointing(unet, 3)
    predict(unet, **inputs)
    assert seen == [False] * 3


@pytest.mark.parametrize("mode", ["half", True, 1.5])
def test_an_unknown_mode_names_the_known_ones(unet, mode):
    with pytest.raises(ConfigError) as error:
        set_gradient_checkpointing(unet, mode)
    assert str(error.value) == (
        f"train.gradient_checkpointing = {mode!r} is unknown. Known: none, transformer, full, or how many of the "
        f"{NUM_BLOCKS} transformer blocks."
    )


@pytest.mark.parametrize("number", [-1, NUM_BLOCKS + 1])
def test_more_blocks_than_there_are(unet, number):
    with pytest.raises(ConfigError) as error:
        set_gradient_checkpointing(unet, number)
    assert str(error.value) == (
        f"train.gradient_checkpointing = {number}, but this U-Net has {NUM_BLOCKS} transformer blocks. Give a number "
        f'from 0 to {NUM_BLOCKS}; all of them are "transformer", and "full" goes further.'
    )
