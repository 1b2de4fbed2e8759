"""What a part of the model is, as a short hash and as shapes: from its files, without torch.

A cached latent belongs to one VAE, a cached embedding to one pair of text encoders; the hash says which. It depends on
the bytes, not on the path or the Hub id, so a moved or renamed model keeps its cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray.sdxl import hub
from sdxl_ray.sdxl.files import PARTS, TOKENIZER_FILES, WEIGHT_STEMS, header_shapes, variant_to_load, weight_files

if TYPE_CHECKING:
    import torch

_LENGTH = 16  # hex digits, 64 bits


def fingerprint(model: str, part: str, *, revision: str | None = None, variant: str | None = None) -> str:
    """16 hex digits over the part's config and weights (tokenizers: their vocabulary).

    Keys that begin with "_" are left out of the config: they hold library versions and paths.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    folder = hub.part_folder(model, part, revision, variant=variant)
    digest = hashlib.sha256()
    config = json.loads((folder / PARTS[part]).read_text(encoding="utf-8"))
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    if part in WEIGHT_STEMS:
        stem = WEIGHT_STEMS[part]
        files = weight_files(folder, stem, variant_to_load(folder, stem, variant))
    else:
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for file in files:
        status = file.stat()
        digest.update(_file_digest(str(file), status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:_LENGTH]


@functools.lru_cache(maxsize=256)
def _file_digest(path: str, size: int, mtime_ns: int) -> bytes:
    """sha256 of a file, read once per process: size and time in the key, so that a changed file is read again."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def text_fingerprint(model: str, *, revision: str | None = None, variant: str | None = None) -> str:
    """Both text encoders and both tokenizers in one hash: what a cached text embedding belongs to.

    Raises:
        ModelError: a part is missing, or the Hub does not give it.
    """
    parts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    joined = ",".join(fingerprint(model, part, revision=revision, variant=variant) for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()[:_LENGTH]


def vae_fingerprint(
    model: str, dtype: str | torch.dtype, *, revision: str | None = None, variant: str | None = None
) -> str:
    """The VAE and the dtype it computes in ("bfloat16" or torch.bfloat16): what a cached latent belongs to.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    part = fingerprint(model, "vae", revision=revision, variant=variant)
    return hashlib.sha256(f"{part},{str(dtype).removeprefix('torch.')}".encode()).hexdigest()[:_LENGTH]


def unet_weight_shapes(model: str, *, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of each U-Net weight, as in its state dict, for estimates. Reads headers only, also on the Hub.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    stem = WEIGHT_STEMS["unet"]
    if hub.is_local(model):
        folder = hub.part_folder(model, "unet")
        files = weight_files(folder, stem, variant_to_load(folder, stem, None))
        shapes = [header_shapes(file) for file in files]
    else:
        folder = hub.part_folder(model, "unet", revision, config_only=True)
        files = weight_files(folder, stem, variant_to_load(folder, stem, None))
        shapes = [
            header_shapes(file) if file.is_file() else hub.remote_header_shapes(model, revision, f"unet/{file.name}")
            for file in files
        ]
    return {name: shape for part in shapes for name, shape in part.items()}
