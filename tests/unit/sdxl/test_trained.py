"""The update of one layer, against sums written out by hand and against the adapted module's output."""

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_ray.sdxl.adapters import (
    ADAPTER_KINDS,
    adapter_parameters,
    attach_adapter,
    base_weight,
    detach_adapter,
    start_state_dict,
    trained_modules,
)
from sdxl_ray.sdxl.trained import TrainedModule, balanced, effective_delta


def layer(shape: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if shape == "linear":
        return nn.Linear(12, 18), torch.randn(5, 12)
    kernel = 3 if shape == "conv3x3" else 1
    return nn.Conv2d(12, 18, kernel, padding=kernel // 2, stride=kernel - kernel // 2), torch.randn(2, 12, 7, 5)


def adapted(shape: str, **arguments) -> tuple[nn.Module, torch.Tensor]:
    """A model of one adapted layer, away from its start."""
    bare, x = layer(shape)
    model = nn.Sequential(bare)
    attach_adapter(model, **{"rank": 3, "alpha": 7.0, "targets": ["0"], **arguments})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, x


@pytest.mark.parametrize("shape", ["linear", "conv3x3", "conv1x1"])
@pytest.mark.parametrize(
    "arguments",
    [
        *({"kind": kind} for kind in ADAPTER_KINDS),
        *({"kind": kind, "rank_stabilized": True} for kind in ADAPTER_KINDS),
        {"kind": "lokr", "rank": 1},
        {"kind": "lokr", "rank": 50},
        {"kind": "lokr", "factor": 2, "rank": 1},
        {"init": "pissa"},
        {"init": "olora", "rank_stabilized": True},
        {"init": "gaussian"},
    ],
    ids=str,
)
def test_base_and_delta_give_the_adapted_output(arguments, shape):
    model, x = adapted(shape, **arguments)
    expected = model(x)
    (trained,) = trained_modules(model).values()
    delta = effective_delta(trained, base_weight(model[0]))
    detach_adapter(model)
    before = model(x)
    assert delta.shape == model[0].weight.shape and delta.dtype == torch.float32
    with torch.no_grad():
        model[0].weight += delta
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "kind", "rank", "scale"),
    [
        ({"kind": "lora"}, "lora", 3, 7 / 3),
        ({"kind": "dora"}, "dora", 3, 7 / 3),
        ({"kind": "loha", "rank_stabilized": True}, "loha", 3, 7 / 3**0.5),
        ({"kind": "lokr", "rank": 1}, "lokr", 1, 7.0),
        ({"init": "pissa"}, "lora", 6, 7 / 3),
    ],
    ids=str,
)
def test_what_is_told_of_a_module(arguments, kind, rank, scale):
    (told,) = trained_modules(adapted("linear", **arguments)[0]).values()
    assert (told.kind, told.rank) == (kind, rank)
    assert told.scale == pytest.approx(scale, rel=1e-12)
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in told.tensors.values())


@pytest.mark.parametrize(
    ("arguments", "shape", "shapes"),
    [
        ({}, "conv3x3", {"lora_A.weight": (3, 12, 3, 3), "lora_B.weight": (18, 3, 1, 1)}),
        ({"init": "pissa"}, "conv3x3", {"lora_A.weight": (6, 12, 3, 3), "lora_B.weight": (18, 6, 1, 1)}),
        ({"kind": "loha"}, "conv3x3", {"hada_w1_a": (18, 3), "hada_w1_b": (3, 108)}),
        ({"kind": "lokr", "rank": 1}, "conv3x3", {"lokr_w1": (3, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 36)}),
        ({"kind": "lokr"}, "conv3x3", {"lokr_w1": (3, 3), "lokr_w2": (6, 4, 3, 3)}),
        ({"kind": "lokr"}, "linear", {"lokr_w1": (3, 3), "lokr_w2": (6, 4)}),
        ({"kind": "dora"}, "linear", {"lora_magnitude_vector.weight": (18,)}),
        ({"kind": "dora"}, "conv1x1", {"lora_magnitude_vector.weight": (1, 18, 1, 1)}),
    ],
    ids=str,
)
def test_the_factors_of_each_kind(arguments, shape, shapes):
    """18 is split into 3 x 6 and 12 into 3 x 4; the small factors are multiplied with the whole kernel."""
    (told,) = trained_modules(adapted(shape, **arguments)[0]).values()
    assert {name: tuple(told.tensors[name].shape) for name in shapes} == shapes


def test_pissa_is_told_as_the_difference_of_both_products():
    bare = layer("linear")[0]
    model, _ = adapted("linear", init="pissa")
    own = {name.removeprefix("0."): parameter.detach() for name, parameter in adapter_parameters(model).items()}
    frozen = {name.removeprefix("0."): value for name, value in start_state_dict(model).items()}
    own["lora_B.weight"] += 1.0  # in place: it has learnt something
    (told,) = trained_modules(model).values()
    assert told.rank == len(told.tensors["lora_A.weight"]) == 6
    taken_off = frozen["lora_B.weight"] @ frozen["lora_A.weight"]
    difference = own["lora_B.weight"] @ own["lora_A.weight"] + taken_off
    torch.testing.assert_close(effective_delta(told, bare.weight), told.scale * difference, rtol=1e-4, atol=1e-5)
    u, s, v = np.linalg.svd(bare.weight.detach().double().numpy())
    principal = torch.tensor((u[:, :3] * s[:3]) @ v[:3], dtype=torch.float32)
    torch.testing.assert_close(-told.scale * taken_off, principal, rtol=1e-4, atol=1e-5)


# ---- formulas, with small whole numbers ------------------------------------------------------------------------------


def number(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_lora_by_hand():
    told = TrainedModule("lora", {"lora_A.weight": number([1, 2]), "lora_B.weight": number([3], [4])}, 0.5, 1)
    assert torch.equal(effective_delta(told, torch.zeros(2, 2)), number([1.5, 3], [2, 4]))


def test_dora_by_hand():
    """Rows (3, 4) and (0, 2) have the lengths 5 and 2; the magnitudes 10 and 1 make them (6, 8) and (0, 1)."""
    tensors = {
        "lora_A.weight": number([1, 0]),
        "lora_B.weight": number([2], [0]),
        "lora_magnitude_vector.weight": torch.tensor([10.0, 1.0]),
    }
    base = number([2, 4], [0, 2])
    told = TrainedModule("dora", tensors, 0.5, 1)
    torch.testing.assert_close(effective_delta(told, base), number([4, 4], [0, -1]))


def test_loha_by_hand():
    tensors = {
        "hada_w1_a": number([1], [2]),
        "hada_w1_b": number([1, 3]),
        "hada_w2_a": number([5], [1]),
        "hada_w2_b": number([1, 2]),
    }
    assert torch.equal(
        effective_delta(TrainedModule("loha", tensors, 2.0, 1), torch.zeros(2, 2)), number([10, 60], [4, 24])
    )


def test_lokr_by_hand():
    told = TrainedModule("lokr", {"lokr_w1": number([1, 2]), "lokr_w2": number([1, 0], [3, 4])}, 1.0, 1)
    assert torch.equal(effective_delta(told, torch.zeros(2, 4)), number([1, 0, 2, 0], [3, 4, 6, 8]))
    split = {
        "lokr_w1_a": number([1], [2]),
        "lokr_w1_b": number([1, 1]),
        "lokr_w2_a": number([3]),
        "lokr_w2_b": number([1, 2]),
    }
    expected = number([3, 6, 3, 6], [6, 12, 6, 12])
    assert torch.equal(effective_delta(TrainedModule("lokr", split, 1.0, 1), torch.zeros(2, 4)), expected)


def test_a_kernel_belongs_to_the_second_kronecker_factor():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, generator=generator), torch.randn(4, 5, 3, 3, generator=generator)
    delta = effective_delta(
        TrainedModule("lokr", {"lokr_w1": first, "lokr_w2": second}, 1.0, 1), torch.zeros(8, 15, 3, 3)
    )
    for out in range(8):
        for channel in range(15):
            torch.testing.assert_close(
                delta[out, channel], first[out // 4, channel // 5] * second[out % 4, channel % 5]
            )


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_tucker_cores_as_lycoris_writes_them(kind):
    """Files of LyCORIS may hold them: w[o, i, y, x] = sum over p, q of t[p, q, y, x] a[p, o] b[q, i]."""
    generator = torch.Generator().manual_seed(0)
    cores, lefts, rights = (
        [torch.randn(shape, generator=generator) for _ in range(2)] for shape in ((2, 2, 3, 3), (2, 4), (2, 5))
    )
    by_hand = [torch.zeros(4, 5, 3, 3) for _ in range(2)]
    for number_of, core in enumerate(cores):
        for p in range(2):
            for q in range(2):
                outer = lefts[number_of][p][:, None] * rights[number_of][q][None]
                by_hand[number_of] += outer[:, :, None, None] * core[p, q]
    if kind == "loha":
        tensors = {
            f"hada_{leaf}": value
            for number_of in range(2)
            for leaf, value in (
                (f"t{number_of + 1}", cores[number_of]),
                (f"w{number_of + 1}_a", lefts[number_of]),
                (f"w{number_of + 1}_b", rights[number_of]),
            )
        }
        expected = by_hand[0] * by_hand[1]
    else:
        tensors = {"lokr_w1": number([2]), "lokr_t2": cores[0], "lokr_w2_a": lefts[0], "lokr_w2_b": rights[0]}
        expected = 2 * by_hand[0]
    delta = effective_delta(TrainedModule(kind, tensors, 1.0, 2), torch.zeros(4, 5, 3, 3))
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_a_base_in_bf16_is_computed_with_in_fp32():
    tensors = {
        "lora_A.weight": number([1, 0]),
        "lora_B.weight": number([0], [0]),
        "lora_magnitude_vector.weight": torch.tensor([5.0, 1.0]),
    }
    delta = effective_delta(TrainedModule("dora", tensors, 1.0, 1), number([3, 4], [0, 1]).bfloat16())
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, torch.zeros(2, 2))


@pytest.mark.parametrize("shapes", [((4, 32), (24, 4)), ((6, 3, 3, 3), (8, 6, 1, 1)), ((20, 8), (6, 20))])
def test_balanced_factors_have_the_same_product_and_survive_sixteen_bits(shapes):
    """[B, -B0] and [A; A0] of a PiSSA that has hardly moved cancel: rounded to bf16, little of the change is left."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in shapes)
    moved_down, moved_up = (each * (1 + 0.01 * torch.randn(each.shape, generator=generator)) for each in (down, up))
    both = {"lora_A.weight": torch.cat([moved_down, down]), "lora_B.weight": torch.cat([moved_up, -up], dim=1)}

    def product(factors, dtype=torch.float64):
        rounded = {name: tensor.to(dtype).double().flatten(1) for name, tensor in factors.items()}
        return rounded["lora_B.weight"] @ rounded["lora_A.weight"]

    expected, found = product(both), balanced(both)
    rank = min(2 * len(down), up.shape[0], down[0].numel())
    assert found["lora_A.weight"].shape == (rank, *down.shape[1:])
    assert found["lora_B.weight"].shape == (up.shape[0], rank, *up.shape[2:])

    def error(factors, dtype=torch.float64):
        return float((product(factors, dtype) - expected).norm() / expected.norm())

    assert error(found) < 1e-6
    assert error(found, torch.bfloat16) < 0.01 < 0.1 < error(both, torch.bfloat16)
