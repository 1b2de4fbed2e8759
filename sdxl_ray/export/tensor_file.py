"""A safetensors file: written tensor by tensor, with equal bytes for equal content, whole or not at all.

`safetensors.torch.save` would hold all tensors and the file in memory, which for a whole SDXL is 28 GB, and it writes
metadata in the order of a hash map, so that the same LoRA would get other bytes every time. The format is eight bytes
of length, a JSON header, and the tensors. Source: github.com/huggingface/safetensors (Format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_ray.errors import ExportError, storage_errors

FileDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# In the order in which safetensors lays tensors out: wide types first, so that all are aligned.
_CODES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {code: place for place, code in enumerate(_CODES.values())}
_ALWAYS_FP32 = (".alpha", ".dora_scale", ".lora_magnitude_vector")
_LEGACY_FROM, _LEGACY_TO = 0x100000, 0x110000
_NO_HASH = "0" * 64  # holds the place until all tensors are written


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is its turn: `make()` returns it with this shape, and its memory is free after."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already, among those that are not."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_lazily(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file; each is read when asked for.

    Raises:
        SafetensorError, OSError: the file cannot be read.
        ExportError: a tensor is of a type that has no plain numbers, such as one of 4 bits.
    """
    file = safe_open(path, framework="pt")
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    found = {}
    for name in file.keys():  # noqa: SIM118
        view = file.get_slice(name)
        code = view.get_dtype()
        if code not in dtypes:
            raise ExportError(
                f"{path}: '{name}' is stored as {code}; the export reads {', '.join(dtypes)}. Set model.path to the "
                "same model in fp32, bf16 or fp16, or leave checkpoint and diffusers-folder out of export.formats."
            )
        found[name] = LazyTensor(tuple(view.get_shape()), dtypes[code], _reader(file, name))
    return found


def _reader(file: safe_open, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def stored_dtype(name: str, dtype: torch.dtype, wanted: FileDtype | None) -> torch.dtype:
    """What a tensor of `dtype` is written as: whole numbers as they are.

    alpha and a DoRA's magnitudes in fp32 always: half a step of bf16 in |W| is as large as what training changed.
    """
    if not dtype.is_floating_point or wanted is None:
        return dtype
    return torch.float32 if name.endswith(_ALWAYS_FP32) else DTYPES[wanted]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str],
    dtype: FileDtype | None,
    *,
    doing: str = "writing the LoRA",
) -> None:
    """Write the file under a name of its own and rename it, so that it appears whole or not at all.

    The hashes that model browsers look for go into the header:

    sshs_model_hash        SHA-256 of the tensor part (A1111, Civitai's AutoV3 takes its first 12 digits)
    modelspec.hash_sha256  the same with 0x in front (ModelSpec 1.0.1)
    sshs_legacy_hash       8 digits of SHA-256 over 64 KiB at 1 MiB, in a file with `ss_*` metadata only; left out where
                           the file ends before, because the hash of nothing matches every such file
    Source: the definitions A1111 checks against, modules/hashes.py (addnet hash).

    Args:
        dtype: of floating-point tensors, None: as each of them is.
        doing: what is being done, for the message when the disk is full.

    Raises:
        StorageError: the disk is full or read-only.
    """
    partial = path.with_name(f"{path.name}.partial")
    cure = "Free some space or choose another folder, then run `sdxl-ray export` on the last checkpoint."
    with storage_errors(doing, path, cure):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, tensors, metadata, dtype)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _write(
    path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str], dtype: FileDtype | None
) -> None:
    as_stored = {name: stored_dtype(name, tensor.dtype, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (_PLACES[_CODES[as_stored[name]]], name))
    entries, length = {}, 0
    for name in order:
        size = math.prod(tensors[name].shape) * as_stored[name].itemsize
        entries[name] = {
            "dtype": _CODES[as_stored[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [length, length + size],
        }
        length += size

    full = {"format": "pt", **metadata, "sshs_model_hash": _NO_HASH, "modelspec.hash_sha256": f"0x{_NO_HASH}"}
    kohya_only = _header({key: value for key, value in metadata.items() if key.startswith("ss_")}, entries)
    if len(kohya_only) + length > _LEGACY_FROM:
        full["sshs_legacy_hash"] = _NO_HASH[:8]

    digest, beginning = hashlib.sha256(), bytearray(kohya_only)
    with path.open("wb") as file:
        file.write(_header(full, entries))
        for name in order:
            for piece in _bytes_of(tensors[name], as_stored[name]):
                file.write(piece)
                digest.update(piece)
                if len(beginning) < _LEGACY_TO:
                    beginning += piece[: _LEGACY_TO - len(beginning)]
        model_hash = digest.hexdigest()
        full |= {"sshs_model_hash": model_hash, "modelspec.hash_sha256": f"0x{model_hash}"}
        if "sshs_legacy_hash" in full:
            full["sshs_legacy_hash"] = hashlib.sha256(beginning[_LEGACY_FROM:_LEGACY_TO]).hexdigest()[:8]
        file.seek(0)
        file.write(_header(full, entries))  # as long as before
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


def _header(metadata: Mapping[str, str], entries: Mapping[str, object]) -> bytes:
    ordered = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors start aligned
    return len(header).to_bytes(8, "little") + header


def _bytes_of(tensor: Tensor | LazyTensor, dtype: torch.dtype) -> Iterator[memoryview]:
    made = tensor.make() if isinstance(tensor, LazyTensor) else tensor
    if tuple(made.shape) != tuple(tensor.shape):
        raise ValueError(f"a tensor was announced with shape {tuple(tensor.shape)} and made with {tuple(made.shape)}")
    flat = made.detach().to("cpu", dtype).contiguous().reshape(-1)
    if flat.numel():
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
