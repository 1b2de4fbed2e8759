"""Each kind of file read as its users' programs read it, and compared with what was trained.

    by diffusers    LoRA in both formats, DoRA in diffusers' own: the calls that `load_lora_weights` makes
    by definition   DoRA, LoHa, LoKr in kohya files: `lycoris.read_delta` on a copy of the weights
    by converter    whole models: diffusers' own converters of single files; folders by name

Weights are compared as well as outputs because a weak adapter changes the output by less than a bf16 U-Net's rounding,
and tensors are counted because diffusers skips names that it does not know with no more than a log line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import Parts, kohya_stem
from sdxl_ray.export.lycoris import read_delta
from sdxl_ray.export.probe import probe_models
from sdxl_ray.sdxl.adapters import base_weight
from sdxl_ray.sdxl.trained import TrainedModule, effective_delta

# What float32 loses where two numbers of the size of a base weight are subtracted, in three or four operations.
_FP32_ROUNDING = 4 * 2.0**-24

_READ_BACK = "read_back"  # the adapter's name while a file is being verified
_UNREADABLE = (KeyError, ValueError, TypeError, RuntimeError, OSError, SafetensorError)


@dataclass(frozen=True)
class ReadBack:
    """What a file gave back.

    answers       of the models with the file on them, as `probe_models`; empty where they could not be asked
    delta_error   Frobenius norm of the difference between the weight changes over that of the trained one, worst module
    worst_module  where that is
    num_read      tensors that the reader used, alphas not counted
    """

    answers: dict[str, Tensor]
    delta_error: float
    worst_module: str
    num_read: int


def read_back_by_diffusers(
    path: Path, models: Mapping[str, nn.Module], parts: Parts, *, rounding: float = _FP32_ROUNDING
) -> ReadBack:
    """The file put onto the models as `StableDiffusionXLPipeline.load_lora_weights` does it, and taken off again.

    Args:
        models: those of `parts`, without adapters.
        rounding: by how much of |W| a DoRA's change may be off because W + change is what is computed; diffusers casts
            its magnitudes to the U-Net's dtype.

    Raises:
        ExportError: diffusers cannot read the file.
    """
    with _loaded(path, models):
        answers = probe_models(models)
        read = {part: _adapter_on(model) for part, model in models.items()}
    errors = {}
    for part, modules in parts.items():
        for module_path, module in modules.items():
            found = read[part].get(module_path)
            layer = models[part].get_submodule(module_path)
            errors[f"{part}.{module_path}"] = 1.0 if found is None else _delta_error(module, found, layer, rounding)
    num_read = sum(len(module.tensors) for modules in read.values() for module in modules.values())
    return ReadBack(answers, *_worst(errors), num_read)


@contextlib.contextmanager
def _loaded(path: Path, models: Mapping[str, nn.Module]) -> Iterator[None]:
    loader: Any = StableDiffusionXLLoraLoaderMixin
    unet: Any = models["unet"]
    try:
        try:
            state, alphas, lora_metadata = loader.lora_state_dict(
                str(path),
                unet_config=unet.config,  # without it sgm names stay as they are and match nothing
                return_lora_metadata=True,
                use_safetensors=True,
                local_files_only=True,
            )
            how = {"network_alphas": alphas, "adapter_name": _READ_BACK, "metadata": lora_metadata}
            # low_cpu_mem_usage: as the pipeline does
            loader.load_lora_into_unet(state, unet=unet, low_cpu_mem_usage=True, **how)
            for part in ("text_encoder", "text_encoder_2"):
                if part in models:
                    loader.load_lora_into_text_encoder(
                        state, text_encoder=models[part], prefix=part, low_cpu_mem_usage=True, **how
                    )
        except _UNREADABLE as error:
            raise ExportError(
                f"{path.name}: diffusers cannot read the LoRA back ({type(error).__name__}: {error}). {cure()}"
            ) from error
        yield
    finally:
        unet.unload_lora()
        for part, model in models.items():
            if part != "unet":
                _unload_text_encoder(model)


def _unload_text_encoder(encoder: Any) -> None:
    """As `StableDiffusionXLPipeline.unload_lora_weights` does it."""
    recurse_remove_peft_layers(encoder)
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
    encoder._hf_peft_config_loaded = False


def _adapter_on(model: nn.Module) -> dict[str, TrainedModule]:
    """What diffusers set up from the file, by module path."""
    found = {}
    for module_path, layer in model.named_modules():
        layer_any: Any = layer
        if _READ_BACK not in getattr(layer, "lora_A", {}):
            continue
        tensors = {
            "lora_A.weight": layer_any.lora_A[_READ_BACK].weight.detach().clone(),
            "lora_B.weight": layer_any.lora_B[_READ_BACK].weight.detach().clone(),
        }
        is_dora = _READ_BACK in layer_any.lora_magnitude_vector
        if is_dora:
            magnitude = layer_any.lora_magnitude_vector[_READ_BACK].weight
            tensors["lora_magnitude_vector.weight"] = magnitude.detach().clone()
        found[module_path] = TrainedModule(
            kind="dora" if is_dora else "lora",
            tensors=tensors,
            scale=layer_any.scaling[_READ_BACK],
            rank=layer_any.r[_READ_BACK],
        )
    return found


def read_back_by_definition(path: Path, models: Mapping[str, nn.Module], parts: Parts) -> ReadBack:
    """A kohya file of any kind merged into the weights, as LyCORIS defines it; then the old weights are put back.

    Quantised weights cannot be replaced: the file's changes are compared, and the models are not asked.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        tensors = load_file(path)
    except _UNREADABLE as error:
        raise ExportError(f"{path.name} cannot be read back ({error}). {cure()}") from error
    layers_per_block = getattr(models["unet"], "config").layers_per_block  # noqa: B009
    places: list[tuple[str, str, Any]] = [
        (part, module_path, models[part].get_submodule(module_path))
        for part, modules in parts.items()
        for module_path in modules
    ]
    possible = can_be_replaced(layer.weight for _, _, layer in places)
    errors, num_read = {}, 0
    with replacing() as replace:
        for part, module_path, layer in places:
            module, name = parts[part][module_path], f"{part}.{module_path}"
            stem = kohya_stem(part, module_path, layers_per_block=layers_per_block)
            own = {
                key.removeprefix(f"{stem}."): tensor for key, tensor in tensors.items() if key.startswith(f"{stem}.")
            }
            base = base_weight(layer)
            try:
                delta = read_delta(own, base)
            except _UNREADABLE:
                errors[name] = 1.0
                continue
            slack = _FP32_ROUNDING if module.kind == "dora" else 0.0
            errors[name] = _relative(delta, effective_delta(module, base), slack * _norm(base))
            num_read += sum(not key.endswith("alpha") for key in own)
            if possible:
                replace(layer.weight, base.add_(delta))
        answers = probe_models(models) if possible else {}
    return ReadBack(answers, *_worst(errors), num_read)


def can_be_replaced(weights: Iterable[Any]) -> bool:
    """Whether all of these can take other values: quantised ones cannot."""
    return not any(type(weight).__module__.startswith("optimum.quanto") for weight in weights)


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[Tensor, Tensor], None]]:
    """A function `replace(parameter, weight)` that gives a parameter other values; afterwards all have their old ones.

    In place and in the parameter's own dtype, one after another: the old values wait on the CPU, so that the device
    never holds a second copy of the model.
    """
    waiting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def replace(parameter: Tensor, weight: Tensor) -> None:
        waiting.append((parameter, parameter.detach().to("cpu", copy=True)))
        parameter.copy_(weight)

    try:
        yield replace
    finally:
        with torch.no_grad():
            for parameter, old in reversed(waiting):  # should one have come twice
                parameter.copy_(old)


def _worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest error and its module; one that is missing differs by 1."""
    worst = max(errors, key=lambda module: (not errors[module] <= 1e30, errors[module]))  # NaN first
    return errors[worst], worst


def _delta_error(trained: TrainedModule, read: TrainedModule, layer: nn.Module, rounding: float) -> float:
    if trained.kind == read.kind == "lora":
        return lora_difference(trained, read)
    base = base_weight(layer)
    return _relative(effective_delta(read, base), effective_delta(trained, base), rounding * _norm(base))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.norm(tensor.double()))


def _relative(found: Tensor, expected: Tensor, slack: float) -> float:
    difference, size = _norm(found - expected), _norm(expected)
    difference = 0.0 if difference <= slack else difference - slack  # NaN stays NaN
    if size == 0.0:  # a module that training did not reach
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def lora_difference(trained: TrainedModule, read: TrainedModule) -> float:
    """|s B A - s' B' A'| / |s B A| in the Frobenius norm, without forming B A (52 MB for one feed-forward layer).

    With U = [s B, -s' B'] and V = [A; A'] the difference is U V, and |U V|^2 = sum((U^T U) * (V V^T)): matrices of
    2r x 2r. In fp64, because the difference of nearly equal terms would be lost in fp32.
    """

    def factors(one: TrainedModule) -> tuple[Tensor, Tensor]:
        up, down = (
            one.tensors[leaf].cpu().double().flatten(1)  # in this order: mps has no float64
            for leaf in ("lora_B.weight", "lora_A.weight")
        )
        return one.scale * up, down

    def norm(up: Tensor, down: Tensor) -> float:
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())

    (trained_up, trained_down), (read_up, read_down) = factors(trained), factors(read)
    difference = norm(torch.cat([trained_up, -read_up], dim=1), torch.cat([trained_down, read_down]))
    size = norm(trained_up, trained_down)
    if size == 0.0:  # a module that training did not reach
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def num_weights(path: Path) -> int:
    """Tensors in a file, alphas not counted."""
    with safe_open(path, framework="pt") as file:
        return sum(not key.endswith(".alpha") for key in file.keys())  # noqa: SIM118


def cure() -> str:
    """What to do about a file that failed."""
    return (
        f"The trained weights are safe in the last checkpoint. diffusers is {diffusers.__version__} and peft "
        f"{importlib.metadata.version('peft')} here: compare with constraints.txt, then run `sdxl-ray export`."
    )
