from collections import Counter

import pytest

from sdxl_ray.diffusion.randomness import keyed_uniform
from sdxl_ray.diffusion.timesteps import stratified_timesteps, uniform_timestep


def test_both_ends_are_reachable():
    """Field notes, trap 35: ai-toolkit never trains the ends."""
    assert uniform_timestep(0.0, 1000) == 0
    assert uniform_timestep(1 - 2**-53, 1000) == 999
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
