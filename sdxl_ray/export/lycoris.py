"""DoRA, LoHa and LoKr as LyCORIS defines them in kohya files: what is written, and what a reader makes of it.

    delta of                    tensors of a module <stem>.                         alpha / rank is applied, where
    LoRA  up down               lora_down.weight, lora_up.weight, alpha             rank = rows of lora_down
    LoHa  (w1a w1b) ∘ (w2a w2b)  hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, alpha  rank = rows of hada_w1_b
    LoKr  w1 ⊗ w2                lokr_w1 | lokr_w1_a, lokr_w1_b; lokr_w2 | ..., alpha
                                rank = columns of the factor that is a product; 1 and no alpha where both are whole
    DoRA  any of these with dora_scale (out, 1[, 1, 1]): the weight is dora_scale (W + delta) / |W + delta|, the norm of
          each output row (LyCORIS's `wd_on_out`)

Convolutions keep their kernels in Tucker cores (hada_t1, hada_t2, lokr_t2: (r, r, k, k)), with factors (r, out) and
(r, in), or flattened in the second factor (r, in k k).

Source: github.com/KohakuBlueleaf/LyCORIS, docs/Algo-Details.md and the `weight_list` of each module. ComfyUI and Forge
divide a DoRA on the output axis by |W| instead: the closer the change is to zero, the less that matters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdxl_ray.errors import ExportError
from sdxl_ray.sdxl.trained import TrainedModule

_FOLD_INTO = {"loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
_LEAVES = {
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "lokr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
}


def lycoris_tensors(module: TrainedModule) -> dict[str, Tensor]:
    """The tensors of a LoHa or LoKr by the ends of their names, the true scale folded into the first factor.

    alpha is the rank, so that a reader that applies alpha / rank and one that applies nothing (LoKr with two whole
    factors, files without alpha) get the same.

    Raises:
        ExportError: tensors that are not this kind's.
    """
    foreign = sorted(module.tensors.keys() - _LEAVES[module.kind])
    folded = [leaf for leaf in _FOLD_INTO[module.kind] if leaf in module.tensors]
    if foreign or len(folded) != 1:
        raise ExportError(
            f"These are not the tensors of a {module.kind}: expected some of "
            f"{', '.join(sorted(_LEAVES[module.kind]))}, found {', '.join(module.tensors)}. "
            "Pass what `trained_modules` returns."
        )
    found = {leaf: tensor.float() for leaf, tensor in module.tensors.items()}
    found[folded[0]] = found[folded[0]] * module.scale
    return {**found, "alpha": torch.tensor(float(module.rank))}


def read_delta(tensors: Mapping[str, Tensor], base_weight: Tensor) -> Tensor:
    """What a reader adds to `base_weight` (out, in[, k, k]) for the tensors of one module: float32, of its shape.

    Written from the definitions above and not from the writer, so that one checks the other.

    Args:
        tensors: by the ends of their names.
    """
    tensors = {name: tensor.to(base_weight.device, torch.float32) for name, tensor in tensors.items()}
    base = base_weight.to(torch.float32)
    if "lora_down.weight" in tensors:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        product, rank = up.flatten(1) @ down.flatten(1), down.shape[0]
    elif "hada_w1_b" in tensors:
        first, rank = _factor(tensors, "hada_w1", "hada_t1")
        second, _ = _factor(tensors, "hada_w2", "hada_t2")
        product = first.reshape(base.shape) * second.reshape(base.shape)
    else:
        first, first_rank = _factor(tensors, "lokr_w1", "")
        second, second_rank = _factor(tensors, "lokr_w2", "lokr_t2")
        product = torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())
        rank = second_rank or first_rank
    alpha = float(tensors["alpha"]) if rank and "alpha" in tensors else rank
    delta = product.reshape(base.shape) * (alpha / rank if rank else 1.0)
    if "dora_scale" not in tensors:
        return delta
    changed = base + delta
    norm = changed.flatten(1).norm(dim=1).reshape(tensors["dora_scale"].shape)
    return tensors["dora_scale"] * changed / norm - base


def _factor(tensors: Mapping[str, Tensor], name: str, core: str) -> tuple[Tensor, int]:
    """(the factor, its rank: 0 for one that is whole)."""
    if name in tensors:
        return tensors[name], 0
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core in tensors:
        # core (i, j, k, l), left (i, out), right (j, in)
        inner = torch.tensordot(tensors[core], right, dims=([1], [0]))  # (i, k, l, in)
        return torch.tensordot(left, inner, dims=([0], [0])).permute(0, 3, 1, 2), right.shape[0]
    return left @ right, right.shape[0]
