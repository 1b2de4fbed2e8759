"""Which device and which precision, chosen once at the edge of each process."""

from __future__ import annotations

import torch

from sdxl_ray.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(device: torch.device, dtype: torch.dtype) -> None:
    """
    Raises:
        ConfigError: the device cannot compute in this precision.
    """
    if device.type == "mps" and dtype is torch.bfloat16 and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ConfigError('model.dtype = "bf16" needs macOS 14 or newer on this machine. Set model.dtype = "fp32".')
    if device.type == "mps" and dtype is torch.float16:
        raise ConfigError(
            'model.dtype = "fp16" is for GPUs that have no bf16; Apple\'s have it from macOS 14 on. Set model.dtype = '
            '"bf16" or "fp32".'
        )


def best_device(accelerator: str = "auto") -> torch.device:
    """CUDA (which is also what ROCm calls itself), else Apple's MPS, else the CPU; the CPU if it is asked for."""
    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
