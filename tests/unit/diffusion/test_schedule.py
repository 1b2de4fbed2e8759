import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_ray.diffusion import schedule as schedule_module
from sdxl_ray.diffusion.distances import make_distance
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import make_weighting
from sdxl_ray.errors import ModelError
from tests.unit.diffusion import reference

CONFIGS = {
    "sdxl": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000},
    "short": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 50},
    "zero terminal snr": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": True,
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_alphas_are_diffusers_to_the_bit(config):
    schedule = NoiseSchedule.from_config(config)
    expected = DDPMScheduler.from_config(config).alphas_cumprod
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert torch.equal(schedule.alphas_cumprod, expected)
    assert schedule.num_timesteps == config["num_train_timesteps"]


def test_other_keys_of_a_scheduler_config_do_not_matter_and_defaults_are_sdxls():
    config = {**CONFIGS["sdxl"], "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    assert torch.equal(NoiseSchedule.from_config(config).alphas_cumprod, NoiseSchedule.from_config({}).alphas_cumprod)


def test_snr_is_diffusers():
    schedule = NoiseSchedule.from_config(CONFIGS["sdxl"])
    timesteps = torch.arange(1000)
    expected = compute_snr(DDPMScheduler.from_config(CONFIGS["sdxl"]), timesteps)
    torch.testing.assert_close(schedule.snr(timesteps), expected, rtol=1e-5, atol=0)


def test_snr_falls_from_clean_to_noise():
    snr = NoiseSchedule.from_config(CONFIGS["sdxl"]).snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    assert snr[0] > 1000
    assert 0.004 < snr[-1] < 0.005


def test_scales_are_shaped_for_their_latents_and_keep_the_variance():
    schedule = NoiseSchedule.from_config(CONFIGS["sdxl"])
    signal_scale, noise_scale = schedule.signal_and_noise(torch.tensor([0, 500, 999]), torch.zeros(3, 4, 8, 8))
    assert signal_scale.shape == noise_scale.shape == (3, 1, 1, 1)
    torch.testing.assert_close(signal_scale**2 + noise_scale**2, torch.ones(3, 1, 1, 1))


def test_an_unknown_beta_schedule_is_refused():
    with pytest.raises(ModelError) as error:
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    assert str(error.value) == (
        'scheduler: beta_schedule = "squaredcos_cap_v2", expected "scaled_linear" (SDXL) or "linear".'
    )


def test_zero_terminal_snr_ends_in_pure_noise():
    schedule = NoiseSchedule.from_config(CONFIGS["zero terminal snr"])
    assert schedule.snr(torch.tensor([999])).tolist() == [0.0]
    plain = NoiseSchedule.from_config(CONFIGS["sdxl"])
    torch.testing.assert_close(schedule.alphas_cumprod[0], plain.alphas_cumprod[0])


def test_zero_terminal_snr_can_be_asked_for():
    """To the bit what the model's own config would give, and in double precision what the paper says."""
    schedule = NoiseSchedule.from_config(CONFIGS["sdxl"], zero_terminal_snr=True)
    own = NoiseSchedule.from_config(CONFIGS["zero terminal snr"])
    assert torch.equal(schedule.alphas_cumprod, own.alphas_cumprod)
    for timestep in reference.TIMESTEPS:
        expected = reference.alphas_cumprod(timestep, zero_terminal_snr=True)
        assert float(schedule.alphas_cumprod[timestep]) == pytest.approx(expected, rel=5e-4), timestep
    assert not torch.equal(schedule.alphas_cumprod, NoiseSchedule.from_config(CONFIGS["sdxl"]).alphas_cumprod)


def test_a_schedule_that_is_rescaled_already_is_not_rescaled_again(monkeypatch):
    calls, rescale = [], schedule_module._with_zero_terminal_snr
    monkeypatch.setattr(schedule_module, "_with_zero_terminal_snr", lambda betas: calls.append(1) or rescale(betas))
    schedule = NoiseSchedule.from_config(CONFIGS["zero terminal snr"], zero_terminal_snr=True)
    assert calls == [1]
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule.from_config(CONFIGS["zero terminal snr"]).alphas_cumprod)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_snr_is_of_the_schedule_that_corrupts(zero_terminal_snr):
    """Field notes, trap 15: kohya's scripts weight by the ratios from before the betas were rescaled."""
    schedule = NoiseSchedule.from_config(CONFIGS["sdxl"], zero_terminal_snr=zero_terminal_snr)
    timesteps = torch.arange(1000)
    signal_scale, noise_scale = schedule.signal_and_noise(timesteps, torch.zeros(1000, 1))
    snr = schedule.snr(timesteps)
    assert snr.isfinite().all()
    torch.testing.assert_close((signal_scale / noise_scale).squeeze(1) ** 2, snr)
    expected = [reference.snr(timestep, zero_terminal_snr) for timestep in reference.TIMESTEPS]
    assert snr[list(reference.TIMESTEPS)].tolist() == pytest.approx(expected, rel=5e-4)


def test_a_lookup_copies_nothing():
    """A copy from the CPU would make the host wait for the accelerator two or three times per micro-batch."""
    schedule = NoiseSchedule.from_config({})
    elsewhere = schedule.to("meta")
    assert schedule.alphas_cumprod.device.type == "cpu"
    timesteps = torch.zeros(3, dtype=torch.int64, device="meta")
    with _CopiesBetweenDevices() as copies:
        scales = elsewhere.signal_and_noise(timesteps, torch.zeros(3, 4, 8, 8, device="meta"))
        snr = elsewhere.snr(timesteps)
    assert {tensor.device.type for tensor in (*scales, snr)} == {"meta"}
    assert copies.found == []


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "smooth_l1"])
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "debiased_sqrt"])
def test_weights_and_distances_copy_nothing_either(name, weighting):
    elsewhere = NoiseSchedule.from_config({}).to("meta")
    distance = make_distance(name, elsewhere, huber_c=0.1, huber_schedule="snr")
    weigh = make_weighting(weighting, "v_prediction", gamma=5.0)
    timesteps, latents = torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(3, 4, 8, 8, device="meta")
    with _CopiesBetweenDevices() as copies:
        found = distance(latents, latents, timesteps), weigh(elsewhere.snr(timesteps))
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert copies.found == []


class _CopiesBetweenDevices(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "copy" in str(function):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))
