"""How an adapter begins: numbers that follow from (seed, name), or from the base weight, and from nothing else.

Everything is computed on the CPU in float32, since CUDA's generator and solvers give other numbers. With all of these
the adapted layer is at first what the base layer was: one factor is zero, or what begins as B0 A0 is taken off again.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from sdxl_ray.errors import ConfigError

INITS = ("default", "gaussian", "pissa", "olora")
FROM_BASE = ("pissa", "olora")  # need the base weight, and a second, frozen adapter that takes the start off again

_ZERO = {"lora_B.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b"}
_NORMAL = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}  # standard deviations
_ITERATIONS = 4  # of the subspace iteration, as in PiSSA's own fast SVD


def initial_value(leaf: str, name: str, shape: tuple[int, ...], *, seed: int, init: str, rank: int) -> Tensor:
    """What parameter `name` begins with: float32, on the CPU; `leaf` is its place in the layer, as `lora_A.weight`.

    lora, dora  B zero. A by Kaiming with a = √5, which is uniform in ±1/√fan_in (github.com/microsoft/LoRA); with
                "gaussian" normal with a standard deviation of 1/rank, as in diffusers and peft
    loha        W2a zero, the others normal (LyCORIS, modules/loha.py)
    lokr        the second factor, or its right half, zero, the others by Kaiming (LyCORIS, modules/lokr.py)
    """
    if leaf in _ZERO:
        return torch.zeros(shape)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(key)
    value = torch.empty(shape)
    if leaf in _NORMAL:
        return nn.init.normal_(value, std=_NORMAL[leaf], generator=generator)
    if init == "gaussian":
        return nn.init.normal_(value, std=1 / rank, generator=generator)
    return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def row_norms(weight: Tensor) -> Tensor:
    """DoRA's magnitude at the start, |W| of each output row: (out,) float32, which makes m W / |W| the base again."""
    return torch.linalg.norm(weight.float().flatten(1), dim=1)


def factors_of_base(init: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B0 (out, rank) and A0 (rank, in) from the float32 base weight (out, in); a kernel's inputs are in*k*k.

    pissa  scale B0 A0 is the sum of the `rank` largest singular directions, √σ to either side (arXiv:2404.02948)
    olora  B0 and A0 are the first columns of Q and rows of R (arXiv:2406.01775)

    Signs are settled, so that the same weight gives the same factors: pissa's largest entry of each column of B0 is
    positive, olora's diagonal of R is.
    """
    matrix = weight.float().flatten(1)
    if init == "olora":
        # without pivoting, the first columns of Q depend on the first columns of W alone
        q, r = torch.linalg.qr(matrix[:, :rank])
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return q, q.T @ matrix
    left, values, right = _largest_directions(matrix, rank)
    sign = torch.where(left.gather(0, left.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0)
    root = (values / scale).sqrt()
    return left * sign * root, (right * sign.T) * root[:, None]


def _largest_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), σ (rank,), Vᵀ (rank, in): by the whole SVD, or by subspace iteration where that is far cheaper.

    The latter (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4) takes 0.09 s instead of 0.5 for 1280 x 1280
    and rank 16 on one core, and SDXL has hundreds of such layers. Its random start is a fixed one, so that the factors
    are a function of the weight.
    """
    width = 2 * rank + 16
    if 8 * width > min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(basis)[0]
        basis = matrix @ torch.linalg.qr(matrix.T @ basis)[0]
    basis = torch.linalg.qr(basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def check_start(kind: str, init: str, dropout: float) -> None:
    """
    Raises:
        ConfigError: an unknown init, or one that does not go with the kind or with dropout.
    """
    if init not in INITS:
        raise ConfigError(f"adapter.init {init!r} is unknown. Known: {', '.join(INITS)}.")
    allowed = {"lora": INITS, "dora": ("default", "gaussian")}.get(kind, ("default",))
    if init not in allowed:
        raise ConfigError(
            f'adapter.init = "{init}" does not go with adapter.kind = "{kind}", which knows {", ".join(allowed)}. '
            'Set adapter.init = "default"' + (', or adapter.kind = "lora".' if init in FROM_BASE else ".")
        )
    if init in FROM_BASE and dropout > 0:
        raise ConfigError(
            f'adapter.init = "{init}" does not go with adapter.dropout = {dropout:g}: the adapter begins as the '
            "largest part of the model itself, which dropout would drop. Set adapter.dropout = 0, or "
            'adapter.init = "default".'
        )


def check_ranks(init: str, ranks: dict[str, tuple[int, tuple[int, ...]]]) -> None:
    """
    Args:
        ranks: of each module its rank and the shape of its weight.

    Raises:
        ConfigError: a weight has fewer directions than the rank asks for, where the start is taken from it.
    """
    if init not in FROM_BASE:
        return
    for name, (rank, shape) in ranks.items():
        if rank > (most := min(shape[0], math.prod(shape[1:]))):
            raise ConfigError(
                f'adapter.init = "{init}" needs ranks up to {most} in {name}, whose weight is '
                f"{' x '.join(map(str, shape))}, and it has {rank}. Lower adapter.rank (or adapter.blocks), or set "
                'adapter.init = "default".'
            )
