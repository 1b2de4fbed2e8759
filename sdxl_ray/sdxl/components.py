"""The base model's parts, from a folder or the Hub, one at a time.

    "builtin:tiny" | folder | owner/name ──resolve_model──▶ folder or Hub id ──load_*──▶ frozen modules
                                                                            ──fingerprint, shapes──▶ no torch needed

A stage loads what it needs: the U-Net never shares memory with the text encoders. Weights are safetensors only, since
a `.bin` is a pickle and can run code when it is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import ModelError
from sdxl_ray.sdxl import hub
from sdxl_ray.sdxl.files import PARTS, WEIGHT_STEMS, missing_files, pickled_weights, variant_to_load, weight_files
from sdxl_ray.sdxl.fingerprint import fingerprint, text_fingerprint, unet_weight_shapes, vae_fingerprint
from sdxl_ray.sdxl.quiet import quiet_libraries
from sdxl_ray.sdxl.tiny import builtin_model

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "TextEncoders",
    "fingerprint",
    "load_scheduler_config",
    "load_text_encoders",
    "load_unet",
    "load_vae",
    "objective_warning",
    "read_part_config",
    "resolve_model",
    "text_fingerprint",
    "unet_identity",
    "unet_weight_shapes",
    "vae_fingerprint",
]


# 64 samples of 4 KiB: training changes a weight everywhere, so two finetunes differ in the first of them already
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class TextEncoders:
    """Both CLIPs with their tokenizers. Encoder 2 gives the pooled vector."""

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection


def resolve_model(path: str) -> str:
    """What `path` means: the absolute path of a complete SDXL in the diffusers layout, or a Hub id, unchanged.

    `path` is "builtin:tiny", a folder, or `owner/name` on the Hub. A Hub id is checked for its form only.

    Raises:
        ModelError: nothing there, a part missing, pickled weights, a single file, or another kind of model.
    """
    if path.startswith("builtin:"):
        return str(builtin_model(path.removeprefix("builtin:")))
    folder = Path(path).expanduser()
    if folder.suffix in {".safetensors", ".ckpt"}:
        raise ModelError(
            f"{path} is a single file; this trainer reads the diffusers folder layout. Convert it once with\n"
            f"  python -c \"from diffusers import StableDiffusionXLPipeline as P; P.from_single_file('{path}')"
            f".save_pretrained('{folder.with_suffix('')}')\"\nand use {folder.with_suffix('')} as the model."
        )
    if path and folder.is_dir():  # an empty path would mean the current folder
        _check_layout(folder)
        return str(folder.resolve())
    if path and folder.exists():
        raise ModelError(
            f"{path} is a file; expected a folder in the diffusers layout, or a Hub id such as owner/name."
        )
    if path.startswith(("/", ".", "~")) or "\\" in path or (path.count("/") == 1 and folder.parent.is_dir()):
        raise ModelError(
            f"there is no folder {path} (looked at {folder.absolute()}). Check the path; on a cluster every node must "
            "see it. Or give a Hub id such as stabilityai/stable-diffusion-xl-base-1.0, or builtin:tiny."
        )
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path):
        raise ModelError(
            f"{path!r} is neither a folder nor a Hub id. Expected a folder in the diffusers layout, owner/name on the "
            "Hub (stabilityai/stable-diffusion-xl-base-1.0), or builtin:tiny."
        )
    return path


def _check_layout(folder: Path) -> None:
    pickles = [file for part in PARTS for file in pickled_weights(folder, part)]
    if pickles:
        raise ModelError(
            f"{folder}: {', '.join(pickles)} {'is a pickle' if len(pickles) == 1 else 'are pickles'}, which can run "
            "code when read, and there is no safetensors file beside. If you trust the source, convert it once with\n"
            f"  python -c \"from diffusers import StableDiffusionXLPipeline as P; P.from_pretrained('{folder}')"
            f".save_pretrained('{folder}-safetensors')\""
        )
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    missing += [file for part in PARTS for file in missing_files(folder, part)]
    if missing:
        raise ModelError(
            f"{folder} is not a complete SDXL{_kind_note(folder)}. Missing: {', '.join(missing)}. Expected "
            f"model_index.json and the folders {', '.join(PARTS)}, each with its config and safetensors weights. "
            "Copy the missing files, or fetch the model again: "
            f"hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir {folder}"
        )
    unet = json.loads((folder / "unet" / "config.json").read_text())
    found = (unet.get("addition_embed_type"), unet.get("in_channels", 4))
    if found != ("text_time", 4):
        raise ModelError(
            f"{folder} is not an SDXL base model: unet/config.json has addition_embed_type {found[0]!r} and "
            f"{found[1]} input channels, expected 'text_time' and 4. Give an SDXL text-to-image model."
        )


def _kind_note(folder: Path) -> str:
    """Names the pipeline when model_index.json says that this is something else."""
    try:
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError):
        return ""
    return "" if kind.startswith("StableDiffusionXL") else f" (model_index.json says {kind})"


def load_unet(
    model: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> UNet2DConditionModel:
    """The frozen U-Net in eval mode. `model` is what `resolve_model` returned.

    `variant` ("fp16") names the weight files to read; a folder that has only the fp16 ones needs no asking.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, model, "unet", dtype, device, revision, variant)


def load_vae(
    model: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> AutoencoderKL:
    """The frozen VAE in eval mode. In fp16 SDXL's own overflows to NaN: use fp32 or bf16 (diffusers' `force_upcast`).

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    from diffusers import AutoencoderKL

    return _load(AutoencoderKL, model, "vae", dtype, device, revision, variant)


def load_text_encoders(
    model: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> TextEncoders:
    """Both frozen text encoders in eval mode, with their tokenizers.

    Raises:
        ModelError: a part is missing, or the Hub does not give it.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    quiet_libraries()
    return TextEncoders(
        tokenizer=CLIPTokenizer.from_pretrained(hub.part_folder(model, "tokenizer", revision)),
        tokenizer_2=CLIPTokenizer.from_pretrained(hub.part_folder(model, "tokenizer_2", revision)),
        text_encoder=_load(CLIPTextModel, model, "text_encoder", dtype, device, revision, variant),
        text_encoder_2=_load(CLIPTextModelWithProjection, model, "text_encoder_2", dtype, device, revision, variant),
    )


def load_scheduler_config(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """The scheduler's config: betas, spacing, prediction_type.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    return read_part_config(model, "scheduler", revision=revision)


def read_part_config(model: str, part: str, *, revision: str | None = None) -> dict[str, Any]:
    """The config of one part as it is on disk, for example `unet/config.json`. Fetches no weights and needs no torch.

    Raises:
        ModelError: the part is missing, or the Hub does not give it.
    """
    path = hub.part_folder(model, part, revision, config_only=True) / PARTS[part]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Copy it again from the model's source.") from error


def objective_warning(objective: str, scheduler_config: Mapping[str, Any]) -> str:
    """One line where `loss.objective` is not what the model's scheduler says it predicts; empty where it is.

    No error, since the config of a finetune is often a copy of SDXL base's.
    """
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction == objective:
        return ""
    return (
        f'loss.objective = "{objective}", but the scheduler of model.path says "{prediction}". '
        f'Set loss.objective = "{prediction}", unless you know that its config is wrong.'
    )


def unet_identity(model: str, *, revision: str | None = None, variant: str | None = None) -> str:
    """Which U-Net this is, in milliseconds: what a resumed run has to have in common with the run it continues.

    A folder is known by the U-Net's config and, of each weight file, its size and samples of its bytes: moved or
    renamed it stays the same, and another finetune of the same shape does not. (`fingerprint` reads all of the 5 to 10
    GB.) A model on the Hub is known by its commit where the local cache knows it, else by the revision's name.

    Raises:
        ModelError: the part is missing.
    """
    if not hub.is_local(model):
        return f"{model}@{_cached_commit(model, revision or 'main')}" + (f" {variant}" if variant else "")
    folder, stem = hub.part_folder(model, "unet", variant=variant), WEIGHT_STEMS["unet"]
    config = {key: value for key, value in read_part_config(model, "unet").items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder, stem, variant_to_load(folder, stem, variant)):
        try:
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for number in range(_NUM_SAMPLES):
                    file.seek(number * size // _NUM_SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error}). Copy it again from the model's source.") from error
    return digest.hexdigest()[:16]


def _cached_commit(model: str, revision: str) -> str:
    """The commit that a branch or tag was when it was last fetched; the name itself where nothing was. No network."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model") / "refs" / revision
    try:
        return reference.read_text(encoding="utf-8").strip()
    except OSError:
        return revision


def _load(
    kind: Any,
    model: str,
    part: str,
    dtype: torch.dtype,
    device: str | torch.device,
    revision: str | None,
    variant: str | None,
) -> Any:
    quiet_libraries()
    folder = hub.part_folder(model, part, revision, variant=variant)
    from safetensors import SafetensorError

    variant = variant_to_load(folder, WEIGHT_STEMS[part], variant)
    try:
        module = kind.from_pretrained(str(folder), dtype=dtype, variant=variant, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as {kind.__name__}: {error}. "
            "Check that the download is complete; copy or fetch this folder again."
        ) from error
    return module.to(device).requires_grad_(False).eval()
