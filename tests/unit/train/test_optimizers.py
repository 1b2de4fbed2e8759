import math

import pytest
import torch
from torch import nn

from sdxl_ray.config.load import with_overrides
from sdxl_ray.train.optimizers import MasterWeights, adamw, clip_by_norm, lr_schedule
from sdxl_ray.train.state import TrainState, Workers
from tests.tiny import make_training


def make_parameters(value=1.0):
    return {"a": nn.Parameter(torch.full((3, 2), value)), "b": nn.Parameter(torch.full((4,), value))}


def make_optimizer(masters, **changes):
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8}
    return adamw(masters, **(settings | changes))


# ---- master weights --------------------------------------------------------------------------------------------------


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


def test_optimizer_state_is_float32():
    masters = MasterWeights(make_parameters(), torch.bfloat16)
    optimizer = make_optimizer(masters)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert len(moments) == 6
    assert {moment.dtype for moment in moments} == {torch.float32}


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


def test_adamw_on_masters_is_adamw_on_the_weights():
    """In fp32, masters are the absence of masters."""
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.float32)
    optimizer = make_optimizer(masters, weight_decay=0.1)
    plain = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    expected = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.1)
    for step in range(5):
        masters.zero()
        for ours, theirs in zip(parameters.values(), plain, strict=True):
            gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        masters.accumulate()
        optimizer.step()
        masters.publish()
        expected.step()
    for ours, theirs in zip(parameters.values(), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_a_restart_brings_back_the_moments_and_keeps_the_configs_settings():
    def make_state(weight_decay):
        masters = MasterWeights(make_parameters(), torch.float32)
        optimizer = make_optimizer(masters, weight_decay=weight_decay)
        return TrainState(None, lambda *_: None, masters, optimizer, lambda step: 0.0, torch.device("cpu"))

    before, after = make_state(0.01), make_state(0.2)
    before.masters.gradient.fill_(2.0)
    before.optimizer.step()
    after.load_state_dict(before.state_dict())
    assert after.optimizer.param_groups[0]["weight_decay"] == 0.2
    for mine, saved in zip(after.optimizer.state.values(), before.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], saved[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
        assert mine["exp_avg"].abs().sum() > 0


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


# ---- learning rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "warmup_steps", "rates"),
    [
        # of a run of 8 steps: {step: share of the peak}
        ("constant", 0, {1: 1, 4: 1, 8: 1, 9: 1}),
        ("constant", 1, {1: 1, 2: 1, 8: 1}),
        ("constant", 4, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1, 5: 1, 8: 1, 9: 1}),
        ("linear", 0, {1: 1, 2: 7 / 8, 5: 0.5, 8: 1 / 8, 9: 0}),
        ("linear", 1, {1: 1, 2: 7 / 8, 5: 0.5, 8: 1 / 8, 9: 0}),
        ("linear", 4, {1: 0.25, 4: 1, 5: 0.8, 8: 0.2, 9: 0, 20: 0}),
        ("linear", 8, {1: 1 / 8, 7: 7 / 8, 8: 1, 9: 0}),
        ("cosine", 0, {1: 1, 3: 0.5 + 0.5 * math.cos(math.pi / 4), 5: 0.5, 9: 0}),
        ("cosine", 1, {1: 1, 5: 0.5, 9: 0}),
        ("cosine", 5, {1: 0.2, 5: 1, 7: 0.5, 8: 0.5 + 0.5 * math.cos(math.pi * 3 / 4), 9: 0}),
        ("cosine", 8, {1: 1 / 8, 8: 1, 9: 0}),
    ],
)
def test_learning_rate_at_chosen_steps(name, warmup_steps, rates):
    rate = lr_schedule(name, peak=3.0, warmup_steps=warmup_steps, max_steps=8)
    assert {step: rate(step) for step in rates} == pytest.approx({step: 3 * share for step, share in rates.items()})


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 20, 30])
def test_no_step_is_wasted_on_a_rate_of_zero_and_none_exceeds_the_peak(name, warmup_steps):
    rate = lr_schedule(name, peak=1.0, warmup_steps=warmup_steps, max_steps=20)
    rates = [rate(step) for step in range(1, 21)]
    assert min(rates) > 0 and max(rates) <= 1.0
    top = max(range(20), key=lambda index: rates[index])
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_a_run_of_one_step_trains():
    for name in ("constant", "linear", "cosine"):
        assert lr_schedule(name, peak=1.0, warmup_steps=0, max_steps=1)(1) == 1.0


def test_the_curve_counts_optimizer_steps_whatever_the_workers(config, index_path):
    """Field notes, traps 10 and 11: elsewhere it runs faster with more workers, or with accumulation."""
    curves = []
    for num_workers, accumulation in ((1, 1), (2, 1), (1, 3)):
        changes = {
            "train.num_workers": num_workers,
            "train.accumulation": accumulation,
            "lr_schedule.name": "cosine",
            "lr_schedule.warmup": "3 steps",
        }
        training = make_training(with_overrides(config, changes), index_path, workers=Workers(0, num_workers))
        assert training.plan.max_steps == 4
        curves.append([training.state.learning_rate(step) for step in range(1, 6)])
    assert curves[0] == curves[1] == curves[2]
    assert curves[0][2] == config.optimizer.learning_rate
