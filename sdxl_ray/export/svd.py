"""The plain LoRA that comes nearest to any trained change of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_ray.sdxl.trained import TrainedModule, effective_delta


def nearest_lora(
    module: TrainedModule, base_weight: Tensor, *, rank: int, device: torch.device | str = "cpu"
) -> tuple[TrainedModule, float]:
    """(LoRA of at most `rank`, relative error |D - B A| / |D| in the Frobenius norm) for D = effective_delta.

    By Eckart and Young (Psychometrika 1, 1936) the nearest matrix of rank r keeps the r largest singular values. With
    D = U S V^T, lora_B = U sqrt(S) and lora_A = sqrt(S) V^T: both halves of the same size, which fp16 holds best. U
    comes from the eigenvectors of D D^T (or V from D^T D, whichever is smaller) in float64, some ten times faster than
    a singular value decomposition; what the square costs in precision lies at 1e-8 of the largest value.

    A convolution (out, in, k, k) is flattened to (out, in k k); its lora_A is (r, in, k, k), its lora_B (out, r, 1, 1).
    The error is computed from the float32 tensors that are returned. A change of zero has error 0.

    Args:
        device: where to compute. Apple's GPUs have no float64: "mps" means the CPU.
    """
    device = "cpu" if torch.device(device).type == "mps" else device
    delta = effective_delta(module, base_weight)
    matrix = delta.flatten(1).to(device, torch.float64)
    rank = min(rank, *matrix.shape)
    tall = matrix.shape[0] > matrix.shape[1]
    square = matrix.T @ matrix if tall else matrix @ matrix.T
    directions = torch.linalg.eigh(square).eigenvectors[:, -rank:].flip(1)  # largest first
    if tall:
        up, down = matrix @ directions, directions.T
        sizes = torch.linalg.norm(up, dim=0)
        root = sizes.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        up, down = up / root, down * root[:, None]
    else:
        up, down = directions, directions.T @ matrix
        sizes = torch.linalg.norm(down, dim=1)
        root = sizes.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        up, down = up * root, down / root[:, None]
    up, down = up.float(), down.float()

    size = float(torch.linalg.norm(matrix))
    error = float(torch.linalg.norm(matrix - up.double() @ down.double())) / size if size else 0.0
    kernel = delta.shape[2:]
    tensors = {
        "lora_A.weight": down.cpu().reshape(rank, delta.shape[1], *kernel).contiguous(),
        "lora_B.weight": up.cpu().reshape(delta.shape[0], rank, *(1 for _ in kernel)).contiguous(),
    }
    return TrainedModule(kind="lora", tensors=tensors, scale=1.0, rank=rank), error
