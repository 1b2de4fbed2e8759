"""Everything one rank needs for the loop, from the config and the data. No Ray, so tests and notebooks use it too.

model ─▶ masters ─▶ optimizer ─▶ state ─▶ checkpoint, if any
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.live import LiveEntries
from sdxl_ray.cache.skipped import UnreadableLimit
from sdxl_ray.diffusion.distances import make_distance
from sdxl_ray.diffusion.loss import LossForm
from sdxl_ray.diffusion.noise import NoiseRecipe
from sdxl_ray.diffusion.objectives import OBJECTIVES, Objective
from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.diffusion.weighting import make_weighting
from sdxl_ray.errors import CacheError
from sdxl_ray.records import Batch
from sdxl_ray.sdxl.components import load_scheduler_config, resolve_model
from sdxl_ray.storage import is_uri
from sdxl_ray.train.batches import BatchBuilder, Conditions, Draws, prefetch
from sdxl_ray.train.checkpoints import load_checkpoint
from sdxl_ray.train.data import Data, Samples, build_plan, data_order
from sdxl_ray.train.ema import Ema
from sdxl_ray.train.entries import CacheEntries
from sdxl_ray.train.eval_loss import stable_eval_loss
from sdxl_ray.train.groups import LearningRates, parameter_groups
from sdxl_ray.train.lr_schedules import LrSchedule, lr_schedule
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.model import build_model
from sdxl_ray.train.optimizers import make_optimizer
from sdxl_ray.train.plan import Plan
from sdxl_ray.train.preflight import check_schedule, timestep_sampler
from sdxl_ray.train.scaling import LossScale
from sdxl_ray.train.state import TrainState, Workers
from sdxl_ray.train.text import PARTS, TrainedText
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
    form: LossForm
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
            self.plan.remaining(self.state.step, self.state.position, self.state.workers.world_rank),
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
    order = data_order(config, data)
    steps_per_epoch = order.micro_batches_per_epoch / (config.train.num_workers * config.train.accumulation)
    state = build_state(config, device, workers=workers, steps_per_epoch=steps_per_epoch, report=report)
    if checkpoint is not None:
        state.load_state_dict(load_checkpoint(checkpoint))
    plan = build_plan(config, order, step=state.step, position=state.position, can_evaluate=bool(data.held_out))
    state.learning_rate = learning_rates(config, plan.max_steps, steps_per_epoch)
    scheduler_config = load_scheduler_config(resolve_model(config.model.path), revision=config.model.revision or None)
    check_schedule(config, scheduler_config)
    loss = config.loss
    schedule = NoiseSchedule.from_config(scheduler_config, zero_terminal_snr=loss.zero_terminal_snr).to(device)
    if loss.zero_terminal_snr:
        scheduler_config = {**scheduler_config, "rescale_betas_zero_snr": True}
    objective_class = OBJECTIVES[loss.objective]
    weighting = make_weighting(loss.weighting, loss.objective, gamma=loss.min_snr_gamma)
    distance = make_distance(loss.error, schedule, huber_c=loss.huber_c, huber_schedule=loss.huber_schedule)
    entries = build_entries(config, data, device=device, report=report, limits=_limits(config, data))
    sections = data.sections.values()

    conditions = _conditions(config, data, entries, state.text)

    def builder(samples: Samples) -> BatchBuilder:
        return BatchBuilder(
            samples,
            entries,
            seed=config.run.seed,
            num_timesteps=schedule.num_timesteps,
            draws=_draws(config, steps_per_epoch, schedule.num_timesteps),
            conditions=conditions,
            weights={section.name: section.weight for section in sections},
            crop_epochs={section.name: section.crop_epochs for section in sections},
            from_parent=[section.name for section in sections if section.prior_prediction],
        )

    return Training(
        data=data,
        plan=plan,
        state=state,
        objective=objective_class(schedule, weighting),
        form=LossForm(distance, loss.mask_normalize, loss.unmasked_share),
        builder=builder(data.train),
        eval_builder=builder(data.held_out),
        # squared and unweighted, so that runs with other weightings can be compared
        eval_objective=objective_class(schedule),
        num_eval_timesteps=config.eval.num_timesteps,
        scheduler_config=scheduler_config,
        prefetching=_prefetching(config),
    )


def build_state(
    config: Config,
    device: torch.device,
    *,
    workers: Workers | None = None,
    steps_per_epoch: float = 1.0,
    report: Callable[[str], None] = logging.getLogger(__name__).warning,
) -> TrainState:
    """The model with its optimizer, before the first step; the learning rate is the peak until somebody sets it."""
    stops = {part: getattr(config, part).stop.in_steps(steps_per_epoch) for part in PARTS}
    built = build_model(config, device, stops, report)
    return TrainState(
        unet=built.unet,
        denoise=built.denoise,
        masters=built.masters,
        optimizer=make_optimizer_of(config, built.masters),
        learning_rate=lambda step: config.optimizer.learning_rate,
        device=device,
        workers=workers or Workers(),
        parent=built.parent,
        text=built.text,
        ema=Ema(built.masters.masters, config.ema.decay, config.ema.warmup) if config.ema.decay else None,
        averages_evaluated=config.ema.evaluate,
        loss_scale=LossScale(device) if config.model.dtype == "fp16" else None,
    )


def make_optimizer_of(config: Config, masters: MasterWeights) -> torch.optim.Optimizer:
    """The optimizer of the settings, with a group for each learning rate; what learns at a rate of 0 is frozen.

    Raises:
        ConfigError: it cannot train these parameters, or a pattern of adapter.blocks is in no module's name.
    """
    optimizer = config.optimizer
    rates = LearningRates(
        # rank 0: these modules are not there
        blocks=[(key, rule.learning_rate_scale) for key, rule in config.adapter.blocks.items() if rule.rank != 0],
        text={part: rate / optimizer.learning_rate for part in PARTS if (rate := getattr(config, part).learning_rate)},
        lora_plus_ratio=optimizer.lora_plus_ratio,
    )
    groups = parameter_groups(masters.masters, rates)
    # Else their gradients would count when the norm is clipped, and with fp16 nobody would take the scale off them.
    masters.freeze(name for name in masters.masters if rates.factor(name) == 0)
    return make_optimizer(
        optimizer.name,
        groups,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        betas=(optimizer.beta1, optimizer.beta2),
        epsilon=optimizer.epsilon,
        options=optimizer.options,
    )


def learning_rates(config: Config, max_steps: int, steps_per_epoch: float) -> LrSchedule:
    """The peak's share of each step, from the settings."""
    settings = config.lr_schedule
    return lr_schedule(
        settings.name,
        peak=config.optimizer.learning_rate,
        warmup_steps=settings.warmup.in_steps(max_steps, steps_per_epoch),
        max_steps=max_steps,
        end_share=settings.end_share,
        power=settings.power,
        cycles=settings.cycles,
        decay_steps=settings.decay.in_steps(max_steps, steps_per_epoch),
    )


def _draws(config: Config, steps_per_epoch: float, num_timesteps: int) -> Draws:
    loss = config.loss
    return Draws(
        sampler=timestep_sampler(config, num_timesteps),
        stratified=loss.stratified,
        noise=NoiseRecipe(
            offset=loss.offset_noise,
            offset_probability=loss.offset_noise_probability,
            multires_discount=loss.multires_noise_discount,
            multires_levels=loss.multires_noise_levels,
            perturbation=loss.input_perturbation,
        ),
        perturbation_end=loss.input_perturbation_end.in_steps(steps_per_epoch),
        caption_dropout=loss.caption_dropout,
        size_dropout=loss.size_dropout,
    )


def _conditions(config: Config, data: Data, entries: CacheEntries, text: TrainedText | None) -> Conditions:
    to_empty = config.loss.caption_dropout_to == "empty"
    if text is not None:
        return Conditions(tokenize=text.tokenize, drop_to_zeros=not to_empty)
    if not to_empty or not config.loss.caption_dropout:
        return Conditions()
    if "" not in data.prompts:
        raise CacheError(
            "the cache has no embedding of the empty caption, which loss.caption_dropout_to asks for. Run "
            "`sdxl-ray cache` with this config."
        )
    return Conditions(dropped_text=entries.prompt("", *data.prompts[""]))


def _prefetching(config: Config) -> Prefetching:
    if config.cache.mode == "off":  # decoding takes a core's time, and the encoder should never wait for it
        return Prefetching(depth=16, num_threads=min(8, os.cpu_count() or 1))
    if is_uri(config.cache.path):  # a shard that is copied from a bucket takes a second of waiting
        return Prefetching(depth=16, num_threads=8)
    return Prefetching()


def _limits(config: Config, data: Data) -> dict[str, UnreadableLimit] | None:
    """With cache.mode = "off", where nothing was decoded before; else what is damaged has left the data already."""
    if config.cache.mode != "off":
        return None
    num_images = data.train.whole.num_images()
    return {
        name: UnreadableLimit(section.path, section.max_unreadable, num_images[name])
        for name, section in data.sections.items()
        if name in num_images
    }


def build_entries(
    config: Config,
    data: Data,
    *,
    device: torch.device,
    report: Callable[[str], None],
    limits: Mapping[str, UnreadableLimit] | None = None,
) -> CacheEntries:
    """The way to the samples' tensors: shards, and encoders where the config asks for them, loaded when needed.

    Args:
        limits: of unreadable images among those that are encoded while training, by dataset.
    """

    def encoders(device: torch.device, limits: Mapping[str, UnreadableLimit] | None = None) -> LiveEntries:
        return LiveEntries(
            resolve_model(config.model.path),
            revision=config.model.revision,
            variant=config.model.variant,
            vae_dtype=config.cache.vae_dtype,
            caption_chunks=config.cache.caption_chunks,
            device=device,
            report=report,
            limits=limits,
        )

    is_off, is_online = config.cache.mode == "off", config.cache.text == "online"
    cpu = torch.device("cpu")
    repair = encoders(cpu)
    # On Apple's MPS the CPU encodes: two threads must not use that device at once.
    live = encoders(device if device.type == "cuda" else cpu, limits) if is_off or is_online else repair
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
