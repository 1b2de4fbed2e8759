"""How fast does this machine train an SDXL LoRA, and how near is that to what its matrix units can do?

    python scripts/bench_train.py                                                    # the default grid, on the GPU
    python scripts/bench_train.py --batch 1,4,12 --resolution 1024 --checkpointing none --json h100.json
    python scripts/bench_train.py --recipe sdxl-ray,diffusers --batch 4 --resolution 1024
    python scripts/bench_train.py --batch 1 --resolution 512 --checkpointing none --steps 2 --warmup 1     # on a CPU

SDXL's U-Net at its true size, random weights, synthetic batches, the real `sdxl_ray/train/loop.py`. No network and no
files, and no Ray: a rented machine needs torch, diffusers, transformers, peft and NumPy and a copy of this repository.

    1  measure the matrix peak               matrix_peak        large matrix products in --dtype, best of several sizes
    2  for each recipe, build the U-Net      build_unet
    3  for each row of the grid, count       count_flops        torch.utils.flop_counter on the meta device
    4                         and measure    measure            --warmup steps, then --steps timed ones
    5  print the table, write --json         print_row

"of peak" divides the FLOPs that the mathematics needs, without what checkpointing computes again, by what step 1
measured: the share of an ideal machine's time. "TF/s run" counts the recomputation too. A step is timed from the
request for its batch to the request for the next; on a GPU by events, so the host waits only at the end of a row.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.errors import TrainingError
from sdxl_ray.records import Batch
from sdxl_ray.sdxl.adapters import attach_adapter, detach_adapter
from sdxl_ray.sdxl.architecture import UNET_CONFIG, build_unet
from sdxl_ray.sdxl.checkpointing import CHECKPOINTING_MODES, set_gradient_checkpointing
from sdxl_ray.sdxl.devices import DTYPES, best_device
from sdxl_ray.sdxl.targets import TARGETS
from sdxl_ray.sdxl.tiny import unet_config as tinyunet_config
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

RECIPES = {
    "sdxl-ray": "frozen base, adapter copies and activations in --dtype, fp32 masters, no autocast",
    "diffusers": "base in --dtype, fp32 LoRA inside, autocast to --dtype, AdamW and clipping by parameter, loss.item()",
    "diffusers-fp32-base": "the same with the base in fp32",
}
NUM_BATCHES = 4  # drawn ahead of the clock, used in turn


@dataclass(frozen=True)
class Row:
    """One point of the grid."""

    recipe: str
    batch: int
    resolution: int
    checkpointing: str


@dataclass(frozen=True)
class Flops:
    """Per image. `forward_backward` is what the mathematics needs, `executed` includes what checkpointing repeats."""

    forward: float
    forward_backward: float
    executed: float


# -- 1: the matrix peak -----------------------------------------------------------------------------------------------


def matrix_peak(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """TFLOP/s of square matrix products, the best of several sizes: what a perfect network could reach here."""
    seconds, sizes = 0.5, (512, 1024, 2048, 4096) if device.type == "cpu" else (2048, 4096, 8192, 12288)
    if tiny:
        seconds, sizes = 0.05, (128, 256)
    by_size = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        multiply = functools.partial(torch.matmul, left, right)
        multiply()  # chooses and compiles its kernel
        once_s = time_calls(device, multiply, 1)
        count = max(1, min(200, int(seconds / 3 / once_s)))
        best_s = min(time_calls(device, multiply, count) / count for _ in range(3))
        by_size[size] = 2 * size**3 / best_s / 1e12
        del left, right, multiply
    empty_cache(device)
    return {"tflops_per_s": max(by_size.values()), "by_size": by_size}


def time_calls(device: torch.device, call: Callable[[], Any], count: int) -> float:
    """Seconds of `count` calls, until the device has done them."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - began


# -- 3: FLOPs ---------------------------------------------------------------------------------------------------------


@functools.cache
def count_flops(tiny: bool, resolution: int, checkpointing: str, rank: int, targets: str) -> Flops:
    """Of one image's step, 2 per multiply-add, on tensors without memory. Elementwise work is not counted."""
    unet = build_unet(dtype=torch.bfloat16, device="meta", config=unet_config(tiny))
    state = synthetic_state(unet, rank=rank, targets=targets, gradient_checkpointing=checkpointing)
    plan = synthetic_plan(num_steps=1, batch_size=1, resolution_hw=(resolution, resolution))
    batch = next(synthetic_batches(unet.config, plan, resolution_hw=(resolution, resolution))).to("meta")
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        prediction = state.denoise(
            batch.latents, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.add_time_ids
        )
    with backward:
        prediction.float().sum().backward()
    executed = forward.get_total_flops() + backward.get_total_flops()
    needed = executed
    if checkpointing != "none":
        needed = count_flops(tiny, resolution, "none", rank, targets).executed
    return Flops(forward=forward.get_total_flops(), forward_backward=needed, executed=executed)


def build_or_none(dtype: torch.dtype, device: torch.device, tiny: bool) -> UNet2DConditionModel | None:
    """The U-Net, or None where the device is too small for its weights alone."""
    try:
        return build_unet(dtype=dtype, device=device, config=unet_config(tiny))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def unet_config(tiny: bool) -> dict[str, Any]:
    """SDXL's, or the one of the tests."""
    return tinyunet_config() if tiny else UNET_CONFIG


# -- 4: measuring -----------------------------------------------------------------------------------------------------


class StepTimer:
    """Marks the moments between steps: CUDA events, so that the host does not wait; elsewhere the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            synchronize(self.device)
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step. The host waits for the device here."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(self.marks)]
        return [end - begin for begin, end in itertools.pairwise(self.marks)]

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with a mark whenever one is asked for."""
        for batch in batches:
            self.mark()
            yield batch


def measure(row: Row, unet: UNet2DConditionModel, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Step times, memory and last loss of one row; `status` says "out of memory" where it did not fit."""
    detach_adapter(unet)  # the last row's
    reset_peak_memory(device)
    timer, num_steps = StepTimer(device), args.warmup + args.steps
    run = run_sdxl_ray if row.recipe == "sdxl-ray" else run_diffusers
    try:
        loss = run(row, unet, args, device, timer, num_steps)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory"}
    except TrainingError as error:
        return {"status": f"failed: {error}"}
    step_s = timer.seconds()[args.warmup :]
    return {
        "status": "ok",
        "step_s": step_s,
        "step_s_median": statistics.median(step_s),
        "step_s_p10": percentile(step_s, 0.1),
        "step_s_p90": percentile(step_s, 0.9),
        "images_per_s": row.batch / statistics.median(step_s),
        "peak_memory_gib": peak_memory_gib(device),
        "last_loss": loss,
    }


def run_sdxl_ray(
    row: Row,
    unet: UNet2DConditionModel,
    args: argparse.Namespace,
    device: torch.device,
    timer: StepTimer,
    num_steps: int,
) -> float:
    """The loop as it trains; the last step's loss."""
    resolution_hw = (row.resolution, row.resolution)
    state = synthetic_state(unet, rank=args.rank, targets=args.targets, gradient_checkpointing=row.checkpointing)
    plan = synthetic_plan(num_steps=num_steps, batch_size=row.batch, resolution_hw=resolution_hw, log_every=num_steps)
    report = Recorder()
    batches = timer.watched(ready_batches(unet, row, device))
    loop.run(state, plan, batches, synthetic_objective(device), report)
    timer.mark()
    return report.history[-1][1]["train/loss"]


def run_diffusers(
    row: Row,
    unet: UNet2DConditionModel,
    args: argparse.Namespace,
    device: torch.device,
    timer: StepTimer,
    num_steps: int,
) -> float:
    """The step of diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py, with fp32 LoRA parameters.

    What differs from ours: autocast around the U-Net, the adapter's own parameters are the fp32 ones, AdamW and
    clipping go from parameter to parameter, and the loss is fetched at every step.
    """
    attach_adapter(unet, rank=args.rank, alpha=float(args.rank), targets=args.targets)
    set_gradient_checkpointing(unet, row.checkpointing)
    unet.train()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, eps=1e-8)
    objective, loss_value = synthetic_objective(device), float("nan")

    def denoise(
        latents: torch.Tensor, timesteps: torch.Tensor, prompts: torch.Tensor, pooled: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        dtype = unet.conv_in.weight.dtype
        # time ids in bf16, as the script has them
        conditions = {"text_embeds": pooled.to(dtype), "time_ids": ids.to(dtype)}
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
            return unet(
                latents.to(dtype), timesteps, prompts.to(dtype), added_cond_kwargs=conditions, return_dict=False
            )[0]

    for batch in itertools.islice(timer.watched(ready_batches(unet, row, device)), num_steps):
        on_device = batch.to(device)
        loss = diffusion_loss(
            denoise, on_device, objective, timesteps=on_device.timesteps, noise=on_device.noise
        ).mean()
        loss_value = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    timer.mark()
    return loss_value


def ready_batches(unet: UNet2DConditionModel, row: Row, device: torch.device) -> Iterator[Batch]:
    """Batches without end, drawn before the clock starts: this is about the step, not about the data."""
    resolution_hw = (row.resolution, row.resolution)
    plan = synthetic_plan(num_steps=NUM_BATCHES, batch_size=row.batch, resolution_hw=resolution_hw)
    drawn = synthetic_batches(unet.config, plan, resolution_hw=resolution_hw)
    return itertools.cycle([batch.pin_memory() if device.type == "cuda" else batch for batch in drawn])


def percentile(values: list[float], share: float) -> float:
    """The nearest of `values`; of one value, that value."""
    return sorted(values)[round(share * (len(values) - 1))]


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA and ROCm have a class for it; MPS and the CPU's allocator say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


# -- devices ----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give freed memory back, so that one row does not make the next run out of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on; of a CPU without a writable /proc/self/clear_refs, that of all rows so far."""
    empty_cache(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        reset_peak_rss()


def peak_memory_gib(device: torch.device) -> float:
    """CUDA: tensors at the peak. MPS: what the driver gave and the cache keeps. CPU: the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return peak_rss_gib()


def device_name(device: torch.device) -> str:
    """What the shop calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()} ({device.type})"


# -- 5: the table -----------------------------------------------------------------------------------------------------

HEADER = (
    f"{'recipe':<20}{'batch':>6}{'px':>6}  {'checkpointing':<14}{'img/s':>9}{'step s':>9}{'p10':>9}{'p90':>9}"
    f"{'TF/s':>9}{'of peak':>9}{'TF/s run':>10}{'GiB':>7}{'loss':>9}"
)


def print_row(row: Row, result: dict[str, Any]) -> None:
    """One line of the table."""
    line = f"{row.recipe:<20}{row.batch:>6}{row.resolution:>6}  {row.checkpointing:<14}"
    if result["status"] == "ok":
        line += (
            f"{result['images_per_s']:>9.3g}{result['step_s_median']:>9.3g}{result['step_s_p10']:>9.3g}"
            f"{result['step_s_p90']:>9.3g}{result['tflops_per_s']:>9.3g}{result['share_of_peak']:>9.1%}"
            f"{result['executed_tflops_per_s']:>10.3g}{result['peak_memory_gib']:>7.2f}{result['last_loss']:>9.4f}"
        )
    else:
        line += f"  {result['status']}"
    print(line, flush=True)


def main() -> None:
    """Steps 1 to 5 of the module docstring."""
    args = parse_arguments()
    device = torch.device(args.device) if args.device else best_device()
    dtype = DTYPES[args.dtype]
    peak = matrix_peak(device, dtype, tiny=args.tiny)
    environment = {
        "device": device_name(device),
        "backend": f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"{device.type} {torch.version.cuda or ''}".strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "scripts/bench_train.py", *sys.argv[1:]]),
    }
    print(" | ".join(f"{name} {environment[name]}" for name in ("device", "backend", "torch", "diffusers", "peft")))
    by_size = ", ".join(f"{size}: {value:.3g}" for size, value in peak["by_size"].items())
    print(f"matrix peak {peak['tflops_per_s']:.3g} TFLOP/s in {args.dtype} (by size {by_size})")
    for resolution in args.resolution:
        flops = count_flops(args.tiny, resolution, "none", args.rank, args.targets)
        print(
            f"{resolution}², rank {args.rank}, {args.targets}: {flops.forward / 1e12:.5g} TFLOP forward, "
            f"{flops.forward_backward / 1e12:.5g} with backward, per image"
        )
    print(HEADER, flush=True)

    rows = []
    for recipe in args.recipe:
        base_dtype = torch.float32 if recipe == "diffusers-fp32-base" else dtype
        unet = build_or_none(base_dtype, device, args.tiny)
        for resolution, checkpointing, batch in itertools.product(args.resolution, args.checkpointing, args.batch):
            row = Row(recipe, batch, resolution, checkpointing)
            result = measure(row, unet, args, device) if unet is not None else {"status": "out of memory"}
            flops = count_flops(args.tiny, resolution, checkpointing, args.rank, args.targets)
            result |= {f"{name}_flops_per_image": value for name, value in asdict(flops).items()}
            if result["status"] == "ok":
                result["tflops_per_s"] = result["images_per_s"] * flops.forward_backward / 1e12
                result["executed_tflops_per_s"] = result["images_per_s"] * flops.executed / 1e12
                result["share_of_peak"] = result["tflops_per_s"] / peak["tflops_per_s"]
            rows.append(asdict(row) | result)
            print_row(row, result)
        del unet
        empty_cache(device)

    if args.json:
        settings = {name: getattr(args, name) for name in ("rank", "targets", "dtype", "steps", "warmup", "tiny")}
        content = {"environment": environment, "settings": settings, "matrix_peak": peak, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """One entry per flag; lists are separated by commas."""

    def integers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    def choices(known: Any) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            if unknown := [item for item in text.split(",") if item not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
            return text.split(",")

        return names

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="recipes: " + "; ".join(f"{name}: {meaning}" for name, meaning in RECIPES.items()),
    )
    parser.add_argument("--batch", type=integers, default=[1, 2, 4, 8], help="images per step (default 1,2,4,8)")
    parser.add_argument("--resolution", type=integers, default=[512, 1024], help="side in pixels (default 512,1024)")
    parser.add_argument(
        "--checkpointing",
        type=choices(CHECKPOINTING_MODES),
        default=list(CHECKPOINTING_MODES),
        help=f"any of {','.join(CHECKPOINTING_MODES)} (default all)",
    )
    parser.add_argument("--recipe", type=choices(RECIPES), default=["sdxl-ray"], help=f"any of {','.join(RECIPES)}")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--targets", default="attention", help=f"{', '.join(TARGETS)}, or a regex for module names")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per row (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts, per row (default 3)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="what the U-Net computes in")
    parser.add_argument("--device", default="", help="cuda, mps, cpu, ... (default: the best there is)")
    parser.add_argument(
        "--tiny", action="store_true", help="the tests' U-Net of a few MB: checks the script, measures nothing"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
