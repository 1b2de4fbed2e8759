import pytest
import torch

from sdxl_ray.diffusion.objectives import Epsilon
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import min_snr

TIMESTEPS = (0, 1, 10, 50, 100, 150, 200, 250, 300, 500, 750, 900, 998, 999)


def alphas_cumprod(timestep: int) -> float:
    """The schedule once more in double precision: beta_t = (a + (b - a) t / 999)^2, a² = 0.00085, b² = 0.012."""
    product = 1.0
    for t in range(timestep + 1):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
    return product


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_min_snr_is_the_formula(timestep, objective):
    """min(snr, 5) / snr for epsilon; for v over snr + 1, which is not the same weight (field notes, trap 14)."""
    snr = alphas_cumprod(timestep) / (1 - alphas_cumprod(timestep))
    expected = min(snr, 5.0) / (snr if objective == "epsilon" else snr + 1)
    schedule = NoiseSchedule.from_config({})
    weight = min_snr(5.0, objective)(schedule.snr(torch.tensor([timestep])))
    assert weight.dtype == torch.float32
    # 1 - abar has lost digits at t = 0, in float32, as in diffusers
    assert float(weight) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("snr", "epsilon", "v_prediction"),
    [
        (1176.0, 5 / 1176, 5 / 1177),
        (100.0, 0.05, 5 / 101),
        (10.0, 0.5, 5 / 11),
        (5.0, 1.0, 5 / 6),
        (4.0, 1.0, 0.8),
        (1.0, 1.0, 0.5),
        (0.25, 1.0, 0.2),
        (0.0047, 1.0, 0.0047 / 1.0047),
    ],
)
def test_min_snr_at_written_out_values(snr, epsilon, v_prediction):
    assert float(min_snr(5.0, "epsilon")(torch.tensor(snr))) == pytest.approx(epsilon, rel=1e-6)
    assert float(min_snr(5.0, "v_prediction")(torch.tensor(snr))) == pytest.approx(v_prediction, rel=1e-6)


def test_min_snr_bounds_what_a_level_of_the_predicted_image_counts():
    """Both objectives weight the error of the predicted image alike: times snr for epsilon, times snr + 1 for v."""
    snr = NoiseSchedule.from_config({}).snr(torch.arange(1000))
    of_epsilon, of_v = min_snr(5.0, "epsilon")(snr) * snr, min_snr(5.0, "v_prediction")(snr) * (snr + 1)
    torch.testing.assert_close(of_epsilon, of_v)
    torch.testing.assert_close(of_epsilon, snr.clamp(max=5.0))


def test_a_huge_gamma_is_no_weighting_for_epsilon():
    snr = NoiseSchedule.from_config({}).snr(torch.arange(1000))
    assert torch.equal(min_snr(1e9, "epsilon")(snr), torch.ones_like(snr))


def test_no_signal_at_all_has_no_weight_in_v():
    assert float(min_snr(5.0, "v_prediction")(torch.tensor(0.0))) == 0.0


def test_without_weighting_no_ratio_is_computed(monkeypatch):
    schedule = NoiseSchedule.from_config({})
    monkeypatch.setattr(NoiseSchedule, "snr", lambda *_: pytest.fail("computed"))
    weight = Epsilon(schedule).weight(torch.tensor([0, 999]))
    assert weight.dtype == torch.float32
    assert weight.tolist() == [1.0, 1.0]
