import pytest
import torch
import torch._dynamo
from torch import nn

from sdxl_ray.errors import ConfigError
from sdxl_ray.records import MicroConditioning
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.compiling import compile_blocks
from sdxl_ray.sdxl.conditioning import add_time_ids, predict
from sdxl_ray.sdxl.quantize import quantize_frozen

BUCKETS = [(8, 6), (6, 8), (8, 8), (16, 8), (4, 12), (12, 4)]  # latent (h, w)


@pytest.fixture(autouse=True)
def fresh_compiler():
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.config.recompile_limit = before
    torch._dynamo.reset()


class Counting:
    """A backend that runs what it is given as it is: no C++ compiler needed."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def inputs(hw, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy_latents": torch.randn(batch_size, 4, *hw, generator=generator),
        "timesteps": torch.arange(batch_size) * 400 + 10,
        "prompt_embeds": torch.randn(batch_size, 77, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch_size, 32, generator=generator),
        "add_time_ids": add_time_ids([MicroConditioning((1365, 1023), (0, 170), (64, 48))] * batch_size),
    }


def gradient(unet, hw):
    unet.zero_grad()
    predict(unet, **inputs(hw)).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(unet).values()])


@pytest.mark.parametrize(("mode", "quantize"), [
    ("none", ""), pytest.param(5, "int8", marks=pytest.mark.slow), pytest.param("full", "", marks=pytest.mark.slow)
])  # fmt: skip
def test_three_graphs_for_six_buckets_and_the_gradients_of_eager(unet, mode, quantize):
    if quantize:
        quantize_frozen(unet, quantize)
    attach_adapter(unet, rank=4, alpha=4.0)
    for parameter in adapter_parameters(unet).values():
        nn.init.constant_(parameter, 0.05)
    set_gradient_checkpointing(unet, mode)
    expected = [gradient(unet, hw) for hw in BUCKETS]
    names = list(unet.state_dict())

    backend = Counting()
    assert compile_blocks(unet, backend=backend) == 22
    for hw, eager in zip(BUCKETS, expected, strict=True):
        torch.testing.assert_close(gradient(unet, hw), eager)
    assert 1 <= backend.graphs <= 3
    assert list(unet.state_dict()) == names


@pytest.mark.slow
def test_without_dynamic_shapes_every_bucket_is_compiled_anew(unet):
    attach_adapter(unet, rank=4, alpha=4.0)
    backend = Counting()
    compile_blocks(unet, dynamic=False, backend=backend)
    counts = []
    for hw in BUCKETS[2:4]:
        gradient(unet, hw)
        counts.append(backend.graphs)
    assert counts[1] >= 2 * counts[0]


def test_the_limit_of_graphs_is_raised_and_never_lowered(unet):
    compile_blocks(unet, backend=Counting())
    assert torch._dynamo.config.recompile_limit == 32
    torch._dynamo.config.recompile_limit = 64
    compile_blocks(unet, backend=Counting())
    assert torch._dynamo.config.recompile_limit == 64


def test_a_module_without_blocks():
    with pytest.raises(ConfigError) as error:
        compile_blocks(nn.Linear(2, 2))
    assert str(error.value) == (
        "train.compile = true, but Linear has no transformer blocks. Set train.compile = false."
    )
