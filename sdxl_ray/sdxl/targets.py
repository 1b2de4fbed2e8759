"""Which layers get an adapter, and how many parameters that makes: names and shapes only, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sdxl_ray.errors import ConfigError

# Ends of module names. In SDXL: 560 and 722 modules.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "all-linear": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}


def target_modules(targets: str | Sequence[str]) -> list[str] | str:
    """What peft's LoraConfig takes for `targets`: a preset's name, a list of module names or their ends, or a regex.

    Raises:
        ConfigError: an empty list, or a string that is neither a preset nor a regular expression.
    """
    if isinstance(targets, str):
        if targets in TARGETS:
            return list(TARGETS[targets])
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"targets {targets!r} is neither a preset ({', '.join(TARGETS)}) nor a regular expression ({error})."
            ) from error
        return targets
    if not targets:
        raise ConfigError(f"targets is empty. Give a preset ({', '.join(TARGETS)}), module names, or a regex.")
    return list(targets)


def is_target(module_name: str, wanted: list[str] | str) -> bool:
    """peft's rule: a string is a regex for the whole name, a list holds whole names or their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module_name) is not None
    return any(module_name == end or module_name.endswith(f".{end}") for end in wanted)


def count_adapter_parameters(
    weight_shapes: Mapping[str, tuple[int, ...]], rank: int, targets: str | Sequence[str]
) -> tuple[int, int]:
    """(modules, parameters) that `attach_adapter` would add, from the shapes of `unet_weight_shapes` alone.

    A linear layer (out, in) gets rank * (in + out) parameters, a convolution (out, in, k, k) rank * (in*k*k + out).
    """
    wanted = target_modules(targets)
    shapes = list(_adaptable(weight_shapes.items(), wanted))
    return len(shapes), sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def _adaptable(
    weight_shapes: Iterable[tuple[str, tuple[int, ...]]], wanted: list[str] | str
) -> Iterator[tuple[int, ...]]:
    for name, shape in weight_shapes:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(shape) >= 2 and is_target(module, wanted):  # norms have one dimension
            yield shape
