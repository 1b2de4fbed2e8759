"""What a part of the model is, as a short hash and as shapes: from its files, without torch.

A cached latent belongs to one VAE, a cached embedding to one pair of text encoders; the hash says which. It depends on
the bytes, not on the path or the Hub id, so a moved or renamed model keeps its cache; of a model on the Hub, only the
configs and vocabularies are fetched to know it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray.sdxl import hub
from sdxl_ray.sdxl.digests import file_sha256
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
    if hub.is_local(model) or part not in WEIGHT_STEMS:
        folder = hub.part_folder(model, part, revision, variant=variant)
        digests = _local_digests(folder, part, variant)
    else:
        folder = hub.part_folder(model, part, revision, config_only=True)
        digests = _hub_digests(model, folder, part, revision, variant)
    config = json.loads((folder / PARTS[part]).read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    for sha256 in digests:
        digest.update(bytes.fromhex(sha256))
    return digest.hexdigest()[:_LENGTH]


def _local_digests(folder: Path, part: str, variant: str | None) -> list[str]:
    if part in WEIGHT_STEMS:
        stem = WEIGHT_STEMS[part]
        files = weight_files(folder, stem, variant_to_load(folder, stem, variant))
    else:
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [file_sha256(file) for file in files]


def _hub_digests(model: str, folder: Path, part: str, revision: str | None, variant: str | None) -> list[str]:
    """The same without fetching gigabytes only to hash them: the Hub knows, and so do the names in its local cache."""
    files = weight_files(folder, WEIGHT_STEMS[part], variant)
    known = {file.name: file_sha256(file) for file in files if file.is_file()}
    elsewhere = [f"{part}/{file.name}" for file in files if file.name not in known]
    if elsewhere:
        told = hub.remote_sha256(model, revision, elsewhere)
        known.update({name.rpartition("/")[2]: sha256 for name, sha256 in told.items()})
    if all(file.name in known for file in files):
        return [known[file.name] for file in files]
    return _local_digests(hub.part_folder(model, part, revision, variant=variant), part, variant)


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


def unet_weight_shapes(
    model: str, *, revision: str | None = None, variant: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each U-Net weight, as in its state dict, for estimates. Reads headers only, also on the Hub.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    stem = WEIGHT_STEMS["unet"]
    if hub.is_local(model):
        folder = hub.part_folder(model, "unet", variant=variant)
        files = weight_files(folder, stem, variant_to_load(folder, stem, variant))
        shapes = [header_shapes(file) for file in files]
    else:
        folder = hub.part_folder(model, "unet", revision, config_only=True)
        files = weight_files(folder, stem, variant_to_load(folder, stem, variant))
        shapes = [
            header_shapes(file) if file.is_file() else hub.remote_header_shapes(model, revision, f"unet/{file.name}")
            for file in files
        ]
    return {name: shape for part in shapes for name, shape in part.items()}
