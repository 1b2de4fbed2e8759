import importlib.util
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest

from sdxl_ray.train.lr_schedules import LR_SCHEDULES, lr_schedule

FALLING = [name for name in LR_SCHEDULES if name != "constant"]
REPOSITORY = Path(__file__).parents[3]


def make(name, **changes):
    settings = {"peak": 1.0, "warmup_steps": 0, "max_steps": 20, "decay_steps": 7}
    return lr_schedule(name, **(settings | changes))


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


def before_there_were_seven(name, peak, warmup_steps, max_steps, step):
    """The first version of these three, as it was, by which runs have been made."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - max(warmup_steps, 1)) / max(1, max_steps + 1 - max(warmup_steps, 1))
    progress = min(1.0, max(0.0, progress))
    if name == "constant":
        return peak * 1.0
    return peak * (1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 50, 997, 2000])
def test_without_an_end_share_nothing_has_changed(name, warmup_steps):
    rate = lr_schedule(name, peak=3e-4, warmup_steps=warmup_steps, max_steps=997)
    for step in range(1, 1005):
        assert rate(step) == before_there_were_seven(name, 3e-4, warmup_steps, 997, step)


# How much is left of the fall at p, as a formula written out here.
SHARE_LEFT = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: math.cos(math.pi * p / 2) ** 2,  # half-angle form
    "polynomial": lambda p: (1 - p) ** 3,
    "rex": lambda p: 2 * (1 - p) / (2 - p),
}


@pytest.mark.parametrize("name", SHARE_LEFT)
@pytest.mark.parametrize("end_share", [0.0, 0.1])
def test_the_curve_at_its_start_middle_and_end(name, end_share):
    """Warm-up over 10 of 100 steps; the fall takes 91, so its middle lies at step 55.5 and its end at 101."""
    rate = make(name, peak=2.0, warmup_steps=10, max_steps=100, end_share=end_share, power=3.0)
    assert [rate(step) for step in (1, 5, 9, 10)] == pytest.approx([0.2, 1.0, 1.8, 2.0])
    for step in (10, 11, 40, 55, 56, 99, 100, 101, 150):
        progress = float(min(Fraction(1), Fraction(step - 10, 91)))
        expected = 2.0 * ((1 - end_share) * SHARE_LEFT[name](progress) + end_share)
        assert rate(step) == pytest.approx(expected, abs=1e-12), step
    assert rate(100) > rate(101) == pytest.approx(2.0 * end_share)


def test_known_points_of_each_curve():
    """Step 5 of 8 is half way down: p = 1/2."""
    half = {
        "linear": 1 / 2, "cosine": 1 / 2, "polynomial": 1 / 4, "rex": 2 / 3, "constant": 1.0, "wsd": 1.0,
        "cosine_restarts": 1.0,
    }  # fmt: skip
    for name in LR_SCHEDULES:
        rate = make(name, max_steps=8, power=2.0, cycles=2, decay_steps=2)
        assert rate(1) == 1.0
        assert rate(5) == pytest.approx(half[name]), name


def test_restarts_begin_at_the_peak_and_end_with_the_run():
    rate = make("cosine_restarts", max_steps=12, cycles=3)
    cycle = [math.cos(math.pi * quarter / 8) ** 2 for quarter in range(4)]
    assert [rate(step) for step in range(1, 13)] == pytest.approx(cycle * 3)
    assert rate(13) == rate(14) == 0.0


@pytest.mark.parametrize("cycles", [1, 3, 7, 49, 60])
@pytest.mark.parametrize("max_steps", [10, 49, 147, 1000])
def test_no_restart_is_missed_by_rounding(cycles, max_steps):
    """In exact fractions: where a cycle's boundary falls on a step, that step has the peak, not almost nothing."""
    rate = make("cosine_restarts", max_steps=max_steps, cycles=cycles)
    for step in range(1, max_steps + 1):
        phase = float(Fraction(step - 1, max_steps) * cycles % 1)
        assert rate(step) == pytest.approx(math.cos(math.pi * phase / 2) ** 2, abs=1e-12)


def test_one_cycle_is_the_cosine():
    one, plain = make("cosine_restarts", cycles=1, warmup_steps=3), make("cosine", warmup_steps=3)
    assert [one(step) for step in range(1, 25)] == [plain(step) for step in range(1, 25)]


def test_wsd_is_constant_and_then_falls_linearly():
    rate = make("wsd", peak=8.0, warmup_steps=2, max_steps=10, decay_steps=4, end_share=0.5)
    # 7 is the first step of the fall's 4 and still at the peak, as the first step of a linear schedule is
    assert [rate(step) for step in range(1, 13)] == [4, 8, 8, 8, 8, 8, 8, 7, 6, 5, 4, 4]


@pytest.mark.parametrize("warmup_steps", [0, 5])
@pytest.mark.parametrize("decay_steps", [20, 21, 1000])
def test_wsd_whose_fall_is_longer_than_the_rest_is_linear(warmup_steps, decay_steps):
    wsd = make("wsd", warmup_steps=warmup_steps, decay_steps=decay_steps)
    linear = make("linear", warmup_steps=warmup_steps)
    assert [wsd(step) for step in range(1, 25)] == pytest.approx([linear(step) for step in range(1, 25)])


def test_wsd_without_a_fall_is_constant():
    wsd, constant = make("wsd", decay_steps=0, warmup_steps=4), make("constant", warmup_steps=4)
    assert [wsd(step) for step in range(1, 25)] == [constant(step) for step in range(1, 25)]


def test_polynomial_of_power_one_is_linear():
    polynomial, linear = make("polynomial", power=1.0), make("linear")
    assert [polynomial(step) for step in range(1, 25)] == [linear(step) for step in range(1, 25)]


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 20, 21, 30])
def test_no_step_is_wasted_on_a_rate_of_zero_and_none_exceeds_the_peak(name, warmup_steps):
    for end_share, decay_steps in itertools.product([0.0, 0.3, 0.77], [0, 1, 7, 100]):
        rate = make(name, warmup_steps=warmup_steps, end_share=end_share, decay_steps=decay_steps)
        rates = [rate(step) for step in range(1, 21)]
        assert min(rates) > 0 and max(rates) <= 1.0
        top = max(range(20), key=lambda index: rates[index])
        assert rates[: top + 1] == sorted(rates[: top + 1])
        if name != "cosine_restarts":
            assert rates[top:] == sorted(rates[top:], reverse=True)
        if warmup_steps <= 20:
            assert rates[top] == 1.0
            assert min(rates[top:]) >= end_share


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_the_peak_is_the_peak_to_the_bit(name):
    for end_share in (i / 97 for i in range(97)):
        rate = make(name, peak=1e-4, end_share=end_share, warmup_steps=5)
        assert max(rate(step) for step in range(1, 21)) == rate(5) == 1e-4


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_run_of_one_step_trains(name):
    for decay_steps in (0, 1, 5):
        assert make(name, max_steps=1, decay_steps=decay_steps)(1) == 1.0
        assert make(name, max_steps=1, warmup_steps=1, decay_steps=decay_steps)(1) == 1.0
        assert make(name, max_steps=1, warmup_steps=4, decay_steps=decay_steps)(1) == 0.25


@pytest.mark.parametrize("name", FALLING)
def test_after_the_run_it_stays_at_the_end(name):
    rate = make(name, end_share=0.25)
    assert rate(21) == rate(22) == rate(1000) == 0.25


def test_the_drawing_is_up_to_date():
    """docs/learning-rates.svg is what `python scripts/draw_lr_schedules.py` writes."""
    path = REPOSITORY / "scripts" / "draw_lr_schedules.py"
    spec = importlib.util.spec_from_file_location("draw_lr_schedules", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawing = (REPOSITORY / "docs" / "learning-rates.svg").read_text(encoding="utf-8")
    assert drawing == script.draw()
    text = (REPOSITORY / "docs" / "learning-rates.md").read_text(encoding="utf-8")
    for name in LR_SCHEDULES:
        assert f">{name}<" in drawing
        assert f"`{name}`" in text


def test_the_curve_counts_optimizer_steps_whatever_the_workers(config, index_path):
    """Field notes, traps 10 and 11: elsewhere it runs faster with more workers, or with accumulation."""
    # The whole trainer, which the other tests here do not need.
    from sdxl_ray.config.load import with_overrides
    from sdxl_ray.train.state import Workers
    from tests.tiny import make_training

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
