"""What a config alone does not show to be impossible: libraries, formats, files. Before any work, also by `check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.diffusion.timesteps import TimestepSampler, make_sampler
from sdxl_ray.errors import ConfigError
from sdxl_ray.export.which import DEFAULT_FORMATS, refuse
from sdxl_ray.train.optimizers import check_optimizer

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


def check_methods(config: Config) -> None:
    """
    Raises:
        ConfigError: with everything that would stop the run.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))


def export_formats(config: Config) -> tuple[str, ...]:
    """What will be written."""
    return config.export.formats or DEFAULT_FORMATS[config.adapter.kind]


def check_schedule(config: Config, scheduler_config: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: the model's own schedule does not go with the objective.
    """
    if config.loss.objective == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            f'loss.objective = "epsilon", but the schedule of {config.model.path} ends in pure noise '
            "(rescale_betas_zero_snr), where epsilon says nothing about the image. Models with this schedule "
            'predict v: set loss.objective = "v_prediction".'
        )


def timestep_sampler(config: Config, num_timesteps: int = 1000) -> TimestepSampler:
    """How often each noise level is drawn.

    Raises:
        ConfigError: no level is left.
    """
    loss = config.loss
    return make_sampler(
        num_timesteps,
        distribution=loss.timesteps,
        logit_mean=loss.logit_mean,
        logit_std=loss.logit_std,
        bias=loss.timestep_bias,
        bias_factor=loss.bias_factor,
        bias_share=loss.bias_share,
        bias_begin=loss.bias_begin,
        bias_end=loss.bias_end,
        minimum=loss.timestep_min,
        maximum=loss.timestep_max,
    )


def _problems(config: Config) -> Iterator[str]:
    has_text_encoders = config.text_encoder.rank > 0 or config.text_encoder_2.rank > 0
    for name in config.export.formats:
        reason = refuse(config.adapter.kind, name, has_text_encoders)
        if reason:
            yield reason
    try:
        check_optimizer(config.optimizer.name, config.optimizer.options)
    except ConfigError as error:
        yield str(error)
    try:
        timestep_sampler(config)
    except ConfigError as error:
        yield str(error)
    run_folder = Path(config.run.output) / config.run.name
    for folder in (run_folder, *run_folder.parents):
        if folder.is_file():
            yield f"run.output = {config.run.output}: {folder} is a file, and the run needs a folder there."
    start = config.adapter.start_from
    if start and not Path(start).is_file():
        yield f'adapter.start_from = "{start}": no such file. Give a LoRA\'s .safetensors file.'
