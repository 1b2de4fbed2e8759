import math
from collections import Counter

import numpy as np
import pytest

from sdxl_ray.diffusion.randomness import keyed_uniform
from sdxl_ray.diffusion.timesteps import (
    make_sampler,
    strata,
    stratified_timesteps,
    stratified_uniform,
    uniform_timestep,
)
from sdxl_ray.errors import ConfigError

NEARLY_ONE = 1 - 2**-53  # the largest number that a generator gives


def test_both_ends_are_reachable():
    """Field notes, trap 35: ai-toolkit never trains the ends."""
    assert uniform_timestep(0.0, 1000) == 0
    assert uniform_timestep(NEARLY_ONE, 1000) == 999
    assert uniform_timestep(1.0, 1000) == 999  # not drawn, but never out of range


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_each_level_gets_an_equal_interval(num_timesteps):
    """The middle of each of T equal intervals gives each level once."""
    middles = [(index + 0.5) / num_timesteps for index in range(num_timesteps)]
    assert [uniform_timestep(u, num_timesteps) for u in middles] == list(range(num_timesteps))


def test_drawn_levels_are_uniform():
    counts = Counter(uniform_timestep(keyed_uniform("timestep", number), 1000) // 100 for number in range(20_000))
    assert set(counts) == set(range(10))
    # five standard deviations of a binomial with p = 0.1
    assert all(abs(count - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [500]), (2, [250, 750]), (4, [125, 375, 625, 875]), (1000, list(range(1000)))]
)
def test_stratified_levels_are_the_middles_of_equal_intervals(count, expected):
    assert stratified_timesteps(count, 1000) == expected


# ---- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [1, 7, 50, 1000])
@pytest.mark.parametrize(
    "neutral", [{}, {"bias": "none", "bias_factor": 7.0}, {"bias": "more_noise", "bias_factor": 1.0}, {"logit_mean": 2}]
)
def test_the_uniform_sampler_is_uniform_timestep_for_every_u(num_timesteps, neutral):
    """To the bit, also where an edge cannot be written in binary: 0.57 * 1000 is below 570."""
    sampler = make_sampler(num_timesteps, **neutral)
    edges = [index / num_timesteps for index in range(num_timesteps)]
    numbers = [0.0, NEARLY_ONE, 0.57, *edges]
    numbers += [math.nextafter(edge, side) for edge in edges[1:] for side in (0.0, 1.0)]
    numbers += np.random.default_rng(0).random(2000).tolist()
    assert [sampler(u) for u in numbers] == [uniform_timestep(u, num_timesteps) for u in numbers]
    assert np.array_equal(sampler.probabilities, np.full(num_timesteps, 1 / num_timesteps))


def normal_cumulative(score):
    return 0.5 * (1 + math.erf(score / math.sqrt(2)))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-1.0, 0.6), (2.0, 1.5)])
def test_logit_normal_is_its_formula(mean, std):
    def cumulative(share):
        if share in (0, 1):
            return share
        return normal_cumulative((math.log(share / (1 - share)) - mean) / std)

    probabilities = make_sampler(distribution="logit_normal", logit_mean=mean, logit_std=std).probabilities
    assert probabilities.shape == (1000,) and probabilities.dtype == np.float64
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    for t in (0, 1, 10, 50, 100, 250, 500, 501, 750, 900, 998, 999):
        expected = cumulative((t + 1) / 1000) - cumulative(t / 1000)
        assert probabilities[t] == pytest.approx(expected, rel=1e-9, abs=1e-15), t


def test_logit_normal_is_symmetric_and_reaches_both_ends():
    sampler = make_sampler(distribution="logit_normal")
    assert (sampler.probabilities > 0).all()
    np.testing.assert_allclose(sampler.probabilities, sampler.probabilities[::-1], rtol=1e-9)
    assert sampler(0.0) == 0
    assert sampler(NEARLY_ONE) == 999
    assert sampler(0.5) == 500


def mean_level(sampler):
    return float((sampler.probabilities * np.arange(1000)).sum())


def test_a_logit_mean_above_zero_gives_more_noise():
    means = [mean_level(make_sampler(distribution="logit_normal", logit_mean=mean)) for mean in (-1, 0, 1)]
    assert means[0] < means[1] == pytest.approx(499.5) and means[1] < means[2]


def test_less_noise_draws_the_low_timesteps_more_often():
    """SimpleTuner's help for `earlier` and `later` states the opposite of what they do."""
    probabilities = make_sampler(bias="less_noise", bias_factor=3.0, bias_share=0.25).probabilities
    assert probabilities[0] == pytest.approx(3 * probabilities[999])
    assert len(set(probabilities[:250])) == 1 and len(set(probabilities[250:])) == 1
    assert probabilities[:250].sum() == pytest.approx(250 * 3 / (250 * 3 + 750))


def test_more_noise_draws_the_high_timesteps_more_often():
    probabilities = make_sampler(bias="more_noise", bias_factor=3.0, bias_share=0.25).probabilities
    assert probabilities[999] == pytest.approx(3 * probabilities[0])
    assert len(set(probabilities[:750])) == 1 and len(set(probabilities[750:])) == 1
    assert probabilities[750:].sum() == pytest.approx(250 * 3 / (250 * 3 + 750))


def test_a_range_is_drawn_more_often_with_both_its_ends():
    probabilities = make_sampler(bias="range", bias_factor=10.0, bias_begin=100, bias_end=102).probabilities
    assert (np.flatnonzero(probabilities > 1 / 1000) == [100, 101, 102]).all()
    assert probabilities[101] == pytest.approx(10 / (997 + 30))


def test_a_factor_of_zero_leaves_levels_out():
    sampler = make_sampler(bias="more_noise", bias_factor=0.0, bias_share=0.5)
    assert sampler.probabilities[:500].sum() == pytest.approx(1)
    assert sampler(NEARLY_ONE) == 499
    assert make_sampler(bias="less_noise", bias_factor=0.0, bias_share=0.5)(0.0) == 500


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 999), (0, 0), (999, 999), (200, 799), (3, 5)])
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_limits_are_included_and_nothing_lies_outside(distribution, minimum, maximum):
    sampler = make_sampler(distribution=distribution, minimum=minimum, maximum=maximum)
    assert (np.flatnonzero(sampler.probabilities) == np.arange(minimum, maximum + 1)).all()
    assert sampler(0.0) == minimum
    assert sampler(NEARLY_ONE) == maximum
    assert sampler(1.0) == maximum  # not drawn, but never out of range


def test_a_bias_takes_its_share_of_the_levels_that_are_seen():
    probabilities = make_sampler(
        bias="more_noise", bias_factor=3.0, bias_share=0.25, minimum=100, maximum=499
    ).probabilities
    assert (np.flatnonzero(probabilities > 1 / 400) == np.arange(400, 500)).all()


def test_limits_above_a_short_schedule_are_its_last_level():
    assert make_sampler(50)(NEARLY_ONE) == 49
    assert (make_sampler(50, bias="range", bias_begin=40, bias_factor=2).probabilities > 1 / 50).sum() == 10


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distribution": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7},
        {"bias": "range", "bias_factor": 5.0, "bias_begin": 400, "bias_end": 599},
        {"distribution": "logit_normal", "bias": "less_noise", "bias_factor": 3.0, "minimum": 50, "maximum": 900},
    ],
)
def test_levels_are_drawn_as_often_as_their_probability_says(settings):
    """20,000 draws in ten groups of levels; five standard deviations of a binomial."""
    sampler, count = make_sampler(**settings), 20_000
    drawn = Counter(sampler(keyed_uniform("timestep", number)) // 100 for number in range(count))
    for group in range(10):
        share = float(sampler.probabilities[group * 100 : group * 100 + 100].sum())
        assert abs(drawn[group] - count * share) <= 5 * (count * share * (1 - share)) ** 0.5


def test_every_u_gives_the_level_whose_interval_it_lies_in():
    sampler = make_sampler(distribution="logit_normal", bias="more_noise", bias_factor=2.0)
    upper = np.cumsum(sampler.probabilities)
    for u in np.random.default_rng(1).random(500):
        level = sampler(u)
        assert upper[level] - sampler.probabilities[level] - 1e-12 <= u <= upper[level] + 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"minimum": 600, "maximum": 400},
            "loss.timestep_min = 600 is above loss.timestep_max = 400: no noise level is left. "
            "Set loss.timestep_min to at most loss.timestep_max.",
        ),
        (
            {"bias": "range", "bias_begin": 500, "bias_end": 400},
            "loss.bias_begin = 500 to loss.bias_end = 400 holds no noise level between loss.timestep_min = 0 and "
            "loss.timestep_max = 999. Let them overlap, with loss.bias_begin the smaller.",
        ),
        (
            {"bias": "range", "bias_begin": 100, "bias_end": 199, "minimum": 200},
            "loss.bias_begin = 100 to loss.bias_end = 199 holds no noise level between loss.timestep_min = 200 and "
            "loss.timestep_max = 999. Let them overlap, with loss.bias_begin the smaller.",
        ),
        (
            {"bias": "range", "bias_factor": 0.0},
            "no noise level from loss.timestep_min = 0 to loss.timestep_max = 999 has a probability above 0 "
            "(loss.timesteps = uniform, loss.logit_mean = 0, loss.logit_std = 1, loss.timestep_bias = range, "
            "loss.bias_factor = 0). Widen the limits or loss.logit_std, or set loss.bias_factor above 0.",
        ),
        (
            {"distribution": "logit_normal", "logit_std": 0.01, "maximum": 10},
            "no noise level from loss.timestep_min = 0 to loss.timestep_max = 10 has a probability above 0 "
            "(loss.timesteps = logit_normal, loss.logit_mean = 0, loss.logit_std = 0.01, loss.timestep_bias = none, "
            "loss.bias_factor = 1). Widen the limits or loss.logit_std, or set loss.bias_factor above 0.",
        ),
        ({"distribution": "beta"}, 'loss.timesteps = "beta", expected one of: uniform, logit_normal.'),
        (
            {"bias": "later"},
            'loss.timestep_bias = "later", expected one of: none, less_noise, more_noise, range.',
        ),
    ],
)
def test_what_leaves_nothing_to_draw_is_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        make_sampler(**settings)
    assert str(error.value) == message


# ---- strata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 48, 49, 100, 333, 1000, 4096])
def test_each_stratum_gets_exactly_one_sample(total):
    permutation = strata(7, 3, total)
    assert sorted(permutation.tolist()) == list(range(total))
    edges = [index / total for index in range(total + 1)]
    for key_u in (0.0, 0.5, NEARLY_ONE, keyed_uniform("u")):
        for place in range(total):
            u = stratified_uniform(key_u, place, total, permutation)
            stratum = permutation[place]
            assert edges[stratum] <= u < edges[stratum + 1]


def test_a_step_of_one_sample_is_not_stratified():
    for key_u in (0.0, 0.123456789, NEARLY_ONE):
        assert stratified_uniform(key_u, 0, 1, strata(0, 0, 1)) == key_u


def test_strata_are_a_function_of_seed_and_step():
    first = strata(7, 3, 100)
    assert np.array_equal(strata(7, 3, 100), first)
    assert not np.array_equal(strata(7, 4, 100), first)
    assert not np.array_equal(strata(8, 3, 100), first)


def test_over_many_steps_each_place_sees_all_levels_alike():
    total, steps = 4, 4000
    drawn = [
        uniform_timestep(stratified_uniform(keyed_uniform("u", step), 0, total, strata(0, step, total)), 1000)
        for step in range(steps)
    ]
    counts = Counter(level // 100 for level in drawn)
    assert all(abs(counts[group] - steps / 10) < 5 * (steps * 0.1 * 0.9) ** 0.5 for group in range(10))


@pytest.mark.parametrize("settings", [{}, {"distribution": "logit_normal"}, {"bias": "more_noise", "bias_factor": 4.0}])
def test_strata_spread_any_distribution_and_keep_its_mean(settings):
    """Each sample lies in its own eighth of the probability, whatever the distribution, and the mean of a step's levels
    varies much less than with independent draws."""
    sampler, total, steps = make_sampler(**settings), 8, 300
    stratified, independent = [], []
    for step in range(steps):
        permutation = strata(0, step, total)
        uniforms = [keyed_uniform("u", step, place) for place in range(total)]
        levels = [sampler(stratified_uniform(u, place, total, permutation)) for place, u in enumerate(uniforms)]
        for stratum, level in zip(permutation, levels, strict=True):
            assert sampler(stratum / total) <= level <= sampler(math.nextafter((stratum + 1) / total, 0.0))
        stratified.append(np.mean(levels))
        independent.append(np.mean([sampler(u) for u in uniforms]))
    expected = mean_level(sampler)
    assert abs(np.mean(stratified) - expected) < 5 * np.std(stratified) / steps**0.5
    assert np.std(stratified) < 0.4 * np.std(independent)
