"""What training made of one layer, without the model: the factors of its update, and the update itself.

    kind   trained weight                              factors of a linear layer (out, in), rank r
    lora   W + s B A                                   A (r, in), B (out, r)
    dora   m (W + s B A) / |W + s B A|                 the same, and m (out,); the norm is each output row's
    loha   W + s (W1a W1b) ∘ (W2a W2b)                 W1a, W2a (out, r), W1b, W2b (r, in)
    lokr   W + s W1 ⊗ W2, either of them Wa Wb or whole

A convolution (out, in, k, k) is a linear layer of in*k*k inputs. Sources: arXiv:2106.09685, 2402.09353, 2108.06098,
2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TrainedKind = Literal["lora", "dora", "loha", "lokr"]


@dataclass(frozen=True)
class TrainedModule:
    """One layer's update. PiSSA and OLoRA come as "lora" of twice their rank, the `balanced` B A - B0 A0."""

    kind: TrainedKind
    # float32, contiguous, on the CPU, under peft's leaf names without the adapter's:
    #   lora_A.weight (r, in[, k, k]), lora_B.weight (out, r[, 1, 1]),
    #   lora_magnitude_vector.weight (out,) or (1, out, 1, 1)
    #   hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b; with hada_t1, hada_t2 (r, r, k, k): w_a (r, out), w_b (r, in)
    #   lokr_w1 or lokr_w1_a and lokr_w1_b; lokr_w2 or lokr_w2_a and lokr_w2_b, with lokr_t2 as in loha
    tensors: Mapping[str, Tensor]
    scale: float  # alpha / rank, or alpha / sqrt(rank): multiplies the product
    rank: int


def balanced(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other factors of the same product B A, with the smallest entries that it can have: B = P sqrt(S), A = sqrt(S) Q^T
    from its singular value decomposition P S Q^T. In float64, by way of QR, so that B A is never formed.

    Args:
        factors: lora_A.weight (r, in[, k, k]) and lora_B.weight (out, r[, 1, 1]); so are the results, float32, with a
            smaller r where the layer has fewer rows or columns.
    """
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    q_up, r_up = torch.linalg.qr(up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(down.double().flatten(1).T)
    left, sizes, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = sizes.sqrt()
    new_up, new_down = q_up @ (left * root), (root[:, None] * right) @ q_down.T
    return {
        "lora_A.weight": new_down.float().reshape(-1, *down.shape[1:]).contiguous(),
        "lora_B.weight": new_up.float().reshape(up.shape[0], -1, *up.shape[2:]).contiguous(),
    }


def effective_delta(module: TrainedModule, base_weight: Tensor) -> Tensor:
    """The trained weight minus the base weight: float32, with the shape of `base_weight` and on its device.

    Only DoRA's depends on the base: m (W + s B A) / |W + s B A| - W. A quantised base is dequantised by the caller.
    """
    tensors = {name: tensor.to(base_weight.device, torch.float32) for name, tensor in module.tensors.items()}
    product = {"lora": _lora, "dora": _lora, "loha": _loha, "lokr": _lokr}[module.kind](tensors)
    delta = module.scale * product.reshape(base_weight.shape)
    if module.kind != "dora":
        return delta
    base = base_weight.to(torch.float32)
    direction = base + delta
    per_row = (-1, *[1] * (base.ndim - 1))
    norm = direction.flatten(1).norm(dim=1)
    return direction * (tensors["lora_magnitude_vector.weight"].flatten() / norm).reshape(per_row) - base


def _lora(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["lora_B.weight"].flatten(1) @ tensors["lora_A.weight"].flatten(1)


def _loha(tensors: Mapping[str, Tensor]) -> Tensor:
    return _product(tensors, "hada_w1", "hada_t1") * _product(tensors, "hada_w2", "hada_t2")


def _lokr(tensors: Mapping[str, Tensor]) -> Tensor:
    first, second = _product(tensors, "lokr_w1"), _product(tensors, "lokr_w2", "lokr_t2")
    if second.ndim == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second)


def _product(tensors: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """A factor that is whole, or the product of two, or of two and a Tucker core (r, r, k, k): (out, in, k, k)."""
    if name in tensors:
        return tensors[name]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core in tensors:
        return torch.einsum("ijkl,io,jn->onkl", tensors[core], left, right)
    return left @ right
