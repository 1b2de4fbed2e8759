"""The whole model with what was trained merged into it: one file in Stability's layout, or a folder for diffusers.

    base model's files  ──base_tensors──▶  {part: {weight: lazy tensor}}
    trained modules     ──merged────────▶  base weight + effective_delta, or the trained weight itself
                        ──write_checkpoint──▶  <name>.checkpoint.safetensors
                        ──write_folder──────▶  <name>.diffusers-folder/

Weights come from the base model's files and not from the U-Net in memory, which may be rounded to bf16 or quantised.
One weight is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_ray.errors import ExportError, storage_errors
from sdxl_ray.export.formats import Parts
from sdxl_ray.export.names import SDXL_LAYERS_PER_BLOCK
from sdxl_ray.export.single_file_names import canonical_text_name, single_file_tensors
from sdxl_ray.export.tensor_file import FileDtype, LazyTensor, lazy, read_lazily, write_tensors
from sdxl_ray.sdxl.components import load_scheduler_config
from sdxl_ray.sdxl.files import PARTS as FOLDERS
from sdxl_ray.sdxl.files import WEIGHT_STEMS, model_index, variant_to_load, weight_files
from sdxl_ray.sdxl.hub import part_folder
from sdxl_ray.sdxl.trained import TrainedModule, effective_delta

Weights = Mapping[str, Mapping[str, LazyTensor]]

_DOING = "writing the model"


@dataclass(frozen=True)
class BaseModel:
    """Where the base model's files are: a folder in the diffusers layout or a Hub id, as `resolve_model` gives it."""

    path: str
    revision: str | None = None
    variant: str | None = None

    def folder(self, part: str) -> Path:
        """The folder of a part; from the Hub it is fetched unless it is in the local cache."""
        return part_folder(self.path, part, self.revision, variant=self.variant)

    def zeros_for_empty_prompt(self) -> bool:
        """`force_zeros_for_empty_prompt` of its model_index.json; true where that says nothing, as in diffusers.

        Raises:
            ExportError: the file is no JSON.
        """
        path = self.folder("scheduler").parent / "model_index.json"
        try:
            return bool(json.loads(path.read_text(encoding="utf-8")).get("force_zeros_for_empty_prompt", True))
        except FileNotFoundError:  # of a model from the Hub, parts are fetched one by one
            return True
        except ValueError as error:
            raise ExportError(f"{path} is not JSON ({error}). Copy it again from the model's source.") from error

    def tensors(self, part: str) -> dict[str, LazyTensor]:
        """A part's weights, under the names that its files have."""
        folder, stem = self.folder(part), WEIGHT_STEMS[part]
        files = weight_files(folder, stem, variant_to_load(folder, stem, self.variant))
        return {name: tensor for file in files for name, tensor in read_lazily(file).items()}


@dataclass(frozen=True)
class Trained:
    """What training changed.

    modules       {part: {module path: TrainedModule}}: adapters
    unet_weights  the U-Net's own weights by their names, where kind is "full": all of them, float32 masters
    """

    modules: Parts = field(default_factory=dict)
    unet_weights: Mapping[str, Tensor] = field(default_factory=dict)


def merged(base: BaseModel, trained: Trained) -> dict[str, dict[str, LazyTensor]]:
    """All four parts' weights, under the names of their files, with what was trained merged in: float32 where it was.

    Raises:
        ExportError: something trained is not in the base model, or the base model has a weight too many.
    """
    parts = {part: base.tensors(part) for part in WEIGHT_STEMS}
    if trained.unet_weights:
        different = sorted(parts["unet"].keys() ^ trained.unet_weights.keys())
        if different:
            raise ExportError(
                f"The trained U-Net and the one in {base.path} have different weights: {len(different)} are in one "
                f"only, such as {different[0]}. Set model.path to the model that was trained."
            )
        parts["unet"] = {name: lazy(trained.unet_weights[name]) for name in parts["unet"]}
    for part, modules in trained.modules.items():
        names = {canonical(part, name): name for name in parts[part]}
        for module_path, module in modules.items():
            name = names.get(canonical(part, f"{module_path}.weight"))
            if name is None:
                raise ExportError(
                    f"{part}: {module_path} was trained and is not in {base.path}, whose weights look like "
                    f"{next(iter(names.values()))}. Set model.path to the model that was trained."
                )
            weight = parts[part][name]
            parts[part][name] = LazyTensor(weight.shape, torch.float32, _merge(module, weight))
    return parts


def canonical(part: str, name: str) -> str:
    """One name for a weight, whatever transformers wrote or loaded it."""
    return canonical_text_name(name) if part.startswith("text_encoder") else name


def _merge(module: TrainedModule, weight: LazyTensor) -> Callable[[], Tensor]:
    def make() -> Tensor:
        base_weight = weight.make()
        return base_weight.to(torch.float32) + effective_delta(module, base_weight)

    return make


def checkpoint_tensors(
    parts: Weights, *, prediction_type: str, zero_terminal_snr: bool, layers_per_block: int = SDXL_LAYERS_PER_BLOCK
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint. ComfyUI and Forge know a model that predicts v by an empty tensor called `v_pred`,
    and one with zero terminal SNR by `ztsnr` beside it (comfy/supported_models.py, SDXL.model_type)."""
    canonical_parts = {
        part: {canonical(part, name): weight for name, weight in weights.items()} for part, weights in parts.items()
    }
    tensors = single_file_tensors(canonical_parts, layers_per_block=layers_per_block)
    if prediction_type == "v_prediction":
        tensors["v_pred"] = lazy(torch.empty(0))
        if zero_terminal_snr:
            tensors["ztsnr"] = lazy(torch.empty(0))
    return tensors


def write_checkpoint(
    path: Path,
    parts: Weights,
    metadata: Mapping[str, str],
    *,
    dtype: FileDtype,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    layers_per_block: int = SDXL_LAYERS_PER_BLOCK,
) -> None:
    """One file with all parts in `dtype`. A merged change that is below half a step of `dtype` is rounded away: of bf16
    1/512 of the weight.

    Raises:
        StorageError: the disk is full or read-only.
    """
    tensors = checkpoint_tensors(
        parts,
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        layers_per_block=layers_per_block,
    )
    write_tensors(path, tensors, metadata, dtype, doing=_DOING)


def write_folder(
    folder: Path,
    base: BaseModel,
    parts: Weights,
    trained: Trained,
    metadata: Mapping[str, str],
    *,
    dtype: FileDtype,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    empty_prompt_is_zeros: bool = True,
) -> None:
    """A folder for `StableDiffusionXLPipeline.from_pretrained`. What was trained is in `dtype`, the rest as it was.

    The scheduler's config says what the model was trained to predict.

    Args:
        empty_prompt_is_zeros: whether captions were dropped to zeros; then an empty prompt is what it was in the base
            model. False: to the encoded empty caption, and that it is in the folder.

    Raises:
        ExportError: the base model's model_index.json cannot be read.
        StorageError: the disk is full or read-only.
    """
    said = load_scheduler_config(base.path, revision=base.revision)
    with storage_errors(_DOING, folder, "Free some space or choose another folder, then run `sdxl-ray export`."):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for part, config in FOLDERS.items():
            source, target = base.folder(part), folder / part
            target.mkdir()
            if part == "scheduler":
                _write_json(target / config, _scheduler(said, prediction_type, zero_terminal_snr))
                continue
            for file in sorted(source.iterdir()):
                if file.suffix in (".json", ".txt") and ".index." not in file.name and file.is_file():
                    shutil.copyfile(file, target / file.name)  # of a link, what it points to
        sampler = said.get("_class_name", "EulerDiscreteScheduler")
        zeros = empty_prompt_is_zeros and base.zeros_for_empty_prompt()
        _write_json(folder / "model_index.json", model_index(sampler, zeros_for_empty_prompt=zeros))
    for part, stem in WEIGHT_STEMS.items():
        changed = bool(trained.modules.get(part)) or (part == "unet" and bool(trained.unet_weights))
        write_tensors(
            folder / part / f"{stem}.safetensors",
            parts[part],
            metadata if changed else {},
            dtype if changed else None,
            doing=_DOING,
        )


def _scheduler(said: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool) -> dict[str, Any]:
    config = {**said, "prediction_type": prediction_type}
    if zero_terminal_snr:
        # spacing: with "leading" a sampler would never visit the last level, the one without any signal
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
