"""Does a real SDXL LoRA step fit and stay finite on this machine's CPU? No files, no network, no Ray.

    python scripts/full_size_step.py                                     # 2 steps at 512², at most 9 GiB
    python scripts/full_size_step.py --gradient-checkpointing full --json step.json

Everything else in the tests uses a network of 8 MB. This builds SDXL's U-Net at its true size (2.57 billion parameters)
with random weights in bf16 and sends synthetic batches through the real loop, so that a copy of the weights in fp32, an
activation kept twice, or an overflow that only deep networks show is found here rather than on somebody's GPU.
It exits 1 if the loss is not finite or the process held more than --max-rss-gib.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sdxl_ray.errors import TrainingError
from sdxl_ray.sdxl.architecture import build_unet
from sdxl_ray.sdxl.checkpointing import CHECKPOINTING_MODES
from sdxl_ray.sdxl.targets import TARGETS
from sdxl_ray.train import loop
from sdxl_ray.train.synthetic import (
    Recorder,
    peak_rss_by_getrusage_gib,
    peak_rss_gib,
    synthetic_batches,
    synthetic_objective,
    synthetic_plan,
    synthetic_state,
)


class StepPrinter(Recorder):
    """One line per step as it ends, with the most memory held so far."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        super().metrics(step, values | {"memory/peak_rss_gib": peak_rss_gib()})
        print(
            f"step {step:>3} | loss {values['train/loss']:.4f} | grad {values['train/grad_norm']:.4f} "
            f"| {values['perf/step_s']:.1f} s | peak RSS {peak_rss_gib():.2f} GiB",
            flush=True,
        )


def main() -> int:
    """Build, run, compare with the limit; the exit code."""
    args = parse_arguments()
    resolution_hw = (args.resolution, args.resolution)
    result: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "json"}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    result["rss_after_imports_gib"] = peak_rss_gib()

    began = time.perf_counter()
    unet = build_unet(dtype=torch.bfloat16, device="cpu", seed=args.seed)
    result["build_s"] = time.perf_counter() - began
    result["unet_parameters"] = sum(parameter.numel() for parameter in unet.parameters())
    result["rss_after_build_gib"] = peak_rss_gib()
    state = synthetic_state(
        unet,
        rank=args.rank,
        targets=args.targets,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    result["adapter_modules"] = len(state.masters.masters) // 2  # lora_A and lora_B
    result["adapter_parameters"] = state.masters.gradient.numel()
    print(
        f"U-Net {result['unet_parameters']:,} parameters in bf16, built in {result['build_s']:.1f} s "
        f"| adapter {result['adapter_parameters']:,} in {result['adapter_modules']} modules "
        f"(rank {args.rank}, {args.targets}) | {args.resolution}², batch 1, "
        f"checkpointing {args.gradient_checkpointing} | RSS {peak_rss_gib():.2f} GiB",
        flush=True,
    )

    plan = synthetic_plan(num_steps=args.steps, batch_size=1, resolution_hw=resolution_hw, seed=args.seed)
    batches = synthetic_batches(unet.config, plan, resolution_hw=resolution_hw)
    report = StepPrinter()
    try:
        loop.run(state, plan, batches, synthetic_objective(state.device), report)
        result["finite"] = True
    except TrainingError as error:  # the loop looks at loss and gradient norm at every step
        print(f"not finite: {error}")
        result["finite"] = False
    changed = sum(
        float(master.detach().abs().sum()) > 0 for name, master in state.masters.masters.items() if "lora_B" in name
    )
    result["adapter_modules_that_moved"] = changed  # lora_B begins at zero
    result["steps_done"] = [{"step": step} | values for step, values in report.history]
    result["peak_rss_gib"] = peak_rss_gib()
    result["peak_rss_by_getrusage_gib"] = peak_rss_by_getrusage_gib()
    fits = result["peak_rss_gib"] <= args.max_rss_gib
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    finite = "yes" if result["finite"] else "NO"
    print(f"loss finite: {finite} | modules whose lora_B moved: {changed}/{result['adapter_modules']}")
    print(
        f"peak RSS {result['peak_rss_gib']:.2f} GiB (getrusage {result['peak_rss_by_getrusage_gib']:.2f}) "
        f"{'<=' if fits else 'EXCEEDS'} --max-rss-gib {args.max_rss_gib:g}"
    )
    return 0 if fits and result["finite"] else 1


def parse_arguments() -> argparse.Namespace:
    """One line per flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=2, help="optimizer steps (default 2: the second has a warm allocator)"
    )
    parser.add_argument("--resolution", type=int, default=512, help="side of the image in pixels, a multiple of 64")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--targets", default="attention", help=f"{', '.join(TARGETS)}, or a regex for module names")
    parser.add_argument("--gradient-checkpointing", choices=CHECKPOINTING_MODES, default="transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-rss-gib", type=float, default=9.0, help="exit 1 above this much memory (GiB)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
