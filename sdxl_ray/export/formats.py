"""Trained adapters as the two kinds of files people use.

    kohya      `lora_unet_input_blocks_4_1_...lora_down.weight`     ComfyUI, A1111, Forge, InvokeAI, kohya, diffusers;
                                                                    of a DoRA see `which`
    diffusers  `unet.down_blocks.1.attentions.0....lora_A.weight`   diffusers and peft

Both take `{part: {module path: TrainedModule}}` with the parts unet, text_encoder and text_encoder_2. What each field
is called, and what each program does with it: "SDXL LoRA file formats" in the project's field notes; the reading side
is diffusers/loaders/{lora_pipeline,lora_conversion_utils,peft}.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxl_ray.errors import ExportError
from sdxl_ray.export.lycoris import lycoris_tensors
from sdxl_ray.export.names import SDXL_LAYERS_PER_BLOCK, text_encoder_stem, unet_stem
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.tensor_file import DTYPES, FileDtype, write_tensors
from sdxl_ray.sdxl.trained import TrainedModule

__all__ = ["DTYPES", "PARTS", "AdapterSpec", "FileDtype", "Parts", "write_diffusers", "write_kohya"]

Parts = Mapping[str, Mapping[str, TrainedModule]]
PARTS = ("unet", "text_encoder", "text_encoder_2")

_MAGNITUDE = "lora_magnitude_vector.weight"


def write_kohya(
    path: Path,
    parts: Parts,
    metadata: Mapping[str, str],
    *,
    dtype: FileDtype = "fp32",
    layers_per_block: int = SDXL_LAYERS_PER_BLOCK,
) -> None:
    """A file whose LoRAs have one alpha everywhere, equal to the rank, with the true scale folded into lora_up.

    So a reader that ignores alpha, one that takes the alpha of a single module for all, and one that reads it per
    module (diffusers does so for convolutions, but not for attention) all get the trained strength. With a rank that
    differs between modules, alpha is the largest rank and lora_up makes up for the rest.

    DoRA adds `dora_scale` (out, 1[, 1, 1]), which is multiplied with the changed weight over the norm of each output
    row; LoHa and LoKr have LyCORIS's names and shapes, see `lycoris`.

    `dtype` is fp32 because the masters are: at rank 16 that is 93 MB, and training can go on from the file without
    loss. fp16 or bf16 halve it and round every weight.

    Raises:
        ExportError: the modules are not what such a file holds.
        StorageError: the disk is full or read-only.
    """
    _check(parts, "kohya")
    lora_ranks = [one.rank for modules in parts.values() for one in modules.values() if one.kind in ("lora", "dora")]
    uniform_alpha = max(lora_ranks, default=0)
    tensors: dict[str, Tensor] = {}
    for part, modules in parts.items():
        for module_path, module in modules.items():
            stem = kohya_stem(part, module_path, layers_per_block=layers_per_block)
            found = _kohya_lora(module, uniform_alpha) if module.kind in ("lora", "dora") else lycoris_tensors(module)
            tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in found.items()}
    header = dict(metadata)
    if "ss_network_alpha" in header:  # describes the tensors of this file, where the trained scale is folded in
        dim = uniform_alpha or max(one.rank for modules in parts.values() for one in modules.values())
        header |= {"ss_network_dim": str(dim), "ss_network_alpha": str(float(dim))}
    write_tensors(path, tensors, header, dtype)


def kohya_stem(part: str, module_path: str, *, layers_per_block: int = SDXL_LAYERS_PER_BLOCK) -> str:
    """The kohya name of a module of the U-Net or of a text encoder."""
    if part == "unet":
        return unet_stem(module_path, layers_per_block=layers_per_block)
    return text_encoder_stem(module_path, encoder=1 if part == "text_encoder" else 2)


def _kohya_lora(module: TrainedModule, alpha: float) -> dict[str, Tensor]:
    down, up = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    found = {
        "lora_down.weight": down,
        "lora_up.weight": up.float() * (module.scale * module.rank / alpha),  # a reader applies alpha / rank
        "alpha": down.new_tensor(float(alpha)),  # 0-dim and floating, or some readers fail
    }
    if module.kind == "dora":
        found["dora_scale"] = module.tensors[_MAGNITUDE].reshape(-1, *(1 for _ in down.shape[1:]))
    return found


def write_diffusers(path: Path, parts: Parts, metadata: Mapping[str, str], *, dtype: FileDtype = "fp32") -> None:
    """A file with the weights as trained, and rank and alpha in the header where `load_lora_weights` looks for them.

    Without the header key `lora_adapter_metadata` diffusers takes alpha = rank. `save_lora_weights` would fill it with
    every field of this peft's LoraConfig, and an older peft then refuses the file ("LoraConfig class could not be
    instantiated"); the five fields here (six for a DoRA) say the same and are as old as the key. Any scale is
    alpha / rank of some alpha, so rsLoRA's needs no field of its own.

    Text encoders: tensors have `text_model.` in their names, which diffusers removes where this transformers' CLIP has
    no such level. Names in the header have not: peft matches ends of names, so these fit both.

    Raises:
        ExportError: the modules are not what such a file holds.
        StorageError: the disk is full or read-only.
    """
    _check(parts, "diffusers")
    tensors: dict[str, Tensor] = {}
    lora_configs: dict[str, Any] = {}
    for part, modules in parts.items():
        for module_path, module in modules.items():
            name = module_path
            if part != "unet" and not name.startswith(("text_model.", "text_projection")):
                name = f"text_model.{name}"
            for leaf, tensor in module.tensors.items():
                # peft keeps the vector's old name, without `.weight`
                tensors[f"{part}.{name}.{leaf.removesuffix('.weight') if leaf == _MAGNITUDE else leaf}"] = tensor
        lora_configs |= {f"{part}.{key}": value for key, value in _lora_config(modules).items()}
    header = dict(metadata)
    header["lora_adapter_metadata"] = json.dumps(lora_configs, sort_keys=True)
    if "modelspec.implementation" in header:
        header["modelspec.implementation"] = "diffusers"  # ModelSpec names the code base whose names the tensors have
    write_tensors(path, tensors, header, dtype)


def _lora_config(modules: Mapping[str, TrainedModule]) -> dict[str, Any]:
    """What peft's LoraConfig takes: the commonest rank and alpha, and patterns for the modules that differ."""
    ranks = {module_path.removeprefix("text_model."): module.rank for module_path, module in modules.items()}
    alphas = {
        module_path.removeprefix("text_model."): module.scale * module.rank for module_path, module in modules.items()
    }
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    if any(module.kind == "dora" for module in modules.values()):
        config["use_dora"] = True
    return config


def _check(parts: Parts, format_name: str) -> None:
    """An ExportError, before anything is written, if these are not modules that the format holds."""
    possible = {"kohya": ("lora", "dora", "loha", "lokr"), "diffusers": ("lora", "dora")}[format_name]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not any(parts.values()):
        raise ExportError(
            f"A {format_name} file holds trained modules of {', '.join(PARTS)}; "
            + (f"'{unknown[0]}' is none of these." if unknown else "there are none to write. Train something first.")
        )
    for part, modules in parts.items():
        kinds = {module.kind for module in modules.values()}
        fitting = possible if part == "unet" else ("lora",)
        if kinds - set(fitting) or len(kinds) > 1:
            raise ExportError(
                f"The {format_name} format holds {' or '.join(fitting)} of the {part}, one kind for all modules; these "
                f"are of kind {', '.join(sorted(kinds))}. Programs would drop a part of the weights without a word. "
                "Choose other export.formats, or keep the checkpoint."
            )
        for module_path, module in modules.items():
            missing = [leaf for leaf in _REQUIRED.get(module.kind, ()) if leaf not in module.tensors]
            if missing:
                raise ExportError(
                    f"{part}: {module_path} is no whole {module.kind}: expected {', '.join(_REQUIRED[module.kind])}, "
                    f"found {', '.join(module.tensors) or 'nothing'}. Pass what `trained_modules` returns."
                )


_REQUIRED: dict[str, tuple[str, ...]] = {
    "lora": ("lora_A.weight", "lora_B.weight"),
    "dora": ("lora_A.weight", "lora_B.weight", _MAGNITUDE),
}
