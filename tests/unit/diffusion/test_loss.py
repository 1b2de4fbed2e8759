"""Our loss is the one of diffusers' train_text_to_image_lora_sdxl.py, for the same weights, noise and timesteps."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.diffusion.objectives import OBJECTIVES, Epsilon, VPrediction
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import min_snr
from sdxl_ray.records import Batch
from sdxl_ray.sdxl.components import load_scheduler_config, load_unet
from sdxl_ray.sdxl.conditioning import predict

TIMESTEPS = (0, 17, 250, 640, 999)


@pytest.fixture(scope="module")
def unet(tiny_model):
    return load_unet(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def schedule(tiny_model):
    return NoiseSchedule.from_config(load_scheduler_config(tiny_model))


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    size = len(TIMESTEPS)
    return Batch(
        sample_ids=tuple(map(str, range(size))),
        latents=normal(size, 4, 8, 6),
        noise=normal(size, 4, 8, 6),
        timesteps=torch.tensor(TIMESTEPS),
        prompt_embeds=normal(size, 77, 64),
        pooled_prompt_embeds=normal(size, 32),
        add_time_ids=torch.tensor([[1365.0, 1023.0, 0.0, 170.0, 64.0, 48.0]] * size),
        weights=torch.ones(size),
    )


def ours(unet, batch, objective):
    return diffusion_loss(
        functools.partial(predict, unet), batch, objective, timesteps=batch.timesteps, noise=batch.noise
    )


def diffusers_script_loss(unet, scheduler, batch, snr_gamma):
    """The training step of diffusers' script, from noise to loss, in its own words."""
    noisy_model_input = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    model_pred = unet(
        noisy_model_input,
        batch.timesteps,
        batch.prompt_embeds,
        added_cond_kwargs={"time_ids": batch.add_time_ids, "text_embeds": batch.pooled_prompt_embeds},
        return_dict=False,
    )[0]
    if scheduler.config.prediction_type == "epsilon":
        target = batch.noise
    else:
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    snr = compute_snr(scheduler, batch.timesteps)
    mse_loss_weights = torch.stack([snr, snr_gamma * torch.ones_like(batch.timesteps)], dim=1).min(dim=1)[0]
    if scheduler.config.prediction_type == "epsilon":
        mse_loss_weights = mse_loss_weights / snr
    else:
        mse_loss_weights = mse_loss_weights / (snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights
    return loss.mean()


@torch.no_grad()
@pytest.mark.parametrize("snr_gamma", [None, 5.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mean_loss_is_the_diffusers_scripts(tiny_model, unet, schedule, batch, prediction_type, snr_gamma):
    scheduler = DDPMScheduler.from_config(load_scheduler_config(tiny_model), prediction_type=prediction_type)
    expected = diffusers_script_loss(unet, scheduler, batch, snr_gamma)
    weighting = min_snr(snr_gamma, prediction_type) if snr_gamma else None
    losses = ours(unet, batch, OBJECTIVES[prediction_type](schedule, weighting))
    assert losses.shape == (len(batch),) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_samples_loss_does_not_depend_on_its_batch(unet, schedule, batch):
    together = ours(unet, batch, Epsilon(schedule))
    for row in range(len(batch)):
        tensors = {
            name: getattr(batch, name)[row : row + 1] for name in batch.__slots__ if name not in ("sample_ids", "masks")
        }
        alone = ours(unet, Batch(sample_ids=(batch.sample_ids[row],), **tensors), Epsilon(schedule))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective_class", [Epsilon, VPrediction])
def test_corruption_is_diffusers_add_noise(tiny_model, schedule, batch, objective_class):
    scheduler = DDPMScheduler.from_config(load_scheduler_config(tiny_model))
    noisy_latents = objective_class(schedule).corrupt(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(noisy_latents, scheduler.add_noise(batch.latents, batch.noise, batch.timesteps))


def test_targets_are_diffusers(tiny_model, schedule, batch):
    scheduler = DDPMScheduler.from_config(load_scheduler_config(tiny_model))
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(VPrediction(schedule).target(batch.latents, batch.noise, batch.timesteps), velocity)
    assert torch.equal(Epsilon(schedule).target(batch.latents, batch.noise, batch.timesteps), batch.noise)


@pytest.mark.parametrize("objective_class", [Epsilon, VPrediction])
def test_a_perfect_prediction_has_no_loss(schedule, batch, objective_class):
    objective = objective_class(schedule)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    losses = diffusion_loss(lambda *_: target, batch, objective, timesteps=batch.timesteps, noise=batch.noise)
    assert losses.tolist() == [0.0] * len(batch)


def test_a_bf16_prediction_is_compared_in_float32(schedule, batch):
    prediction = torch.full_like(batch.latents, 1 / 3).bfloat16()
    losses = diffusion_loss(
        lambda *_: prediction, batch, Epsilon(schedule), timesteps=batch.timesteps, noise=batch.noise
    )
    expected = ((prediction.double() - batch.noise.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected.float())


# ---- masks -----------------------------------------------------------------------------------------------------------


def loss_and_gradient(batch, objective):
    """The losses, and how they change with each pixel of the prediction."""
    prediction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = diffusion_loss(lambda *_: prediction, batch, objective, timesteps=batch.timesteps, noise=batch.noise)
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    return losses, gradient


def with_masks(batch, masks):
    return dataclasses.replace(batch, masks=masks)


@pytest.mark.parametrize("objective_class", [Epsilon, VPrediction])
def test_a_mask_of_ones_is_no_mask(schedule, batch, objective_class):
    """To the bit."""
    objective = objective_class(schedule, min_snr(5.0, "epsilon"))
    losses, gradient = loss_and_gradient(batch, objective)
    masked = with_masks(batch, torch.ones(len(batch), 1, 8, 6))
    for found, expected in zip(loss_and_gradient(masked, objective), (losses, gradient), strict=True):
        assert torch.equal(found, expected)


def test_what_is_masked_out_has_no_gradient_and_the_rest_keeps_its_own(schedule, batch):
    masks = (torch.rand(len(batch), 1, 8, 6, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    assert 0 < masks.mean() < 1
    _, plain = loss_and_gradient(batch, Epsilon(schedule))
    _, gradient = loss_and_gradient(with_masks(batch, masks), Epsilon(schedule))
    everywhere = masks.expand_as(gradient)
    assert (gradient[everywhere == 0] == 0).all()
    assert torch.equal(gradient[everywhere == 1], plain[everywhere == 1])


def test_a_grey_mask_counts_in_part(schedule, batch):
    masks = torch.full((len(batch), 1, 8, 6), 0.25)
    plain, _ = loss_and_gradient(batch, Epsilon(schedule))
    masked, _ = loss_and_gradient(with_masks(batch, masks), Epsilon(schedule))
    torch.testing.assert_close(masked, 0.25 * plain)


def test_a_sample_that_is_masked_out_whole_has_no_loss(schedule, batch):
    masks = torch.ones(len(batch), 1, 8, 6)
    masks[1] = 0
    plain, _ = loss_and_gradient(batch, Epsilon(schedule))
    masked, _ = loss_and_gradient(with_masks(batch, masks), Epsilon(schedule))
    assert masked[1] == 0
    assert torch.equal(masked[[0, 2, 3, 4]], plain[[0, 2, 3, 4]])


def test_a_mask_changes_the_u_nets_gradient_through_the_loss_only(unet, schedule, batch):
    """The U-Net sees the whole image: what is masked out is not hidden from it."""
    seen = []

    def denoise(noisy_latents, *rest):
        seen.append(noisy_latents)
        return predict(unet, noisy_latents, *rest)

    half = torch.ones(len(batch), 1, 8, 6)
    half[..., :3] = 0
    with torch.no_grad():
        for each in (batch, with_masks(batch, half)):
            diffusion_loss(denoise, each, Epsilon(schedule), timesteps=batch.timesteps, noise=batch.noise)
    assert torch.equal(seen[0], seen[1])
