"""The trained delta of the U-Net or of a text encoder. Names are the model's with the factor's behind, and no adapter
name in between:

    down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

The base is frozen, the adapter fp32; a caller that computes in bf16 copies it and keeps these as masters. The layers
are peft's; which modules, which ranks and how they start is decided here.

PiSSA and OLoRA begin with factors B0 A0 of the base weight and leave that weight as it is, since bf16 would round the
difference and a quantised weight cannot take it. A second, frozen adapter takes them off: W + s (B A - B0 A0).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.sdxl.adapter_layers import (
    START,
    TRAINED,
    adapted_layers,
    base_weight,
    inject,
    parameters_of,
    remove_layers,
)
from sdxl_ray.sdxl.adapter_start import FROM_BASE, check_ranks, check_start, factors_of_base, initial_value, row_norms
from sdxl_ray.sdxl.full import trains_everything
from sdxl_ray.sdxl.targets import TARGETS, BlockRule, match_targets, module_widths, unread_prefix
from sdxl_ray.sdxl.trained import TrainedKind, TrainedModule, balanced

__all__ = [
    "ADAPTER_KINDS",
    "BlockRule",
    "adapter_disabled",
    "adapter_parameters",
    "adapter_state_dict",
    "attach_adapter",
    "base_weight",
    "detach_adapter",
    "load_adapter_state_dict",
    "load_start_state_dict",
    "scale_adapter",
    "start_from",
    "start_state_dict",
    "trained_modules",
]

ADAPTER_KINDS = ("lora", "dora", "loha", "lokr")


def attach_adapter(
    module: nn.Module,
    *,
    kind: str = "lora",
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "attention",
    seed: int = 0,
    rank_stabilized: bool = False,
    init: str = "default",
    factor: int = -1,
    blocks: Sequence[BlockRule] = (),
) -> None:
    """Freeze the model and put a trainable fp32 adapter into it; at first it changes nothing.

    What it adds is scaled by alpha / rank, or by alpha / sqrt(rank) (arXiv:2312.03732), with the rank and alpha of each
    module; `sdxl/trained.py` has the formulas. The start of each module follows from (seed, its name) or from its
    weight, so it is the same on every device and rank, and the global random state stays as it was.

    Args:
        module: the U-Net or one of the text encoders, of which encoder 1's last layer is left out: SDXL does not read
            it. Quantised or not; but pissa and olora need, whenever they are attached, the same base in the same dtype.
        dropout: share of the adapter's inputs that is zeroed in training, whatever the kind.
        targets: a preset, module names or their ends, or one regex; see `targets.match_targets`.
        init: default, gaussian (lora and dora), pissa or olora (lora; a convolution's kernel is flattened).
        factor: lokr's small Kronecker factor, -1: near the square root. A second factor that the rank would not make
            smaller is kept whole.
        blocks: other ranks and alphas; the first whose pattern is found in a module's name counts.

    Raises:
        ConfigError: an unknown kind or init, one that does not go with the other, a target or block that matches
            nothing or cannot be adapted, a rank that pissa or olora cannot have, or a second adapter.
    """
    if kind not in ADAPTER_KINDS:
        raise ConfigError(f"adapter.kind {kind!r} is unknown. Known: {', '.join(ADAPTER_KINDS)}.")
    if rank < 1:
        raise ConfigError(f"adapter.rank is {rank}, expected 1 or more; 16 is a usual choice.")
    check_start(kind, init, dropout)
    if adapted_layers(module):
        raise ConfigError("the model already has an adapter. Call detach_adapter(module) first.")
    names = _select(module, targets)
    widths = module_widths(names, rank=rank, alpha=alpha, blocks=blocks)
    shapes = {name: module.get_submodule(name).weight.shape for name in widths}
    check_ranks(init, {name: (width.rank, tuple(shapes[name])) for name, width in widths.items()})  # type: ignore[arg-type]
    module.requires_grad_(False)
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):  # peft draws from the global state; _initialise replaces that
        inject(module, TRAINED, kind, widths, dropout, factor)
        if init in FROM_BASE:
            inject(module, START, kind, widths, 0.0, factor)
    for path, layer in adapted_layers(module).items():
        width = widths[path]
        layer.set_adapter([TRAINED, START] if init in FROM_BASE else [TRAINED])
        scale = width.alpha / (width.rank**0.5 if rank_stabilized else width.rank)
        layer.scaling.update(dict.fromkeys(layer.scaling, scale))
        layer.requires_grad_(False)
        for leaf, parameter in parameters_of(layer, TRAINED).items():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            _initialise(layer, leaf, parameter, f"{path}.{leaf}", seed, init)
        if init in FROM_BASE:
            _start_from_base(layer, init)


def _select(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that `targets` means."""
    every = dict(module.named_modules())
    layers = [name for name, layer in every.items() if isinstance(layer, nn.Linear | nn.Conv2d)]
    unread = unread_prefix(every)
    names = [name for name in match_targets(targets, layers) if not (unread and name.startswith(unread))]
    if names:
        return names
    if others := match_targets(targets, list(every)):
        never_read = unread is not None and others[0].startswith(unread)
        reason = "is never read by SDXL" if never_read else f"is a {type(every[others[0]]).__name__}"
        raise ConfigError(
            f"adapter.targets {targets!r} cannot be adapted: {others[0]} {reason}. Linear and convolution layers can "
            "be, such as to_q and conv1 in the U-Net."
        )
    example = next((name for name in layers if name.endswith(("to_q", "q_proj"))), "(no attention)")
    raise ConfigError(
        f"adapter.targets {targets!r} matches no module of the model. Give a preset ({', '.join(TARGETS)}), a list "
        f"of module names or their ends, or a regex for the whole name; a name looks like {example}."
    )


@torch.no_grad()
def _initialise(layer: Any, leaf: str, parameter: nn.Parameter, name: str, seed: int, init: str) -> None:
    if parameter.is_meta:
        return
    if leaf == "lora_magnitude_vector.weight":
        parameter.copy_(row_norms(base_weight(layer)).view(parameter.shape))
    else:
        shape, rank = tuple(parameter.shape), layer.r[TRAINED]
        parameter.copy_(initial_value(leaf, name, shape, seed=seed, init=init, rank=rank))


@torch.no_grad()
def _start_from_base(layer: Any, init: str) -> None:
    """A and B begin as A0 and B0, rounded to the base's dtype, in which the frozen pair is kept: so both are equal."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    trained, frozen = parameters_of(layer, TRAINED), parameters_of(layer, START)
    for parameter in frozen.values():
        parameter.data = parameter.data.to(dtype)
    if base.weight.is_meta:
        return
    left, right = factors_of_base(init, base_weight(layer), layer.r[TRAINED], layer.scaling[TRAINED])
    for leaf, value, sign in (("lora_A.weight", right, 1), ("lora_B.weight", left, -1)):
        rounded = value.to(dtype).view(trained[leaf].shape)
        trained[leaf].copy_(rounded)
        frozen[leaf].copy_(sign * rounded)


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, in a fixed order: the adapter's parameters under names that do not depend on peft's adapter
    name, or after `full.train_everything` all of the model's under their own."""
    layers = adapted_layers(module)
    found = {
        f"{path}.{leaf}": parameter
        for path, layer in layers.items()
        for leaf, parameter in parameters_of(layer, TRAINED).items()
    }
    if not layers:
        found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return dict(sorted(found.items()))


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in parameters.items()
    }


def trained_modules(module: nn.Module) -> dict[str, TrainedModule]:
    """What training made of each adapted layer, by the layer's name: copies, for the export. Empty without an adapter.

    PiSSA's and OLoRA's come as a LoRA of twice the rank, W + s (B A - B0 A0), so that they fit the untouched base. Its
    factors are other ones of the same product: [B, -B0] and [A; A0] nearly cancel, which 16 bits would not survive.
    """
    return {path: _trained(layer) for path, layer in sorted(adapted_layers(module).items())}


def _trained(layer: Any) -> TrainedModule:
    tensors, rank = _copies(parameters_of(layer, TRAINED)), layer.r[TRAINED]
    kind: TrainedKind = "lora"
    if "lora_magnitude_vector.weight" in tensors:
        kind = "dora"
    elif "hada_w1_a" in tensors:
        kind = "loha"
    elif "lora_A.weight" not in tensors:
        kind = "lokr"
    if start := _copies(parameters_of(layer, START)):
        both = {leaf: torch.cat([tensors[leaf], start[leaf]], dim=int("lora_B" in leaf)) for leaf in tensors}
        tensors = balanced(both)
        rank = len(tensors["lora_A.weight"])
    return TrainedModule(kind, tensors, float(layer.scaling[TRAINED]), rank)


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained: float32, contiguous, on the CPU, named as in `adapter_parameters`."""
    return _copies(adapter_parameters(module))


def load_adapter_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the attached adapter, which keeps its dtype and device. Nothing is copied unless all fits.

    Raises:
        CheckpointError: names or shapes differ.
    """
    _load(adapter_parameters(module), state)


def start_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """-B0 and A0 of pissa and olora: float32, on the CPU. Empty for other starts.

    Attached anew to the same base in the same dtype they come out the same, on the same kind of machine. Where the base
    has another dtype, or is quantised, they have to be loaded: a rounded weight has other singular directions.
    """
    return _copies(_start_parameters(module))


def load_start_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `start_state_dict` gave into the frozen half of an attached adapter.

    Raises:
        CheckpointError: names or shapes differ.
    """
    _load(_start_parameters(module), state)


def _start_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{leaf}": parameter
        for path, layer in sorted(adapted_layers(module).items())
        for leaf, parameter in parameters_of(layer, START).items()
    }


def _load(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
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


def start_from(module: nn.Module, modules: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Begin with a LoRA that was read: the attached lora or dora adapter then adds scale * up @ down to each weight.

    A smaller rank is filled up with the fresh A and zeros of B, so the rest of the rank can still learn. The scale goes
    into B. Modules that the LoRA does not have begin as they are; what it has for encoder 1's last layer, which SDXL
    does not read, is left out. DoRA's magnitude becomes |W + scale up down|, so that it begins as that LoRA too.
    Nothing is copied unless all fits.

    Args:
        modules: of each module's name down (r, in[, k, k]), up (out, r[, 1, 1]) and the scale, alpha / r.

    Raises:
        ConfigError: another kind of adapter, or pissa or olora; modules that are not adapted here, a larger rank, or
            other shapes.
    """
    layers = adapted_layers(module)
    if not layers:
        raise ConfigError("adapter.start_from needs an adapter: call attach_adapter first.")
    if not all(hasattr(layer, "lora_A") for layer in layers.values()):
        raise ConfigError('adapter.start_from reads a LoRA and needs adapter.kind = "lora" or "dora".')
    if _start_parameters(module):
        raise ConfigError(
            "adapter.start_from and adapter.init = pissa or olora both say how the adapter begins. "
            'Set adapter.init = "default".'
        )
    unread = unread_prefix(name for name, _ in module.named_modules())
    modules = {path: given for path, given in modules.items() if not (unread and path.startswith(unread))}
    problems = [problem for path in modules if (problem := _misfit(path, layers.get(path), *modules[path][:2]))]
    if problems or not modules:
        raise ConfigError(
            f"adapter.start_from: the LoRA does not fit in {len(problems)} of {len(modules)} modules: "
            f"{_first_five(problems) or 'it is empty'}. Raise adapter.rank to the file's, and let adapter.targets "
            f"select all of its modules; {len(layers)} are adapted."
        )
    with torch.no_grad():
        for path, (down, up, scale) in modules.items():
            layer, (a, b) = layers[path], _pair(layers[path])
            rank = down.shape[0]
            a[:rank] = down.to(a).reshape(a[:rank].shape)
            b.zero_()
            b[:, :rank] = up.to(b).reshape(b[:, :rank].shape) * (scale / layer.scaling[TRAINED])
            magnitude = parameters_of(layer, TRAINED).get("lora_magnitude_vector.weight")
            if magnitude is not None:
                base = base_weight(layer)
                product = (b.flatten(1) @ a.flatten(1)).cpu() * layer.scaling[TRAINED]
                magnitude.copy_(row_norms(base + product.view(base.shape)).view(magnitude.shape))


def _pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight


def _misfit(path: str, layer: Any, down: Tensor, up: Tensor) -> str:
    """What keeps a module of the file from fitting; empty if nothing does."""
    if layer is None:
        return f"{path} is not adapted"
    a, b = _pair(layer)
    rank = down.shape[0]
    if rank > a.shape[0]:
        return f"{path} has rank {rank}, more than {a.shape[0]}"
    if down.numel() != rank * a[0].numel() or up.numel() != rank * b.shape[0]:
        return f"{path} is of {tuple(up.shape)} and {tuple(down.shape)}, expected {tuple(b.shape)} and {tuple(a.shape)}"
    return ""


def scale_adapter(module: nn.Module, strength: float) -> None:
    """Multiply what the adapter adds to each weight, W' - W, by `strength`: for drawing images, not for training.

    The same for all kinds, DoRA included, and for pissa and olora, whose alpha cannot be changed after the fact.
    """
    for layer in adapted_layers(module).values():
        if TRAINED in getattr(layer, "lora_magnitude_vector", {}):
            # what peft's DoRA layer returns is (W' - W) x
            layer.lora_magnitude_vector[TRAINED].register_forward_hook(lambda _, __, added: added * strength)
        else:
            layer.scaling = {name: scale * strength for name, scale in layer.scaling.items()}


@contextlib.contextmanager
def adapter_disabled(module: nn.Module) -> Iterator[None]:
    """The base model's output inside. For forward passes without gradients: a checkpointed block is computed again in
    the backward pass, when the adapter is back.

    Raises:
        ConfigError: the model itself is trained, so that the base is gone.
    """
    layers = list(adapted_layers(module).values())
    if not layers and trains_everything(module):
        raise ConfigError(
            'adapter.kind = "full" trains the U-Net itself, so there is no base model left in memory to compare with. '
            "Train an adapter, or leave out what needs the base: prior prediction and images without the adapter."
        )
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


def detach_adapter(module: nn.Module) -> None:
    """Remove the adapter: modules, names and outputs are those of the model as it was loaded."""
    remove_layers(module)
