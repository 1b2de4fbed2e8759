"""Training on a CUDA or ROCm device.

pytest -m gpu tests/gpu
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins; deterministic matrix products

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_ray.records import Batch
from sdxl_ray.sdxl.adapters import adapter_state_dict, attach_adapter
from sdxl_ray.sdxl.architecture import UNET_CONFIG, build_unet
from sdxl_ray.sdxl.tiny import unet_config
from sdxl_ray.train import loop
from sdxl_ray.train.synthetic import (
    Recorder,
    synthetic_batches,
    synthetic_objective,
    synthetic_plan,
    synthetic_state,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no device on this machine"),
]

TINY = unet_config()
# SDXL's levels at a quarter of their width: about 170 million parameters, 0.3 GiB
MID_SIZE = UNET_CONFIG | {"block_out_channels": (96, 160, 320), "attention_head_dim": [2, 5, 10]}
RESOLUTION_HW = (128, 128)
TENSORS = ("latents", "noise", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "add_time_ids", "weights")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture
def deterministic():
    """Equal bits from run to run: attention by plain matrix products, and an error from whatever adds in any order."""
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


def new_state(dtype=torch.bfloat16, device="cuda", config=TINY, gradient_checkpointing="none"):
    unet = build_unet(dtype=dtype, device=device, config=config)
    return synthetic_state(unet, rank=4, gradient_checkpointing=gradient_checkpointing, learning_rate=1e-2)


def train(state, num_steps, *, resolution_hw=RESOLUTION_HW, batch_size=2):
    """Losses of the steps up to `num_steps`, from where the state stands."""
    plan = synthetic_plan(num_steps=num_steps, batch_size=batch_size, resolution_hw=resolution_hw)
    batches = synthetic_batches(state.unet.config, plan, resolution_hw=resolution_hw, position=state.position)
    report = Recorder()
    loop.run(state, plan, batches, synthetic_objective(state.device), report)
    return [values["train/loss"] for _, values in report.history]


def test_a_step_is_finite_and_moves_the_adapter(dtype):
    state = new_state(dtype)
    assert state.device.type == "cuda"
    losses = train(state, 2)
    assert all(math.isfinite(loss) for loss in losses)
    adapter = state.masters.state_dict()
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter.values())
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_losses_are_those_of_the_cpu():
    """Weights, adapter, noise and timesteps are equal on both, so the losses differ by rounding only."""
    on_gpu, on_cpu = (train(new_state(torch.float32, device), 3) for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(dtype, deterministic):
    whole = new_state(dtype)
    losses = train(whole, 4)

    first = new_state(dtype)
    assert train(first, 2) == losses[:2]
    second = new_state(dtype)
    second.load_state_dict(first.state_dict())
    assert train(second, 4) == losses[2:]
    expected, resumed = whole.masters.state_dict(), second.masters.state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_random_numbers_are_those_of_the_cpu():
    """Batches, base and adapter begin with the same bits; pinning and copying change none of a batch."""
    plan = synthetic_plan(num_steps=3, batch_size=2, resolution_hw=RESOLUTION_HW)
    for batch in synthetic_batches(TINY | {"in_channels": 4}, plan, resolution_hw=RESOLUTION_HW):
        on_gpu = batch.pin_memory().to("cuda")
        assert isinstance(on_gpu, Batch) and on_gpu.noise.device.type == "cuda"
        assert all(torch.equal(getattr(on_gpu, name).cpu(), getattr(batch, name)) for name in TENSORS)
        assert on_gpu.sample_ids == batch.sample_ids
    bases, adapters = [], []
    for device in ("cpu", "cuda"):
        unet = build_unet(dtype=torch.float32, device=device, config=TINY)
        bases.append({name: tensor.cpu() for name, tensor in unet.state_dict().items()})
        attach_adapter(unet, rank=4, alpha=4.0)
        adapters.append(adapter_state_dict(unet))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    # scaled on the device, so a product may be rounded in another way
    assert all(torch.allclose(bases[0][name], bases[1][name], rtol=1e-6, atol=0) for name in bases[0])


def test_checkpointing_the_transformers_saves_memory():
    peaks_gib = {}
    for mode in ("none", "transformer", "full"):
        state = new_state(config=MID_SIZE, gradient_checkpointing=mode)
        train(state, 1, resolution_hw=(512, 512))  # allocates the optimizer's state and the libraries' workspaces
        torch.cuda.reset_peak_memory_stats()
        train(state, 2, resolution_hw=(512, 512))
        peaks_gib[mode] = torch.cuda.max_memory_allocated() / 2**30
        del state
        torch.cuda.empty_cache()
    assert peaks_gib["full"] < peaks_gib["transformer"] < 0.8 * peaks_gib["none"]
