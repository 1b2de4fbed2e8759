import io

import pytest
import torch
from torch import nn

from sdxl_ray.errors import TrainingError
from sdxl_ray.train.masters import MasterWeights, clip_by_norm
from sdxl_ray.train.optimizers import (
    OPTIMIZERS,
    ParameterGroup,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from sdxl_ray.train.scaling import LossScale

CPU = torch.device("cpu")
# All by name, and AdamW as it is on CUDA: it skips inside its kernel.
ALL = [*((name, {}) for name in OPTIMIZERS), ("adamw", {"fused": True})]
IDS = [*OPTIMIZERS, "adamw fused"]
SHAPES = {"a": (80, 64), "b": (8, 4)}


class Run:
    """A tiny model y = sum(w * x), whose gradient is x, trained as the loop does it."""

    def __init__(self, name="adamw", options=(), loss_scale=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
        self.masters = MasterWeights(self.parameters, dtype)
        self.loss_scale = loss_scale
        self.optimizer = make_optimizer(
            name,
            [ParameterGroup(tuple(self.masters.masters.values()))],
            learning_rate=0.5,
            weight_decay=0.01,
            betas=(0.9, 0.99),
            epsilon=1e-8,
            options=dict(options),
        )

    def step(self, number, *, worst=0.0, size=1.0, max_norm=0.0):
        """`worst` is added to one gradient."""
        self.masters.zero()
        for micro_batch in range(2):
            generator = torch.Generator().manual_seed(10 * number + micro_batch)
            loss = torch.zeros(())
            for parameter in self.parameters.values():
                x = size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if worst and micro_batch:
                    x.view(-1)[0] = worst
                loss = loss + (parameter * x).float().sum()
            (self.loss_scale.scale(loss) if self.loss_scale else loss).backward()
            self.masters.accumulate()
        self.masters.gradient.div_(2.0)
        if self.loss_scale:
            self.loss_scale.unscale(self.optimizer)
        self.gradient = self.masters.gradient.clone()
        self.norm = clip_by_norm(self.masters.gradient, max_norm)
        set_learning_rate(self.optimizer, 0.5 / number)
        self.loss_scale.step(self.optimizer) if self.loss_scale else self.optimizer.step()
        self.masters.publish()

    def snapshot(self):
        file = io.BytesIO()
        torch.save({"weights": self.masters.state_dict(), "optimizer": optimizer_state(self.optimizer)}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def same(mine, theirs):
    if isinstance(mine, torch.Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(same(*pair) for pair in zip(mine, theirs, strict=True))
    return mine == theirs


@pytest.mark.parametrize(("name", "options"), ALL, ids=IDS)
def test_scaling_by_a_power_of_two_changes_nothing(name, options):
    """In fp32 nothing overflows or vanishes, so scaling up and down is exact."""
    plain, scaled = Run(name, options), Run(name, options, LossScale(CPU))
    for number in range(1, 6):
        plain.step(number, max_norm=1.0)
        scaled.step(number, max_norm=1.0)
        assert torch.equal(plain.gradient, scaled.gradient)
        assert torch.equal(plain.norm, scaled.norm)
    assert same(scaled.snapshot(), plain.snapshot())


@pytest.mark.parametrize("worst", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("name", "options"), ALL, ids=IDS)
def test_a_step_that_is_not_finite_changes_nothing_but_the_scale(name, options, worst):
    run = Run(name, options, LossScale(CPU, initial=1024.0))
    run.step(1)
    run.step(2)
    before = run.snapshot()
    run.step(3, worst=worst, max_norm=1.0)
    assert not torch.isfinite(run.norm)  # how the loop sees that the step was skipped
    assert same(run.snapshot(), before)
    assert run.loss_scale.value() == 512.0
    run.step(4)
    assert torch.isfinite(run.norm)
    assert not same(run.snapshot(), before)


@pytest.mark.parametrize(("name", "options"), ALL, ids=IDS)
def test_a_skipped_step_is_as_if_it_had_not_been(name, options):
    run, without = Run(name, options, LossScale(CPU)), Run(name, options, LossScale(CPU))
    for number in (1, 2, 3, 4):
        run.step(number)
        without.step(number)
        if number in (1, 3):
            run.step(9, worst=float("inf"))
    assert same(run.snapshot(), without.snapshot())


@pytest.mark.parametrize("worst", [0.0, float("inf")])
def test_an_infinite_first_step(worst):
    """The optimizer has no state yet, and the first scale is a guess that is often too high."""
    run = Run(loss_scale=LossScale(CPU))
    before = run.masters.state_dict()
    run.step(1, worst=worst)
    assert same(run.masters.state_dict(), before) == (worst > 0)
    run.step(2)
    assert not same(run.masters.state_dict(), before)


def test_small_gradients_survive_fp16():
    """3e-8 is 0 in fp16, whose smallest number is 6e-8; scaled by 2^16 it is 2e-3."""
    plain, scaled = Run(dtype=torch.float16), Run(dtype=torch.float16, loss_scale=LossScale(CPU))
    for run in (plain, scaled):
        run.masters.zero()
        weight = run.parameters["b"]
        loss = (weight * 1.0).sum().float() * 2e-8
        (run.loss_scale.scale(loss) if run.loss_scale else loss).backward()
        run.masters.accumulate()
    scaled.loss_scale.unscale(scaled.optimizer)
    assert plain.masters.gradient.abs().max() == 0
    assert scaled.masters.masters["b"].grad.flatten().tolist() == pytest.approx([2e-8] * 32, rel=1e-3)


def test_overflow_in_fp16_is_found_and_halves_the_scale_until_it_fits():
    """A gradient of 3 is 196608 at a scale of 2^16, and fp16 ends at 65504."""
    run = Run(dtype=torch.float16, loss_scale=LossScale(CPU))
    before = run.masters.state_dict()
    scales = []
    for number in range(1, 7):
        run.step(number, worst=3.0, size=0.25)  # only the one gradient is large
        scales.append(run.loss_scale.value())
    assert scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**14, 2.0**14]
    assert not same(run.masters.state_dict(), before)


def test_the_scale_doubles_after_enough_good_steps_in_a_row():
    run = Run(loss_scale=LossScale(CPU, initial=8.0, growth_interval=3))
    scales = []
    for number in range(1, 11):
        run.step(number, worst=float("inf") if number == 5 else 0.0)
        scales.append(run.loss_scale.value())
    #                 3 good           bad, and counting begins again
    assert scales == [8, 8, 16, 16, 8, 8, 8, 16, 16, 16]


def test_the_defaults():
    state = LossScale(CPU).state_dict()
    assert (state["scale"], state["growth_factor"], state["backoff_factor"], state["growth_interval"]) == (
        65536.0,
        2.0,
        0.5,
        2000,
    )


def test_a_rank_without_a_micro_batch_decides_like_the_others():
    """It never scales a loss, and sees the sum of the others' gradients."""
    idle, busy = Run(loss_scale=LossScale(CPU)), Run(loss_scale=LossScale(CPU))
    for number, worst in ((1, 0.0), (2, float("inf")), (3, 0.0)):
        busy.masters.zero()
        loss = sum((parameter * (worst or 1.0)).sum() for parameter in busy.parameters.values())
        busy.loss_scale.scale(loss).backward()
        busy.masters.accumulate()
        idle.masters.gradient.copy_(busy.masters.gradient)  # what all_reduce does
        for run in (idle, busy):
            run.loss_scale.unscale(run.optimizer)
            set_learning_rate(run.optimizer, 0.1 / number)
            run.loss_scale.step(run.optimizer)
    assert same(idle.snapshot(), busy.snapshot())
    assert idle.loss_scale.state_dict() == busy.loss_scale.state_dict()
    assert idle.loss_scale.value() == 2.0**15


@pytest.mark.parametrize(("name", "options"), ALL, ids=IDS)
def test_frozen_weights_stay(name, options):
    run = Run(name, options, LossScale(CPU))
    run.step(1)
    run.masters.freeze(["b"])
    before = run.masters.state_dict()
    run.step(2)
    run.step(3, worst=float("inf"))
    run.step(4)
    after = run.masters.state_dict()
    assert torch.equal(after["b"], before["b"])
    assert not torch.equal(after["a"], before["a"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, tmp_path):
    def make():
        return Run(name, {}, LossScale(CPU, growth_interval=3))

    def steps(run, numbers):
        for number in numbers:
            run.step(number, worst=float("inf") if number in (2, 5) else 0.0)

    whole, before, after = make(), make(), make()
    steps(whole, range(1, 10))
    steps(before, range(1, 5))
    torch.save(before.snapshot() | {"loss_scale": before.loss_scale.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    after.masters.load_state_dict(saved["weights"])
    load_optimizer_state(after.optimizer, saved["optimizer"])
    after.loss_scale.load_state_dict(saved["loss_scale"])
    assert after.loss_scale.state_dict() == before.loss_scale.state_dict() != LossScale(CPU).state_dict()
    steps(after, range(5, 10))
    assert same(after.snapshot(), whole.snapshot())
    assert after.loss_scale.state_dict() == whole.loss_scale.state_dict()


def test_a_gradient_that_is_never_finite_is_an_error():
    run = Run(loss_scale=LossScale(CPU, initial=2.0**-8))
    run.step(1, worst=float("nan"))
    run.step(2, worst=float("nan"))
    assert run.loss_scale.value() == 2.0**-10
    run.step(3, worst=float("nan"))
    with pytest.raises(TrainingError) as caught:
        run.loss_scale.value()
    assert str(caught.value) == (
        "the gradient in fp16 is not finite whatever the loss is scaled by (the scale fell to 0.00049). Set "
        'model.dtype = "bf16" where the device has it, or "fp32"; or lower optimizer.learning_rate.'
    )
