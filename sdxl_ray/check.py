"""What a run would do, before it costs anything: images, buckets, steps, parameters, memory, disk."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray.cache.planning import CachePlan, plan_cache
from sdxl_ray.records import parse_bucket_key
from sdxl_ray.sdxl.components import objective_warning, read_part_config, resolve_model
from sdxl_ray.sdxl.fingerprint import unet_weight_shapes
from sdxl_ray.sdxl.targets import count_adapter_parameters
from sdxl_ray.train.plan import DataOrder, Every, run_length, split_holdout

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

GIB = 2**30
# Live activations of one 1024² image in GiB, counted on the true architecture with attention LoRA in bf16; the second
# row with adapters in all linear layers. Checkpointing counts what stays plus the largest block that is recomputed.
ACTIVATIONS_GIB = {
    "attention": {"none": 5.22, "transformer": 1.1, "full": 0.8},
    "all-linear": {"none": 6.29, "transformer": 1.2, "full": 0.9},
}
# What drawing a validation image takes at least in GiB, counted likewise: the VAE's weights and its live tensors for a
# tile of 512² in fp32; a 1024² image is decoded at once, with 3.0, where there is room. The U-Net's guided pair, 0.3,
# is over by then.
_VAE_GIB = 0.31
_TILE_GIB = 0.8
_TRUE_UNET_PARAMETERS = 2_500_000_000  # at least: anything smaller is not the architecture of the table above
_MUCH_EVALUATION = 0.1  # of the forward passes
_CONTEXT_GIB = 1.0  # CUDA context, cuDNN and cuBLAS workspaces


@dataclass
class Explanation:
    """What `sdxl-ray check` prints."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    global_batch_size: int = 0
    num_steps: int = 0
    num_epochs: float = 0.0
    eval_share: float = 0.0  # of the run's forward passes
    num_adapter_parameters: int = 0
    memory_gib: float | None = None
    disk_gib: float = 0.0
    buckets: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        return "\n".join([*self.lines, *(f"note: {warning}" for warning in self.warnings)])


def explain(config: Config) -> Explanation:
    """Scan the images, plan the run, estimate what it needs. Encodes nothing and starts nothing.

    Raises:
        InputError: what would stop the run.
    """
    model = resolve_model(config.model.path)
    plan = plan_cache(config.dataset, config.model, config.cache, model_path=model, prompts=config.validation.prompts)
    found = Explanation(buckets=plan.buckets)
    _explain_images(config, plan, found)
    _explain_steps(config, plan, found)
    _explain_model(config, model, found)
    _explain_disk(config, plan, model, found)
    return found


def _explain_images(config: Config, plan: CachePlan, found: Explanation) -> None:
    found.lines.append(f"images      {len(plan.samples)} of {plan.num_images} in {config.dataset.path}")
    for item in plan.skipped[:5]:
        found.lines.append(f"            skipped {Path(item.path).name}: {item.reason}")
    if len(plan.skipped) > 5:
        found.lines.append(f"            and {len(plan.skipped) - 5} more")
    for bucket, count in sorted(plan.buckets.items(), key=lambda item: -item[1]):
        batches = math.ceil(count * config.dataset.repeats / config.train.micro_batch_size)
        found.lines.append(f"bucket      {bucket:>9}  {count} images, {batches} micro-batches an epoch")
    captions = Counter(len(sample.captions) for sample in plan.samples)
    found.lines.append(f"captions    {sum(count * images for count, images in captions.items())}")
    scales = [_enlargement(sample.original_hw, sample.target_hw) for sample in plan.samples]
    enlarged = [scale for scale in scales if scale > 1.0]
    if enlarged:
        found.warnings.append(
            f"{len(enlarged)} images are smaller than their bucket and are enlarged, up to {max(enlarged):.1f} times"
        )
    found.lines.append(
        f"cache       {plan.num_missing_latents} images and {plan.num_missing_text} captions to encode, "
        f"into {config.cache.path}"
    )


def _explain_steps(config: Config, plan: CachePlan, found: Explanation) -> None:
    hashes = [sample.image_hash for sample in plan.samples]
    train_rows, held_out = split_holdout(hashes, config.eval.holdout, config.eval.max_images)
    train = [plan.samples[row] for row in train_rows]
    order = DataOrder(
        [sample.bucket for sample in train],
        [sample.repeats for sample in train],
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
    )
    per_step = config.train.num_workers * config.train.accumulation
    duration = config.train.duration
    found.num_steps, num_micro_batches = run_length(
        steps=duration.value if duration.unit == "steps" else None,
        epochs=duration.value if duration.unit == "epochs" else None,
        order=order,
        micro_batches_per_step=per_step,
        step=0,
        position=0,
    )
    found.num_epochs = num_micro_batches / order.micro_batches_per_epoch
    found.global_batch_size = config.global_batch_size
    found.lines += [
        f"split       {len(train)} to train on, {len(held_out)} held out for the eval loss",
        f"batch       {config.global_batch_size} images a step = {config.train.micro_batch_size} x "
        f"{config.train.accumulation} accumulated x {config.train.num_workers} workers",
        f"length      {found.num_steps} steps, {found.num_epochs:.1f} epochs of {order.samples_per_epoch} images",
    ]
    smaller = sum(
        count % config.train.micro_batch_size > 0
        for count in Counter(sample.bucket for sample in train for _ in range(sample.repeats)).values()
    )
    if smaller and len(train) < 10 * config.train.micro_batch_size * max(1, len(found.buckets)):
        found.warnings.append(f"{smaller} buckets end an epoch with a smaller micro-batch; its images count the same")
    every = Every(config.eval.every.in_steps(order.micro_batches_per_epoch / per_step), last=found.num_steps)
    num_evaluations = 1 + sum(every.due(step) for step in range(1, found.num_steps + 1))  # also before the first step
    evaluated = num_evaluations * len(held_out) * config.eval.num_timesteps
    trained = found.num_epochs * order.samples_per_epoch
    found.eval_share = evaluated / (evaluated + trained)
    if found.eval_share > _MUCH_EVALUATION:
        found.warnings.append(
            f"evaluation is {found.eval_share:.0%} of the run's forward passes: {num_evaluations} times "
            f"{len(held_out)} images at {config.eval.num_timesteps} noise levels. "
            "Raise eval.every, or lower eval.max_images or eval.num_timesteps."
        )
    if not held_out and config.eval.holdout > 0:
        found.warnings.append("too few different images to hold one out; there is no eval loss")


def _explain_model(config: Config, model: str, found: Explanation) -> None:
    revision = config.model.revision or None
    shapes = unet_weight_shapes(model, revision=revision, variant=config.model.variant or None)
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    modules, found.num_adapter_parameters = count_adapter_parameters(
        shapes, config.adapter.rank, config.adapter.targets
    )
    found.lines.append(
        f"adapter     {config.adapter.kind} rank {config.adapter.rank} on {modules} layers: "
        f"{found.num_adapter_parameters / 1e6:.2f} M parameters beside {num_parameters / 1e6:,.0f} M frozen ones"
    )
    warning = objective_warning(config.loss.objective, read_part_config(model, "scheduler", revision=revision))
    if warning:
        found.warnings.append(warning)
    if num_parameters < _TRUE_UNET_PARAMETERS:
        found.lines.append("memory      a small model: not estimated")
        return
    found.memory_gib = estimate_memory_gib(config, num_parameters, found.num_adapter_parameters)
    found.lines.append(
        f"memory      estimated at {found.memory_gib:.1f} GiB per worker at {config.dataset.resolution} px with "
        f"micro_batch_size {config.train.micro_batch_size}, "
        f'gradient_checkpointing "{config.train.gradient_checkpointing}"'
    )


def estimate_memory_gib(config: Config, num_parameters: int, num_adapter_parameters: int) -> float:
    """Weights, adapter with optimizer, workspace, and the larger of a step's activations and a validation image's.

    An estimate, not a measurement: live tensors counted on the true architecture. docs/numerics.md says how.
    """
    weight_bytes = {"bf16": 2, "fp32": 4}[config.model.dtype]
    images = config.train.micro_batch_size * (config.dataset.resolution / 1024) ** 2
    activations = ACTIVATIONS_GIB[config.adapter.targets][config.train.gradient_checkpointing] * weight_bytes / 2
    # masters, gradients and two moments in fp32, and the copy and gradient in the U-Net's precision
    adapter = num_adapter_parameters * (16 + 2 * weight_bytes) / GIB
    step = activations * images
    drawing = _VAE_GIB + _TILE_GIB if config.validation.prompts else 0.0
    return num_parameters * weight_bytes / GIB + max(step, drawing) + adapter + _CONTEXT_GIB


def _explain_disk(config: Config, plan: CachePlan, model: str, found: Explanation) -> None:
    config_2 = read_part_config(model, "text_encoder_2", revision=config.model.revision or None)
    width = read_part_config(model, "unet", revision=config.model.revision or None)["cross_attention_dim"]
    text_bytes = plan.num_missing_text * 2 * (77 * width + config_2["projection_dim"])
    latent_bytes = 0
    for shard in plan.missing_latents:
        height, latent_width = (edge // 8 for edge in parse_bucket_key(Path(shard.name).parent.name))
        latent_bytes += len(shard.keys) * 2 * 2 * 4 * height * latent_width  # mean and std, 4 channels, bf16
    checkpoints = (config.checkpoint.keep + 1) * 12 * found.num_adapter_parameters  # masters and two moments
    exports = len(config.export.formats) * 4 * found.num_adapter_parameters
    found.disk_gib = (text_bytes + latent_bytes + checkpoints + exports) / GIB
    found.lines.append(
        f"disk        {(text_bytes + latent_bytes) / GIB:.2f} GiB more cache, "
        f"{(checkpoints + exports) / GIB:.2f} GiB checkpoints and LoRA files in {config.run.output}"
    )


def _enlargement(original_hw: tuple[int, int], target_hw: tuple[int, int]) -> float:
    return max(target_hw[0] / original_hw[0], target_hw[1] / original_hw[1])
