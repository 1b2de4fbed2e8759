"""Frozen weights in 8 or 4 bits: less memory for what training only reads. Weights alone, never activations.

    int8  one scale per output channel                symmetric, scale = max|w| / 127       relative error about 0.8 %
    fp8   e4m3, one scale per output channel          scale = max|w| / 448                                about 2.6 %
    int4  a scale and a shift per 64 weights of a row scale = (max - min) / 15                            about   9 %

(root mean square, of normal weights.) optimum-quanto does the rounding, packing and unpacking. Its linear layer is not
used: it keeps each layer's input for a weight gradient that nobody asks for, a fifth more activations in a transformer
block, and its CPU kernels for int8 and int4 take twice as long as unpacking a weight and multiplying. So a weight is
unpacked where it is used, in the forward pass and again in the backward pass, and no unpacked copy lives longer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input

from sdxl_ray.errors import ConfigError

QUANTIZATIONS = ("int8", "int4", "fp8")

# What stays as it is, by the module's whole name; * takes in dots. Together 1.0 % of the U-Net's weights.
KEPT = (
    "conv_in",  # few weights, all of the image goes through them; and predict() reads the compute dtype here
    "conv_out",
    "time_embedding.*",  # one vector per image, added everywhere: an error here is in all layers at once
    "add_embedding.*",
    "*.time_emb_proj",
    "text_projection",  # CLIP: the pooled vector, for the same reason
)

# Group norms and layer norms are never quantised (no matrix), nor are embedding tables: a lookup would unpack them all.

INT4_GROUP = 64  # quanto's own 128 would send bf16 weights to its "tinygemm" kernel when they move to a GPU


_PART = 2**18  # weights that are rounded at once
_GIVE_BACK_BYTES = 64 * 2**20  # of replaced weights: about one transformer block of SDXL


@dataclass(frozen=True)
class Quantized:
    """What `quantize_frozen` did. Bytes are those of all parameters and buffers, scales included."""

    kind: str
    quantized: tuple[str, ...]  # names of modules
    kept: tuple[str, ...]  # linear layers and convolutions that stay as they were
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**30, self.bytes_after / 2**30
        return (
            f"{len(self.quantized)} layers in {self.kind}, {len(self.kept)} as they were: "
            f"{before:.2f} GiB became {after:.2f}"
        )


class QuantizedLinear(nn.Linear):
    """A frozen linear layer; `weight` is one of quanto's tensors and shows the dtype that it is unpacked to."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), with a gradient for the input only."""
        if not hasattr(self.weight, "qtype"):  # peft makes an adapter's factors of the base layer's own class
            return super().forward(input)
        return _FrozenLinear.apply(input, self.weight, self.bias)


class QuantizedConv2d(nn.Conv2d):
    """A frozen convolution, in the same way."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h', w'), with a gradient for the input only."""
        if not hasattr(self.weight, "qtype"):  # as in QuantizedLinear
            return super().forward(input)
        return _FrozenConv2d.apply(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def quantize_frozen(
    module: nn.Module,
    kind: str,
    *,
    keep: Sequence[str] = KEPT,
    device: torch.device | str | None = None,
    setting: str = "model.quantize",
) -> Quantized:
    """Replace the weights of linear layers and convolutions in place; names and outputs' dtypes stay the same.

    To be called on a frozen U-Net or text encoder, before an adapter is attached. One layer after another, so there is
    never more than one weight twice, and what was replaced is freed at once.

    Args:
        kind: one of QUANTIZATIONS.
        keep: patterns (fnmatch) of module names to leave alone.
        device: where the result goes, and where the rounding is done, layer by layer: the unquantised model need not
            fit there. None: where each weight is.
        setting: the key to name in errors.

    Raises:
        ConfigError: an unknown kind, something trainable, nothing to quantise, or optimum-quanto is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f'{setting} = "{kind}" is unknown. Known: none, {", ".join(QUANTIZATIONS)}.')
    if trainable := [name for name, parameter in module.named_parameters() if parameter.requires_grad]:
        raise ConfigError(
            f'{setting} = "{kind}" is for frozen weights, but {trainable[0]} and {len(trainable) - 1} others are '
            "trained. Quantise before the adapter is attached; to train the weights themselves set "
            f'{setting} = "none".'
        )
    layers = list(_layers(module))
    chosen = [
        (name, layer)
        for name, layer in layers
        if not any(fnmatch(name, pattern) for pattern in keep) and _fits(layer, kind)
    ]
    if not chosen:
        raise ConfigError(
            f'{setting} = "{kind}" finds nothing to quantise in {type(module).__name__}: {len(layers)} linear layers '
            f"and convolutions, all of them quantised already, kept, or of a shape that {kind} cannot take. "
            f'Set {setting} = "none".'
        )
    bytes_before, freed = stored_bytes(module), 0
    for _, layer in chosen:
        freed += layer.weight.numel() * layer.weight.element_size()
        _quantize(layer, kind, device, setting)
        if freed >= _GIVE_BACK_BYTES:
            freed = 0
            _give_memory_back()
    if device is not None:
        module.to(device)  # norms, biases and what was kept
    _give_memory_back()
    return Quantized(
        kind=kind,
        quantized=tuple(name for name, _ in chosen),
        kept=tuple(sorted({name for name, _ in layers} - {name for name, _ in chosen})),
        bytes_before=bytes_before,
        bytes_after=stored_bytes(module),
    )


def _give_memory_back() -> None:
    """Return freed pages to the system, where the C library can.

    glibc keeps them, and each layer leaves holes that the next one's do not fit: SDXL's U-Net grew to 10.5 GiB while it
    shrank to 2.4. man 3 malloc_trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a quantised weight, of its packed numbers, scales and shifts."""
    stored = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}  # tied weights count once
    return sum(part.numel() * part.element_size() for tensor in stored.values() for part in _parts(tensor))


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass is made of; a plain tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Plain ones: not what is quantised already, and no class of another library that computes differently."""
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear or type(layer) is nn.Conv2d:
            yield name, layer


def _fits(layer: nn.Linear | nn.Conv2d, kind: str) -> bool:
    """A scale per output channel needs two of them; 4-bit rows are short or fall into groups, and numbers pair up."""
    num_rows = layer.weight.shape[0]
    if num_rows < 2:
        return False
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False  # SDXL has neither
    row = layer.weight.numel() // num_rows
    return kind != "int4" or row <= INT4_GROUP or row % INT4_GROUP == 0


@torch.no_grad()
def _quantize(layer: nn.Linear | nn.Conv2d, kind: str, device: torch.device | str | None, setting: str) -> None:
    weight = layer.weight.detach()
    if device is not None:
        weight = weight.to(device)
    layer.weight = nn.Parameter(_rounded(weight, kind, setting), requires_grad=False)
    # The class and not a new module: parents, hooks and the modules' order stay as they are.
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d


def _rounded(weight: Tensor, kind: str, setting: str) -> Tensor:
    """The quantised weight as one of quanto's tensors, which says it has the weight's shape and dtype.

    Scales and shifts are computed in fp32 and rounded to the weight's dtype first, and the numbers then fit the rounded
    ones; in bf16 throughout, the error of int8 is 5 % larger.
    """
    try:
        from optimum.quanto import (
            AbsmaxOptimizer,
            MaxOptimizer,
            WeightQBitsTensor,
            WeightQBytesTensor,
            qfloat8_e4m3fn,
            qint4,
            qint8,
            quantize_weight,
        )
    except ImportError as error:
        raise ConfigError(
            f'{setting} = "{kind}" needs optimum-quanto ({error}). Install it with\n  pip install optimum-quanto\n'
            f'or set {setting} = "none".'
        ) from error
    qtypes = {"int8": qint8, "fp8": qfloat8_e4m3fn}
    dtype, size, stride = weight.dtype, weight.size(), weight.stride()
    group = INT4_GROUP if kind == "int4" and weight[0].numel() > INT4_GROUP else None
    rows = weight.reshape(-1, group or weight[0].numel())  # (scales, weights that share one)
    numbers, scales, shifts = [], [], []
    # On the CPU a few rows at a time, which stay in its cache: three times as fast, without fp32 copies of the whole.
    # optimized=False: quanto's plain layout, not that of one of its kernels.
    num_parts = min(rows.numel() // _PART, len(rows) // 2) if weight.device.type == "cpu" else 1
    for part in rows.tensor_split(max(1, num_parts)):
        exact = part.float()
        if kind == "int4":
            scale, shift = (value.to(dtype) for value in MaxOptimizer()(exact, qtype=qint4, axis=0))
            scale.masked_fill_(scale == 0, 1)  # all of them are equal: the shift alone gives them
            rounded = quantize_weight(exact, qint4, 0, scale.float(), shift.float(), optimized=False)
            numbers.append(rounded._data.unpack())
            shifts.append(shift)
        else:
            scale = AbsmaxOptimizer()(exact, qtype=qtypes[kind], axis=0).to(dtype)
            scale.masked_fill_(scale == 0, 1)  # all zeros
            numbers.append(quantize_weight(exact, qtypes[kind], 0, scale.float(), optimized=False)._data)
        scales.append(scale)
    data, scale = torch.cat(numbers), torch.cat(scales)
    if kind == "int4":
        return WeightQBitsTensor(qint4, 0, group, size, stride, data, scale, torch.cat(shifts))
    scale = scale.view(-1, *[1] * (len(size) - 1))
    return WeightQBytesTensor(qtypes[kind], 0, size, stride, data.view(size), scale, None)


class _FrozenLinear(torch.autograd.Function):
    """Keeps the packed weight and nothing else: dL/dx = dL/dy W."""

    @staticmethod
    def forward(input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return functional.linear(input, weight.dequantize(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize(), None, None


class _FrozenConv2d(torch.autograd.Function):
    """The same for a convolution."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Any,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        return functional.conv2d(input, weight.dequantize(), bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.input_shape, ctx.geometry = inputs[0].shape, inputs[3:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        (weight,) = ctx.saved_tensors
        gradient = conv2d_input(ctx.input_shape, weight.dequantize(), gradient, *ctx.geometry)
        return (gradient, *(None,) * 6)
