import pytest
import torch
from torch import nn

from sdxl_ray.train.masters import MasterWeights, clip_by_norm


def make_parameters(value=1.0):
    return {"a": nn.Parameter(torch.full((3, 2), value)), "b": nn.Parameter(torch.full((4,), value))}


def test_compute_copies_follow_the_masters_in_their_own_precision():
    parameters = make_parameters(1 / 3)
    masters = MasterWeights(parameters, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    with torch.no_grad():
        for master in masters.masters.values():
            master += 0.1
    masters.publish()
    for name, master in masters.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(parameters[name], master.bfloat16())
        assert not torch.equal(parameters[name].float(), master)


def test_updates_too_small_for_bf16_add_up_in_the_masters():
    """Field notes, trap 18: 1 + 2^-9 is 1 in bf16, so a bf16 adapter would never move."""
    parameters = make_parameters(1.0)
    masters = MasterWeights(parameters, torch.bfloat16)
    optimizer = torch.optim.SGD(masters.masters.values(), lr=2**-9)
    moved = []
    for _ in range(8):
        masters.zero()
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, -1.0)
        masters.accumulate()
        optimizer.step()
        masters.publish()
        moved.append(float(parameters["a"][0, 0].detach()))
    assert float(torch.ones((), dtype=torch.bfloat16) + 2**-9) == 1.0  # the premise
    assert moved[0] == 1.0  # rounded away in the copy, not in the master
    assert moved[-1] == 1 + 8 * 2**-9
    assert torch.equal(masters.masters["a"].detach(), torch.full((3, 2), 1 + 8 * 2**-9))


def test_gradients_add_up_in_float32():
    """256 + 1 is 256 in bf16."""
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.bfloat16)
    masters.zero()
    for gradient in (256.0, 1.0, 1.0):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, gradient)
        masters.accumulate()
        assert all(parameter.grad is None for parameter in parameters.values())
    assert masters.gradient.dtype == torch.float32
    assert masters.gradient.tolist() == [258.0] * 10
    for master in masters.masters.values():
        assert master.grad.unique().tolist() == [258.0]


def test_a_parameter_without_gradient_adds_nothing():
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.float32)
    parameters["b"].grad = torch.ones(4)
    masters.accumulate()
    assert masters.gradient.tolist() == [0.0] * 6 + [1.0] * 4


def test_extras_lie_behind_the_gradients_in_one_buffer():
    masters = MasterWeights(make_parameters(), torch.float32, num_extra=2)
    first, second = masters.extras
    first += 3.0
    second += 4.0
    masters.masters["b"].grad.fill_(5.0)
    assert masters.buffer.tolist() == [0.0] * 6 + [5.0] * 4 + [3.0, 4.0]
    masters.zero()
    assert masters.buffer.abs().sum() == 0


def test_restore_puts_the_unrounded_weights_into_the_model():
    parameters = make_parameters(1 / 3)
    masters = MasterWeights(parameters, torch.bfloat16)
    masters.restore()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, masters.masters[name])
        assert parameter[(0,) * parameter.ndim] == torch.tensor(1 / 3)


def test_state_dict_is_a_copy_and_loading_it_publishes():
    parameters = make_parameters(0.5)
    masters = MasterWeights(parameters, torch.bfloat16)
    saved = masters.state_dict()
    with torch.no_grad():
        masters.masters["a"].zero_()
    masters.publish()
    assert saved["a"].unique().tolist() == [0.5]
    masters.load_state_dict(saved)
    assert masters.masters["a"].unique().tolist() == parameters["a"].float().unique().tolist() == [0.5]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_frozen_weights_get_no_gradient_and_do_not_move(weight_decay):
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.bfloat16)
    optimizer = torch.optim.AdamW(masters.masters.values(), lr=0.1, weight_decay=weight_decay)

    def step():
        masters.zero()
        loss = parameters["a"].float().square().sum() + parameters["b"].float().square().sum()
        loss.backward()
        masters.accumulate()
        optimizer.step()
        masters.publish()

    step()
    assert masters.masters["b"].unique().tolist() != [1.0]
    before = {name: master.detach().clone() for name, master in masters.masters.items()}
    masters.freeze(["b"])
    step()
    assert torch.equal(masters.masters["b"], before["b"])
    assert not torch.equal(masters.masters["a"], before["a"])
    assert parameters["b"].grad is None
    assert masters.gradient[:6].abs().min() > 0
    assert masters.gradient[6:].tolist() == [0.0] * 4


def test_frozen_weights_may_be_loaded_and_published():
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.float32)
    masters.freeze(["b"])
    masters.load_state_dict({"a": torch.zeros(3, 2), "b": torch.full((4,), 2.0)})
    assert parameters["b"].tolist() == [2.0] * 4


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 50.0])
def test_clipping_is_torchs(max_norm):
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.float32)
    masters.gradient.copy_(torch.randn(10, generator=torch.Generator().manual_seed(0)))
    plain = make_parameters()
    for name, parameter in plain.items():
        parameter.grad = masters.masters[name].grad.clone()
    expected = nn.utils.clip_grad_norm_(plain.values(), max_norm)
    norm = clip_by_norm(masters.gradient, max_norm)
    torch.testing.assert_close(norm, expected)
    for name, parameter in plain.items():
        torch.testing.assert_close(masters.masters[name].grad, parameter.grad)


def test_zero_means_no_clipping():
    gradient = torch.tensor([3.0, 4.0])
    assert float(clip_by_norm(gradient, 0.0)) == 5.0
    assert gradient.tolist() == [3.0, 4.0]
