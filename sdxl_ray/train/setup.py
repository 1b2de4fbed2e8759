"""Everything one rank needs for the loop, from the config and the data. No Ray, so tests and notebooks use it too.

model ─▶ adapter ─▶ masters ─▶ optimizer ─▶ state ─▶ checkpoint, if any
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.live import LiveEntries
from sdxl_ray.diffusion.objectives import OBJECTIVES, Objective
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import min_snr
from sdxl_ray.errors import CacheError, ConfigError
from sdxl_ray.records import Batch
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.components import load_scheduler_config, load_unet, resolve_model
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.storage import is_uri
from sdxl_ray.train.batches import BatchBuilder, prefetch
from sdxl_ray.train.checkpoints import load_checkpoint
from sdxl_ray.train.data import Data, Samples, build_plan, data_order
from sdxl_ray.train.entries import CacheEntries
from sdxl_ray.train.eval_loss import stable_eval_loss
from sdxl_ray.train.loop import NUM_EXTRAS
from sdxl_ray.train.optimizers import MasterWeights, adamw, lr_schedule
from sdxl_ray.train.plan import Plan
from sdxl_ray.train.state import TrainState, Workers
from sdxl_ray.train.validation import Prompts, read_prompts

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


@dataclass(frozen=True)
class Prefetching:
    """How many batches are made ahead of the step, in how many threads. Reading shards takes little of either."""

    depth: int = 4
    num_threads: int = 2


@dataclass
class Training:
    """One rank, ready to run."""

    data: Data
    plan: Plan
    state: TrainState
    objective: Objective
    builder: BatchBuilder
    eval_builder: BatchBuilder
    eval_objective: Objective
    num_eval_timesteps: int
    scheduler_config: dict[str, Any]
    prefetching: Prefetching

    def batches(self) -> Iterator[Batch]:
        """This rank's batches from the state's position to the end of the run."""
        return prefetch(
            self.builder.training,
            self.plan.remaining(self.state.position, self.state.workers.world_rank),
            depth=self.prefetching.depth,
            num_threads=self.prefetching.num_threads,
            pin_memory=self.state.device.type == "cuda",
        )

    def evaluate(self) -> dict[str, float]:
        """The stable eval loss. Collective."""
        workers = self.state.workers
        rows = range(workers.world_rank, len(self.data.held_out), workers.world_size)

        def share() -> Iterator[Batch]:
            return prefetch(
                lambda row: self.eval_builder.evaluation(row, self.num_eval_timesteps),
                rows,
                depth=self.prefetching.depth,
                num_threads=self.prefetching.num_threads,
                pin_memory=self.state.device.type == "cuda",
            )

        return stable_eval_loss(self.state, share, self.eval_objective)


def build_training(
    config: Config,
    data: Data,
    *,
    workers: Workers,
    device: torch.device,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = logging.getLogger(__name__).warning,
) -> Training:
    """Load the model and build one rank's training, from the start or from a checkpoint.

    Args:
        report: told in one line about damaged entries and images, from the threads that make batches.
    """
    model, revision = resolve_model(config.model.path), config.model.revision or None
    dtype = DTYPES[config.model.dtype]
    unet = load_unet(model, dtype=dtype, device=device, revision=revision, variant=config.model.variant or None)
    attach_adapter(
        unet,
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        alpha=config.adapter.scaling_alpha,
        dropout=config.adapter.dropout,
        targets=config.adapter.targets,
        seed=config.run.seed,
    )
    set_gradient_checkpointing(unet, config.train.gradient_checkpointing)
    unet.train()
    masters = MasterWeights(adapter_parameters(unet), dtype, num_extra=NUM_EXTRAS)
    optimizer = adamw(
        masters,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        epsilon=config.optimizer.epsilon,
    )
    state = TrainState(
        unet=unet,
        denoise=functools.partial(predict, unet),
        masters=masters,
        optimizer=optimizer,
        learning_rate=lambda step: config.optimizer.learning_rate,
        device=device,
        workers=workers,
    )
    if checkpoint is not None:
        state.load_state_dict(load_checkpoint(checkpoint))
    order = data_order(config, data)
    plan = build_plan(
        config,
        order,
        step=state.step,
        position=state.position,
        can_evaluate=bool(data.held_out),
    )
    steps_per_epoch = order.micro_batches_per_epoch / plan.micro_batches_per_step
    state.learning_rate = lr_schedule(
        config.lr_schedule.name,
        peak=config.optimizer.learning_rate,
        warmup_steps=config.lr_schedule.warmup.in_steps(plan.max_steps, steps_per_epoch),
        max_steps=plan.max_steps,
    )
    scheduler_config = load_scheduler_config(model, revision=revision)
    schedule = NoiseSchedule.from_config(scheduler_config).to(device)
    if config.loss.objective == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise ConfigError(
            f'loss.objective = "epsilon", but the schedule of {config.model.path} ends in pure noise '
            "(rescale_betas_zero_snr), where epsilon says nothing about the image. Models with this schedule "
            'predict v: set loss.objective = "v_prediction".'
        )
    objective_class = OBJECTIVES[config.loss.objective]
    weighting = min_snr(config.loss.min_snr_gamma, config.loss.objective) if config.loss.min_snr_gamma else None

    entries = build_entries(config, data, device=device, report=report)
    sections = data.sections.values()

    def builder(samples: Samples) -> BatchBuilder:
        return BatchBuilder(
            samples,
            entries,
            seed=config.run.seed,
            num_timesteps=schedule.num_timesteps,
            caption_dropout=config.loss.caption_dropout,
            weights={section.name: section.weight for section in sections},
            crop_epochs={section.name: section.crop_epochs for section in sections},
        )

    return Training(
        data=data,
        plan=plan,
        state=state,
        objective=objective_class(schedule, weighting),
        builder=builder(data.train),
        eval_builder=builder(data.held_out),
        eval_objective=objective_class(schedule),  # unweighted, so that runs with other weightings can be compared
        num_eval_timesteps=config.eval.num_timesteps,
        scheduler_config=scheduler_config,
        prefetching=_prefetching(config),
    )


def _prefetching(config: Config) -> Prefetching:
    if config.cache.mode == "off":  # decoding takes a core's time, and the encoder should never wait for it
        return Prefetching(depth=16, num_threads=min(8, os.cpu_count() or 1))
    if is_uri(config.cache.path):  # a shard that is copied from a bucket takes a second of waiting
        return Prefetching(depth=16, num_threads=8)
    return Prefetching()


def build_entries(config: Config, data: Data, *, device: torch.device, report: Callable[[str], None]) -> CacheEntries:
    """The way to the samples' tensors: shards, and encoders where the config asks for them, loaded when needed."""

    def encoders(device: torch.device) -> LiveEntries:
        return LiveEntries(
            resolve_model(config.model.path),
            revision=config.model.revision,
            variant=config.model.variant,
            vae_dtype=config.cache.vae_dtype,
            caption_chunks=config.cache.caption_chunks,
            device=device,
            report=report,
        )

    is_off, is_online = config.cache.mode == "off", config.cache.text == "online"
    repair = encoders(torch.device("cpu"))
    # On Apple's MPS the CPU encodes: two threads must not use that device at once.
    live = encoders(device) if device.type in ("cuda", "cpu") and (is_off or is_online) else repair
    rules = {section.name: CaptionRules.of(section) for section in data.sections.values()} if is_online else {}
    return CacheEntries(
        data.reader,
        live=live,
        repair=repair,
        rules=rules,
        report=report,
        on_demand=config.cache.mode == "ondemand",
    )


def validation_prompts(config: Config, data: Data) -> Prompts | None:
    """The prompts with their embeddings, or None where the config has none.

    Raises:
        CacheError: the cache does not have them.
    """
    if not config.validation.prompts:
        return None
    # What has no shard, or a damaged one, is encoded on the CPU: it is done once.
    entries = build_entries(config, data, device=torch.device("cpu"), report=logging.getLogger(__name__).warning)

    def read(text: str) -> Mapping[str, torch.Tensor]:
        if text not in data.prompts:
            raise CacheError(
                f'the cache has no embedding of the validation prompt "{text}". Run `sdxl-ray cache` with this config.'
            )
        return entries.prompt(text, *data.prompts[text])

    return read_prompts(config.validation.prompts, config.validation.negative_prompt, read)
