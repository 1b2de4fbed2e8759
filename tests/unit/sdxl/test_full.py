import pytest
import torch
from torch import nn

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.sdxl.adapters import (
    adapter_disabled,
    adapter_parameters,
    adapter_state_dict,
    attach_adapter,
    load_adapter_state_dict,
    trained_modules,
)
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.full import train_everything, trains_everything


def test_every_weight_is_trained_under_its_own_name(unet, inputs):
    expected = predict(unet, **inputs)
    assert not trains_everything(unet) and not adapter_parameters(unet)
    train_everything(unet)
    assert trains_everything(unet)
    assert list(adapter_parameters(unet)) == sorted(name for name, _ in unet.named_parameters())
    prediction = predict(unet, **inputs)
    assert torch.equal(prediction, expected)
    prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(unet).values())
    assert trained_modules(unet) == {}


def test_state_round_trip(tiny_model, unet, inputs):
    train_everything(unet)
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.5)
    other = load_unet(tiny_model, dtype=torch.float32)
    train_everything(other)
    state = adapter_state_dict(unet)
    load_adapter_state_dict(other, state)
    assert torch.equal(predict(unet, **inputs), predict(other, **inputs))
    del state["conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"in 1 places: missing conv_in\.bias"):
        load_adapter_state_dict(other, state)


def test_there_is_no_base_left(unet):
    train_everything(unet)
    with pytest.raises(ConfigError) as error, adapter_disabled(unet):
        pass
    assert str(error.value) == (
        'adapter.kind = "full" trains the U-Net itself, so there is no base model left in memory to compare with. '
        "Train an adapter, or leave out what needs the base: prior prediction and images without the adapter."
    )


def test_an_adapter_beside_it_is_refused(unet):
    attach_adapter(unet, rank=2, alpha=2)
    with pytest.raises(ConfigError, match="and this one has an adapter already"):
        train_everything(unet)


def test_quantised_weights_are_refused():
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(8, 8))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    with pytest.raises(ConfigError) as error:
        train_everything(model)
    assert 'cannot train quantised weights, and 0.weight is one. Set model.quantize = "none"' in str(error.value)
