"""Which device and which precision, chosen once at the edge of each process."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device(accelerator: str = "auto") -> torch.device:
    """CUDA (which is also what ROCm calls itself), else Apple's MPS, else the CPU; the CPU if it is asked for."""
    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
