"""peft's layers: put around modules, found again, read, and taken off. The only place that knows how peft keeps them.

module.get_submodule(path)          LoRA, LoHa or LoKr layer, in the place of the module
    .base_layer                     the module itself
    .lora_A["default"].weight, ...  factors, of the trained adapter and, under "start", of a frozen one
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.loha.layer import Conv2d as LoHaConv2d
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import Conv2d as LoKrConv2d
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from sdxl_ray.sdxl.targets import Width

TRAINED = "default"  # peft's name for the adapter that is trained
START = "start"  # and for the frozen one that takes B0 A0 off; its B holds -B0


class _InputDropout:
    """Dropout as LoRA has it, on the inputs of the adapter. peft's LoHa and LoKr only drop whole rows of the update or
    whole modules, and ask the global generator for each module in each step, even at a share of 0."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        result = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return result
        dropped = nn.functional.dropout(x, layer.module_dropout[TRAINED], training=layer.training)
        return (result + layer._get_delta_activations(TRAINED, dropped)).to(x.dtype)


class _LoHaLinear(_InputDropout, LoHaLinear): ...


class _LoHaConv2d(_InputDropout, LoHaConv2d): ...


class _LoKrLinear(_InputDropout, LoKrLinear): ...


class _LoKrConv2d(_InputDropout, LoKrConv2d): ...


class _LoHaModel(LoHaModel):
    layers_mapping = {nn.Conv2d: _LoHaConv2d, nn.Linear: _LoHaLinear}  # noqa: RUF012  (declared so by peft)


class _LoKrModel(LoKrModel):
    layers_mapping = {nn.Conv2d: _LoKrConv2d, nn.Linear: _LoKrLinear}  # noqa: RUF012


def inject(
    module: nn.Module, adapter_name: str, kind: str, widths: Mapping[str, Width], dropout: float, factor: int
) -> None:
    """Put layers around the modules that `widths` names, with peft's own start, active and not scaled.

    One call per rank, and whole names: peft's rank patterns have to reach the end of a name, so that "mid_block" would
    match nothing, and it compiles a regular expression for each pair of a pattern and a module.
    """
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, width in widths.items():
        by_rank[width.rank].append(re.escape(name))
    for rank, names in by_rank.items():
        regex = "|".join(names)  # peft takes a string as a regex for the whole name
        config: Any
        if kind in ("lora", "dora"):
            config = LoraConfig(
                r=rank, lora_alpha=rank, lora_dropout=dropout, use_dora=kind == "dora", target_modules=regex
            )
            inject_adapter_in_model(config, module, adapter_name)
            _make_plain(module, adapter_name)
        elif kind == "loha":
            config = LoHaConfig(r=rank, alpha=rank, module_dropout=dropout, target_modules=regex)
            _LoHaModel(module, config, adapter_name)
        else:
            config = LoKrConfig(
                r=rank, alpha=rank, module_dropout=dropout, target_modules=regex, decompose_factor=factor
            )
            _LoKrModel(module, config, adapter_name)
        del module.peft_config  # peft's note of its one config, and with another rank it would warn about a second


def _make_plain(module: nn.Module, adapter_name: str) -> None:
    """peft makes a convolution's factors of the base layer's own class, and quanto's QConv2d does not compute without
    quantised weights."""
    for layer in adapted_layers(module).values():
        for factors in (layer.lora_A, layer.lora_B):
            if adapter_name in factors and isinstance(factor := factors[adapter_name], nn.Conv2d):
                plain = nn.Conv2d(
                    factor.in_channels,
                    factor.out_channels,
                    factor.kernel_size,  # type: ignore[arg-type]
                    factor.stride,  # type: ignore[arg-type]
                    factor.padding,  # type: ignore[arg-type]
                    bias=False,
                    device="meta",
                )
                plain.weight = factor.weight
                factors[adapter_name] = plain


def base_weight(layer: nn.Module) -> Tensor:
    """The weight below the adapter, or of a bare layer: float32, on the CPU, dequantised. A copy."""
    bare = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Any = dequantize_module_weight(bare)  # bitsandbytes' and torchao's
    if type(weight) not in (Tensor, nn.Parameter):  # quanto's
        weight = weight.dequantize()
    return weight.detach().to("cpu", torch.float32, copy=True)


def parameters_of(layer: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    """`{"lora_A.weight": ...}` of one layer and one adapter: peft keeps them in modules or in dictionaries."""
    found: dict[str, nn.Parameter] = {}
    for leaf in layer.adapter_layer_names:
        holder = getattr(layer, leaf)
        if adapter_name in holder:
            item = holder[adapter_name]
            found |= (
                {leaf: item}
                if isinstance(item, nn.Parameter)
                else {f"{leaf}.{n}": p for n, p in item.named_parameters()}
            )
    return found


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """peft's layers by the names of the modules they are around."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def remove_layers(module: nn.Module) -> None:
    """Put the modules themselves back in their places."""
    for path, layer in adapted_layers(module).items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())
