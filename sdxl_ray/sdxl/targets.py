"""Which layers get an adapter of which rank, and how many parameters that makes: names and shapes only, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdxl_ray.errors import ConfigError

_UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_ALL_LINEAR = (
    *(*_UNET_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *(*_CLIP_ATTENTION, "fc1", "fc2"),
)

# Ends of module names, of the U-Net and of the text encoders; none of one's occurs in the other. In SDXL's U-Net: 560,
# 722 and 788 modules. The last preset adds what kohya's conv_dim does: 45 convolutions of the 17 resnets, the linear
# layer of each that takes in the timestep, and 4 convolutions of the samplers.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (*_UNET_ATTENTION, *_CLIP_ATTENTION),
    "all-linear": _ALL_LINEAR,
    "all-linear+conv": (
        *_ALL_LINEAR,
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}


class BlockRule(NamedTuple):
    """Another rank or alpha for the modules whose name `pattern` is found in, as by `re.search`."""

    pattern: str
    rank: int | None = None  # None: the general one; 0: these modules are not adapted
    alpha: float | None = (
        None  # None: this block's rank if the general alpha is the general rank, else that; 0: this block's rank
    )


@dataclass(frozen=True)
class Width:
    """One module's rank, and what its update is scaled by: alpha / rank."""

    rank: int
    alpha: float


def match_targets(targets: str | Sequence[str], names: Collection[str]) -> list[str]:
    """The names that `targets` means, in the order of `names`.

    Several strings are whole names or their ends at a dot. One string is a preset, else an end, if it is one of any
    name here, else a regular expression for the whole name.

    Raises:
        ConfigError: nothing was given, one of several ends is no name's, or one string is neither a preset, nor an end,
            nor a regular expression.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ConfigError(f"adapter.targets is empty. Give a preset ({', '.join(TARGETS)}), module names, or a regex.")
    if len(wanted) > 1:
        if strangers := [end for end in wanted if not any(_ends_with(name, [end]) for name in names)]:
            raise ConfigError(
                f"adapter.targets: no linear or convolution layer has a name that ends in {', '.join(strangers)}. "
                f"Several targets are ends of names, such as to_q; presets ({', '.join(TARGETS)}) and regular "
                "expressions stand alone."
            )
        return [name for name in names if _ends_with(name, wanted)]
    if wanted[0] in TARGETS:
        return [name for name in names if _ends_with(name, TARGETS[wanted[0]])]
    if by_end := [name for name in names if _ends_with(name, wanted)]:
        return by_end
    try:
        pattern = re.compile(wanted[0])
    except re.error as error:
        raise ConfigError(
            f"adapter.targets {wanted[0]!r} is neither a preset ({', '.join(TARGETS)}), nor the end of a module's "
            f"name, nor a regular expression ({error})."
        ) from error
    return [name for name in names if pattern.fullmatch(name)]


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def block_of(name: str, patterns: Sequence[str]) -> int | None:
    """Which pattern counts for a module: the first that `re.search` finds in its name. None: none of them."""
    return next((number for number, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def module_widths(
    names: Sequence[str], *, rank: int, alpha: float, blocks: Sequence[BlockRule] = ()
) -> dict[str, Width]:
    """Rank and alpha of each module that is adapted: those that a rule gives rank 0 are left out.

    Raises:
        ConfigError: a pattern that is no regular expression or is found in none of `names`, or no module is left.
    """
    blocks = [BlockRule(*block) for block in blocks]  # plain triples will do
    for block in blocks:
        try:
            found = any(re.search(block.pattern, name) for name in names)
        except re.error as error:
            raise ConfigError(
                f"adapter.blocks: {block.pattern!r} is no regular expression ({error}). Write a part of a module's "
                f"name, such as mid_block or {_block_part(names)}."
            ) from error
        if not found:
            raise ConfigError(
                f"adapter.blocks: {block.pattern!r} is found in the name of none of the {len(names)} modules that "
                f"adapter.targets selects. Such a name is {names[0]}; a pattern is a part of it, "
                f"such as {_block_part(names)}."
            )
    patterns = [block.pattern for block in blocks]
    widths = {}
    for name in names:
        number = block_of(name, patterns)
        width = Width(rank, alpha) if number is None else _width(blocks[number], rank, alpha)
        if width.rank:
            widths[name] = width
    if not widths:
        raise ConfigError(
            f"adapter.blocks gives rank 0 to all {len(names)} modules that adapter.targets selects, so nothing would "
            "be trained. Give one of its patterns a rank, or change adapter.targets."
        )
    return widths


def _width(block: BlockRule, rank: int, alpha: float) -> Width:
    own = rank if block.rank is None else block.rank
    if block.alpha is not None:
        return Width(own, block.alpha or float(own))
    return Width(own, float(own) if alpha == rank else alpha)


def _block_part(names: Sequence[str]) -> str:
    return ".".join(names[0].split(".")[:2])


def unread_prefix(names: Iterable[str]) -> str | None:
    """The prefix of the one layer whose output SDXL never reads: encoder 1's last. None for encoder 2 and the U-Net.

    Of encoder 1 the U-Net sees the layer before the last alone, so an adapter in the last would get no gradient.
    Encoder 2's last layer feeds the pooled vector.
    """
    last: tuple[int, str] | None = None
    for name in names:
        if name.startswith("text_projection"):
            return None
        if found := re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.", name):
            last = max(last or (-1, ""), (int(found[1]), found[0]))
    return last[1] if last else None


def count_adapter_parameters(
    weight_shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    targets: str | Sequence[str],
    *,
    kind: str = "lora",
    factor: int = -1,
    blocks: Sequence[BlockRule] = (),
) -> tuple[int, int]:
    """(modules, parameters) that `attach_adapter` would train, from the names and shapes of a state dict alone.

    Of a layer (out, in) and rank r; a convolution (out, in, k, k) counts as in*k*k inputs:

        lora  r (in + out)        dora  r (in + out) + out        loha  2 r (in + out)
        lokr  a b + r (out/a + in/b), or a b + (out/a) (in/b) where r is half of the larger side or more; a and b are
              `kronecker_split` of out and of in, and the kernel belongs to the second factor
        full  everything

    Raises:
        ConfigError: as `match_targets` and `module_widths`.
    """
    if kind == "full":
        owners = {name.rpartition(".")[0] for name in weight_shapes}
        return len(owners), sum(math.prod(shape) for shape in weight_shapes.values())
    layers = {  # norms have one dimension
        name.removesuffix(".weight"): shape
        for name, shape in weight_shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }
    unread = unread_prefix(weight_shapes)
    names = [name for name in match_targets(targets, layers) if not (unread and name.startswith(unread))]
    if not names:
        return 0, 0
    widths = module_widths(names, rank=rank, alpha=rank, blocks=blocks)
    return len(widths), sum(_count(kind, layers[name], width.rank, factor) for name, width in widths.items())


def _count(kind: str, shape: tuple[int, ...], rank: int, factor: int) -> int:
    outputs, channels, kernel = shape[0], shape[1], math.prod(shape[2:])
    low_rank = rank * (outputs + channels * kernel)
    if kind == "dora":
        return low_rank + outputs
    if kind == "loha":
        return 2 * low_rank
    if kind == "lokr":
        (small_out, large_out), (small_in, large_in) = (
            kronecker_split(outputs, factor),
            kronecker_split(channels, factor),
        )
        whole = 2 * rank >= max(large_out, large_in)
        second = large_out * large_in * kernel if whole else rank * (large_out + large_in * kernel)
        return small_out * small_in + second
    return low_rank


def kronecker_split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as a product of two whole numbers, as LyCORIS splits it for LoKr.

    `factor` and the rest where `factor` divides it; else the largest divisor up to `factor` and up to the square root,
    which is the only bound for -1. 320 gives (16, 20), or (8, 40) for a factor of 8.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = math.isqrt(dimension) if factor == -1 else max(1, min(factor, math.isqrt(dimension)))
    small = next(divisor for divisor in range(bound, 0, -1) if dimension % divisor == 0)
    return small, dimension // small
