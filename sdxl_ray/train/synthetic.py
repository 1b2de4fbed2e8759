"""Training without data: what the scripts and tests share that measure steps of a network with random weights.

    build_unet(...)  ─▶ synthetic_state ─┐
    synthetic_plan ─▶ synthetic_batches ─┴─▶ loop.run(state, plan, batches, objective, Recorder())

Numbers are keyed as in a real run, shapes and dtypes are those of `BatchBuilder`. It needs neither Ray nor Arrow nor
pydantic, so a machine with torch, diffusers and peft is enough.
"""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxl_ray.diffusion.objectives import Epsilon
from sdxl_ray.diffusion.randomness import keyed_normal, keyed_uniform
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.timesteps import uniform_timestep
from sdxl_ray.records import Batch, MicroConditioning, bucket_key
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.architecture import SCHEDULER_CONFIG
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.conditioning import add_time_ids, predict, unet_dtype
from sdxl_ray.train.loop import NUM_EXTRAS
from sdxl_ray.train.lr_schedules import lr_schedule
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.optimizers import ParameterGroup, make_optimizer
from sdxl_ray.train.order import DataOrder, MicroBatch
from sdxl_ray.train.plan import Every, Plan
from sdxl_ray.train.state import TrainState

_STATUS = Path("/proc/self/status")  # Linux
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Recorder:
    """A `Reporter` that keeps what it is told: `history[i]` is (step, values)."""

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.history.append((step, values))

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.history.append((step, values))

    def images(self, step: int) -> None:
        pass

    def checkpoint(self, step: int, state: TrainState) -> None:
        pass

    def asked_to_stop(self) -> bool:
        return False


def synthetic_objective(device: torch.device) -> Epsilon:
    """What SDXL base was trained on."""
    return Epsilon(NoiseSchedule.from_config(SCHEDULER_CONFIG).to(device))


def synthetic_plan(
    *, num_steps: int, batch_size: int, resolution_hw: tuple[int, int], log_every: int = 1, seed: int = 0
) -> Plan:
    """One worker, one micro-batch a step, `batch_size` images of one bucket; nothing is due but log lines."""
    bucket = bucket_key(resolution_hw)
    never = Every(0)
    return Plan(
        order=DataOrder([bucket] * batch_size, [1] * batch_size, micro_batch_size=batch_size, seed=seed),
        num_workers=1,
        accumulation=1,
        max_steps=num_steps,
        num_micro_batches=num_steps,
        log=Every(log_every, last=num_steps),
        evaluate=never,
        validate=never,
        save=never,
        max_grad_norm=1.0,
        seed=seed,
    )


def synthetic_state(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    targets: str | Sequence[str] = "attention",
    gradient_checkpointing: str | int = "none",
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> TrainState:
    """A fresh LoRA on `unet`, with its fp32 masters and AdamW, put together as in `setup.build_training`."""
    attach_adapter(unet, rank=rank, alpha=float(rank), targets=targets, seed=seed)
    set_gradient_checkpointing(unet, gradient_checkpointing)
    unet.train()
    masters = MasterWeights(adapter_parameters(unet), unet_dtype(unet), num_extra=NUM_EXTRAS)
    return TrainState(
        unet=unet,
        denoise=functools.partial(predict, unet),
        masters=masters,
        optimizer=make_optimizer(
            "adamw",
            [ParameterGroup(tuple(masters.masters.values()))],
            learning_rate=learning_rate,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            epsilon=1e-8,
            options={},
        ),
        learning_rate=lr_schedule("constant", peak=learning_rate, warmup_steps=0, max_steps=1),
        device=masters.buffer.device,
    )


def synthetic_batches(
    unet_config: Mapping[str, Any], plan: Plan, *, resolution_hw: tuple[int, int], position: int = 0
) -> Iterator[Batch]:
    """What is left of the plan from `position` on, on the CPU. Step s gets the same batch wherever one begins."""
    for share in plan.remaining(0, position, world_rank=0):
        yield synthetic_batch(unet_config, share.micro_batch, resolution_hw=resolution_hw, seed=plan.seed)


def synthetic_batch(
    unet_config: Mapping[str, Any],
    micro_batch: MicroBatch,
    *,
    resolution_hw: tuple[int, int],
    seed: int = 0,
    num_chunks: int = 1,
    encodes_text: bool = False,
) -> Batch:
    """Normal latents and embeddings as wide as the U-Net wants them, keyed noise and timesteps.

    Args:
        num_chunks: of 77 tokens for each caption.
        encodes_text: for a model that encodes captions in each step; all of them are empty.
    """
    height, width = resolution_hw
    latent_shape = (unet_config["in_channels"], height // 8, width // 8)
    text_width = unet_config["cross_attention_dim"]
    pooled_width = unet_config["projection_class_embeddings_input_dim"] - 6 * unet_config["addition_time_embed_dim"]
    keys = [(seed, micro_batch.epoch, row) for row in micro_batch.rows]

    def normal(shape: tuple[int, ...], name: str) -> torch.Tensor:
        return torch.stack([keyed_normal(shape, *key, name) for key in keys])

    return Batch(
        sample_ids=tuple(f"synthetic-{row}" for row in micro_batch.rows),
        latents=normal(latent_shape, "latents"),
        noise=normal(latent_shape, "noise"),
        timesteps=torch.tensor([uniform_timestep(keyed_uniform(*key, "timestep"), 1000) for key in keys]),
        # bf16 as in the shards of the cache
        prompt_embeds=normal((77 * num_chunks, text_width), "prompt_embeds").bfloat16(),
        pooled_prompt_embeds=normal((pooled_width,), "pooled_prompt_embeds").bfloat16(),
        add_time_ids=add_time_ids([MicroConditioning(resolution_hw, (0, 0), resolution_hw)] * len(keys)),
        weights=torch.ones(len(keys)),
        input_ids=torch.zeros(len(keys), 2, num_chunks, 77, dtype=torch.int64) if encodes_text else None,
    )


def peak_rss_gib() -> float:
    """The most memory this process held since it began, or since `reset_peak_rss`.

    Linux's VmHWM rather than ru_maxrss, which a child takes over from the process that started it.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))
    return peak_rss_by_getrusage_gib()


def peak_rss_by_getrusage_gib() -> float:
    """`getrusage`'s answer, which every Unix has: in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak_rss() -> bool:
    """Count the peak from now on; False where the system has no way to. man 5 proc, clear_refs."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
