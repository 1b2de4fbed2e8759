import numpy as np
import pytest
import torch

from sdxl_ray.diffusion.randomness import keyed_generator, keyed_normal, keyed_seed, keyed_uniform


def draws(*key):
    """One number of each kind, and some noise."""
    return (keyed_uniform(*key), keyed_seed(*key), keyed_normal((2, 3), *key).tolist())


def test_a_draw_depends_on_its_key_and_on_nothing_drawn_before():
    first = draws(7, 0, "sample", "noise")
    np.random.default_rng(0).random(10)
    torch.manual_seed(3)
    draws("another")
    assert draws(7, 0, "sample", "noise") == first


@pytest.mark.parametrize(
    "other",
    [
        (8, 0, "sample", "noise"),
        (7, 1, "sample", "noise"),
        (7, 0, "sample-2", "noise"),
        (7, 0, "sample", "timestep"),
        (7, 0, "samplenoise"),
        (0, 7, "sample", "noise"),
        ("7", 0, "sample", "noise"),
    ],
)
def test_every_part_of_the_key_counts(other):
    for found, one in zip(draws(*other), draws(7, 0, "sample", "noise"), strict=True):
        assert found != one


def test_drawing_leaves_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws(1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_normal_is_standard_float32():
    noise = torch.cat([keyed_normal((4, 16, 16), 0, number, "noise").flatten() for number in range(200)])
    assert noise.dtype == torch.float32
    # 204,800 numbers: five standard errors of the mean are 0.011, of the standard deviation 0.008
    assert noise.mean().abs() < 0.011
    assert (noise.std() - 1).abs() < 0.008


def test_neighbouring_keys_are_uncorrelated():
    numbers = np.array([keyed_uniform(0, number) for number in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / 4000**0.5


def test_seeds_fit_torch():
    seeds = [keyed_seed(number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0 and max(seeds) < 2**63
    torch.manual_seed(max(seeds))


def test_generators_are_philox_with_a_stream_per_key():
    assert isinstance(keyed_generator(0).bit_generator, np.random.Philox)
