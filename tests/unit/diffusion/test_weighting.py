"""Every weighting against its formula, written out in double precision, and against the others by what it means."""

import math

import pytest
import torch

from sdxl_ray.diffusion.objectives import OBJECTIVES, Epsilon
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import make_weighting
from sdxl_ray.errors import ConfigError
from tests.unit.diffusion import reference

GAMMA = 5.0

# (weighting, objective) -> its formula, as the papers and programs have it
FORMULAS = {
    ("min_snr", "epsilon"): lambda snr: min(snr, GAMMA) / snr if snr else 1.0,
    ("min_snr", "v_prediction"): lambda snr: min(snr, GAMMA) / (snr + 1),
    ("min_snr", "sample"): lambda snr: min(snr, GAMMA),
    ("soft_min_snr", "epsilon"): lambda snr: GAMMA / (snr + GAMMA),
    ("soft_min_snr", "v_prediction"): lambda snr: snr * GAMMA / (snr + GAMMA) / (snr + 1),
    ("soft_min_snr", "sample"): lambda snr: snr * GAMMA / (snr + GAMMA),
    ("debiased", "epsilon"): lambda snr: 1 / math.sqrt(min(snr, 1000)),
    ("debiased", "v_prediction"): lambda snr: 1 / (min(snr, 1000) + 1),
    ("debiased_sqrt", "epsilon"): lambda snr: 1 / math.sqrt(min(snr, 1000)),
    ("debiased_sqrt", "v_prediction"): lambda snr: 1 / math.sqrt(min(snr, 1000) + 1),
}


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("name", "objective"), FORMULAS)
def test_weights_are_their_formula_at_every_level(name, objective, zero_terminal_snr):
    schedule = NoiseSchedule.from_config({}, zero_terminal_snr=zero_terminal_snr)
    weighting = make_weighting(name, objective, gamma=GAMMA)
    timesteps = [t for t in reference.TIMESTEPS if not (zero_terminal_snr and objective == "epsilon" and t == 999)]
    weights = weighting(schedule.snr(torch.tensor(timesteps)))
    assert weights.dtype == torch.float32 and weights.shape == (len(timesteps),)
    expected = [FORMULAS[name, objective](reference.snr(t, zero_terminal_snr)) for t in timesteps]
    # 1 - abar has lost digits at t = 0, and sqrt(abar) less its last value at t = 998, in float32, as in diffusers
    assert weights.tolist() == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("snr", [1176.0, 1000.0, 100.0, 10.0, 5.0, 4.0, 1.0, 0.25, 0.0047, 1e-7])
@pytest.mark.parametrize(("name", "objective"), FORMULAS)
def test_weights_are_their_formula_to_float32(name, objective, snr):
    weight = make_weighting(name, objective, gamma=GAMMA)(torch.tensor([snr]))
    assert float(weight) == pytest.approx(FORMULAS[name, objective](float(torch.tensor(snr))), rel=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("name", "objective"), FORMULAS)
def test_no_level_has_an_infinite_or_undefined_weight(name, objective, zero_terminal_snr):
    snr = NoiseSchedule.from_config({}, zero_terminal_snr=zero_terminal_snr).snr(torch.arange(1000))
    if zero_terminal_snr and objective == "epsilon" and name.startswith("debiased"):
        snr = snr[:-1]  # 1 / sqrt(0); epsilon says nothing about the image there, and such a run is refused
    weights = make_weighting(name, objective, gamma=GAMMA)(snr)
    assert weights.isfinite().all() and (weights >= 0).all()


@pytest.mark.parametrize(
    ("name", "objective", "expected"),
    [
        ("min_snr", "epsilon", 1.0),
        ("min_snr", "v_prediction", 0.0),
        ("min_snr", "sample", 0.0),
        ("soft_min_snr", "epsilon", 1.0),
        ("soft_min_snr", "v_prediction", 0.0),
        ("soft_min_snr", "sample", 0.0),
        ("debiased", "v_prediction", 1.0),
        ("debiased_sqrt", "v_prediction", 1.0),
    ],
)
def test_where_there_is_no_signal_at_all(name, objective, expected):
    assert float(make_weighting(name, objective, gamma=GAMMA)(torch.tensor(0.0))) == expected


@pytest.mark.parametrize("timestep", [0, 50, 250, 500, 750, 999])
@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr"])
def test_one_model_has_the_same_weighted_error_whatever_it_predicts(name, timestep):
    """The derivation itself: the three objectives' errors of one prediction of the image, each with its own weight."""
    schedule = NoiseSchedule(NoiseSchedule.from_config({}).alphas_cumprod.double())
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted_latents = torch.randn(3, 1, 4, 6, 6, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([timestep])
    signal_scale, noise_scale = schedule.signal_and_noise(timesteps, latents)
    noisy_latents = signal_scale * latents + noise_scale * noise
    predicted_noise = (noisy_latents - signal_scale * predicted_latents) / noise_scale
    losses = []
    for key, objective_class in OBJECTIVES.items():
        objective = objective_class(schedule, make_weighting(name, key, gamma=GAMMA))
        error = objective.target(predicted_latents, predicted_noise, timesteps) - objective.target(
            latents, noise, timesteps
        )
        losses.append(float((error**2).mean() * objective.weight(timesteps)))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_soft_min_snr_is_that_of_k_diffusion():
    """(sigma s)^2 / (sigma^2 + s^2)^2 on a target that is scaled by c_out = sigma s / sqrt(sigma^2 + s^2)."""
    for data_std in (0.5, 1.0, 5**-0.5):
        weighting = make_weighting("soft_min_snr", "sample", gamma=data_std**-2)
        for timestep in reference.TIMESTEPS:
            variance = 1 / reference.snr(timestep)
            of_its_target = variance * data_std**2 / (variance + data_std**2) ** 2
            of_the_image = of_its_target / (variance * data_std**2 / (variance + data_std**2))
            weight = float(weighting(torch.tensor(1 / variance, dtype=torch.float64)))
            assert weight == pytest.approx(of_the_image, rel=1e-12)


def test_soft_min_snr_lies_below_min_snr_and_comes_near_it_at_both_ends():
    snr = NoiseSchedule.from_config({}).snr(torch.arange(1000))
    soft = make_weighting("soft_min_snr", "sample", gamma=GAMMA)(snr)
    hard = make_weighting("min_snr", "sample", gamma=GAMMA)(snr)
    assert (soft < hard).all()
    assert soft[0] / hard[0] > 0.99 and soft[-1] / hard[-1] > 0.99
    assert float((soft / hard).min()) == pytest.approx(0.5, abs=0.01)  # at snr = gamma


def test_a_huge_gamma_is_no_weighting_for_epsilon():
    snr = NoiseSchedule.from_config({}).snr(torch.arange(1000))
    assert torch.equal(make_weighting("min_snr", "epsilon", gamma=1e9)(snr), torch.ones_like(snr))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_constant_is_no_weighting(objective):
    assert make_weighting("constant", objective, gamma=GAMMA) is None


def test_without_weighting_no_ratio_is_computed(monkeypatch):
    schedule = NoiseSchedule.from_config({})
    monkeypatch.setattr(NoiseSchedule, "snr", lambda *_: pytest.fail("computed"))
    weight = Epsilon(schedule).weight(torch.tensor([0, 999]))
    assert weight.dtype == torch.float32
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["debiased", "debiased_sqrt"])
def test_a_weighting_without_a_form_for_the_image_is_refused(name):
    with pytest.raises(ConfigError) as error:
        make_weighting(name, "sample", gamma=GAMMA)
    assert str(error.value) == (
        f'loss.weighting = "{name}" has no published form for loss.objective = "sample" (only for epsilon and '
        'v_prediction). Set loss.weighting = "min_snr", "soft_min_snr" or "constant", which have one for all '
        "objectives."
    )


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ConfigError) as error:
        make_weighting("p2", "epsilon", gamma=GAMMA)
    assert str(error.value) == (
        'loss.weighting = "p2", expected one of: constant, min_snr, soft_min_snr, debiased, debiased_sqrt.'
    )
