"""What is trained, put together without weights: what the model's shapes make impossible is refused by `check` too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import ConfigError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


def needs_rehearsal(config: Config) -> bool:
    """Whether anything depends on more than names and counts. It takes some seconds, most of them for imports."""
    return bool(
        config.adapter.start_from
        or config.adapter.init in ("pissa", "olora")
        or config.adapter.blocks
        or config.optimizer.options
        or config.optimizer.name in ("muon", "adamw_schedule_free")
        or "." in config.optimizer.name
    )


def rehearse(config: Config, model: str) -> None:
    """Attach the adapters to models on torch's "meta" device, begin with adapter.start_from, make the optimizer.

    Args:
        model: a folder or Hub id, as `resolve_model` gives it.

    Raises:
        InputError: what a worker would refuse.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter, start_from
    from sdxl_ray.sdxl.components import read_part_config
    from sdxl_ray.sdxl.devices import DTYPES
    from sdxl_ray.sdxl.full import train_everything
    from sdxl_ray.train.masters import MasterWeights
    from sdxl_ray.train.model import read_start
    from sdxl_ray.train.setup import make_optimizer_of
    from sdxl_ray.train.text import PARTS

    revision, dtype = config.model.revision or None, DTYPES[config.model.dtype]
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    models: dict[str, Any] = {}
    with torch.device("meta"):
        models["unet"] = UNet2DConditionModel.from_config(read_part_config(model, "unet", revision=revision))
        for part in PARTS:
            if getattr(config, part).rank:
                settings = read_part_config(model, part, revision=revision)
                models[part] = classes[part](CLIPTextConfig.from_dict(settings))
    parameters: dict[str, Any] = {}
    for part, module in models.items():
        module.to(dtype)
        if part == "unet" and config.adapter.kind == "full":
            train_everything(module)
        else:
            section = config.adapter if part == "unet" else getattr(config, part)
            attach_adapter(module, **section.arguments(config.run.seed))
        prefix = "" if part == "unet" else f"{part}."
        parameters |= {f"{prefix}{name}": parameter for name, parameter in adapter_parameters(module).items()}
    for part, modules in read_start(config, models["unet"].config).items():
        if part in models:
            start_from(models[part], modules)
    make_optimizer_of(config, MasterWeights(parameters, dtype))
    _take_a_step(config)


def _take_a_step(config: Config) -> None:
    """What an optimizer does not say when it is made."""
    import torch

    from sdxl_ray.train.masters import MasterWeights
    from sdxl_ray.train.setup import make_optimizer_of

    if config.adapter.blocks:
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"blocks": {}})})
    masters = MasterWeights({"x.lora_A.weight": torch.nn.Parameter(torch.ones(4, 4))}, torch.float32)
    optimizer = make_optimizer_of(config, masters)
    masters.gradient.fill_(1.0)
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'optimizer.name = "{config.optimizer.name}" cannot take a step with these settings: {error}. '
            "Change optimizer.options, or take another optimizer."
        ) from error
