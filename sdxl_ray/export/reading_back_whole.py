"""Whole models read back: each weight through diffusers' own converters, and equal bit for bit to what it was to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sdxl_ray.errors import ExportError, ModelError
from sdxl_ray.export.reading_back import cure
from sdxl_ray.export.single_file_names import PREFIXES
from sdxl_ray.export.tensor_file import FileDtype, LazyTensor, lazy, read_lazily, stored_dtype
from sdxl_ray.export.whole_model import Weights, canonical
from sdxl_ray.sdxl.components import resolve_model
from sdxl_ray.sdxl.files import WEIGHT_STEMS

# What diffusers called the VAE's attention before 0.17; its converter knows the new names only.
_OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_back_checkpoint(
    path: Path, parts: Weights, *, dtype: FileDtype, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]
) -> Weights:
    """The file's weights by part, under the diffusers layout's names (`text_model.` in those of the text encoders).

    Raises:
        ExportError: the file cannot be read, or a weight is missing or another than was to be written.
    """
    try:
        tensors = load_file(path)
        found = {
            "unet": convert_ldm_unet_checkpoint(tensors, unet_config),
            "vae": convert_ldm_vae_checkpoint(tensors, vae_config),
            "text_encoder": convert_ldm_clip_checkpoint(tensors),
            "text_encoder_2": convert_open_clip_checkpoint(None, tensors, prefix=PREFIXES["text_encoder_2"]),
        }
    except (KeyError, ValueError, TypeError, RuntimeError, OSError, SafetensorError, AttributeError) as error:
        raise ExportError(
            f"{path.name}: diffusers cannot read the model back ({type(error).__name__}: {error}). {cure()}"
        ) from error
    read = {part: {name: lazy(weight) for name, weight in weights.items()} for part, weights in found.items()}
    _compare(path.name, read, parts, dict.fromkeys(parts, dtype))
    return read


def read_back_folder(folder: Path, parts: Weights, *, dtype: FileDtype, changed: Iterable[str]) -> Weights:
    """The same of a folder; parts that are not `changed` have to be as they were.

    Raises:
        ExportError: the folder is no complete SDXL, or a weight is missing or another than was to be written.
    """
    try:
        resolve_model(str(folder.resolve()))
        lazily = {part: read_lazily(folder / part / f"{stem}.safetensors") for part, stem in WEIGHT_STEMS.items()}
    except (ModelError, OSError, SafetensorError) as error:
        raise ExportError(f"{folder.name}: cannot be read back ({error}). {cure()}") from error
    found = {
        part: {canonical(part, name): tensor for name, tensor in weights.items()} for part, weights in lazily.items()
    }
    _compare(folder.name, found, parts, {part: dtype if part in changed else None for part in parts})
    return found


def _compare(
    name: str,
    found: Weights,
    parts: Weights,
    dtypes: Mapping[str, FileDtype | None],
) -> None:
    for part, weights in parts.items():
        expected = {_as_read(part, name): weight for name, weight in weights.items()}
        read = {_as_read(part, name): weight for name, weight in found[part].items()}
        ignored = "text_model.embeddings.position_ids"
        different = sorted((expected.keys() ^ read.keys()) - {ignored})
        wrong = [
            key
            for key, weight in expected.items()
            if key in read.keys() - {ignored}
            and not _equal(read[key], weight, stored_dtype(key, weight.dtype, dtypes[part]))
        ]
        if different or wrong:
            raise ExportError(
                f"{name} does not give back the model. Of {len(expected)} weights of {part}, {len(different)} are "
                f"missing or too many and {len(wrong)} differ, such as {(different + wrong)[0]}. {cure()}"
            )


def _as_read(part: str, name: str) -> str:
    name = canonical(part, name)
    if part == "vae":
        for old, new in _OLD_VAE_NAMES.items():
            name = name.replace(old, new)
    return name


def _equal(lazily_read: LazyTensor, weight: LazyTensor, dtype: torch.dtype) -> bool:
    read = lazily_read.make()
    expected = weight.make().detach().to("cpu", dtype)
    if expected.ndim == 4 and read.ndim == 2:
        expected = expected.flatten(1)  # old VAE folders hold attention's matrices as 1x1 convolutions
    return read.shape == expected.shape and torch.equal(read, expected)


def weights_of(model: nn.Module, part: str, found: Weights) -> dict[str, LazyTensor]:
    """A part's weights under the names of the model in memory, for `replacing`."""
    names = {canonical(part, name): name for name, _ in model.named_parameters()}
    own = {canonical(part, name): weight for name, weight in found[part].items()}
    return {name: own[key] for key, name in names.items() if key in own}
