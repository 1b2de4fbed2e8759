"""Draws that are a pure function of a key such as (seed, epoch, sample_id, "noise").

Nothing here has state, so a resumed run, a run with another number of workers and an evaluation draw exactly what they
should without anybody saving or skipping anything. Philox (Salmon et al., SC 2011) is made for this: a counter-based
generator whose key selects the stream. NumPy's is used on the CPU, so that CUDA, ROCm and CPU see the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # planning a run needs the order of its data, and no torch
    import torch


def keyed_generator(*key: object) -> np.random.Generator:
    """A generator for this key alone. Keys are compared by `repr`, so 1 and "1" differ."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def keyed_normal(shape: Sequence[int], *key: object) -> torch.Tensor:
    """Standard normal float32 of `shape`."""
    import torch

    return torch.from_numpy(keyed_generator(*key).standard_normal(tuple(shape), dtype=np.float32))


def keyed_uniform(*key: object) -> float:
    """One number in [0, 1)."""
    return float(keyed_generator(*key).random())


def keyed_seed(*key: object) -> int:
    """63 bits for a generator that has to be seeded, such as torch's for dropout masks."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
