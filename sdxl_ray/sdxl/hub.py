"""A part of a model as a local folder, fetched from the Hub when it is not there yet. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_ray.errors import ModelError
from sdxl_ray.sdxl.files import PARTS, TOKENIZER_FILES, WEIGHT_STEMS, missing_files


def is_local(model: str) -> bool:
    """Whether `resolve_model` gave a folder rather than a Hub id."""
    return Path(model).is_absolute()


def part_folder(
    model: str, part: str, revision: str | None = None, *, variant: str | None = None, config_only: bool = False
) -> Path:
    """The folder of `part`, which holds its config and (unless `config_only`) all of its files.

    From the Hub only these files are fetched, not the .bin, ONNX and fp16 copies that lie beside them.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    if part not in PARTS:
        raise ModelError(f"an SDXL has no part {part!r}. Its parts: {', '.join(PARTS)}.")
    root = Path(model)
    if not is_local(model):
        root = _fetch(model, part, revision, variant, config_only)
    if config_only:
        missing = [] if (root / part / PARTS[part]).is_file() else [f"{part}/{PARTS[part]}"]
    else:
        missing = [] if variant else missing_files(root, part)
    if missing and is_local(model):
        raise ModelError(f"{model}: {', '.join(missing)} is missing. Copy it from the model's source.")
    if missing:
        raise ModelError(
            f"{model} on the Hub gave no {', '.join(missing)}. Either it is not an SDXL in the diffusers layout, or it "
            "was fetched only in part and the Hub is out of reach now (HF_HUB_OFFLINE?). Fetch it while online: "
            f"hf download {model}. If it has only fp16 weights, set the variant to fp16."
        )
    return root / part


def _fetch(model: str, part: str, revision: str | None, variant: str | None, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*.json", "model_index.json"]  # which says what an empty prompt is; whole-model exports ask it
    unwanted: list[str] = []
    if part.startswith("tokenizer"):
        wanted = [*(f"{part}/{name}" for name in (PARTS[part], *TOKENIZER_FILES)), "model_index.json"]
    elif part in WEIGHT_STEMS and not config_only:
        wanted.append(f"{part}/{WEIGHT_STEMS[part]}{f'*.{variant}' if variant else ''}*.safetensors")
        unwanted = [] if variant else ["*.fp16*", "*.non_ema*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        raise _explained(error, model, revision) from error


def remote_header_shapes(model: str, revision: str | None, file: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of one safetensors file on the Hub, by reading its header alone.

    Raises:
        ModelError: the Hub does not give it.
    """
    from huggingface_hub import parse_safetensors_file_metadata

    try:
        tensors: dict[str, Any] = parse_safetensors_file_metadata(model, file, revision=revision).tensors
    except Exception as error:
        raise _explained(error, model, revision) from error
    return {name: tuple(info.shape) for name, info in tensors.items()}


def remote_sha256(model: str, revision: str | None, files: Sequence[str]) -> dict[str, str]:
    """sha256 of large files of a repository, without fetching them; those that the Hub does not tell are left out."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        found = HfApi().get_paths_info(model, list(files), revision=revision)
    except Exception:  # offline, gated: who fetches the files will be told why
        return {}
    return {file.path: file.lfs.sha256 for file in found if isinstance(file, RepoFile) and file.lfs}


def cached_sha256(path: Path) -> str | None:
    """sha256 of a file in the Hub's local cache: a link to a blob that is called by it. None for any other file.

    Source: huggingface.co/docs/huggingface_hub/guides/manage-cache (git hashes, 40 digits, name the small files).
    """
    if not path.is_symlink() or not path.is_file():
        return None
    blob = path.readlink()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def _explained(error: Exception, model: str, revision: str | None) -> ModelError:
    """The cause in a sentence, then every cure that can apply.

    Causes differ in type between huggingface_hub's releases, so whatever is not recognised is quoted.
    """
    from huggingface_hub import errors as hub_errors

    at = f"{model}@{revision}" if revision else model
    if isinstance(error, hub_errors.GatedRepoError):
        return ModelError(
            f"{at} is gated: accept its licence at https://huggingface.co/{model}, then `hf auth login` or set "
            "HF_TOKEN on every node."
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return ModelError(
            f"{at} is not on the Hub, or is private. Check the spelling; for a private model `hf auth login` or set "
            "HF_TOKEN on every node. A local folder is given by its path (./models/sdxl)."
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return ModelError(f"{model} has no revision {revision!r}. Leave it out, or see https://huggingface.co/{model}.")
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ModelError(
        f"{at} cannot be fetched from the Hub and is not in the local cache: {first_line}\n"
        "Unset HF_HUB_OFFLINE if it is set; behind a firewall set HF_ENDPOINT to a mirror; for a gated or private "
        f"model `hf auth login`; or fetch it elsewhere with `hf download {model} --local-dir FOLDER` and give FOLDER."
    )
