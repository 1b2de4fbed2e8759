"""Nothing is called exported that was not read back: the last stage of a training, and its proof.

1  what the trained models answer to a fixed probe       probe_models
2  what was trained, then the models without it          trained_modules, detach_adapter
3  each format under a name that no program picks up     exporters: formats, svd, whole_model
4  that file through its reader                          exporters: reading_back, reading_back_whole
5  same answer, same weight change? then the final name  _export
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from sdxl_ray.errors import ExportError
from sdxl_ray.export.exporters import EXPORTS, OUTPUT_TOLERANCE, UNVERIFIED, Job
from sdxl_ray.export.probe import probe_models
from sdxl_ray.export.reading_back import cure
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.tensor_file import DTYPES, FileDtype
from sdxl_ray.export.which import is_whole_model, refuse
from sdxl_ray.export.whole_model import BaseModel
from sdxl_ray.records import ExportedFile
from sdxl_ray.sdxl.adapters import detach_adapter, trained_modules
from sdxl_ray.sdxl.conditioning import unet_dtype


def export_adapter(
    unet: diffusers.UNet2DConditionModel,
    *,
    folder: Path,
    name: str,
    spec: AdapterSpec,
    metadata: Mapping[str, str],
    formats: Sequence[str] = ("kohya", "diffusers"),
    dtype: FileDtype = "fp32",
    text_encoders: Mapping[str, nn.Module] | None = None,
    svd_rank: int = 0,
    base: BaseModel | None = None,
    unet_weights: Mapping[str, Tensor] | None = None,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    empty_prompt_is_zeros: bool = True,
) -> list[ExportedFile]:
    """Write what was trained in each format and prove each file.

    **Afterwards no model has an adapter.**

    Names are those of `file_name`. A file takes its name when it has passed. One that fails stays as `<file>.rejected`,
    which no program lists among its LoRAs, for whoever looks into it; an older file of the name is not touched.

    Args:
        text_encoders: "text_encoder" and "text_encoder_2", those with an adapter.
        svd_rank: of kohya-svd; 0: four times the largest rank of the U-Net's modules. Plain LoRAs of no higher rank go
            into it as they are.
        base: the base model's files, for checkpoint and diffusers-folder.
        unet_weights: of kind "full": the trained weights by name, float32 masters; None: the U-Net's own.
        prediction_type, zero_terminal_snr: what whole models say about themselves.
        empty_prompt_is_zeros: the same, of the diffusers-folder: False where captions were dropped to the encoded empty
            text; then an empty prompt is not turned into zeros, whatever the base model says.

    Raises:
        ExportError: what was trained does not fit a format, or a file does not give it back.
        StorageError: the disk is full or read-only.
    """
    encoders = {part: encoder for part, encoder in (text_encoders or {}).items() if trained_modules(encoder)}
    for format_name in formats:
        reason = refuse(spec.kind, format_name, bool(encoders))
        if reason is None and is_whole_model(format_name) and base is None:
            reason = f"The format {format_name} needs the base model's files, and none were given."
        if reason:
            raise ExportError(reason)
    models: dict[str, nn.Module] = {"unet": unet, **encoders}
    parts = {part: modules for part, model in models.items() if (modules := trained_modules(model))}
    reference = probe_models(models)
    for model in models.values():
        detach_adapter(model)
    job = Job(
        models=models,
        parts=parts,
        reference=reference,
        spec=spec,
        metadata=metadata,
        dtype=dtype,
        coarsest=max([DTYPES[dtype], unet_dtype(unet), *_dtypes(encoders)], key=lambda one: OUTPUT_TOLERANCE[one]),
        svd_rank=svd_rank,
        base=base,
        unet_weights=_full_weights(unet, unet_weights) if spec.kind == "full" else {},
        says={"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr},
        empty_prompt_is_zeros=empty_prompt_is_zeros,
    )
    return [_export(job, format_name, folder / file_name(name, format_name, spec.kind)) for format_name in formats]


def file_name(name: str, format_name: str, kind: str) -> str:
    """What the file or folder of a format is called.

    `<name>.safetensors` is what people take into ComfyUI and A1111: kohya's format, but of a DoRA the plain LoRA that
    comes nearest, because few programs read a DoRA; it is in `<name>.dora.safetensors`. `<name>.<format>.safetensors`
    the others, `<name>.diffusers-folder` a folder.

    Args:
        kind: as in adapter.kind.
    """
    if format_name == "diffusers-folder":
        return f"{name}.diffusers-folder"
    middles = {"kohya": "dora", "kohya-svd": ""} if kind == "dora" else {"kohya": ""}
    middle = middles.get(format_name, format_name)
    return ".".join(part for part in (name, middle, "safetensors") if part)


def _dtypes(encoders: Mapping[str, nn.Module]) -> list[torch.dtype]:
    return [next(parameter.dtype for parameter in encoder.parameters()) for encoder in encoders.values()]


def _full_weights(unet: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    own = unet.state_dict()
    missing = [] if weights is None else sorted(own.keys() - weights.keys())
    if missing:  # the U-Net's own copies may be rounded to bf16
        raise ExportError(
            f"{len(missing)} of the U-Net's {len(own)} weights are not among those that were trained, such as "
            f"{missing[0]}. Pass the masters of all of them, or none."
        )
    return {name: tensor if weights is None else weights[name] for name, tensor in own.items()}


def _export(job: Job, format_name: str, path: Path) -> ExportedFile:
    unverified = path.with_name(path.name + UNVERIFIED)
    try:
        try:
            error, note, warning = EXPORTS[format_name](job, unverified)
        except RuntimeError as failure:  # torch's: no memory left, a shape or a dtype that a layer cannot take
            raise ExportError(
                f"{path.name} could not be verified: {type(failure).__name__} while it was written and read back "
                f"({failure}). Where memory ran out, export with nothing else on the device. {cure()}"
            ) from failure
    except ExportError as refusal:
        if not unverified.exists():
            raise
        rejected = path.with_name(f"{path.name}.rejected")
        _replace(unverified, rejected)
        raise ExportError(f"{refusal} The file is kept as {rejected}.") from refusal
    _replace(unverified, path)
    return ExportedFile(path, format_name, error, note, warning)


def _replace(source: Path, target: Path) -> None:
    """A folder cannot take the place of another that is not empty."""
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
