"""One format at a time: written, read back through its reader, compared with what was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import Parts, write_diffusers, write_kohya
from sdxl_ray.export.metadata import plain_lora_metadata, whole_model_metadata
from sdxl_ray.export.probe import probe_models, relative_error
from sdxl_ray.export.reading_back import (
    ReadBack,
    can_be_replaced,
    cure,
    num_weights,
    read_back_by_definition,
    read_back_by_diffusers,
    replacing,
)
from sdxl_ray.export.reading_back_whole import read_back_checkpoint, read_back_folder, weights_of
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.svd import nearest_lora
from sdxl_ray.export.tensor_file import FileDtype
from sdxl_ray.export.which import DORA_IN_KOHYA
from sdxl_ray.export.whole_model import BaseModel, Trained, Weights, merged, write_checkpoint, write_folder
from sdxl_ray.sdxl.adapters import base_weight
from sdxl_ray.sdxl.components import load_scheduler_config, read_part_config
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
# What a file's name ends with until it has passed: no program lists it.
UNVERIFIED = ".unverified"
# Above this a plain LoRA is no good stand-in for what was trained.
SVD_WARNING = 0.05


@dataclass(frozen=True)
class Job:
    """What all formats have in common; `models` have no adapters any more.

    svd_rank  of kohya-svd; 0: four times the largest rank of the U-Net's modules
    says      the model predicts: prediction_type, zero_terminal_snr
    """

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
    says: Mapping[str, Any]
    empty_prompt_is_zeros: bool = True

    @property
    def layers_per_block(self) -> int:
        unet: Any = self.models["unet"]
        return unet.config.layers_per_block


Exported = tuple[float, str, str]  # relative error of the output, note, warning


def _kohya(job: Job, path: Path) -> Exported:
    write_kohya(path, job.parts, job.metadata, dtype=job.dtype, layers_per_block=job.layers_per_block)
    read_back = read_back_by_diffusers if job.spec.kind == "lora" else read_back_by_definition
    error = _checked(job, path, job.parts, read_back(path, job.models, job.parts))
    warning = ""
    if job.spec.kind == "dora":
        warning = f"{_final_name(path)} is a DoRA: {DORA_IN_KOHYA}. For these, take the file of the format kohya-svd."
    return error, "", warning


def _diffusers(job: Job, path: Path) -> Exported:
    write_diffusers(path, job.parts, job.metadata, dtype=job.dtype)
    rounding = 4 * torch.finfo(job.coarsest).eps
    read = read_back_by_diffusers(path, job.models, job.parts, rounding=rounding)
    return _checked(job, path, job.parts, read), "", ""


def _nearest(job: Job, path: Path) -> Exported:
    unet, modules = job.models["unet"], job.parts["unet"]
    svd_rank = job.svd_rank or 4 * max(module.rank for module in modules.values())
    device = next(unet.parameters()).device
    found: dict[str, TrainedModule] = {}
    errors: dict[str, float] = {}
    for module_path, module in modules.items():
        if module.kind == "lora" and module.rank <= svd_rank:
            found[module_path], errors[module_path] = module, 0.0
            continue
        weight = base_weight(unet.get_submodule(module_path))
        found[module_path], errors[module_path] = nearest_lora(module, weight, rank=svd_rank, device=device)
    parts = {**job.parts, "unet": found}  # the text encoders' are LoRAs already
    header = plain_lora_metadata(job.metadata, rank=svd_rank)
    write_kohya(path, parts, header, dtype=job.dtype, layers_per_block=job.layers_per_block)
    read = read_back_by_diffusers(path, job.models, parts)
    _checked(job, path, parts, read, output_tolerance=math.inf)  # it holds that LoRA; how near is told below
    worst = max(errors, key=lambda module_path: errors[module_path])
    mean = sum(errors.values()) / len(errors)
    note = (
        f"{_final_name(path)} is the nearest plain LoRA of rank {svd_rank}: its weight change is off by "
        f"{errors[worst]:.1%} at worst ({worst}), {mean:.1%} on average."
    )
    if all(found[module_path] is module for module_path, module in modules.items()):
        note = f"{_final_name(path)} holds the trained LoRA as it is."
    warning = ""
    if errors[worst] > SVD_WARNING:
        warning = f"{note} Raise export.svd_rank to come nearer, or use a program that reads {job.spec.kind} files."
    return relative_error(read.answers, job.reference), note, warning


def _checkpoint(job: Job, path: Path) -> Exported:
    base, trained, parts = _merged(job)
    metadata = whole_model_metadata(job.metadata)
    scheduler = load_scheduler_config(base.path, revision=base.revision)  # a base that says so is trained so
    says = {**job.says}
    says["zero_terminal_snr"] = says["zero_terminal_snr"] or scheduler.get("rescale_betas_zero_snr", False)
    write_checkpoint(path, parts, metadata, dtype=job.dtype, layers_per_block=job.layers_per_block, **says)
    unet: Any = job.models["unet"]
    vae_config = read_part_config(base.path, "vae", revision=base.revision)
    found = read_back_checkpoint(path, parts, dtype=job.dtype, unet_config=dict(unet.config), vae_config=vae_config)
    return _checked_whole(job, path, trained, found), "", ""


def _folder(job: Job, path: Path) -> Exported:
    base, trained, parts = _merged(job)
    metadata = whole_model_metadata(job.metadata)
    write_folder(
        path,
        base,
        parts,
        trained,
        metadata,
        dtype=job.dtype,
        empty_prompt_is_zeros=job.empty_prompt_is_zeros,
        **job.says,
    )
    changed = {*job.parts, "unet"} if trained.unet_weights else set(job.parts)
    found = read_back_folder(path, parts, dtype=job.dtype, changed=changed)
    return _checked_whole(job, path, trained, found), "", ""


EXPORTS: dict[str, Callable[[Job, Path], Exported]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "kohya-svd": _nearest,
    "checkpoint": _checkpoint,
    "diffusers-folder": _folder,
}


def _final_name(path: Path) -> str:
    """What a file will be called that is still being verified."""
    return path.name.removesuffix(UNVERIFIED)


def _merged(job: Job) -> tuple[BaseModel, Trained, dict[str, Any]]:
    assert job.base is not None  # asked for in export_adapter
    trained = Trained(job.parts, job.unet_weights)
    return job.base, trained, merged(job.base, trained)


def _checked(job: Job, path: Path, parts: Parts, read: ReadBack, *, output_tolerance: float | None = None) -> float:
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
            f"{_final_name(path)} does not give back the trained LoRA. "
            f"Relative error of the output: {error:.1e}, allowed {tolerance:.0e}. "
            f"Of the weight change: {read.delta_error:.1e} in {read.worst_module}, allowed {delta_tolerance:.0e}. "
            f"Weights: {num_trained} trained, {num_in_file} in the file, {read.num_read} read. {cure()}"
        )
    return error


def _checked_whole(job: Job, path: Path, trained: Trained, found: Weights) -> float:
    """The same for whole models, whose weights were compared already; quantised models cannot be asked, and give 0."""
    places = []
    for part, model in job.models.items():
        everything = part == "unet" and bool(trained.unet_weights)
        changed = {f"{module_path}.weight" for module_path in trained.modules.get(part, {})}
        places += [
            (model.get_parameter(name), weight)
            for name, weight in weights_of(model, part, found).items()
            if everything or name in changed
        ]
    error = 0.0
    if can_be_replaced(parameter for parameter, _ in places):
        with replacing() as replace:
            for parameter, weight in places:
                replace(parameter, weight.make())
            error = relative_error(probe_models(job.models), job.reference)
    if not error <= OUTPUT_TOLERANCE[job.coarsest]:
        raise ExportError(
            f"{_final_name(path)} does not draw as the trained model does. Relative error of the "
            f"output: {error:.1e}, allowed {OUTPUT_TOLERANCE[job.coarsest]:.0e}. {cure()}"
        )
    return error
