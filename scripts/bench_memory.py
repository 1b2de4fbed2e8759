"""How much memory do SDXL's weights, activations and a training step take?

    python scripts/bench_memory.py weights                                         # bytes by precision; seconds
    python scripts/bench_memory.py activations --checkpointing none,10,35,transformer,full --resolution 1024
    python scripts/bench_memory.py step --quantize none,int8 --checkpointing none,transformer --max-rss-gib 6.5

SDXL's networks at their true size with random weights: no network, no files, no Ray.

    weights      on the meta device, so without memory: the bytes of all parameters and buffers as they are stored,
                 scales included. Exact.
    activations  a forward and backward pass of one image on fake tensors (shapes and lifetimes without numbers): what
                 is alive where the forward pass ends, and the most at any time, besides the weights. Exact for the
                 tensors; without what kernels take for themselves.
    step         steps of the real loop on this machine's CPU, each case in a process of its own; the most memory that
                 the process held after loading (VmHWM, reset through /proc/self/clear_refs). Exits 1 above
                 --max-rss-gib. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.architecture import TEXT_ENCODER_2_CONFIG, TEXT_ENCODER_CONFIG, UNET_CONFIG, build_unet
from sdxl_ray.sdxl.checkpointing import CHECKPOINTING_MODES, set_gradient_checkpointing
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.sdxl.quantize import QUANTIZATIONS, quantize_frozen, stored_bytes
from sdxl_ray.sdxl.tiny import unet_config as tiny_unet_config

GIB = 2**30

# -- weights ----------------------------------------------------------------------------------------------------------


def weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per network: GiB in fp32, in bf16 and quantised from bf16, and how many layers stay as they were."""
    builders: dict[str, Callable[[torch.dtype], nn.Module]] = {
        "U-Net": lambda dtype: build_unet(dtype=dtype, device="meta", config=network_config(args.tiny)),
        "text encoder 1": lambda dtype: build_text_encoder("CLIPTextModel", TEXT_ENCODER_CONFIG, dtype),
        "text encoder 2": lambda dtype: build_text_encoder("CLIPTextModelWithProjection", TEXT_ENCODER_2_CONFIG, dtype),
    }
    rows = []
    print(
        "| GiB | fp32 | bf16 | int8 | fp8 | int4 | layers quantised | layers kept |\n|---|---|---|---|---|---|---|---|"
    )
    for name, build in builders.items():
        row: dict[str, Any] = {"network": name}
        row["fp32"] = stored_bytes(build(torch.float32))
        row["bf16"] = stored_bytes(build(torch.bfloat16))
        for kind in ("int8", "fp8", "int4"):
            done = quantize_frozen(build(torch.bfloat16), kind)
            row |= {kind: done.bytes_after, "quantized": len(done.quantized), "kept": len(done.kept)}
        sizes = " | ".join(f"{row[kind] / GIB:.3f}" for kind in ("fp32", "bf16", "int8", "fp8", "int4"))
        print(f"| {name} | {sizes} | {row['quantized']} | {row['kept']} |", flush=True)
        rows.append(row)
    return rows


def build_text_encoder(class_name: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Frozen, on meta."""
    import transformers

    with torch.device("meta"):
        encoder = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
    return encoder.to(dtype).requires_grad_(False)


def network_config(tiny: bool) -> dict[str, Any]:
    """SDXL's, or the one of the tests."""
    return tiny_unet_config() if tiny else UNET_CONFIG


# -- activations ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside and are still referenced; `apart` is not counted."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary({tensor.untyped_storage(): 0 for tensor in apart})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def activations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per setting of checkpointing: MiB held where the forward pass ends, and the most in the whole step."""
    fake = FakeTensorMode()
    unet = fake_unet(args, fake)
    print(f"attention LoRA, rank {args.rank}, {args.dtype}, batch 1, {args.resolution}²")
    print("| checkpointing | held at the end of the forward pass, MiB | most at any time, MiB |\n|---|---|---|")
    rows = []
    for mode in args.checkpointing:
        set_gradient_checkpointing(unet, mode)
        with fake, LiveBytes(apart=unet.parameters()) as live:
            loss = predict(unet, **fake_inputs(unet, args)).float().square().mean()
            held = live.now
            loss.backward()
        for parameter in adapter_parameters(unet).values():
            parameter.grad = None
        rows.append({"checkpointing": mode, "held": held, "peak": live.peak})
        print(f"| {mode} | {held / 2**20:.0f} | {live.peak / 2**20:.0f} |", flush=True)
    return rows


def fake_unet(args: argparse.Namespace, fake: FakeTensorMode) -> UNet2DConditionModel:
    """With its LoRA, all in --dtype, as while training."""
    unet = build_unet(dtype=DTYPES[args.dtype], device="meta", config=network_config(args.tiny))
    attach_adapter(unet, kind="lora", rank=args.rank, alpha=float(args.rank))
    with fake:
        for module in unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # as if on the CPU, whose attention is a flash kernel; meta's keeps the matrix of all pairs
                weight = torch.empty(parameter.shape, dtype=DTYPES[args.dtype])
                setattr(module, name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
    return unet.train()


def fake_inputs(unet: UNet2DConditionModel, args: argparse.Namespace) -> dict[str, Tensor]:
    """One image. To be called inside a FakeTensorMode."""
    config, dtype, edge = unet.config, DTYPES[args.dtype], args.resolution // 8
    pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "noisy_latents": torch.empty(1, config["in_channels"], edge, edge, dtype=dtype),
        "timesteps": torch.zeros(1, dtype=torch.int64),
        "prompt_embeds": torch.empty(1, 77, config["cross_attention_dim"], dtype=dtype),
        "pooled_prompt_embeds": torch.empty(1, pooled_width, dtype=dtype),
        "add_time_ids": torch.zeros(1, 6),
    }


# -- step -------------------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per case, measured in a process of its own: memory that an earlier case freed is not this one's."""
    rows = []
    print(
        f"attention LoRA, rank {args.rank}, {args.dtype}, batch 1, {args.resolution}², {args.steps} steps\n"
        "| quantize | checkpointing | RSS after loading, GiB | peak RSS after loading, GiB "
        "| peak RSS while loading, GiB | s per step | loss |\n|---|---|---|---|---|---|---|"
    )
    for quantize in args.quantize:
        for mode in args.checkpointing:
            command = [sys.executable, __file__, "one-case", "--quantize", quantize, "--checkpointing", str(mode)]
            for name in ("resolution", "rank", "dtype", "steps"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run([*command, *(["--tiny"] if args.tiny else [])], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"| {quantize} | {mode} | {row['rss_loaded_gib']:.2f} | {row['peak_rss_gib']:.2f} "
                f"| {row['peak_rss_loading_gib']:.2f} | {', '.join(f'{s:.1f}' for s in row['step_s'])} "
                f"| {', '.join(f'{loss:.4f}' for loss in row['losses'])} |",
                flush=True,
            )
    return rows


def one_case(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What `step` starts: prints one line of JSON."""
    from sdxl_ray.train import loop
    from sdxl_ray.train.synthetic import (
        Recorder,
        peak_rss_gib,
        reset_peak_rss,
        synthetic_batches,
        synthetic_objective,
        synthetic_plan,
        synthetic_state,
    )

    resolution_hw, (quantize,), (mode,) = (args.resolution, args.resolution), args.quantize, args.checkpointing
    began = time.perf_counter()
    unet = build_unet(dtype=DTYPES[args.dtype], device="cpu", config=network_config(args.tiny))
    if quantize != "none":
        quantize_frozen(unet, quantize)
    loading_s, peak_rss_loading_gib = time.perf_counter() - began, peak_rss_gib()
    rss_loaded_gib = rss_gib()
    if not reset_peak_rss():
        raise SystemExit("this system cannot reset the peak of the resident set (/proc/self/clear_refs); use Linux")
    state = synthetic_state(unet, rank=args.rank, gradient_checkpointing=mode)
    plan = synthetic_plan(num_steps=args.steps, batch_size=1, resolution_hw=resolution_hw)
    report = Recorder()
    batches = synthetic_batches(unet.config, plan, resolution_hw=resolution_hw)
    loop.run(state, plan, batches, synthetic_objective(state.device), report)
    row = {
        "quantize": quantize,
        "checkpointing": mode,
        "loading_s": loading_s,
        "weights_gib": stored_bytes(unet) / GIB,
        "rss_loaded_gib": rss_loaded_gib,
        "peak_rss_loading_gib": peak_rss_loading_gib,
        "peak_rss_gib": peak_rss_gib(),
        "step_s": [values["perf/step_s"] for _, values in report.history],
        "losses": [values["train/loss"] for _, values in report.history],
    }
    print(json.dumps(row))
    return [row]


def rss_gib() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def main() -> int:
    """The exit code: 1 where a step took more than --max-rss-gib."""
    args = parse_arguments()
    rows = {"weights": weights, "activations": activations, "step": step, "one-case": one_case}[args.what](args)
    if args.json:
        content = {"what": args.what, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    too_much = [row for row in rows if args.max_rss_gib and row.get("peak_rss_gib", 0) > args.max_rss_gib]
    if too_much:
        print(f"{len(too_much)} of {len(rows)} cases EXCEED --max-rss-gib {args.max_rss_gib:g}")
    return 1 if too_much else 0


def parse_arguments() -> argparse.Namespace:
    """One line per flag; lists are separated by commas."""

    def modes(text: str) -> list[str | int]:
        found: list[str | int] = [int(item) if item.isdigit() else item for item in text.split(",")]
        if unknown := [item for item in found if isinstance(item, str) and item not in CHECKPOINTING_MODES]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(CHECKPOINTING_MODES)}, or a number of blocks"
            )
        return found

    def kinds(text: str) -> list[str]:
        known = ("none", *QUANTIZATIONS)
        if unknown := [item for item in text.split(",") if item not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("weights", "activations", "step", "one-case"))
    parser.add_argument("--checkpointing", type=modes, default=list(CHECKPOINTING_MODES), help="modes and numbers")
    parser.add_argument("--quantize", type=kinds, default=["int8"], help="any of none,int8,fp8,int4 (step)")
    parser.add_argument("--resolution", type=int, default=512, help="side of the image in pixels (default 512)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA on the attention layers (default 16)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="what the U-Net computes in")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default 2: the second has moments)")
    parser.add_argument("--max-rss-gib", type=float, default=0.0, help="exit 1 above this much memory (step)")
    parser.add_argument("--tiny", action="store_true", help="the tests' U-Net: checks the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
