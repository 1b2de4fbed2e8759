import dataclasses

import numpy as np
import pytest
import torch

from sdxl_ray.config.load import with_overrides
from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.errors import TrainingError
from sdxl_ray.train.eval_loss import RANGES, stable_eval_loss
from tests.tiny import make_training, run_workers


@pytest.fixture(scope="module")
def training(tiny_cache):
    config, index_path = tiny_cache
    config = with_overrides(config, {"adapter.dropout": 0.5, "eval.num_timesteps": 6})
    training = make_training(config, index_path)
    with torch.no_grad():  # so that dropout would show
        for name, master in training.state.masters.masters.items():
            if "lora_B" in name:
                master.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    training.state.masters.publish()
    return training


def test_twice_the_same_value(training):
    assert training.evaluate() == training.evaluate()


def test_it_is_the_plain_mean_over_images_and_noise_levels(training):
    state, builder = training.state, training.eval_builder
    state.unet.eval()
    with torch.no_grad():
        batches = [builder.evaluation(row, 6) for row in range(len(training.data.held_out))]
        losses = [
            diffusion_loss(state.denoise, batch, training.eval_objective, timesteps=batch.timesteps, noise=batch.noise)
            for batch in batches
        ]
    state.unet.train()
    assert len(batches) > 1
    values = training.evaluate()
    assert values["eval/loss"] == pytest.approx(float(torch.cat(losses).double().mean()), rel=1e-9)
    by_level = torch.stack(losses).double()  # (images, 6): levels 83, 250, 416, 583, 750, 916
    assert values["eval/loss_t000_250"] == pytest.approx(float(by_level[:, 0].mean()), rel=1e-9)
    assert values["eval/loss_t250_500"] == pytest.approx(float(by_level[:, 1:3].mean()), rel=1e-9)


def test_ranges_average_to_the_whole(training):
    values = training.evaluate()
    counts = np.histogram([83, 250, 416, 583, 750, 916], bins=[0, 250, 500, 750, 1000])[0]
    parts = [values[f"eval/loss_t{low:03d}_{high}"] for low, high in RANGES]
    assert np.average(parts, weights=counts) == pytest.approx(values["eval/loss"], rel=1e-12)


def test_a_range_without_a_noise_level_is_left_out(training):
    one_level = dataclasses.replace(training, num_eval_timesteps=1)  # 500
    assert set(one_level.evaluate()) == {"eval/loss", "eval/loss_t500_750"}


def test_modes_and_random_state_are_left_as_they_were(training):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.state.unet.train()
    training.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in training.state.unet.modules())
    assert all(parameter.grad is None for parameter in training.state.unet.parameters())
    training.state.unet.eval()
    training.evaluate()
    assert not any(module.training for module in training.state.unet.modules())
    training.state.unet.train()


def test_the_mode_comes_back_also_after_an_error(training):
    def damaged():
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        stable_eval_loss(training.state, damaged, training.eval_objective)
    assert training.state.unet.training


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.weighting": "min_snr"},
        {"loss.error": "mae"},
        {"loss.offset_noise": 0.1},
        {"loss.caption_dropout": 1.0},
        {"run.seed": 99},
    ],
)
def test_how_the_loss_of_training_is_made_does_not_matter(config, index_path, changes):
    """Else trials could not be compared. (A new adapter is zero, whatever the seed.)"""
    values = make_training(config, index_path).evaluate()
    assert make_training(with_overrides(config, changes), index_path).evaluate() == values


# ---- damaged images and masks ----------------------------------------------------------------------------------------


def batches_of(training):
    return [training.eval_builder.evaluation(row, 4) for row in range(len(training.data.held_out))]


def loss_of(training, batches):
    return stable_eval_loss(training.state, lambda: batches, training.eval_objective)


def test_damaged_images_are_left_out_of_the_mean(training):
    batches = batches_of(training)
    damaged = dataclasses.replace(
        batches[0], weights=torch.zeros(4), latents=torch.zeros_like(batches[0].latents), sample_ids=("x",) * 4
    )
    assert loss_of(training, [damaged, *batches[1:]]) == loss_of(training, batches[1:])
    assert loss_of(training, batches) != loss_of(training, batches[1:])


def test_only_damaged_images_are_an_error(training):
    damaged = [dataclasses.replace(batch, weights=torch.zeros(4)) for batch in batches_of(training)]
    with pytest.raises(TrainingError, match="no held-out image can be decoded"):
        loss_of(training, damaged)
    assert training.state.unet.training


def test_what_is_masked_out_is_not_evaluated(training):
    batches = batches_of(training)
    ones = [dataclasses.replace(each, masks=torch.ones_like(each.latents[:, :1])) for each in batches]
    half = [dataclasses.replace(each, masks=torch.full_like(each.latents[:, :1], 0.5)) for each in batches]
    assert loss_of(training, ones) == loss_of(training, batches)
    assert loss_of(training, half)["eval/loss"] == pytest.approx(0.5 * loss_of(training, batches)["eval/loss"])


def test_weights_of_datasets_do_not_matter(config, index_path):
    data = config.model_dump(mode="json")
    data["dataset"][0]["weight"] = 7.0
    heavy = type(config).model_validate(data)
    training = make_training(heavy, index_path)
    assert set(training.builder.weights.values()) == {7.0}
    assert training.evaluate() == make_training(config, index_path).evaluate()


def _evaluate(workers, config, index_path):
    training = make_training(config, index_path, workers=workers)
    return training.evaluate(), len(training.data.held_out)


@pytest.mark.parametrize("world_size", [3])
def test_the_number_of_workers_does_not_matter(config, index_path, world_size):
    """Three ranks for four images: unequal shares."""
    config = with_overrides(config, {"train.num_workers": world_size})
    expected = make_training(config, index_path).evaluate()
    for values, num_held_out in run_workers(_evaluate, world_size, config, index_path):
        assert num_held_out == 4
        assert values == pytest.approx(expected, rel=1e-9)
