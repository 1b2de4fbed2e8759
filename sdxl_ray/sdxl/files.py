"""Which files make up a part of an SDXL on disk, in the diffusers layout. No torch.

unet/config.json  unet/diffusion_pytorch_model[.fp16].safetensors       or an index that names the shards
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sdxl_ray.errors import ModelError

PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


def missing_files(folder: Path, part: str) -> list[str]:
    """What `folder/part` lacks, as paths relative to `folder`."""
    missing = [] if (folder / part / PARTS[part]).is_file() else [f"{part}/{PARTS[part]}"]
    if part.startswith("tokenizer"):
        slow = all((folder / part / name).is_file() for name in ("vocab.json", "merges.txt"))
        if not slow and not (folder / part / "tokenizer.json").is_file():
            missing.append(f"{part}/vocab.json with {part}/merges.txt")
    elif part in WEIGHT_STEMS:
        stem = WEIGHT_STEMS[part]
        files = weight_files(folder / part, stem, variant_to_load(folder / part, stem, None))
        missing += [f"{part}/{file.name}" for file in files if not file.is_file()]
    return missing


def pickled_weights(folder: Path, part: str) -> list[str]:
    """The `.bin` files of a part that has no safetensors, relative to `folder`."""
    if part not in WEIGHT_STEMS or any((folder / part).glob(f"{WEIGHT_STEMS[part]}*.safetensors")):
        return []
    # transformers calls its pickle pytorch_model.bin, diffusers diffusion_pytorch_model.bin
    return [f"{part}/{file.name}" for file in sorted((folder / part).glob("*.bin"))]


def variant_to_load(folder: Path, stem: str, variant: str | None) -> str | None:
    """`variant`, or "fp16" where a folder has nothing else (downloaded with --variant fp16, as many people do)."""
    if variant is None and not weight_files(folder, stem, None)[0].is_file():
        fp16 = weight_files(folder, stem, "fp16")
        return "fp16" if fp16[0].is_file() else None
    return variant


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of one part: those an index names, or the single one. They need not exist."""
    middle = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if not index.is_file():
        return [folder / f"{stem}{middle}.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ModelError(f"{index} is not an index of safetensors shards ({error!r}). Copy it again.") from error
    return [folder / name for name in names]


def header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, from its header alone.

    Layout: 8 bytes little-endian length, then JSON. Source: github.com/huggingface/safetensors (Format).
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}). Copy or fetch it again.") from error
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def model_index(scheduler: str, *, zeros_for_empty_prompt: bool) -> dict[str, Any]:
    """The contents of model_index.json of a folder in diffusers' layout, as diffusers writes it."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": zeros_for_empty_prompt,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
