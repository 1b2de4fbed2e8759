"""Every way to train, through all of stage 2 on the tiny SDXL: it learns, resumes to the bit and is exported."""

import dataclasses

import numpy as np
import pytest
import torch

from sdxl_ray.config.load import with_overrides
from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.errors import ConfigError
from sdxl_ray.run_folder import checkpoint_name
from sdxl_ray.sdxl.adapters import adapter_disabled
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.train.finish import export_run
from sdxl_ray.train.preflight import check_methods
from tests.tiny import ListReporter, assert_equal, make_training, snapshot, train

KINDS = {
    "lora": {},
    "lora of all linear layers and convolutions, rank-stabilised, some blocks otherwise": {
        "adapter.targets": "all-linear+conv",
        "adapter.rank_stabilized": True,
        "adapter.blocks": {
            "mid_block": {"rank": 4, "alpha": 1.0, "learning_rate_scale": 0.5},
            r"up_blocks\.1": {"rank": 0},
        },
    },
    "lora with dropout from a normal start": {"adapter.dropout": 0.3, "adapter.init": "gaussian"},
    "pissa": {"adapter.init": "pissa"},
    "olora": {"adapter.init": "olora", "adapter.alpha": 1.0},
    "dora": {"adapter.kind": "dora"},
    "dora of all linear layers and convolutions": {"adapter.kind": "dora", "adapter.targets": "all-linear+conv"},
    "loha": {"adapter.kind": "loha", "adapter.targets": "all-linear+conv"},
    "lokr": {"adapter.kind": "lokr", "adapter.targets": "all-linear+conv", "adapter.factor": 4},
    "full": {"adapter.kind": "full", "adapter.rank": 16, "adapter.alpha": 0.0, "optimizer.learning_rate": 1e-4},
    "text encoders": {
        "cache.text": "online",
        "text_encoder.rank": 2,
        "text_encoder.stop": "3 steps",
        "text_encoder_2.rank": 2,
        "text_encoder_2.targets": "all-linear",
        "text_encoder_2.learning_rate": 1e-3,
    },
    "lora on int8": {"model.quantize": "int8"},
    "average": {"ema.decay": 0.9},
}
OPTIMIZERS = {
    "adamw_8bit": {},
    "lion": {},
    "stable_adamw": {},
    "prodigy": {"optimizer.learning_rate": 1.0},
    "adafactor": {},
    "adamw_schedule_free": {},
    "muon": {},
    "torch.optim.RAdam": {"optimizer.options": {"decoupled_weight_decay": True}},
    "adamw": {"optimizer.lora_plus_ratio": 4.0},
}


def resumed_and_whole(config, index_path, folder):
    config = with_overrides(config, {"train.duration": "5 steps", "checkpoint.every": "2 steps", "train.log_every": 1})
    whole = make_training(config, index_path)
    before = {name: tensor.clone() for name, tensor in whole.state.masters.state_dict().items()}
    uninterrupted = train(whole, ListReporter(folder=folder))
    resumed = make_training(config, index_path, checkpoint=folder / checkpoint_name(2))
    report = train(resumed)
    assert report.losses() == {step: loss for step, loss in uninterrupted.losses().items() if step > 2}
    assert report.evaluations == [item for item in uninterrupted.evaluations if item[0] > 2]
    return whole, resumed, before


# What another kind in the default suite goes through as well.
SLOW = ("dora", "olora", "lora with dropout from a normal start")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS]
)
def test_each_kind_learns_resumes_to_the_bit_and_is_exported(config, index_path, tmp_path, name):
    config = with_overrides(config, KINDS[name])
    whole, resumed, before = resumed_and_whole(config, index_path, tmp_path / "checkpoints")
    assert_equal(snapshot(resumed.state), snapshot(whole.state))
    after = whole.state.masters.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    files = export_run(config, resumed, tmp_path / "export", name="tiny", sample_folder=None, started_at=None)
    assert files and all(file.path.exists() for file in files)
    for file in files:
        if file.format != "kohya-svd":  # which is only near; its error is what is told
            assert file.relative_error < 1e-4, file


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_resumes_to_the_bit(config, index_path, tmp_path, name):
    config = with_overrides(config, {"optimizer.name": name, **OPTIMIZERS[name]})
    check_methods(config)
    whole, resumed, before = resumed_and_whole(config, index_path, tmp_path)
    assert_equal(snapshot(resumed.state), snapshot(whole.state))
    after = whole.state.masters.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if ".lora_B." in key)


@pytest.mark.parametrize("changes", [
    {"loss.objective": "v_prediction", "loss.zero_terminal_snr": True, "loss.weighting": "min_snr"},
    {"loss.objective": "sample"},
    {"loss.error": "huber", "loss.weighting": "debiased"},
    {"loss.offset_noise": 0.05, "loss.multires_noise_discount": 0.3, "loss.input_perturbation": 0.1,
     "loss.input_perturbation_end": "4 steps"},
    {"loss.timesteps": "logit_normal", "loss.timestep_bias": "more_noise", "loss.timestep_min": 10},
    {"loss.caption_dropout": 0.5, "loss.caption_dropout_to": "empty", "loss.size_dropout": 0.3},
])  # fmt: skip
def test_each_objective_resumes_to_the_bit(config, index_path, tmp_path, changes):
    whole, resumed, _ = resumed_and_whole(with_overrides(config, changes), index_path, tmp_path)
    assert_equal(snapshot(resumed.state), snapshot(whole.state))


def test_fp16_trains_with_a_loss_scale_that_a_resumed_run_takes_over(config, index_path, tmp_path):
    config = with_overrides(config, {"model.dtype": "fp16"})
    whole, resumed, _ = resumed_and_whole(config, index_path, tmp_path)
    assert_equal(snapshot(resumed.state), snapshot(whole.state))
    assert resumed.state.loss_scale.state_dict() == whole.state.loss_scale.state_dict()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_blocks_that_do_not_learn_count_nothing_in_the_gradient(config, index_path, dtype):
    """With fp16 their gradients would keep the scale of the loss, and clipping would take everyone's step away."""
    config = with_overrides(config, {"model.dtype": dtype, "train.duration": "1 steps", "train.log_every": 1})
    still = {"adapter.blocks": {"down_blocks|mid_block": {"learning_rate_scale": 0.0}}}
    norms, changed = [], []
    for changes in ({}, still):
        training = make_training(with_overrides(config, changes), index_path)
        before = training.state.masters.state_dict()
        norms.append(train(training).logged[0][1]["train/grad_norm"])
        after = training.state.masters.state_dict()
        changed.append({name for name in after if not torch.equal(after[name], before[name])})
    assert 0 < norms[1] < norms[0]
    assert changed[1] == {name for name in changed[0] if name.startswith("up_blocks")} != set()


def test_a_step_that_overflows_in_fp16_is_skipped_and_the_run_goes_on(config, index_path, monkeypatch):
    config = with_overrides(config, {"model.dtype": "fp16", "train.duration": "3 steps", "train.log_every": 1})
    training = make_training(config, index_path)
    seen, denoise = [], training.state.denoise

    def overflowing(*inputs):
        seen.append(training.state.step)
        return denoise(*inputs) * (float("inf") if training.state.step == 2 else 1.0)

    training.state.denoise = overflowing
    before = training.state.loss_scale.value()
    report = train(training)
    losses = {step: values.get("train/loss") for step, values in report.logged}
    assert losses[2] is None and all(np.isfinite(losses[step]) for step in (1, 3))
    assert training.state.loss_scale.value() == before / 2
    assert seen[-1] == 3 or training.state.step == 3


# ---- text encoders ---------------------------------------------------------------------------------------------------


def of_part(state, part):
    return {name: tensor for name, tensor in state.masters.state_dict().items() if name.startswith(f"{part}.")}


def test_a_text_encoder_stops_learning_when_it_should_and_the_other_goes_on(config, index_path):
    config = with_overrides(config, {**KINDS["text encoders"], "train.duration": "5 steps"})
    training = make_training(config, index_path)
    seen = {}

    class Watching(ListReporter):
        def metrics(self, step, values):
            super().metrics(step, values)
            seen[step] = {part: of_part(training.state, part) for part in ("text_encoder", "text_encoder_2")}

    train(training, Watching())

    def changed(part, step):
        return any(not torch.equal(seen[step][part][name], seen[step - 1][part][name]) for name in seen[step][part])

    assert [changed("text_encoder", step) for step in (2, 3, 4, 5)] == [True, True, False, False]
    assert all(changed("text_encoder_2", step) for step in (2, 3, 4, 5))


def test_untrained_text_adapters_say_what_the_cache_says(config, index_path):
    """cached = online encoding"""
    cached = make_training(config, index_path)
    online = make_training(
        with_overrides(config, {"cache.text": "online", "text_encoder.rank": 2, "text_encoder_2.rank": 2}), index_path
    )
    expected, batch = next(cached.batches()), next(online.batches())
    assert batch.prompt_embeds.numel() == 0
    encoded = online.state.conditioned(batch)
    torch.testing.assert_close(encoded.prompt_embeds, expected.prompt_embeds.float(), rtol=0.02, atol=0.02)  # bf16
    assert torch.equal(encoded.noise, expected.noise) and torch.equal(encoded.timesteps, expected.timesteps)


# ---- the base model as the target ------------------------------------------------------------------------------------


def with_prior(config):
    raw = config.model_dump(mode="json")
    raw["dataset"][0] |= {"role": "regularization", "prior_prediction": True}
    raw["eval"]["holdout"] = 0.0
    return type(config).model_validate(raw)


def test_an_adapter_that_does_nothing_has_no_prior_loss_and_one_that_does_something_has(config, index_path):
    training = make_training(with_prior(config), index_path)
    state = training.state
    batch = next(training.batches())
    assert batch.from_parent.all()

    def losses():
        with torch.no_grad():
            return diffusion_loss(
                state.denoise, batch, training.objective, timesteps=batch.timesteps, noise=batch.noise,
                parent=state.parent,
            )  # fmt: skip

    assert torch.equal(losses(), torch.zeros(len(batch)))
    with torch.no_grad():
        for name, master in state.masters.masters.items():
            if ".lora_B." in name:
                master.fill_(0.05)
    state.masters.publish()
    assert (losses() > 0).all()
    train(training)  # its gradient takes it back towards the base model
    with adapter_disabled(state.unet), torch.no_grad():
        base = predict(state.unet, batch.latents, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds,
                       batch.add_time_ids)  # fmt: skip
    assert torch.isfinite(base).all()


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"ema.decay": 0.9}, {"optimizer.name": "adamw_schedule_free"}])
def test_what_is_evaluated_and_exported_is_the_average_and_training_goes_on_as_if_nobody_had_looked(
    config, index_path, tmp_path, changes
):
    config = with_overrides(config, {**changes, "train.duration": "4 steps", "eval.every": "2 steps"})
    looked, alone = (
        make_training(config, index_path),
        make_training(with_overrides(config, {"eval.every": "99 steps"}), index_path),
    )
    train(looked)
    train(alone)
    assert_equal(snapshot(looked.state), snapshot(alone.state))
    state = looked.state
    average = state.average()
    assert any(not torch.equal(average[name], master) for name, master in state.masters.state_dict().items())
    with state.evaluated_weights():
        for name, parameter in state.masters.parameters.items():
            np.testing.assert_array_equal(parameter.detach().numpy(), average[name].numpy())
    for name, parameter in state.masters.parameters.items():
        assert torch.equal(parameter, state.masters.masters[name])


def test_the_average_is_only_exported_where_that_is_wanted(config, index_path, tmp_path):
    from safetensors.torch import load_file

    exported = {}
    for export in (True, False):
        changes = {"ema.decay": 0.9, "ema.export": export, "export.formats": ["diffusers"]}
        training = make_training(with_overrides(config, changes), index_path)
        train(training)
        average, masters = training.state.average(), training.state.masters.state_dict()
        (file,) = export_run(
            with_overrides(config, changes), training, tmp_path / str(export), name="x", sample_folder=None,
            started_at=None,
        )  # fmt: skip
        exported = load_file(file.path)
        expected = average if export else masters
        for name, tensor in expected.items():
            assert torch.equal(exported[f"unet.{name}"], tensor), name


# ---- starting from a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["kohya", "diffusers"])
def test_a_run_can_go_on_from_an_exported_file(config, index_path, tmp_path, file_format):
    config = with_overrides(config, {"adapter.alpha": 1.0})
    first = make_training(config, index_path)
    train(first)
    batch = dataclasses.replace(next(make_training(config, index_path).batches()), masks=None)

    def predicted(training):
        with torch.no_grad():
            return training.state.denoise(
                batch.latents, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.add_time_ids
            )

    expected = predicted(first)
    (file,) = export_run(
        with_overrides(config, {"export.formats": [file_format]}), first, tmp_path, name="x", sample_folder=None,
        started_at=None,
    )  # fmt: skip
    second = make_training(
        with_overrides(config, {"adapter.start_from": str(file.path), "adapter.rank": 4, "adapter.alpha": 8.0}),
        index_path,
    )
    torch.testing.assert_close(predicted(second), expected, rtol=1e-4, atol=1e-5)


# ---- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.kind": "loha", "export.formats": ["diffusers"]}, "diffusers cannot read a LoHa"),
        (
            {"adapter.kind": "full", "adapter.rank": 16, "adapter.alpha": 0.0, "export.formats": ["kohya"]},
            "trains the U-Net itself",
        ),
        (
            {"adapter.start_from": "/nowhere/x.safetensors"},
            'adapter.start_from = "/nowhere/x.safetensors": no such file',
        ),
        ({"optimizer.options": {"betta": 1}}, "betta"),
        ({"optimizer.name": "torch.optim.Nothing"}, "torch.optim.Nothing"),
    ],
)
def test_what_the_settings_alone_do_not_show(config, changes, expected):
    with pytest.raises(ConfigError) as error:
        check_methods(with_overrides(config, changes))
    assert expected in str(error.value)
