"""What cannot be trained together, and settings that would play no part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sdxl_ray.config.fields import Section

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

TARGET_PRESETS = ("attention", "all-linear", "all-linear+conv")
OPTIMIZERS = (
    "adamw", "adamw_8bit", "lion", "stable_adamw", "prodigy", "adafactor", "adamw_schedule_free", "muon",
)  # fmt: skip

_PRODIGY_RATE = 0.1  # below this somebody has left the rate of another optimizer there

_ANOTHER = "another optimizer.name; what else its class takes goes to optimizer.options"

# (setting, whether it plays a part, what would make it so)
_ONLY_WITH: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("adapter.factor", lambda c: c.adapter.kind == "lokr", 'adapter.kind = "lokr"'),
    (
        "loss.min_snr_gamma",
        lambda c: c.loss.weighting in ("min_snr", "soft_min_snr"),
        'loss.weighting = "min_snr" or "soft_min_snr"',
    ),
    ("loss.huber_c", lambda c: c.loss.error in ("huber", "smooth_l1"), 'loss.error = "huber" or "smooth_l1"'),
    ("loss.huber_schedule", lambda c: c.loss.error in ("huber", "smooth_l1"), 'loss.error = "huber" or "smooth_l1"'),
    ("loss.offset_noise_probability", lambda c: c.loss.offset_noise > 0, "loss.offset_noise = 0.05, say"),
    ("loss.multires_noise_levels", lambda c: c.loss.multires_noise_discount > 0, "loss.multires_noise_discount = 0.3"),
    ("loss.input_perturbation_end", lambda c: c.loss.input_perturbation > 0, "loss.input_perturbation = 0.1, say"),
    ("loss.logit_mean", lambda c: c.loss.timesteps == "logit_normal", 'loss.timesteps = "logit_normal"'),
    ("loss.logit_std", lambda c: c.loss.timesteps == "logit_normal", 'loss.timesteps = "logit_normal"'),
    ("loss.bias_factor", lambda c: c.loss.timestep_bias != "none", 'loss.timestep_bias = "less_noise", say'),
    (
        "loss.bias_share",
        lambda c: c.loss.timestep_bias in ("less_noise", "more_noise"),
        'loss.timestep_bias = "less_noise" or "more_noise"',
    ),
    ("loss.bias_begin", lambda c: c.loss.timestep_bias == "range", 'loss.timestep_bias = "range"'),
    ("loss.bias_end", lambda c: c.loss.timestep_bias == "range", 'loss.timestep_bias = "range"'),
    ("loss.mask_normalize", lambda c: _has_masks(c), 'dataset.mask = "alpha" or "file"'),
    ("loss.unmasked_share", lambda c: _has_masks(c), 'dataset.mask = "alpha" or "file"'),
    ("loss.caption_dropout_to", lambda c: c.loss.caption_dropout > 0, "loss.caption_dropout = 0.1, say"),
    ("lr_schedule.end_share", lambda c: c.lr_schedule.name != "constant", "another lr_schedule.name than constant"),
    ("lr_schedule.power", lambda c: c.lr_schedule.name == "polynomial", 'lr_schedule.name = "polynomial"'),
    ("lr_schedule.cycles", lambda c: c.lr_schedule.name == "cosine_restarts", 'lr_schedule.name = "cosine_restarts"'),
    ("lr_schedule.decay", lambda c: c.lr_schedule.name == "wsd", 'lr_schedule.name = "wsd"'),
    ("ema.warmup", lambda c: c.ema.decay > 0, "ema.decay = 0.999, say"),
    ("ema.evaluate", lambda c: c.ema.decay > 0, "ema.decay = 0.999, say"),
    ("ema.export", lambda c: c.ema.decay > 0, "ema.decay = 0.999, say"),
    (
        "export.svd_rank",
        lambda c: "kohya-svd" in c.export.formats or not (c.export.formats or c.adapter.kind in ("lora", "full")),
        'export.formats = ["kohya-svd"]',
    ),
    ("optimizer.beta1", lambda c: c.optimizer.name not in ("adafactor", "muon"), _ANOTHER),
    ("optimizer.beta2", lambda c: c.optimizer.name not in ("adafactor", "muon"), _ANOTHER),
    ("optimizer.epsilon", lambda c: c.optimizer.name not in ("adafactor", "lion"), _ANOTHER),
    ("train.global_batch_size", lambda c: c.train.micro_batch_size == 0, 'train.micro_batch_size = "auto"'),
)


def method_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """(key, problem) of each. A problem names the other key too."""
    for key, plays_a_part, cure in _ONLY_WITH:
        if _is_set(config, key) and not plays_a_part(config):
            yield key, f"is set, but plays no part. Remove it, or set {cure}."
    yield from _in_adapter(config)
    yield from _in_full(config)
    yield from _in_quantized(config)
    yield from _in_text_encoders(config)
    yield from _in_loss(config)
    yield from _in_optimizer(config)
    yield from _in_batch_size(config)


def _in_adapter(config: Config) -> Iterator[tuple[str, str]]:
    adapter = config.adapter
    if len(adapter.targets) > 1:
        for preset in TARGET_PRESETS:
            if preset in adapter.targets:
                yield "adapter.targets", f'"{preset}" stands alone: adapter.targets = "{preset}"'
    for pattern in adapter.blocks:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"adapter.blocks.{pattern}", f"is not a regular expression: {error}"
    kind = f'adapter.kind = "{adapter.kind}"'
    if adapter.kind != "lora" and adapter.init in ("pissa", "olora"):
        yield "adapter.init", f'"{adapter.init}" begins a LoRA from the weights; {kind} has no such beginning'
    if adapter.kind in ("loha", "lokr"):
        if adapter.init == "gaussian":
            yield "adapter.init", f'"gaussian" is a beginning of lora and dora; {kind} has its own'
        if adapter.rank_stabilized:
            yield "adapter.rank_stabilized", f"was derived for A and B of a LoRA, and {kind} has other factors"
    if adapter.start_from and adapter.kind not in ("lora", "dora"):
        yield "adapter.start_from", f"reads a LoRA, which {kind} cannot go on from"
    if adapter.start_from and adapter.init in ("pissa", "olora"):
        yield "adapter.start_from", f'and adapter.init = "{adapter.init}" are two beginnings. Remove one.'


def _in_full(config: Config) -> Iterator[tuple[str, str]]:
    """There is no adapter."""
    if config.adapter.kind != "full":
        return
    for name in ("rank", "alpha", "dropout", "targets", "start_from", "rank_stabilized", "init"):
        if _is_set(config, f"adapter.{name}"):
            yield f"adapter.{name}", f'is about an adapter, and adapter.kind = "full" has none. Remove adapter.{name}.'
    if any(rule.rank is not None or rule.alpha is not None for rule in config.adapter.blocks.values()):
        yield "adapter.blocks", 'may only scale learning rates with adapter.kind = "full", which has no ranks'
    for part in ("text_encoder", "text_encoder_2"):
        if getattr(config, part).rank:
            yield f"{part}.rank", 'is set, but adapter.kind = "full" trains the U-Net alone. Set it to 0.'
    for number, dataset in enumerate(config.dataset, start=1):
        if dataset.prior_prediction:
            text = 'needs the model without the adapter, and adapter.kind = "full" changes the model itself'
            yield f"dataset.{number}.prior_prediction", text


def _in_quantized(config: Config) -> Iterator[tuple[str, str]]:
    quantize, adapter = config.model.quantize, config.adapter
    if quantize == "none":
        return
    if adapter.kind == "full":
        yield "model.quantize", f'"{quantize}" rounds weights that adapter.kind = "full" has to change. Set "none".'
    if adapter.kind == "dora":
        text = f'"{quantize}" has no float weights, whose norms adapter.kind = "dora" takes in each step. Set "none".'
        yield "model.quantize", text
    if adapter.init in ("pissa", "olora"):
        text = f'"{quantize}" has no float weights, from which adapter.init = "{adapter.init}" begins. Set "none".'
        yield "model.quantize", text


def _in_text_encoders(config: Config) -> Iterator[tuple[str, str]]:
    any_trained = config.text_encoder.rank > 0 or config.text_encoder_2.rank > 0
    for part in ("text_encoder", "text_encoder_2"):
        section = getattr(config, part)
        for name in ("alpha", "learning_rate", "stop", "targets"):
            if not section.rank and _is_set(config, f"{part}.{name}"):
                yield f"{part}.{name}", f"is set, but {part}.rank = 0: it is not trained. Set {part}.rank = 8, say."
        if section.rank and config.cache.text == "cached":
            yield (
                f"{part}.rank",
                "is set, and what the encoder says changes in each step, so nothing of it can be cached. "
                'Set cache.text = "online".',
            )
        if not any_trained and getattr(config.model, f"quantize_{part}") != "none":
            yield (
                f"model.quantize_{part}",
                "is set, but no text encoder is trained, so none is in memory while training. Remove it.",
            )
    if any_trained:
        for number, dataset in enumerate(config.dataset, start=1):
            if dataset.prior_prediction:
                yield (
                    f"dataset.{number}.prior_prediction",
                    "compares with the base model, which would need a second encoding of each caption: not with "
                    "text_encoder.rank or text_encoder_2.rank above 0",
                )


def _in_loss(config: Config) -> Iterator[tuple[str, str]]:
    loss = config.loss
    if loss.zero_terminal_snr and loss.objective == "epsilon":
        yield (
            "loss.zero_terminal_snr",
            'is set, but with loss.objective = "epsilon" the last noise level would say nothing about the image: noise '
            'is all there is to see and to predict. Set loss.objective = "v_prediction", or remove it.',
        )
    if loss.objective == "sample" and loss.weighting in ("debiased", "debiased_sqrt"):
        yield (
            "loss.weighting",
            f'"{loss.weighting}" has no published form for loss.objective = "sample". Set loss.weighting = '
            '"min_snr", say.',
        )
    if loss.timestep_min > loss.timestep_max:
        yield "loss.timestep_min", f"is {loss.timestep_min}, above loss.timestep_max = {loss.timestep_max}"
    if loss.timestep_bias == "range":
        if loss.bias_begin > loss.bias_end:
            yield "loss.bias_begin", f"is {loss.bias_begin}, above loss.bias_end = {loss.bias_end}"
        elif loss.bias_end < loss.timestep_min or loss.bias_begin > loss.timestep_max:
            yield (
                "loss.bias_begin",
                f"to loss.bias_end is {loss.bias_begin}-{loss.bias_end}, outside of what is seen: loss.timestep_min to "
                f"loss.timestep_max is {loss.timestep_min}-{loss.timestep_max}",
            )
    for number, dataset in enumerate(config.dataset, start=1):
        if dataset.prior_prediction and dataset.role != "regularization":
            text = f'is set, but dataset.role = "{dataset.role}". Set dataset.role = "regularization".'
            yield f"dataset.{number}.prior_prediction", text


def _in_optimizer(config: Config) -> Iterator[tuple[str, str]]:
    optimizer, adapter = config.optimizer, config.adapter
    name = optimizer.name
    if "." not in name and name not in OPTIMIZERS:
        yield (
            "optimizer.name",
            f'"{name}" is not known: {", ".join(OPTIMIZERS)}, or a dotted path such as torch.optim.RAdam',
        )
    if optimizer.lora_plus_ratio != 1 and adapter.kind not in ("lora", "dora"):
        yield "optimizer.lora_plus_ratio", f'is about A and B, which adapter.kind = "{adapter.kind}" does not have'
    if name == "prodigy":
        if optimizer.learning_rate < _PRODIGY_RATE:
            yield (
                "optimizer.learning_rate",
                f"is {optimizer.learning_rate:g}, but prodigy finds the rate itself and multiplies it by this one. "
                "Set it to 1.0.",
            )
        rates = {
            "optimizer.lora_plus_ratio": optimizer.lora_plus_ratio != 1,
            "adapter.blocks": any(rule.learning_rate_scale not in (0, 1) for rule in adapter.blocks.values()),
            "text_encoder.learning_rate": config.text_encoder.learning_rate not in (0, optimizer.learning_rate),
            "text_encoder_2.learning_rate": config.text_encoder_2.learning_rate not in (0, optimizer.learning_rate),
        }
        for key, is_set in rates.items():
            if is_set:
                yield key, 'is set, but optimizer.name = "prodigy" finds one learning rate for all. Remove it.'
    if name == "adamw_schedule_free":
        if config.lr_schedule.name != "constant":
            yield (
                "lr_schedule.name",
                f'is "{config.lr_schedule.name}", but optimizer.name = "adamw_schedule_free" takes the place of a '
                'schedule. Set it to "constant".',
            )
        if config.ema.decay:
            yield "ema.decay", 'is set, but optimizer.name = "adamw_schedule_free" averages already. Set it to 0.'
    if name == "muon":
        reasons = {
            "adapter.kind": (adapter.kind in ("dora", "full"), "has parameters that are no matrices"),
            "adapter.targets": ("all-linear+conv" in adapter.targets, "has convolutions, whose A is no matrix"),
        }
        for key, (holds, reason) in reasons.items():
            if holds:
                yield key, f'{reason}, and optimizer.name = "muon" is for matrices only. Set optimizer.name = "adamw".'


def _in_batch_size(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if train.micro_batch_size:
        return
    if not train.global_batch_size:
        yield (
            "train.global_batch_size",
            'is 0, but train.micro_batch_size = "auto" needs to know how many images a step takes: 16, say',
        )
    if train.accumulation != 1:
        yield "train.accumulation", 'is set, but follows from train.micro_batch_size = "auto". Remove it.'
    is_trained = config.text_encoder.rank > 0 or config.text_encoder_2.rank > 0
    for key, beside in (
        ('cache.mode = "off"', config.cache.mode == "off"),
        ('cache.text = "online"', config.cache.text == "online" and not is_trained),
    ):
        if beside:
            text = f'"auto" tries out what training needs, and with {key} encoders work on the same GPU. Give a number.'
            yield "train.micro_batch_size", text
    if config.cluster.accelerator == "cpu":
        yield (
            "train.micro_batch_size",
            '"auto" tries out what fits on a GPU; cluster.accelerator = "cpu" shares its memory with everything. '
            "Give a number.",
        )


def _has_masks(config: Config) -> bool:
    return any(dataset.mask != "none" for dataset in config.datasets)


def _is_set(config: Config, key: str) -> bool:
    """Whether a setting differs from its default."""
    section: Any = config
    *parents, name = key.split(".")
    for parent in parents:
        section = getattr(section, parent)
    assert isinstance(section, Section)
    return bool(getattr(section, name) != type(section).model_fields[name].default)
