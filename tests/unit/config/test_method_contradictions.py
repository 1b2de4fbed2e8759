"""What cannot be trained together is refused when the settings are read."""

import pytest

from sdxl_ray.config.load import config_from_dict
from sdxl_ray.config.method_contradictions import _ONLY_WITH
from sdxl_ray.config.schema import Config
from sdxl_ray.errors import ConfigError

FULL = {"adapter": {"kind": "full"}}
REGULARIZATION = [{"path": "a"}, {"path": "b", "role": "regularization", "prior_prediction": True}]


def problems(raw):
    with pytest.raises(ConfigError) as error:
        config_from_dict(raw)
    return str(error.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"adapter": {"targets": ["attention", "to_q"]}},
            'adapter.targets: "attention" stands alone: adapter.targets = "attention"',
        ),
        (
            {"adapter": {"blocks": {"mid(": {"rank": 4}}}},
            "adapter.blocks.mid(: is not a regular expression: missing ), unterminated subpattern at position 3",
        ),
        (
            {"adapter": {"kind": "dora", "init": "pissa"}},
            'adapter.init: "pissa" begins a LoRA from the weights; adapter.kind = "dora" has no such beginning',
        ),
        (
            {"adapter": {"kind": "lokr", "rank_stabilized": True}},
            'adapter.rank_stabilized: was derived for A and B of a LoRA, and adapter.kind = "lokr" has other factors',
        ),
        (
            {"adapter": {"kind": "loha", "start_from": "x.safetensors"}},
            'adapter.start_from: reads a LoRA, which adapter.kind = "loha" cannot go on from',
        ),
        (
            {"adapter": {"init": "olora", "start_from": "x.safetensors"}},
            'adapter.start_from: and adapter.init = "olora" are two beginnings. Remove one.',
        ),
        (
            {"adapter": {"kind": "full", "rank": 64}},
            'adapter.rank: is about an adapter, and adapter.kind = "full" has none. Remove adapter.rank.',
        ),
        (
            {"train": {"micro_batch_size": "auto", "global_batch_size": 8}, "cache": {"mode": "off"}},
            'train.micro_batch_size: "auto" tries out what training needs, and with cache.mode = "off" encoders work '
            "on the same GPU. Give a number.",
        ),
        (
            {"adapter": {"kind": "full", "dropout": 0.1}},
            'adapter.dropout: is about an adapter, and adapter.kind = "full" has none. Remove adapter.dropout.',
        ),
        (
            {**FULL, "dataset": REGULARIZATION},
            "dataset 2 (b): dataset.prior_prediction: needs the model without the adapter, and adapter.kind = "
            '"full" changes the model itself',
        ),
        (
            {**FULL, "model": {"quantize": "int8"}},
            'model.quantize: "int8" rounds weights that adapter.kind = "full" has to change. Set "none".',
        ),
        (
            {"adapter": {"kind": "dora"}, "model": {"quantize": "int4"}},
            'model.quantize: "int4" has no float weights, whose norms adapter.kind = "dora" takes in each step. '
            'Set "none".',
        ),
        (
            {"text_encoder": {"rank": 4}},
            "text_encoder.rank: is set, and what the encoder says changes in each step, so nothing of it can be "
            'cached. Set cache.text = "online".',
        ),
        (
            {"text_encoder_2": {"stop": "3 epochs"}},
            "text_encoder_2.stop: is set, but text_encoder_2.rank = 0: it is not trained. Set text_encoder_2.rank = 8, "
            "say.",
        ),
        (
            {"model": {"quantize_text_encoder_2": "int8"}},
            "model.quantize_text_encoder_2: is set, but no text encoder is trained, so none is in memory while "
            "training. Remove it.",
        ),
        (
            {"loss": {"zero_terminal_snr": True}},
            'loss.zero_terminal_snr: is set, but with loss.objective = "epsilon" the last noise level would say '
            "nothing about the image: noise is all there is to see and to predict. Set loss.objective = "
            '"v_prediction", or remove it.',
        ),
        (
            {"loss": {"objective": "sample", "weighting": "debiased"}},
            'loss.weighting: "debiased" has no published form for loss.objective = "sample". Set loss.weighting = '
            '"min_snr", say.',
        ),
        (
            {"loss": {"timestep_min": 600, "timestep_max": 500}},
            "loss.timestep_min: is 600, above loss.timestep_max = 500",
        ),
        (
            {"loss": {"timestep_bias": "range", "bias_begin": 0, "bias_end": 99, "timestep_min": 100}},
            "loss.bias_begin: to loss.bias_end is 0-99, outside of what is seen: loss.timestep_min to "
            "loss.timestep_max is 100-999",
        ),
        (
            {"dataset": [{"path": "a", "prior_prediction": True}]},
            'dataset.prior_prediction: is set, but dataset.role = "train". Set dataset.role = "regularization".',
        ),
        (
            {"optimizer": {"name": "adam"}},
            'optimizer.name: "adam" is not known: adamw, adamw_8bit, lion, stable_adamw, prodigy, adafactor, '
            "adamw_schedule_free, muon, or a dotted path such as torch.optim.RAdam",
        ),
        (
            {"optimizer": {"lora_plus_ratio": 16.0}, "adapter": {"kind": "loha"}},
            'optimizer.lora_plus_ratio: is about A and B, which adapter.kind = "loha" does not have',
        ),
        (
            {"optimizer": {"name": "prodigy"}},
            "optimizer.learning_rate: is 0.0001, but prodigy finds the rate itself and multiplies it by this one. "
            "Set it to 1.0.",
        ),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1.0, "lora_plus_ratio": 4.0}},
            'optimizer.lora_plus_ratio: is set, but optimizer.name = "prodigy" finds one learning rate for all. '
            "Remove it.",
        ),
        (
            {"optimizer": {"name": "adamw_schedule_free"}, "lr_schedule": {"name": "cosine"}},
            'lr_schedule.name: is "cosine", but optimizer.name = "adamw_schedule_free" takes the place of a schedule. '
            'Set it to "constant".',
        ),
        (
            {"optimizer": {"name": "adamw_schedule_free"}, "ema": {"decay": 0.999}},
            'ema.decay: is set, but optimizer.name = "adamw_schedule_free" averages already. Set it to 0.',
        ),
        (
            {"optimizer": {"name": "muon"}, "adapter": {"targets": "all-linear+conv"}},
            'adapter.targets: has convolutions, whose A is no matrix, and optimizer.name = "muon" is for matrices '
            'only. Set optimizer.name = "adamw".',
        ),
        (
            {"train": {"micro_batch_size": "auto"}},
            'train.global_batch_size: is 0, but train.micro_batch_size = "auto" needs to know how many images a step '
            "takes: 16, say",
        ),
        (
            {"train": {"micro_batch_size": "auto", "global_batch_size": 8, "accumulation": 2}},
            'train.accumulation: is set, but follows from train.micro_batch_size = "auto". Remove it.',
        ),
        (
            {"train": {"micro_batch_size": "auto", "global_batch_size": 8}, "cluster": {"accelerator": "cpu"}},
            'train.micro_batch_size: "auto" tries out what fits on a GPU; cluster.accelerator = "cpu" shares its '
            "memory with everything. Give a number.",
        ),
    ],
)
def test_refused_with_the_reason(raw, expected):
    assert problems({"dataset": {"path": "images"}, **raw}) == f"given: {expected}"


@pytest.mark.parametrize(("key", "value"), [
    ("adapter.factor", 4), ("loss.min_snr_gamma", 1.0), ("loss.huber_c", 0.5), ("loss.huber_schedule", "constant"),
    ("loss.offset_noise_probability", 0.5), ("loss.multires_noise_levels", 3),
    ("loss.input_perturbation_end", "9 steps"),
    ("loss.logit_mean", 1.0), ("loss.logit_std", 2.0), ("loss.bias_factor", 3.0), ("loss.bias_share", 0.5),
    ("loss.bias_begin", 1), ("loss.bias_end", 2), ("loss.mask_normalize", True), ("loss.unmasked_share", 0.1),
    ("lr_schedule.end_share", 0.1), ("lr_schedule.power", 3.0), ("lr_schedule.cycles", 2),
    ("lr_schedule.decay", "1 step"), ("ema.warmup", False), ("ema.evaluate", False), ("ema.export", False),
    ("export.svd_rank", 8), ("train.global_batch_size", 8),
])  # fmt: skip
def test_a_setting_that_would_play_no_part_is_an_error(key, value):
    """A run that ignores what somebody wrote is worse than none."""
    section, name = key.split(".")
    text = problems({"dataset": {"path": "images"}, section: {name: value}})
    assert text.startswith(f"given: {key}: is set, but plays no part. Remove it, or set ")


@pytest.mark.parametrize(("name", "key", "value"), [
    ("adafactor", "beta1", 0.5), ("muon", "beta2", 0.9), ("adafactor", "epsilon", 1e-4), ("lion", "epsilon", 1e-4),
])  # fmt: skip
def test_so_is_what_an_optimizer_has_no_use_for(name, key, value):
    text = problems({"dataset": {"path": "images"}, "optimizer": {"name": name, key: value}})
    assert text.startswith(f"given: optimizer.{key}: is set, but plays no part.")


def test_every_such_setting_exists_and_plays_its_part_somewhere():
    for key, _, cure in _ONLY_WITH:
        section, name = key.split(".")
        assert name in type(getattr(Config(), section)).model_fields
        assert "=" in cure or "another" in cure
    config_from_dict({"dataset": {"path": "images"}, "loss": {"caption_dropout": 0.2, "caption_dropout_to": "empty"}})
    text = problems({"dataset": {"path": "a"}, "loss": {"caption_dropout": 0.0, "caption_dropout_to": "empty"}})
    assert "loss.caption_dropout_to: is set, but plays no part" in text


@pytest.mark.parametrize("rates", [
    {"text_encoder": {"rank": 4, "learning_rate": 1e-5}, "cache": {"text": "online"}},
    {"adapter": {"kind": "lokr", "factor": 8}},
    {"loss": {"objective": "v_prediction", "zero_terminal_snr": True, "weighting": "min_snr", "min_snr_gamma": 1.0}},
    {"optimizer": {"name": "prodigy", "learning_rate": 1.0, "options": {"d_coef": 0.5}}},
    {"train": {"micro_batch_size": "auto", "global_batch_size": 16}},
    {"train": {"gradient_checkpointing": 35}},
    {"dataset": REGULARIZATION},
    {"adapter": {"kind": "dora"}, "export": {"svd_rank": 64}},
])  # fmt: skip
def test_what_goes_together_survives_being_written_down(rates, tmp_path):
    from sdxl_ray.config.load import dump_config, load_config

    config = config_from_dict({"dataset": {"path": str(tmp_path)}, **rates})
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config


def test_the_names_that_settings_know_are_those_that_there_are():
    """config lies below train and beside sdxl, so it cannot ask them."""
    from sdxl_ray.config.method_contradictions import OPTIMIZERS, TARGET_PRESETS
    from sdxl_ray.sdxl.targets import TARGETS
    from sdxl_ray.train.optimizers import OPTIMIZERS as MADE

    assert OPTIMIZERS == MADE
    assert set(TARGET_PRESETS) <= set(TARGETS)
