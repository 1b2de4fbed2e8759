import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ray.config.load import with_overrides
from sdxl_ray.errors import ConfigError, DatasetError
from sdxl_ray.train.data import build_plan, data_order, load_data, run_identity
from sdxl_ray.train.setup import Prefetching, build_training, learning_rates
from sdxl_ray.train.state import Workers
from tests.tiny import assert_equal, cache_without_ray, make_training, snapshot, train


def with_dataset(config, **settings):
    """The config with other settings of its only dataset."""
    raw = config.model_dump(mode="json")
    raw["dataset"][0] |= settings
    return type(config).model_validate(raw)


def test_epochs_and_steps_mean_the_same_run(config, index_path):
    """9 training images in buckets of 5, 2 and 2: five micro-batches of 2 an epoch."""
    in_epochs = make_training(with_overrides(config, {"train.duration": "2 epochs"}), index_path).plan
    in_steps = make_training(with_overrides(config, {"train.duration": "10 steps"}), index_path).plan
    assert (in_epochs.max_steps, in_epochs.num_micro_batches) == (10, 10)
    assert (in_steps.max_steps, in_steps.num_micro_batches) == (10, 10)


def zero_snr_model(tiny_model, folder) -> str:
    """The tiny SDXL with the schedule of v-prediction models, such as NoobAI's."""
    shutil.copytree(tiny_model, folder)
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    return str(folder)


def test_epsilon_on_a_schedule_that_ends_in_pure_noise_is_refused(config, index_path, tiny_model, tmp_path):
    """Field notes, trap 16."""
    model = zero_snr_model(tiny_model, tmp_path / "zero-snr")
    with pytest.raises(ConfigError, match=r'ends in pure noise .* set loss.objective = "v_prediction"'):
        make_training(with_overrides(config, {"model.path": model}), index_path)


def test_v_prediction_trains_on_a_schedule_that_ends_in_pure_noise(config, index_path, tiny_model, tmp_path):
    """Field notes, trap 15: weights follow the rescaled schedule, and SNR 0 divides nothing by zero."""
    changes = {
        "model.path": zero_snr_model(tiny_model, tmp_path / "zero-snr"),
        "loss.objective": "v_prediction",
        "loss.weighting": "min_snr",
    }
    objective = make_training(with_overrides(config, changes), index_path).objective
    weights = objective.weight(torch.arange(1000))
    assert torch.isfinite(weights).all()
    assert weights[999] == 0
    latents, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0)
    assert torch.equal(objective.corrupt(latents, noise, torch.tensor([999])), noise)
    assert torch.equal(objective.target(latents, noise, torch.tensor([999])), -latents)


def test_the_held_out_images_can_be_limited(config, index_path):
    few = load_data(with_overrides(config, {"eval.holdout": 0.9, "eval.max_images": 2}), index_path)
    many = load_data(with_overrides(config, {"eval.holdout": 0.9}), index_path)
    assert len(few.held_out) == 2 < len(many.held_out)
    assert len(few.train) == 13 - 2


def test_the_schedule_lies_on_the_device_once(config, index_path):
    training = make_training(config, index_path)
    for objective in (training.objective, training.eval_objective):
        assert objective.schedule.alphas_cumprod.device == training.state.device


def test_a_run_is_the_same_with_a_moved_model_and_another_with_another(config, index_path, tiny_model, tmp_path):
    """Two folders of one name may hold different finetunes, and one may have another name on another machine."""
    data = load_data(with_overrides(config, {"eval.holdout": 0.2}), index_path)

    def identity(folder):
        return run_identity(with_overrides(config, {"model.path": str(folder)}), data)

    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    assert identity(moved) == identity(tiny_model)
    other = Path(shutil.copytree(tiny_model, tmp_path / "other" / Path(tiny_model).name))
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = {name for name, value in identity(other).items() if value != identity(tiny_model)[name]}
    assert changed == {"model (U-Net)"}
    assert run_identity(with_overrides(config, {"eval.max_images": 3}), data)["eval.max_images"] == 3


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex"])
def test_the_learning_rate_is_the_same_curve_for_any_number_of_workers(config, index_path, name):
    """Field notes, traps 10 and 11: others step it once per process, or per micro-batch."""

    def curve(**dealt):
        changes = {f"train.{key}": value for key, value in dealt.items()}
        settings = {"lr_schedule.name": name, "lr_schedule.warmup": "3 steps", "train.duration": "10 steps"}
        changed = with_overrides(config, {**settings, **changes})
        order = data_order(changed, load_data(changed, index_path))
        plan = build_plan(changed, order, step=0, position=0, can_evaluate=True)
        rate = learning_rates(changed, plan.max_steps, order.micro_batches_per_epoch / plan.micro_batches_per_step)
        return [rate(step) for step in range(1, 11)]

    alone = curve()
    assert curve(num_workers=2) == alone == curve(accumulation=3) == curve(num_workers=2, accumulation=2)
    assert alone[2] == max(alone) == config.optimizer.learning_rate  # the warm-up ends at its third step
    assert alone[-1] > 0


def test_the_settings_of_the_loss_reach_the_step(config, index_path):
    changes = {
        "loss.error": "huber", "loss.weighting": "debiased", "loss.timestep_max": 500, "loss.offset_noise": 0.1,
        "loss.size_dropout": 0.5, "loss.caption_dropout": 0.25, "loss.stratified": False,
    }  # fmt: skip
    training = make_training(with_overrides(config, changes), index_path)
    draws = training.builder.draws
    assert (draws.noise.offset, draws.size_dropout, draws.caption_dropout, draws.stratified) == (0.1, 0.5, 0.25, False)
    assert draws.sampler.probabilities[501:].sum() == 0 < draws.sampler.probabilities[500]
    ones = torch.ones(1, 4, 2, 2)
    error = training.form.distance(ones, torch.zeros_like(ones), torch.tensor([0]))
    assert not torch.equal(error, ones)  # it is not the squared one
    assert training.objective.weight(torch.tensor([999])) > 10 * training.objective.weight(torch.tensor([0]))
    assert training.eval_objective.weight(torch.tensor([0, 999])).tolist() == [1.0, 1.0]
    assert make_training(with_dataset(config, mask="alpha"), index_path).form.mask_normalize is False
    masked = with_dataset(config, mask="alpha").model_dump(mode="json")
    masked["loss"] |= {"mask_normalize": True, "unmasked_share": 0.1}
    form = make_training(type(config).model_validate(masked), index_path).form
    assert (form.mask_normalize, form.unmasked_share) == (True, 0.1)


# ---- datasets and modes of the cache ---------------------------------------------------------------------------------


def test_a_datasets_settings_reach_the_batches(config, index_path):
    training = make_training(with_dataset(config, weight=0.25, repeats=3), index_path)
    (name,) = training.data.sections
    assert training.builder.weights == {name: 0.25} and training.builder.crop_epochs == {name: 1}
    batches = list(training.batches())
    assert {weight for batch in batches for weight in batch.weights.tolist()} == {0.25}
    assert training.plan.order.samples_per_epoch == 3 * len(training.data.train)


def test_a_weight_that_all_samples_share_changes_no_step(config, index_path):
    """The loss of a step is over the sum of its weights. A power of two, so that nothing rounds."""
    plain, weighted = make_training(config, index_path), make_training(with_dataset(config, weight=2.0), index_path)
    assert train(weighted).losses() == train(plain).losses()
    assert_equal(snapshot(weighted.state), snapshot(plain.state))


def test_training_is_the_same_in_all_modes_of_the_cache(config, index_path):
    """Losses, evaluations and the trained adapter, to the bit."""
    expected = make_training(config, index_path)
    results = train(expected)
    for changes in ({"cache.mode": "off"}, {"cache.text": "online"}):
        other = with_overrides(config, changes)
        training = make_training(other, cache_without_ray(other))
        found = train(training)
        assert (found.losses(), found.evaluations) == (results.losses(), results.evaluations)
        assert_equal(snapshot(training.state), snapshot(expected.state))


def test_a_worker_that_encodes_makes_more_batches_ahead(config, index_path):
    assert make_training(config, index_path).prefetching == Prefetching()
    off = with_overrides(config, {"cache.mode": "off"})
    live = make_training(off, index_path).prefetching
    assert live.depth > Prefetching().depth and live.num_threads >= 1


def test_a_damaged_image_is_told_and_the_run_goes_on(config, tmp_path):
    """With cache.mode = "off", where nothing was decoded before."""
    images = Path(shutil.copytree(config.datasets[0].path, tmp_path / "images"))
    off = with_overrides(with_dataset(config, path=str(images)), {"cache.mode": "off", "cache.path": str(tmp_path)})
    index_path = cache_without_ray(off)
    data = load_data(off, index_path)
    damaged = Path(data.train[0].path)
    damaged.write_bytes(b"no image any more")
    told = []
    training = make_training_that_reports(with_overrides(off, {"train.duration": "1 epoch"}), data, told.append)
    found = {
        name: weight
        for batch in training.batches()
        for name, weight in zip(batch.sample_ids, batch.weights.tolist(), strict=True)
    }
    assert [name for name, weight in found.items() if weight == 0] == [data.train[0].sample_id]
    assert told and all(str(damaged) in line for line in told)


def test_too_many_damaged_images_end_the_run(config, tmp_path):
    """With cache.mode = "off": docs/data.md promises it of every mode."""
    images = Path(shutil.copytree(config.datasets[0].path, tmp_path / "images"))
    off = with_overrides(
        with_dataset(config, path=str(images), resolution=[64, 96], flip=True),
        {"cache.mode": "off", "cache.path": str(tmp_path), "train.duration": "3 epochs"},
    )
    data = load_data(off, cache_without_ray(off))
    for path in sorted({sample.path for sample in data.train})[:3]:
        Path(path).write_bytes(b"no image any more")
    training = make_training_that_reports(off, data, lambda text: None)
    with pytest.raises(DatasetError) as error:
        for _ in training.batches():
            pass
    lines = str(error.value).splitlines()
    assert lines[0] == f"{images}: 3 of 13 images cannot be used, more than dataset.max_unreadable = 0.2 allows:"
    assert (len(lines), lines[-1]) == (5, "Repair or remove them, or raise dataset.max_unreadable.")


def make_training_that_reports(config, data, report):
    return build_training(config, data, workers=Workers(), device=torch.device("cpu"), report=report)
