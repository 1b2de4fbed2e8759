"""The nearest LoRA, against numpy's singular value decomposition."""

import numpy as np
import pytest
import torch

from sdxl_ray.export.svd import nearest_lora
from sdxl_ray.sdxl.trained import TrainedModule, effective_delta


def lokr(out, into, kernel=()):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "lokr_w1": torch.randn(2, 2, generator=generator),
        "lokr_w2": torch.randn(out // 2, into // 2, *kernel, generator=generator),
    }
    return TrainedModule(kind="lokr", tensors=tensors, scale=0.3, rank=4), torch.zeros(out, into, *kernel)


@pytest.mark.parametrize(("out", "into", "kernel"), [(10, 14, ()), (14, 10, ()), (10, 6, (3, 3)), (10, 6, (1, 1))])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_it_keeps_the_largest_singular_values(out, into, kernel, rank):
    module, base = lokr(out, into, kernel)
    found, error = nearest_lora(module, base, rank=rank)

    delta = effective_delta(module, base).flatten(1).numpy().astype(np.float64)
    sizes = np.linalg.svd(delta, compute_uv=False)
    rank = min(rank, *delta.shape)
    assert found.kind == "lora" and found.scale == 1.0 and found.rank == rank
    assert found.tensors["lora_A.weight"].shape == (rank, into, *kernel)
    assert found.tensors["lora_B.weight"].shape == (out, rank, *(1 for _ in kernel))
    left_over = np.sqrt((sizes[rank:] ** 2).sum() / (sizes**2).sum())
    assert error == pytest.approx(left_over, abs=3e-7)
    assert np.linalg.norm(delta - effective_delta(found, base).flatten(1).numpy()) / np.linalg.norm(
        delta
    ) == pytest.approx(left_over, abs=3e-7)


def test_apples_gpus_have_no_float64_so_the_cpu_computes():
    module, base = lokr(10, 14)
    found, error = nearest_lora(module, base, rank=3, device="mps")
    expected, expected_error = nearest_lora(module, base, rank=3)
    assert error == expected_error
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_both_halves_have_the_same_size():
    found, _ = nearest_lora(*lokr(10, 14), rank=3)
    up, down = found.tensors["lora_B.weight"], found.tensors["lora_A.weight"]
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_a_change_of_zero_is_a_lora_of_zero():
    module, base = lokr(10, 14)
    nothing = TrainedModule(kind="lokr", tensors={**module.tensors, "lokr_w1": torch.zeros(2, 2)}, scale=1.0, rank=4)
    found, error = nearest_lora(nothing, base, rank=2)
    assert error == 0.0
    assert not effective_delta(found, base).any()


def test_a_dora_is_flattened_by_its_magnitudes_and_comes_near_with_more_rank():
    base = torch.randn(10, 14, generator=torch.Generator().manual_seed(1))
    tensors = {
        "lora_A.weight": torch.randn(2, 14, generator=torch.Generator().manual_seed(2)),
        "lora_B.weight": 0.1 * torch.randn(10, 2, generator=torch.Generator().manual_seed(3)),
        "lora_magnitude_vector.weight": base.norm(dim=1) * torch.linspace(0.9, 1.1, 10),
    }
    module = TrainedModule(kind="dora", tensors=tensors, scale=1.0, rank=2)
    errors = [nearest_lora(module, base, rank=rank)[1] for rank in (1, 2, 4, 8, 10)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-6
