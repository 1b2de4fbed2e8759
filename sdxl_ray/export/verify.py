"""Nothing is called exported that was not read back: the last stage of a training, and its proof.

1  what the trained models answer to a fixed probe       probe_models
2  what was trained, then the models without it          trained_modules, detach_adapter
3  each format under a name that no program picks up     formats, svd, whole_model
4  that file through its reader                          reading_back, reading_back_whole
5  same answer, same weight change? then the final name  export_adapter
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import Parts, write_diffusers, write_kohya
from sdxl_ray.export.metadata import plain_lora_metadata, whole_model_metadata
from sdxl_ray.export.probe import probe_models, relative_error
from sdxl_ray.export.reading_back import (
    ReadBack,
    cure,
    num_weights,
    read_back_by_definition,
    read_back_by_diffusers,
    swapped,
)
from sdxl_ray.export.reading_back_whole import read_back_checkpoint, read_back_folder, weights_of
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.svd import nearest_lora
from sdxl_ray.export.tensor_file import DTYPES, FileDtype
from sdxl_ray.export.which import is_whole_model, refuse
from sdxl_ray.export.whole_model import BaseModel, Trained, Weights, merged, write_checkpoint, write_folder
from sdxl_ray.records import ExportedFile
from sdxl_ray.sdxl.adapters import base_weight, detach_adapter, trained_modules
from sdxl_ray.sdxl.components import load_scheduler_config, read_part_config
from sdxl_ray.sdxl.conditioning import unet_dtype
from sdxl_ray.sdxl.trained import TrainedModule

# Largest output difference over largest output, by the coarser of the file's and the models' dtypes. A bf16 U-Net
# rounds to 8 significant bits in each layer, and training may have computed with bf16 copies of the adapter: some per
# cent of difference are rounding there and could hide a real error (1.4 % seen on the tiny SDXL). That is why the
# weight change is compared as well.
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Frobenius norm of the difference over that of the trained change, worst module, by the same dtype (diffusers casts
# what it reads to the U-Net's). fp32: folding the scale rounds once. bf16: lora_A and lora_B are rounded to 8 bits
# each, 0.3 % seen; fp16 rounds less, but loses what lies below 6e-8.
DELTA_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Above this a plain LoRA is no good stand-in for what was trained.
SVD_WARNING = 0.05


@dataclass(frozen=True)
class _Job:
    """What all formats have in common; `models` have no adapters any more."""

    models: Mapping[str, nn.Module]
    parts: Parts
    reference: Mapping[str, Tensor]
    spec: AdapterSpec
    metadata: Mapping[str, str]
    dtype: FileDtype
    coarsest: torch.dtype
    svd_rank: int
    base: BaseModel | None
    unet_weights: Mapping[str, Tensor]
    says: Mapping[str, Any]  # what the model predicts

    @property
    def layers_per_block(self) -> int:
        unet: Any = self.models["unet"]
        return unet.config.layers_per_block


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
) -> list[ExportedFile]:
    """Write what was trained in each format and prove each file.

    **Afterwards no model has an adapter.**

    `<name>.safetensors` is kohya's format, which is what users of ComfyUI and A1111 expect under a plain name;
    `<name>.<format>.safetensors` the others, `<name>.diffusers-folder` a folder. A file takes its name when it has
    passed. One that fails stays as `<file>.rejected`, which no program lists among its LoRAs, for whoever looks into
    it; an older file of the name is not touched.

    Args:
        text_encoders: "text_encoder" and "text_encoder_2", those with an adapter.
        svd_rank: of kohya-svd; 0: four times the adapter's.
        base: the base model's files, for checkpoint and diffusers-folder.
        unet_weights: of kind "full": the trained weights by name, float32 masters; None: the U-Net's own.
        prediction_type, zero_terminal_snr: what whole models say about themselves.

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
    job = _Job(
        models=models,
        parts=parts,
        reference=reference,
        spec=spec,
        metadata=metadata,
        dtype=dtype,
        coarsest=max([DTYPES[dtype], unet_dtype(unet), *_dtypes(encoders)], key=lambda one: OUTPUT_TOLERANCE[one]),
        svd_rank=svd_rank or 4 * spec.rank,
        base=base,
        unet_weights=_full_weights(unet, unet_weights) if spec.kind == "full" else {},
        says={"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr},
    )
    return [_export(job, format_name, folder / file_name(name, format_name)) for format_name in formats]


def file_name(name: str, format_name: str) -> str:
    """What the file or folder of a format is called."""
    if format_name == "kohya":
        return f"{name}.safetensors"
    return f"{name}.{format_name}" + ("" if format_name == "diffusers-folder" else ".safetensors")


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


def _export(job: _Job, format_name: str, path: Path) -> ExportedFile:
    unverified = path.with_name(f"{path.name}.unverified")
    try:
        error, note, warning = _EXPORTS[format_name](job, unverified)
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


_Exported = tuple[float, str, str]  # relative error of the output, note, warning


def _kohya(job: _Job, path: Path) -> _Exported:
    write_kohya(path, job.parts, job.metadata, dtype=job.dtype, layers_per_block=job.layers_per_block)
    if job.spec.kind == "lora":
        return _checked(job, path, job.parts, read_back_by_diffusers(path, job.models, job.parts)), "", ""
    return _checked(job, path, job.parts, read_back_by_definition(path, job.models, job.parts)), "", ""


def _diffusers(job: _Job, path: Path) -> _Exported:
    write_diffusers(path, job.parts, job.metadata, dtype=job.dtype)
    rounding = 4 * torch.finfo(job.coarsest).eps
    return (
        _checked(job, path, job.parts, read_back_by_diffusers(path, job.models, job.parts, rounding=rounding)),
        "",
        "",
    )


def _nearest(job: _Job, path: Path) -> _Exported:
    parts: dict[str, dict[str, TrainedModule]] = {}
    errors: dict[str, float] = {}
    device = next(job.models["unet"].parameters()).device
    for part, modules in job.parts.items():
        parts[part] = {}
        for module_path, module in modules.items():
            model: Any = job.models[part]
            if part != "unet":  # a LoRA already
                parts[part][module_path] = module
                continue
            weight = base_weight(model.get_submodule(module_path))
            parts[part][module_path], errors[module_path] = nearest_lora(
                module, weight, rank=job.svd_rank, device=device
            )
    header = plain_lora_metadata(job.metadata, rank=job.svd_rank)
    write_kohya(path, parts, header, dtype=job.dtype, layers_per_block=job.layers_per_block)
    read = read_back_by_diffusers(path, job.models, parts)
    _checked(job, path, parts, read, output_tolerance=math.inf)  # it holds that LoRA; how near is told below
    worst = max(errors, key=lambda module_path: errors[module_path])
    mean = sum(errors.values()) / len(errors)
    note = (
        f"{path.name.removesuffix('.unverified')} is the nearest plain LoRA of rank {job.svd_rank}: its weight change "
        f"is off by {errors[worst]:.1%} at worst ({worst}), {mean:.1%} on average."
    )
    warning = ""
    if errors[worst] > SVD_WARNING:
        warning = f"{note} Raise export.svd_rank to come nearer, or use a program that reads {job.spec.kind} files."
    return relative_error(read.answers, job.reference), note, warning


def _checkpoint(job: _Job, path: Path) -> _Exported:
    base, trained, parts = _merged(job)
    metadata = whole_model_metadata(job.metadata)
    scheduler = load_scheduler_config(base.path, revision=base.revision)  # a base that says so is trained so
    says = {**job.says}
    says["zero_terminal_snr"] = says["zero_terminal_snr"] or scheduler.get("rescale_betas_zero_snr", False)
    write_checkpoint(path, parts, metadata, dtype=job.dtype, layers_per_block=job.layers_per_block, **says)
    unet: Any = job.models["unet"]
    vae_config = read_part_config(base.vae or base.path, "vae", revision=None if base.vae else base.revision)
    found = read_back_checkpoint(path, parts, dtype=job.dtype, unet_config=dict(unet.config), vae_config=vae_config)
    return _checked_whole(job, path, trained, found), "", ""


def _folder(job: _Job, path: Path) -> _Exported:
    base, trained, parts = _merged(job)
    metadata = whole_model_metadata(job.metadata)
    write_folder(path, base, parts, trained, metadata, dtype=job.dtype, **job.says)
    changed = {*job.parts, "unet"} if trained.unet_weights else set(job.parts)
    found = read_back_folder(path, parts, dtype=job.dtype, changed=changed)
    return _checked_whole(job, path, trained, found), "", ""


_EXPORTS: dict[str, Callable[[_Job, Path], _Exported]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "kohya-svd": _nearest,
    "checkpoint": _checkpoint,
    "diffusers-folder": _folder,
}


def _merged(job: _Job) -> tuple[BaseModel, Trained, dict[str, Any]]:
    assert job.base is not None  # asked for in export_adapter
    trained = Trained(job.parts, job.unet_weights)
    return job.base, trained, merged(job.base, trained)


def _checked(job: _Job, path: Path, parts: Parts, read: ReadBack, *, output_tolerance: float | None = None) -> float:
    """The relative error of the output; an ExportError where the file does not give back `parts`."""
    tolerance = OUTPUT_TOLERANCE[job.coarsest] if output_tolerance is None else output_tolerance
    delta_tolerance = DELTA_TOLERANCE[job.coarsest]
    error = relative_error(read.answers, job.reference) if read.answers else read.delta_error
    num_in_file = num_weights(path)
    num_trained = sum(len(module.tensors) for modules in parts.values() for module in modules.values())
    # written as "not <=" so that NaN fails
    if (
        num_in_file != read.num_read
        or read.num_read != num_trained
        or (not error <= tolerance and output_tolerance is None)
        or not read.delta_error <= delta_tolerance
    ):
        raise ExportError(
            f"{path.name.removesuffix('.unverified')} does not give back the trained LoRA. "
            f"Relative error of the output: {error:.1e}, allowed {tolerance:.0e}. "
            f"Of the weight change: {read.delta_error:.1e} in {read.worst_module}, allowed {delta_tolerance:.0e}. "
            f"Weights: {num_trained} trained, {num_in_file} in the file, {read.num_read} read. {cure()}"
        )
    return error


def _checked_whole(job: _Job, path: Path, trained: Trained, found: Weights) -> float:
    """The same for whole models, whose weights were compared already; quantised models cannot be asked, and give 0."""
    weights = {}
    for part, model in job.models.items():
        own = weights_of(model, part, found)
        everything = part == "unet" and bool(trained.unet_weights)
        changed = {f"{module_path}.weight" for module_path in trained.modules.get(part, {})}
        weights[part] = {name: weight.make() for name, weight in own.items() if everything or name in changed}
    with swapped(job.models, weights) as possible:
        error = relative_error(probe_models(job.models), job.reference) if possible else 0.0
    if not error <= OUTPUT_TOLERANCE[job.coarsest]:
        raise ExportError(
            f"{path.name.removesuffix('.unverified')} does not draw as the trained model does. Relative error of the "
            f"output: {error:.1e}, allowed {OUTPUT_TOLERANCE[job.coarsest]:.0e}. {cure()}"
        )
    return error
