"""Our loss is the one of diffusers' train_text_to_image_lora_sdxl.py, for the same weights, noise and timesteps."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdxl_ray.diffusion.distances import make_distance, mse
from sdxl_ray.diffusion.loss import LossForm, diffusion_loss
from sdxl_ray.diffusion.objectives import OBJECTIVES, Epsilon, Sample, VPrediction
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import make_weighting
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
    weighting = make_weighting("min_snr", prediction_type, gamma=snr_gamma) if snr_gamma else None
    losses = ours(unet, batch, OBJECTIVES[prediction_type](schedule, weighting))
    assert losses.shape == (len(batch),) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_samples_loss_does_not_depend_on_its_batch(unet, schedule, batch):
    together = ours(unet, batch, Epsilon(schedule))
    for row in range(len(batch)):
        tensors = {
            name: tensor[row : row + 1]
            for name in batch.__slots__
            if name != "sample_ids" and (tensor := getattr(batch, name)) is not None
        }
        alone = ours(unet, Batch(sample_ids=(batch.sample_ids[row],), **tensors), Epsilon(schedule))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective_class", OBJECTIVES.values())
def test_corruption_is_diffusers_add_noise(tiny_model, schedule, batch, objective_class):
    scheduler = DDPMScheduler.from_config(load_scheduler_config(tiny_model))
    noisy_latents = objective_class(schedule).corrupt(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(noisy_latents, scheduler.add_noise(batch.latents, batch.noise, batch.timesteps))


def test_targets_are_diffusers(tiny_model, schedule, batch):
    scheduler = DDPMScheduler.from_config(load_scheduler_config(tiny_model))
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(VPrediction(schedule).target(batch.latents, batch.noise, batch.timesteps), velocity)
    assert torch.equal(Epsilon(schedule).target(batch.latents, batch.noise, batch.timesteps), batch.noise)
    assert torch.equal(Sample(schedule).target(batch.latents, batch.noise, batch.timesteps), batch.latents)


@pytest.mark.parametrize("objective_class", OBJECTIVES.values())
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


def loss_and_gradient(batch, objective, form=LossForm()):
    """The losses, and how they change with each pixel of the prediction."""
    prediction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = diffusion_loss(
        lambda *_: prediction, batch, objective, timesteps=batch.timesteps, noise=batch.noise, form=form
    )
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    return losses, gradient


def with_masks(batch, masks):
    return dataclasses.replace(batch, masks=masks)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("objective_key", OBJECTIVES)
def test_a_mask_of_ones_is_no_mask(schedule, batch, objective_key, normalize):
    """To the bit."""
    objective = OBJECTIVES[objective_key](schedule, make_weighting("min_snr", objective_key, gamma=5.0))
    losses, gradient = loss_and_gradient(batch, objective)
    masked = with_masks(batch, torch.ones(len(batch), 1, 8, 6))
    form = LossForm(mask_normalize=normalize)
    for found, expected in zip(loss_and_gradient(masked, objective, form), (losses, gradient), strict=True):
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


def some_masks(batch):
    """Of different sizes, with grey edges: (B, 1, 8, 6)."""
    masks = torch.zeros(len(batch), 1, 8, 6)
    for row in range(len(batch)):
        masks[row, :, : row + 1, 1:4] = 1
        masks[row, :, row + 1, 1:4] = 0.25
    return masks


def written_out_loss(error, mask, share, normalize):
    """Of one sample, in plain loops over (4, h, w) in double precision."""
    total = area = 0.0
    channels, height, width = error.shape
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                counts = share + (1 - share) * float(mask[0, y, x])
                total += counts * float(error[channel, y, x])
                area += counts
    return total / area if normalize else total / (channels * height * width)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["mse", "huber"])
def test_masked_losses_are_their_formula(schedule, batch, name, share, normalize):
    distance = make_distance(name, schedule, huber_c=0.1, huber_schedule="snr")
    form = LossForm(distance, mask_normalize=normalize, unmasked_share=share)
    prediction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    masks = some_masks(batch)
    losses, _ = loss_and_gradient(with_masks(batch, masks), Epsilon(schedule), form)
    error = distance(prediction, batch.noise, batch.timesteps)
    expected = [written_out_loss(error[row], masks[row], share, normalize) for row in range(len(batch))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["mse", "mae", "huber", "smooth_l1"])
def test_the_gradient_outside_the_mask_is_zero_exactly(schedule, batch, name, normalize):
    form = LossForm(make_distance(name, schedule, huber_c=0.1, huber_schedule="snr"), mask_normalize=normalize)
    masks = some_masks(batch)
    _, gradient = loss_and_gradient(with_masks(batch, masks), Epsilon(schedule), form)
    everywhere = masks.expand_as(gradient)
    assert (gradient[everywhere == 0] == 0).all()
    assert (gradient[everywhere > 0] != 0).all()


def test_a_small_mask_counts_as_much_as_a_large_one_when_normalized(schedule, batch):
    """The same error everywhere: the loss is that error, whatever the mask (field notes, trap 13)."""
    flat = dataclasses.replace(batch, noise=torch.zeros_like(batch.noise), masks=some_masks(batch))

    def losses(form):
        prediction = torch.full_like(batch.latents, 3.0)
        return diffusion_loss(
            lambda *_: prediction, flat, Epsilon(schedule), timesteps=batch.timesteps, noise=flat.noise, form=form
        )

    torch.testing.assert_close(losses(LossForm(mask_normalize=True)), torch.full((len(batch),), 9.0))
    assert (losses(LossForm()).diff() > 0).all()  # the masks grow from row to row


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_an_empty_mask_divides_nothing_by_zero(schedule, batch, share):
    form = LossForm(mask_normalize=True, unmasked_share=share)
    masked = with_masks(batch, torch.zeros(len(batch), 1, 8, 6))
    losses, gradient = loss_and_gradient(masked, Epsilon(schedule), form)
    plain, plain_gradient = loss_and_gradient(batch, Epsilon(schedule))
    if share == 0:
        assert (losses == 0).all() and (gradient == 0).all()
    else:  # all pixels count the same, and the mean is over what counts
        torch.testing.assert_close(losses, plain)
        torch.testing.assert_close(gradient, plain_gradient)


@pytest.mark.parametrize("normalize", [False, True])
def test_an_unmasked_share_of_one_is_no_mask(schedule, batch, normalize):
    form = LossForm(mask_normalize=normalize, unmasked_share=1.0)
    found = loss_and_gradient(with_masks(batch, some_masks(batch)), Epsilon(schedule), form)
    for one, expected in zip(found, loss_and_gradient(batch, Epsilon(schedule)), strict=True):
        assert torch.equal(one, expected)


# ---- shape of the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective_key", OBJECTIVES)
def test_the_neutral_form_is_the_plain_loss_to_the_bit(schedule, batch, objective_key):
    objective = OBJECTIVES[objective_key](schedule, make_weighting("min_snr", objective_key, gamma=5.0))
    prediction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    form = LossForm(make_distance("mse", schedule, huber_c=0.1, huber_schedule="snr"))
    assert form == LossForm() and LossForm().distance is mse
    losses, _ = loss_and_gradient(batch, objective, form)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    expected = ((prediction - target) ** 2).flatten(1).mean(1) * objective.weight(batch.timesteps)
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "smooth_l1"])
@pytest.mark.parametrize(
    ("objective_key", "weighting"),
    [
        *(("v_prediction", name) for name in ("constant", "min_snr", "soft_min_snr", "debiased", "debiased_sqrt")),
        *(("sample", name) for name in ("constant", "min_snr", "soft_min_snr")),
    ],
)
def test_every_form_of_the_loss_is_finite_on_a_zero_terminal_snr_schedule(batch, objective_key, weighting, name):
    schedule = NoiseSchedule.from_config({}, zero_terminal_snr=True)
    objective = OBJECTIVES[objective_key](schedule, make_weighting(weighting, objective_key, gamma=5.0))
    form = LossForm(make_distance(name, schedule, huber_c=0.1, huber_schedule="snr"), mask_normalize=True)
    losses, gradient = loss_and_gradient(with_masks(batch, some_masks(batch)), objective, form)
    assert losses.isfinite().all() and gradient.isfinite().all()


# ---- perturbation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective_class", OBJECTIVES.values())
def test_a_perturbation_is_seen_and_not_asked_for(schedule, batch, objective_class):
    objective = objective_class(schedule)
    perturbation = 0.1 * torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    perturbed = dataclasses.replace(batch, perturbation=perturbation)
    seen = []
    target = objective.target(batch.latents, batch.noise, batch.timesteps)

    def denoise(noisy_latents, *_):
        seen.append(noisy_latents)
        return target

    losses = diffusion_loss(denoise, perturbed, objective, timesteps=batch.timesteps, noise=batch.noise)
    assert losses.tolist() == [0.0] * len(batch)
    assert torch.equal(seen[0], objective.corrupt(batch.latents, batch.noise + perturbation, batch.timesteps))
    assert not torch.equal(seen[0], objective.corrupt(batch.latents, batch.noise, batch.timesteps))


# ---- prior prediction ------------------------------------------------------------------------------------------------


def toward(shift):
    """A model without a batch: each row's prediction depends on that row alone, and on all that the model is told."""

    def denoise(noisy_latents, timesteps, prompt_embeds, pooled_prompt_embeds, add_time_ids):
        told = prompt_embeds.mean((1, 2)) + pooled_prompt_embeds.mean(1) + add_time_ids.mean(1) + timesteps
        return noisy_latents * 0.5 + told.view(-1, 1, 1, 1) / 1000 + shift

    return denoise


def prior_loss(denoise, parent, batch, objective, from_parent):
    batch = dataclasses.replace(batch, from_parent=None if from_parent is None else torch.tensor(from_parent))
    return diffusion_loss(denoise, batch, objective, timesteps=batch.timesteps, noise=batch.noise, parent=parent)


SOME = [True, False, True, False, False]


@pytest.mark.parametrize("objective_class", OBJECTIVES.values())
def test_a_model_equal_to_its_parent_has_no_prior_loss(schedule, batch, objective_class):
    losses = prior_loss(toward(0), toward(0), batch, objective_class(schedule), SOME)
    plain = prior_loss(toward(0), None, batch, objective_class(schedule), None)
    assert losses[[0, 2]].tolist() == [0.0, 0.0]
    assert torch.equal(losses[[1, 3, 4]], plain[[1, 3, 4]])
    assert (plain > 0).all()


def test_the_prior_loss_is_the_distance_from_the_parents_prediction(schedule, batch):
    losses = prior_loss(toward(0.5), toward(0), batch, Epsilon(schedule), SOME)
    assert losses[[0, 2]].tolist() == pytest.approx([0.25, 0.25], rel=1e-4)


def test_the_parent_is_called_once_on_its_rows_and_without_gradient(schedule, batch):
    calls, shift = [], torch.zeros((), requires_grad=True)

    def parent(*inputs):
        calls.append(inputs)
        assert not torch.is_grad_enabled()
        return toward(0)(*inputs) + shift

    perturbed = dataclasses.replace(batch, perturbation=torch.full_like(batch.noise, 0.1))
    losses = prior_loss(toward(shift + 1), parent, perturbed, Epsilon(schedule), SOME)
    ((noisy_latents, timesteps, prompt_embeds, pooled_prompt_embeds, add_time_ids),) = calls
    expected = Epsilon(schedule).corrupt(batch.latents, batch.noise + 0.1, batch.timesteps)
    rows = [0, 2]
    assert torch.equal(noisy_latents, expected[rows])  # the same input, perturbation and all
    assert torch.equal(timesteps, batch.timesteps[rows])
    assert torch.equal(prompt_embeds, batch.prompt_embeds[rows])
    assert torch.equal(pooled_prompt_embeds, batch.pooled_prompt_embeds[rows])
    assert torch.equal(add_time_ids, batch.add_time_ids[rows])
    (gradient,) = torch.autograd.grad(losses[rows].sum(), shift)
    assert float(gradient) == pytest.approx(4.0, rel=1e-4)  # d/ds (s + 1)^2 twice at s = 0; the target has none


@pytest.mark.parametrize("from_parent", [None, [False] * 5])
def test_without_rows_of_the_parent_it_is_not_called(schedule, batch, from_parent):
    def parent(*_):
        pytest.fail("called")

    losses = prior_loss(toward(0), parent, batch, Epsilon(schedule), from_parent)
    assert torch.equal(losses, prior_loss(toward(0), None, batch, Epsilon(schedule), None))


def test_the_batchs_noise_is_not_written_to(schedule, batch):
    """It is the target of epsilon itself."""
    before = batch.noise.clone()
    prior_loss(toward(0), toward(1), batch, Epsilon(schedule), SOME)
    assert torch.equal(batch.noise, before)


@torch.no_grad()
def test_a_fresh_u_net_has_no_prior_loss(unet, schedule, batch):
    denoise = functools.partial(predict, unet)
    losses = prior_loss(denoise, denoise, batch, Epsilon(schedule), [True] * 5)
    assert losses.tolist() == [0.0] * 5
    some = prior_loss(denoise, denoise, batch, Epsilon(schedule), SOME)
    assert some[[0, 2]].max() < 1e-10  # a smaller batch rounds differently
    assert some[[1, 3, 4]].min() > 0.1


def test_masks_and_weighting_count_for_the_prior_loss_too(schedule, batch):
    masked = with_masks(batch, some_masks(batch))
    objective = Epsilon(schedule, make_weighting("min_snr", "epsilon", gamma=5.0))
    losses = prior_loss(toward(0.5), toward(0), masked, objective, [True] * 5)
    expected = 0.25 * masked.masks.mean((1, 2, 3)) * objective.weight(batch.timesteps)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
