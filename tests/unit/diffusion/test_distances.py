"""Every distance against its formula, written out in double precision."""

import math

import pytest
import torch

from sdxl_ray.diffusion.distances import mae, make_distance, mse
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.errors import ConfigError
from tests.unit.diffusion import reference

DIFFERENCES = (-30.0, -1.0, -0.1, -1e-3, 0.0, 1e-3, 0.3, 1.0, 4.0)


def expected_c(c0, huber_schedule, timestep, zero_terminal_snr):
    if huber_schedule == "constant":
        return c0
    if huber_schedule == "exponential":
        return math.exp(-(-math.log(c0) / 1000) * timestep)
    abar = reference.alphas_cumprod(timestep, zero_terminal_snr)
    if abar == 0:
        return c0  # sigma is infinite
    sigma = math.sqrt((1 - abar) / abar)
    return (1 - c0) / (1 + sigma) ** 2 + c0


def expected_distance(name, difference, c):
    if name == "mse":
        return difference**2
    if name == "mae":
        return abs(difference)
    root = math.sqrt(difference**2 + c**2) - c
    return 2 * c * root if name == "huber" else 2 * root


def schedule_of(zero_terminal_snr=False):
    return NoiseSchedule.from_config({}, zero_terminal_snr=zero_terminal_snr)


def measured(distance, timestep, differences=DIFFERENCES):
    """Of these differences, all at one level; prediction and target are apart from zero."""
    target = torch.full((1, 1, 1, len(differences)), 0.5)
    prediction = target + torch.tensor(differences)
    return distance(prediction, target, torch.tensor([timestep])).flatten()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("name", ["mse", "mae", "huber", "smooth_l1"])
@pytest.mark.parametrize("c0", [0.1, 1.0, 20.0])
def test_distances_are_their_formula_at_every_level(name, huber_schedule, zero_terminal_snr, c0):
    distance = make_distance(name, schedule_of(zero_terminal_snr), huber_c=c0, huber_schedule=huber_schedule)
    for timestep in reference.TIMESTEPS:
        c = expected_c(c0, huber_schedule, timestep, zero_terminal_snr)
        expected = [expected_distance(name, difference, c) for difference in DIFFERENCES]
        found = measured(distance, timestep)
        assert found.dtype == torch.float32
        # 0.5 + 0.001 has 13 bits of the 0.001 left
        assert found.tolist() == pytest.approx(expected, rel=2e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "smooth_l1"])
def test_each_sample_has_the_c_of_its_own_level(name):
    """In one call: SimpleTuner loops over the samples."""
    distance = make_distance(name, schedule_of(), huber_c=0.1, huber_schedule="snr")
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    together = distance(prediction, target, timesteps)
    assert together.shape == prediction.shape
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(distance(prediction[one], target[one], timesteps[one]), together[one])
    if name in ("huber", "smooth_l1"):
        same_level = distance(prediction, target, torch.tensor([0, 0, 0]))
        assert not torch.equal(same_level[2], together[2])


def test_mse_is_the_squared_error_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=generator)
    distance = make_distance("mse", schedule_of(), huber_c=0.1, huber_schedule="snr")
    assert distance is mse
    assert torch.equal(distance(prediction, target, torch.zeros(3, dtype=torch.int64)), (prediction - target) ** 2)


def test_a_huge_c_makes_huber_squared_and_a_tiny_c_makes_smooth_l1_twice_the_absolute():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    huber = make_distance("huber", schedule_of(), huber_c=1000.0, huber_schedule="constant")
    # d^2 / (4 c^2) below it, relatively: d is at most 6
    torch.testing.assert_close(
        huber(prediction, target, timesteps), mse(prediction, target, timesteps), rtol=1e-5, atol=0
    )
    smooth_l1 = make_distance("smooth_l1", schedule_of(), huber_c=1e-30, huber_schedule="constant")
    torch.testing.assert_close(smooth_l1(prediction, target, timesteps), 2 * mae(prediction, target, timesteps))


def test_a_small_difference_keeps_its_digits():
    """sqrt(d^2 + c^2) - c would be 0 for all of these in float32."""
    huber = make_distance("huber", schedule_of(), huber_c=1000.0, huber_schedule="constant")
    prediction = torch.tensor([1e-3, 1e-4, 1e-5]).view(1, 1, 1, 3)
    found = huber(prediction, torch.zeros(1, 1, 1, 3), torch.tensor([0])).flatten()
    assert found.tolist() == pytest.approx([1e-6, 1e-8, 1e-10], rel=1e-5)


@pytest.mark.parametrize("huber_c", [1e-30, 0.1, 1000.0])
@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("name", ["mae", "huber", "smooth_l1"])
def test_gradients_are_finite_and_zero_at_no_difference(name, huber_schedule, huber_c):
    distance = make_distance(name, schedule_of(True), huber_c=huber_c, huber_schedule=huber_schedule)
    prediction = torch.tensor([0.0, 1e-20, 1e-3, 1.0, 1e4]).expand(2, 1, 1, 5).contiguous().requires_grad_()
    losses = distance(prediction, torch.zeros(2, 1, 1, 5), torch.tensor([0, 999]))
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert (gradient[..., 0] == 0).all()
    assert (gradient[..., 2:] >= 0).all()


@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
def test_c_falls_from_one_at_no_noise_to_its_value_at_all_noise(huber_schedule):
    """Read off a large difference, where smooth_l1 is 2 (|d| - c)."""
    distance = make_distance("smooth_l1", schedule_of(True), huber_c=0.25, huber_schedule=huber_schedule)
    found = [1000 - float(measured(distance, timestep, [1000.0])[0]) / 2 for timestep in (0, 500, 999)]
    if huber_schedule == "constant":
        assert found == pytest.approx([0.25] * 3, abs=2e-4)
    else:
        assert found[0] > found[1] > found[2]
        assert found[0] == pytest.approx(1, abs=0.06)  # of snr: sigma is 0.03 at t = 0
        assert found[2] == pytest.approx(0.25, abs=1e-3)


def test_half_precision_is_compared_in_float32():
    prediction = torch.full((1, 4, 2, 2), 1 / 3).bfloat16()
    target = torch.full((1, 4, 2, 2), 0.3)
    for name in ("mse", "mae", "huber", "smooth_l1"):
        distance = make_distance(name, schedule_of(), huber_c=0.1, huber_schedule="snr")
        found = distance(prediction, target, torch.tensor([3]))
        assert torch.equal(found, distance(prediction.float(), target, torch.tensor([3])))


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError) as error:
        make_distance("l2", schedule_of(), huber_c=0.1, huber_schedule="snr")
    assert str(error.value) == 'loss.error = "l2", expected one of: mse, huber, smooth_l1, mae.'
    with pytest.raises(ConfigError) as error:
        make_distance("huber", schedule_of(), huber_c=0.1, huber_schedule="cosine")
    assert str(error.value) == 'loss.huber_schedule = "cosine", expected one of: constant, exponential, snr.'
