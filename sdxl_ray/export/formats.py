"""One trained adapter as the two files people use.

    kohya      `lora_unet_input_blocks_4_1_...lora_down.weight`     ComfyUI, A1111, Forge, InvokeAI, kohya, diffusers
    diffusers  `unet.down_blocks.1.attentions.0....lora_A.weight`   diffusers and peft

What each field is called, and what each program does with it: "SDXL LoRA file formats" in the project's field notes;
the reading side is diffusers/loaders/{lora_pipeline,lora_conversion_utils,peft}.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from sdxl_ray.errors import ExportError, storage_errors
from sdxl_ray.export.names import SDXL_LAYERS_PER_BLOCK, unet_stem

FileDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What was attached to the U-Net and trained.

    kind     "lora"; others are refused until a format holds them so that its readers get them right
    rank     inner dimension
    alpha    the adapter's output is times alpha / rank
    targets  "attention", "all-linear" or module names, as given to `attach_adapter`
    """

    kind: str
    rank: int
    alpha: float
    targets: str | tuple[str, ...] = "attention"

    @property
    def scale(self) -> float:
        """The factor on lora_B @ lora_A in the trained U-Net."""
        return self.alpha / self.rank


def write_kohya(
    path: Path,
    state: Mapping[str, Tensor],
    spec: AdapterSpec,
    metadata: Mapping[str, str],
    *,
    dtype: FileDtype = "fp32",
    layers_per_block: int = SDXL_LAYERS_PER_BLOCK,
) -> None:
    """A file whose LoRA has one alpha everywhere, equal to the rank, with the true scale folded into lora_up.

    So a reader that ignores alpha, one that takes the alpha of a single module for all, and one that reads it per
    module (diffusers does so for convolutions, but not for attention) all get the trained strength. With a rank that
    differs between modules, alpha is the largest rank and lora_up makes up for the rest.

    `dtype` is fp32 because the masters are: at rank 16 that is 93 MB, and training can go on from the file without
    loss. fp16 or bf16 halve it and round every weight.
    """
    modules = _lora_modules(state, spec, "kohya")
    uniform_alpha = max(down.shape[0] for down, _ in modules.values())
    tensors: dict[str, Tensor] = {}
    for module_path, (down, up) in modules.items():
        stem = unet_stem(module_path, layers_per_block=layers_per_block)
        factor = spec.scale * down.shape[0] / uniform_alpha  # a reader applies uniform_alpha / rank of this module
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up.float() * factor
        tensors[f"{stem}.alpha"] = torch.tensor(float(uniform_alpha))  # 0-dim and floating, or some readers fail
    header = dict(metadata)
    if "ss_network_alpha" in header:  # describes the tensors of this file, where the trained alpha is folded in
        header |= {"ss_network_dim": str(uniform_alpha), "ss_network_alpha": str(float(uniform_alpha))}
    _write(path, tensors, header, dtype)


def write_diffusers(
    path: Path,
    state: Mapping[str, Tensor],
    spec: AdapterSpec,
    metadata: Mapping[str, str],
    *,
    dtype: FileDtype = "fp32",
) -> None:
    """A file with the weights as trained, and rank and alpha in the header where `load_lora_weights` looks for them.

    Without the header key `lora_adapter_metadata` diffusers takes alpha = rank. `save_lora_weights` would fill it with
    every field of this peft's LoraConfig, and an older peft then refuses the file ("LoraConfig class could not be
    instantiated"); the five fields here say the same and are as old as the key.
    """
    modules = _lora_modules(state, spec, "diffusers")
    ranks = {module_path: down.shape[0] for module_path, (down, _) in modules.items()}
    other_ranks = {module_path: rank for module_path, rank in ranks.items() if rank != spec.rank}
    lora_config = {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": sorted(modules),
        "rank_pattern": other_ranks,
        # one scale for all, hence an alpha of its own wherever the rank differs
        "alpha_pattern": {module_path: spec.scale * rank for module_path, rank in other_ranks.items()},
    }
    prefixed = {f"unet.{key}": value for key, value in lora_config.items()}
    header = dict(metadata)
    header["lora_adapter_metadata"] = json.dumps(prefixed, sort_keys=True)
    if "modelspec.implementation" in header:
        header["modelspec.implementation"] = "diffusers"  # ModelSpec names the code base whose names the tensors have
    tensors: dict[str, Tensor] = {}
    for module_path, (down, up) in modules.items():
        tensors[f"unet.{module_path}{_DOWN}"] = down
        tensors[f"unet.{module_path}{_UP}"] = up
    _write(path, tensors, header, dtype)


WRITERS: dict[str, Callable[..., None]] = {"kohya": write_kohya, "diffusers": write_diffusers}


def _lora_modules(state: Mapping[str, Tensor], spec: AdapterSpec, file_format: str) -> dict[str, tuple[Tensor, Tensor]]:
    """`{module path: (lora_A, lora_B)}`; an ExportError before anything is written if that is not all there is."""
    if spec.kind != "lora":
        raise ExportError(
            f"The {file_format} format holds an adapter of kind 'lora', this one is '{spec.kind}': programs that read "
            'it would drop a part of the weights without a word. Set adapter.kind = "lora", or keep the checkpoint.'
        )
    downs = {key.removesuffix(_DOWN): tensor for key, tensor in state.items() if key.endswith(_DOWN)}
    ups = {key.removesuffix(_UP): tensor for key, tensor in state.items() if key.endswith(_UP)}
    foreign = [key for key in state if not key.endswith((_DOWN, _UP))]
    alone = sorted(downs.keys() ^ ups.keys())
    if foreign or alone or not downs:
        found = f"{len(downs)} lora_A, {len(ups)} lora_B and {len(foreign)} other tensors"
        example = f" (such as '{(foreign + alone)[0]}')" if foreign or alone else ""
        raise ExportError(
            f"The adapter's weights are no LoRA that a {file_format} file can hold: expected one lora_A and one lora_B "
            f"for each module, found {found}{example}. Pass what `adapter_state_dict(unet)` returns."
        )
    return {module_path: (down, ups[module_path]) for module_path, down in downs.items()}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: FileDtype) -> None:
    """The file appears under its name when it is whole, or not at all."""
    final = {
        key: tensor.detach().to("cpu", torch.float32 if key.endswith(".alpha") else DTYPES[dtype]).contiguous()
        for key, tensor in tensors.items()
    }
    content = _serialize(final, metadata)
    partial = path.with_name(f"{path.name}.partial")
    cure = "Free some space or choose another folder, then run `sdxl-ray export` on the last checkpoint."
    with storage_errors("writing the LoRA", path, cure):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, equal for equal input, with the hashes that model browsers look for.

    `safetensors.torch.save` does the tensors; the header is ours because safetensors writes metadata in the order of a
    hash map, so that the same LoRA would get other bytes every time.

    sshs_model_hash        SHA-256 of the tensor part (A1111, Civitai's AutoV3 takes its first 12 digits)
    modelspec.hash_sha256  the same with 0x in front (ModelSpec 1.0.1)
    sshs_legacy_hash       8 digits of SHA-256 over 64 KiB at 1 MiB, in a file with `ss_*` metadata only; left out where
                           the file ends before, because the hash of nothing matches every such file
    Source: the definitions A1111 checks against, modules/hashes.py (addnet hash).
    """
    plain = safetensors.torch.save(tensors)
    header_length = int.from_bytes(plain[:8], "little")
    entries, data = json.loads(plain[8 : 8 + header_length]), plain[8 + header_length :]

    def file_with(metadata: Mapping[str, str]) -> bytes:
        ordered = {"__metadata__": dict(sorted(metadata.items())), **entries}
        header = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)  # tensors start aligned
        return len(header).to_bytes(8, "little") + header + data

    model_hash = hashlib.sha256(data).hexdigest()
    full = {"format": "pt", **metadata, "sshs_model_hash": model_hash, "modelspec.hash_sha256": f"0x{model_hash}"}
    kohya_only = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    legacy_part = file_with(kohya_only)[0x100000:0x110000]
    if legacy_part:
        full["sshs_legacy_hash"] = hashlib.sha256(legacy_part).hexdigest()[:8]
    return file_with(full)
