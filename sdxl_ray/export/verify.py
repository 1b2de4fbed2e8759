"""Nothing is called exported that was not read back: the last stage of a training, and its proof.

1  what the trained U-Net answers to a fixed probe       probe_output
2  its adapter's weights, then the U-Net without them    adapter_state_dict, detach_adapter
3  each format under a name that no program picks up     WRITERS in formats
4  that file through diffusers' own reader               verify_file
5  same answer, same weight change? then the final name  export_adapter
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import DTYPES, WRITERS, AdapterSpec, FileDtype
from sdxl_ray.records import ExportedFile
from sdxl_ray.sdxl.adapters import adapter_state_dict, detach_adapter
from sdxl_ray.sdxl.conditioning import predict, unet_dtype

_READ_BACK = "read_back"  # the adapter's name while a file is being verified

# Largest output difference over largest output, by the U-Net's dtype. A bf16 U-Net rounds to 8 significant bits in each
# layer, and training may have computed with bf16 copies of the adapter: some per cent of difference are rounding there
# and could hide a real error (1.4 % seen on the tiny SDXL). That is why the weight change is compared as well.
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Frobenius norm of the difference over that of the trained change, worst module, by the coarser of the file's and the
# U-Net's dtype (diffusers casts what it reads to the U-Net's). fp32: folding the scale rounds once. bf16: lora_A and
# lora_B are rounded to 8 bits each, 0.3 % seen; fp16 rounds less, but loses what lies below 6e-8.
DELTA_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed inputs for one forward pass, all float32 but the timesteps: B = 1.

    noisy_latents (1, 4, h, w), timesteps (1,) int64, prompt_embeds (1, 77, cross_attention_dim),
    pooled_prompt_embeds (1, projection_dim), add_time_ids (1, 6) pixels
    """

    noisy_latents: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    add_time_ids: Tensor


def make_probe(unet: diffusers.UNet2DConditionModel, *, seed: int = 0) -> Probe:
    """Inputs of the right shapes for this U-Net, the same on every machine; 256 px suffice to reach every weight."""
    config = unet.config
    generator = np.random.default_rng(seed)  # torch's generators differ between devices and versions

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    side = min(32, config.sample_size)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = float(8 * side)
    return Probe(
        noisy_latents=normal(1, config.in_channels, side, side),
        timesteps=torch.tensor([500]),
        prompt_embeds=normal(1, 77, config.cross_attention_dim),
        pooled_prompt_embeds=normal(1, pooled_width),
        add_time_ids=torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]),
    )


@torch.no_grad()
def probe_output(unet: diffusers.UNet2DConditionModel, probe: Probe) -> Tensor:
    """The prediction (1, 4, h, w) for the probe, float32 on the CPU, without dropout."""
    was_training = unet.training
    unet.eval()
    try:
        prediction = predict(
            unet,
            probe.noisy_latents.to(unet.device),
            probe.timesteps.to(unet.device),
            probe.prompt_embeds.to(unet.device),
            probe.pooled_prompt_embeds.to(unet.device),
            probe.add_time_ids.to(unet.device),
        )
    finally:
        unet.train(was_training)
    return prediction.float().cpu()


def verify_file(
    path: Path,
    unet: diffusers.UNet2DConditionModel,
    reference: Tensor,
    probe: Probe,
    *,
    state: Mapping[str, Tensor],
    spec: AdapterSpec,
    tolerance: float,
    delta_tolerance: float = DELTA_TOLERANCE[torch.float32],
) -> float:
    """The relative error of the U-Net's output with the file on it, read as `load_lora_weights` reads it.

    `unet` has no adapter, before and after; `reference` is the trained model's `probe_output`, `state` and `spec` its
    adapter. Weights are compared as well as outputs because a weak LoRA changes the output by less than a bf16 U-Net's
    rounding, and tensors are counted because diffusers skips names that it does not know with no more than a log line.

    Raises:
        ExportError: the file cannot be read, or what it gives back is not the trained adapter.
    """
    with _loaded(path, unet):
        output = probe_output(unet, probe)
        read = _adapter_on(unet)
    error = float((output - reference).abs().max() / reference.abs().max())
    trained = {
        module_path: (state[f"{module_path}.lora_A.weight"], state[f"{module_path}.lora_B.weight"], spec.scale)
        for module_path in {key.rsplit(".lora_", 1)[0] for key in state}
    }
    delta_error, worst_module = _worst_delta(trained, read)
    num_in_file, num_read, num_trained = _num_weights(path), 2 * len(read), len(state)
    # written as "not <=" so that NaN fails
    if (
        num_in_file != num_read
        or num_read != num_trained
        or not error <= tolerance
        or not delta_error <= delta_tolerance
    ):
        raise ExportError(
            f"{path.name} does not give back the trained LoRA. "
            f"Relative error of the U-Net's output: {error:.1e}, allowed {tolerance:.0e}. "
            f"Of the weight change: {delta_error:.1e} in {worst_module}, allowed {delta_tolerance:.0e}. "
            f"Weights: {num_trained} trained, {num_in_file} in the file, {num_read} read by diffusers. {_cure()}"
        )
    return error


def export_adapter(
    unet: diffusers.UNet2DConditionModel,
    *,
    folder: Path,
    name: str,
    spec: AdapterSpec,
    metadata: Mapping[str, str],
    formats: Sequence[str] = ("kohya", "diffusers"),
    dtype: FileDtype = "fp32",
) -> list[ExportedFile]:
    """Write the adapter of a trained U-Net and prove each file. **Afterwards the U-Net has no adapter.**

    `<name>.safetensors` is kohya's format, which is what users of ComfyUI and A1111 expect under a plain name;
    `<name>.diffusers.safetensors` the other. A file takes its name when it has passed. One that fails stays as
    `<file>.rejected`, which no program lists among its LoRAs, for whoever looks into it; an older file of the name is
    not touched.

    Raises:
        ExportError: the adapter does not fit a format, or a file does not give it back.
        StorageError: the disk is full or read-only.
    """
    unknown = [format_name for format_name in formats if format_name not in WRITERS]
    if unknown:
        raise ExportError(f"No export format is called '{unknown[0]}'. Known: {', '.join(WRITERS)}.")
    state = adapter_state_dict(unet)
    probe = make_probe(unet)
    reference = probe_output(unet, probe)
    detach_adapter(unet)

    exported = []
    for format_name in formats:
        path = folder / (f"{name}.safetensors" if format_name == "kohya" else f"{name}.{format_name}.safetensors")
        unverified = path.with_name(f"{path.name}.unverified")
        layout = {"layers_per_block": unet.config.layers_per_block} if format_name == "kohya" else {}
        WRITERS[format_name](unverified, state, spec, metadata, dtype=dtype, **layout)
        try:
            error = verify_file(
                unverified,
                unet,
                reference,
                probe,
                state=state,
                spec=spec,
                tolerance=max(OUTPUT_TOLERANCE[unet_dtype(unet)], OUTPUT_TOLERANCE[DTYPES[dtype]]),
                delta_tolerance=max(DELTA_TOLERANCE[unet_dtype(unet)], DELTA_TOLERANCE[DTYPES[dtype]]),
            )
        except ExportError as refusal:
            rejected = unverified.replace(path.with_name(f"{path.name}.rejected"))
            raise ExportError(f"{refusal} The file is kept as {rejected}.") from refusal
        unverified.replace(path)
        exported.append(ExportedFile(path, format_name, error))
    return exported


@contextlib.contextmanager
def _loaded(path: Path, unet: diffusers.UNet2DConditionModel) -> Iterator[None]:
    """The U-Net with the file's LoRA on it, through the calls `StableDiffusionXLPipeline.load_lora_weights` makes."""
    loader = StableDiffusionXLLoraLoaderMixin
    try:
        try:
            state, alphas, lora_metadata = loader.lora_state_dict(
                str(path),
                unet_config=unet.config,  # without it sgm names stay as they are and match nothing
                return_lora_metadata=True,
                use_safetensors=True,
                local_files_only=True,
            )
            loader.load_lora_into_unet(
                state,
                network_alphas=alphas,
                unet=unet,
                adapter_name=_READ_BACK,
                metadata=lora_metadata,
                low_cpu_mem_usage=True,  # as the pipeline does
            )
        except (KeyError, ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise ExportError(
                f"{path.name}: diffusers cannot read the LoRA back ({type(error).__name__}: {error}). {_cure()}"
            ) from error
        yield
    finally:
        unet.unload_lora()


def _adapter_on(unet: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """`{module path: (lora_A, lora_B, scale)}` as diffusers set them up from the file."""
    return {
        module_path: (
            module.lora_A[_READ_BACK].weight.detach().clone(),  # type: ignore[index, union-attr]
            module.lora_B[_READ_BACK].weight.detach().clone(),  # type: ignore[index, union-attr]
            module.scaling[_READ_BACK],  # type: ignore[index]
        )
        for module_path, module in unet.named_modules()
        if _READ_BACK in getattr(module, "lora_A", {})
    }


def _worst_delta(
    trained: Mapping[str, tuple[Tensor, Tensor, float]], read: Mapping[str, tuple[Tensor, Tensor, float]]
) -> tuple[float, str]:
    """The largest relative difference between two weight changes, and its module; one that is missing differs by 1."""
    errors = {module: _delta_error(trained[module], read[module]) if module in read else 1.0 for module in trained}
    worst = max(errors, key=lambda module: (not errors[module] <= 1e30, errors[module]))  # NaN first
    return errors[worst], worst


def _delta_error(trained: tuple[Tensor, Tensor, float], read: tuple[Tensor, Tensor, float]) -> float:
    """|s B A - s' B' A'| / |s B A| in the Frobenius norm, without forming B A (52 MB for one feed-forward layer).

    With U = [s B, -s' B'] and V = [A; A'] the difference is U V, and |U V|^2 = sum((U^T U) * (V V^T)): matrices of
    2r x 2r. In fp64, because the difference of nearly equal terms would be lost in fp32.
    """

    def factors(down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return scale * up.to("cpu", torch.float64).flatten(1), down.to("cpu", torch.float64).flatten(1)

    def norm(up: Tensor, down: Tensor) -> float:
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())

    (trained_up, trained_down), (read_up, read_down) = factors(*trained), factors(*read)
    difference = norm(torch.cat([trained_up, -read_up], dim=1), torch.cat([trained_down, read_down]))
    size = norm(trained_up, trained_down)
    if size == 0.0:  # a module that training did not reach
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def _num_weights(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(not key.endswith(".alpha") for key in file.keys())  # noqa: SIM118


def _cure() -> str:
    return (
        f"The trained weights are safe in the last checkpoint. diffusers is {diffusers.__version__} and peft "
        f"{importlib.metadata.version('peft')} here: compare with constraints.txt, then run `sdxl-ray export`."
    )
