"""The trained delta. Names are those of the U-Net with `lora_A`/`lora_B` behind, and no adapter name in between:

    down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

The base is frozen, the adapter fp32; a caller that computes in bf16 copies it and keeps these as masters.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.sdxl.targets import TARGETS, is_target, target_modules

ADAPTER_KINDS = ("lora",)

_NAME = "default"  # peft's name for the one adapter we attach


def attach_adapter(
    unet: UNet2DConditionModel,
    *,
    kind: str = "lora",
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "attention",
    seed: int = 0,
) -> None:
    """Freeze the U-Net and put a trainable fp32 adapter into it; at first it changes nothing, as lora_B is zero.

    The adapter adds alpha / rank * B A x to each target (arXiv:2106.09685). The start of each module follows from
    (seed, its name), so it is the same on every device and rank, and the global random state stays as it was.

    Raises:
        ConfigError: an unknown kind, a target that matches nothing or cannot be adapted, or a second adapter.
    """
    if kind not in ADAPTER_KINDS:
        raise ConfigError(f"adapter.kind {kind!r} is unknown. Known: {', '.join(ADAPTER_KINDS)}.")
    if rank < 1:
        raise ConfigError(f"adapter.rank is {rank}, expected 1 or more; 16 is a usual choice.")
    if _adapted_modules(unet):
        raise ConfigError("the U-Net already has an adapter. Call detach_adapter(unet) first.")
    wanted = target_modules(targets)
    # peft would raise too, without saying what the names look like
    if not any(is_target(name, wanted) for name, _ in unet.named_modules()):
        example = next((name for name, module in unet.named_modules() if name.endswith("to_q")), "(no attention)")
        raise ConfigError(
            f"adapter.targets {targets!r} matches no module of the U-Net. Give a preset ({', '.join(TARGETS)}), a list "
            f"of module names or their ends, or a regex for the whole name; a name looks like {example}."
        )
    unet.requires_grad_(False)
    devices = {parameter.device for parameter in unet.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(
        devices=list(devices)
    ):  # peft initialises from the global state; _initialise replaces it
        try:
            unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted),  # type: ignore[arg-type]
                adapter_name=_NAME,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"adapter.targets {targets!r} cannot be adapted: {error}") from error
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    _initialise(adapter_parameters(unet), seed)


def _initialise(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """lora_A as in the reference (Kaiming uniform, a = √5, which is uniform in ±1/√fan_in), lora_B zero.

    Source: github.com/microsoft/LoRA, loralib/layers.py. Drawn on the CPU: CUDA's generator gives other numbers.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta:
            continue
        if "lora_B" in name:
            nn.init.zeros_(parameter)
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
        start = torch.empty(parameter.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=torch.Generator().manual_seed(key))
        with torch.no_grad():
            parameter.copy_(start)


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters in a fixed order, under names that do not depend on peft's adapter name."""
    found = {
        name.replace(f".{_NAME}.", "."): parameter
        for name, parameter in unet.named_parameters()
        if re.search(rf"\.lora_[AB]\.{_NAME}\.", name)
    }
    return dict(sorted(found.items()))


def adapter_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter: float32, contiguous, on the CPU, named as in `adapter_parameters`."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in adapter_parameters(unet).items()
    }


def load_adapter_state_dict(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the attached adapter, which keeps its dtype and device. Nothing is copied unless all fits.

    Raises:
        CheckpointError: names or shapes differ.
    """
    parameters = adapter_parameters(unet)
    problems = [f"missing {name}" for name in parameters if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in parameters]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if problems:
        raise CheckpointError(
            f"the saved adapter does not fit the attached one in {len(problems)} places: {_first_five(problems)}. "
            "It was made with another rank, other targets, or another model: set them back, or start a new run."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _first_five(problems: Sequence[str]) -> str:
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


@contextlib.contextmanager
def adapter_disabled(unet: nn.Module) -> Iterator[None]:
    """The base model's output inside. For forward passes without gradients: a checkpointed block is computed again in
    the backward pass, when the adapter is back."""
    layers = _adapted_modules(unet)
    before = [layer._disable_adapters for layer in layers]
    # The flag itself and not peft's enable_adapters(), which also turns requires_grad off and on: DDP and the optimizer
    # hold these parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def detach_adapter(unet: UNet2DConditionModel) -> None:
    """Remove the adapter: modules, names and outputs are those of the model as it was loaded."""
    if _adapted_modules(unet):
        unet.unload_lora()


def _adapted_modules(unet: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
