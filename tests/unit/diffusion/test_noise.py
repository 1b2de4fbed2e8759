"""White noise stays what it was; offset and multires noise add what they promise, for each sample by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdxl_ray.diffusion.noise import NoiseRecipe, draw_noise, draw_perturbation, perturbation_amount
from sdxl_ray.diffusion.randomness import keyed_normal

SHAPE = (4, 32, 24)
KEY = (7, 0, 0, "sample")


def draws(recipe, count, shape=SHAPE):
    return torch.stack([draw_noise(shape, recipe, (7, 0, 0, number)) for number in range(count)])


def test_the_neutral_recipe_is_white_noise_to_the_bit():
    assert torch.equal(draw_noise(SHAPE, NoiseRecipe(), KEY), keyed_normal(SHAPE, *KEY, "noise"))


def test_settings_of_what_is_off_change_nothing():
    recipe = NoiseRecipe(offset_probability=0.3, multires_levels=2, perturbation=0.1)
    assert torch.equal(draw_noise(SHAPE, recipe, KEY), keyed_normal(SHAPE, *KEY, "noise"))


@pytest.mark.parametrize("recipe", [NoiseRecipe(offset=0.1), NoiseRecipe(multires_discount=0.3)])
def test_noise_is_a_function_of_its_key(recipe):
    first = draw_noise(SHAPE, recipe, KEY)
    torch.manual_seed(3)
    torch.randn(5)
    assert first.shape == SHAPE and first.dtype == torch.float32
    assert torch.equal(draw_noise(SHAPE, recipe, KEY), first)
    assert not torch.equal(draw_noise(SHAPE, recipe, (7, 0, 0, "other")), first)
    assert not torch.equal(draw_noise(SHAPE, recipe, (7, 1, 0, "sample")), first)


# ---- offset ----------------------------------------------------------------------------------------------------------


def test_an_offset_is_one_value_for_each_channel():
    added = draw_noise(SHAPE, NoiseRecipe(offset=0.1), KEY) - keyed_normal(SHAPE, *KEY, "noise")
    of_channels = added.mean((1, 2))
    torch.testing.assert_close(added, of_channels[:, None, None].expand(SHAPE), rtol=0, atol=1e-6)
    assert len({round(float(value), 5) for value in of_channels}) == 4


def test_offsets_are_drawn_for_each_sample_with_the_given_spread():
    """SimpleTuner flips one coin for a whole batch."""
    count = 1000
    offsets = (draws(NoiseRecipe(offset=0.5), count, (4, 2, 2)) - draws(NoiseRecipe(), count, (4, 2, 2))).mean((2, 3))
    # 4000 numbers: five standard errors of a standard deviation of 0.5 are 0.028
    assert float(offsets.std()) == pytest.approx(0.5, abs=0.028)
    assert float(offsets.mean()) == pytest.approx(0, abs=0.04)
    correlation = np.corrcoef(offsets.numpy().T)
    assert np.abs(correlation - np.eye(4)).max() < 5 / count**0.5  # of channels
    assert abs(np.corrcoef(offsets[:-1, 0], offsets[1:, 0])[0, 1]) < 5 / count**0.5  # of samples


def test_the_probability_of_an_offset_is_the_share_of_samples_that_get_one():
    count = 1000
    plain, recipe = draws(NoiseRecipe(), count, (4, 2, 2)), NoiseRecipe(offset=0.5, offset_probability=0.25)
    always = draws(NoiseRecipe(offset=0.5), count, (4, 2, 2))
    found = draws(recipe, count, (4, 2, 2))
    with_offset = (found != plain).flatten(1).any(1)
    assert abs(float(with_offset.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert torch.equal(found[with_offset], always[with_offset])  # chosen or not, the draws are the same
    assert torch.equal(found[~with_offset], plain[~with_offset])


# ---- multires --------------------------------------------------------------------------------------------------------


def block_mean_variance(noise, size):
    """Variance of the means of blocks of size x size pixels: 1 / size^2 for white noise of unit variance."""
    return float(F.avg_pool2d(noise, size).var())


def source_multires(rng, shape, discount, levels):
    """The recipe of the wandb report, once more: from level 0 on, each smaller by r^i, of amplitude discount^i."""
    noise = torch.from_numpy(rng.standard_normal(shape)).float()
    height, width = shape[1:]
    for level in range(levels + 1):
        shrink = rng.random() * 2 + 2
        height, width = max(1, int(height / shrink**level)), max(1, int(width / shrink**level))
        coarse = torch.from_numpy(rng.standard_normal((1, shape[0], height, width))).float()
        noise += torch.nn.Upsample(size=shape[1:], mode="bilinear")(coarse)[0] * discount**level
        if height == 1 or width == 1:
            break
    return noise / noise.std()


@pytest.mark.parametrize("discount", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(4, 32, 24), (4, 128, 96), (4, 1, 8)])
def test_multires_noise_has_unit_deviation_in_each_sample(discount, shape):
    for number in range(5):
        noise = draw_noise(shape, NoiseRecipe(multires_discount=discount), (0, number))
        assert noise.shape == shape and noise.dtype == torch.float32
        assert float(noise.std()) == pytest.approx(1, abs=1e-5)


def test_multires_noise_is_correlated_where_it_is_coarse():
    white, multires = draws(NoiseRecipe(), 50), draws(NoiseRecipe(multires_discount=0.5), 50)
    assert block_mean_variance(white, 8) == pytest.approx(1 / 64, rel=0.2)
    assert block_mean_variance(multires, 8) > 4 / 64

    def neighbours(noise):
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    assert abs(neighbours(white)) < 0.02
    assert neighbours(multires) > 0.08


def test_more_discount_and_more_levels_mean_coarser_noise():
    coarseness = [
        block_mean_variance(draws(NoiseRecipe(multires_discount=discount), 50), 8) for discount in (0, 0.3, 0.6, 0.9)
    ]
    assert coarseness == sorted(coarseness) and len(set(coarseness)) == 4
    one, six = (NoiseRecipe(multires_discount=0.9, multires_levels=levels) for levels in (1, 6))
    assert block_mean_variance(draws(one, 50), 8) < block_mean_variance(draws(six, 50), 8)


@pytest.mark.parametrize("discount", [0.3, 0.8])
def test_multires_noise_is_distributed_as_in_its_source(discount):
    rng = np.random.default_rng(0)
    ours = draws(NoiseRecipe(multires_discount=discount), 1500)
    theirs = torch.stack([source_multires(rng, SHAPE, discount, 6) for _ in range(1500)])
    for size in (2, 4, 8):  # of other seeds they differ by 1 %; without the second white noise by 30 %
        found, expected = block_mean_variance(ours, size), block_mean_variance(theirs, size)
        assert found == pytest.approx(expected, rel=0.05), size


def test_an_offset_on_multires_noise_keeps_its_size():
    with_both = draw_noise(SHAPE, NoiseRecipe(offset=0.5, multires_discount=0.3), KEY)
    multires = draw_noise(SHAPE, NoiseRecipe(multires_discount=0.3), KEY)
    offset = draw_noise(SHAPE, NoiseRecipe(offset=0.5), KEY) - draw_noise(SHAPE, NoiseRecipe(), KEY)
    torch.testing.assert_close(with_both - multires, offset, rtol=0, atol=1e-6)


# ---- perturbation ----------------------------------------------------------------------------------------------------


def test_no_perturbation_is_none():
    assert draw_perturbation(SHAPE, 0.0, KEY) is None


def test_a_perturbation_has_its_deviation_and_is_independent_of_the_noise():
    perturbation, noise = draw_perturbation(SHAPE, 0.1, KEY), draw_noise(SHAPE, NoiseRecipe(), KEY)
    assert perturbation.shape == SHAPE and perturbation.dtype == torch.float32
    numbers = perturbation.numel()
    assert float(perturbation.std()) == pytest.approx(0.1, rel=5 / (2 * numbers) ** 0.5)
    assert abs(np.corrcoef(perturbation.flatten(), noise.flatten())[0, 1]) < 5 / numbers**0.5
    torch.testing.assert_close(draw_perturbation(SHAPE, 0.2, KEY), 2 * perturbation)


def test_a_perturbation_falls_linearly_to_zero():
    assert [perturbation_amount(0.4, step, 100) for step in (0, 25, 50, 100, 1000)] == [0.4, 0.4 * 0.75, 0.2, 0.0, 0.0]
    assert perturbation_amount(0.4, 5000, 0) == 0.4
