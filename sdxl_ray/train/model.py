"""What is trained, put together: the U-Net with its adapter, perhaps text encoders with theirs, and their masters.

load ─▶ quantise ─▶ adapter ─▶ checkpointing, compiling ─▶ masters
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_ray.diffusion.loss import Denoiser
from sdxl_ray.export.read import read_lora
from sdxl_ray.sdxl.adapters import adapter_disabled, adapter_parameters, attach_adapter, start_from
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.compiling import compile_blocks
from sdxl_ray.sdxl.components import load_text_encoders, load_unet, resolve_model
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.devices import DTYPES, check_precision
from sdxl_ray.sdxl.full import train_everything
from sdxl_ray.sdxl.quantize import quantize_frozen
from sdxl_ray.train.loop import NUM_EXTRAS
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.text import PARTS, TrainedText

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


@dataclass
class Model:
    """On one device, ready to be trained."""

    unet: Any
    text: TrainedText | None  # where text encoders are trained
    masters: MasterWeights
    denoise: Denoiser
    parent: Denoiser | None  # the base model; None where the U-Net itself is trained


def build_model(
    config: Config,
    device: torch.device,
    stops: dict[str, int] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Model:
    """Load the base model and attach what is trained. Every rank and every restart comes to the same weights.

    Args:
        stops: last learning step of each text encoder; see `TrainedText`.
        report: told in a line what of adapter.start_from finds no place.

    Raises:
        ConfigError: the settings do not fit the model, or adapter.start_from does not fit them.
    """
    model, dtype = resolve_model(config.model.path), DTYPES[config.model.dtype]
    where: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "revision": config.model.revision or None,
        "variant": config.model.variant or None,
    }
    check_precision(device, dtype)
    if config.model.quantize == "none":
        unet = load_unet(model, **where)
    else:  # on the CPU, so that an accelerator never holds the weights as they were
        unet = load_unet(model, **{**where, "device": torch.device("cpu")})
        quantize_frozen(unet, config.model.quantize, device=device)
    if config.adapter.kind == "full":
        train_everything(unet)
    else:
        attach_adapter(unet, **config.adapter.arguments(config.run.seed))
    text = None
    if config.text_encoder.rank or config.text_encoder_2.rank:
        text = _trained_text(config, model, where, stops or {})
    if config.adapter.start_from:
        _start_from(config, unet, text, report)
    set_gradient_checkpointing(unet, config.train.gradient_checkpointing)
    if config.train.compile:
        compile_blocks(unet)
    unet.train()
    parameters = {**adapter_parameters(unet), **(text.parameters() if text else {})}
    return Model(
        unet=unet,
        text=text,
        masters=MasterWeights(parameters, dtype, num_extra=NUM_EXTRAS),
        denoise=functools.partial(predict, unet),
        parent=None if config.adapter.kind == "full" else functools.partial(_predict_as_base, unet),
    )


def _trained_text(config: Config, model: str, where: dict[str, Any], stops: dict[str, int]) -> TrainedText:
    encoders = load_text_encoders(model, **where)
    trained = {}
    for part in PARTS:
        encoder = getattr(encoders, part)
        encoder.requires_grad_(False)
        quantize = getattr(config.model, f"quantize_{part}")
        if quantize != "none":
            quantize_frozen(encoder, quantize, setting=f"model.quantize_{part}")
        if getattr(config, part).rank:
            attach_adapter(encoder, **getattr(config, part).arguments(config.run.seed))
            trained[part] = stops.get(part, 0)
    return TrainedText(encoders, num_chunks=config.cache.caption_chunks, stops=trained)


def read_start(config: Config, unet_config: Mapping[str, Any]) -> dict[str, Any]:
    """The modules of adapter.start_from by part, as `start_from` takes them; empty without one.

    Raises:
        InputError: the file is no LoRA of SDXL that can be gone on from.
    """
    path = config.adapter.start_from
    return dict(read_lora(Path(path), unet_config=unet_config)) if path else {}


def _start_from(config: Config, unet: Any, text: TrainedText | None, report: Callable[[str], None]) -> None:
    for part, modules in read_start(config, unet.config).items():
        if part == "unet":
            start_from(unet, modules)
        elif text is not None and part in text.stops:
            start_from(text.encoder(part), modules)
        else:
            report(
                f"{config.adapter.start_from} also changes {part}, which is not trained here, so that part of it is "
                f"left out. To go on from it: {part}.rank = {max(down.shape[0] for down, _, _ in modules.values())}"
            )


def _predict_as_base(unet: Any, *inputs: torch.Tensor) -> torch.Tensor:
    with adapter_disabled(unet):
        return predict(unet, *inputs)
