"""What a run would do, before it costs anything: images, buckets, steps, parameters, memory, disk."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.foreseen import index_of
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.planning import CachePlan, plan_cache
from sdxl_ray.cache.preview import SKIPPED_SHOWN, write_contact_sheet
from sdxl_ray.cache.scan import scan_all, scan_each
from sdxl_ray.errors import ConfigError
from sdxl_ray.export.which import is_whole_model
from sdxl_ray.records import parse_bucket_key
from sdxl_ray.sdxl.components import objective_warning, read_part_config, resolve_model
from sdxl_ray.sdxl.fingerprint import unet_weight_shapes
from sdxl_ray.sdxl.targets import count_adapter_parameters
from sdxl_ray.train.data import Split, build_plan, data_order, split
from sdxl_ray.train.preflight import check_methods, check_schedule, export_formats
from sdxl_ray.train.rehearsal import needs_rehearsal, rehearse
from sdxl_ray.train.try_out import with_batch_size

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
# Bytes of each weight of the frozen U-Net with its scales, measured by scripts/bench_memory.py (docs/memory.md).
QUANTIZED_BYTES = {"int8": 1.012, "fp8": 1.012, "int4": 0.578}
_NUM_WIDE_BLOCKS = 10  # transformer blocks at a quarter of the latents' size; the other 60 see an eighth
_FREED_GIB = (0.108, 0.055)  # by each of either kind that is recomputed
_TRUE_UNET_PARAMETERS = 2_500_000_000  # at least: anything smaller is not the architecture of the table above
_TEXT_ENCODER_PARAMETERS, _TEXT_ENCODER_2_PARAMETERS = 123_060_480, 694_659_840
_WHOLE_MODEL_PARAMETERS = 3_468_840_000  # U-Net, both text encoders and VAE of SDXL
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


def explain(config: Config, *, progress: Callable[[str, int, int], None] = lambda *_: None) -> Explanation:
    """Scan the images, plan the run, estimate what it needs. Encodes nothing and starts nothing.

    Args:
        progress: called with ("scan", done, total) while new images are looked at.

    Raises:
        InputError: what would stop the run.
    """
    check_methods(config)
    model = resolve_model(config.model.path)
    plan = _plan(config, model, progress)
    index = index_of(plan)
    found = Explanation(buckets=plan.buckets)
    if not config.train.micro_batch_size:
        config = with_batch_size(config, 1)
        found.warnings.append('train.micro_batch_size = "auto" is found out when the run starts; here it is taken as 1')
    _explain_images(config, plan, index, found)
    _explain_steps(config, split(config, index), found)
    _explain_model(config, model, found)
    _explain_disk(config, plan, model, found)
    return found


def preview_crops(
    config: Config, path: Path, *, progress: Callable[[str, int, int], None] = lambda *_: None, num_shown: int = 24
) -> list[str]:
    """A contact sheet of the crops and captions of each bucket, and of what is skipped, as one HTML page.

    Returns:
        what a person may want to know about the datasets beside it.

    Raises:
        InputError: what would stop the run.
    """
    plan = _plan(config, resolve_model(config.model.path), progress)
    index = index_of(plan)
    codes, buckets = index.codes("bucket")
    shown = {}
    for number, bucket in enumerate(buckets):
        rows = np.flatnonzero(codes == number)
        # Spread over the bucket: the first ones are often alike.
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(num_shown, len(rows))).round().astype(int))]
        shown[bucket] = [index[int(row)] for row in chosen]
    is_online = config.cache.text == "online"
    write_contact_sheet(
        path,
        title=", ".join(dataset.name for dataset in config.datasets),
        counts=plan.buckets,
        shown=shown,
        skipped=[(item.path, item.reason) for item in plan.skipped[:SKIPPED_SHOWN]],
        num_skipped=len(plan.skipped),
        # Else what is encoded has it all.
        decorations={dataset.name: CaptionRules.of(dataset) for dataset in config.datasets if is_online},
    )
    return list(plan.collection.notes)


def _plan(config: Config, model: str, progress: Callable[[str, int, int], None]) -> CachePlan:
    return plan_cache(
        config.datasets,
        config.model,
        config.cache,
        model_path=model,
        prompts=config.prompts,
        scan=scan_all(scan_each, progress),
    )


def _explain_images(config: Config, plan: CachePlan, index: Index, found: Explanation) -> None:
    codes, names = index.codes("dataset")
    samples = Counter(dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True)))
    for dataset in config.datasets:
        num_skipped = plan.skipped.num(dataset.name)
        num_images = plan.collection.num_images[dataset.name]
        role = "" if dataset.role == "train" else f" ({dataset.role})"
        text = f"images      {num_images - num_skipped} of {num_images} in {dataset.path}{role}"
        if samples[dataset.name] != num_images - num_skipped:
            text += f", {samples[dataset.name]} samples with their sizes and mirror images"
        found.lines.append(text)
        for item in itertools.islice(plan.skipped.of(dataset.name), 5):
            found.lines.append(f"            skipped {Path(item.path).name}: {item.reason}")
        if num_skipped > 5:
            found.lines.append(f"            and {num_skipped - 5} more")
    for bucket, count in sorted(plan.buckets.items(), key=lambda item: -item[1]):
        found.lines.append(f"bucket      {bucket:>9}  {count} samples")
    sources = ", ".join(f"{count} from {name}" for name, count in plan.collection.captions_from.items() if count)
    found.lines.append(f"captions    {sources}")
    found.warnings += plan.collection.notes
    num_long = plan.num_long_captions()
    if num_long:
        found.warnings.append(
            f"{num_long} captions are longer than {plan.max_tokens} tokens; the rest of them is not seen "
            f"(cache.caption_chunks){'; of those that are encoded already' if plan.num_missing_text else ''}"
        )
    num_enlarged, most = _enlargements(index)
    if num_enlarged:
        found.warnings.append(
            f"{num_enlarged} images are smaller than a bucket of theirs and are enlarged, up to {most:.1f} times"
        )
    found.lines.append(
        f"cache       {plan.num_missing_latents} images and {plan.num_missing_text} captions to encode, "
        f"into {config.cache.path}"
    )


def _explain_steps(config: Config, parts: Split, found: Explanation) -> None:
    train, held_out = parts.train, parts.held_out
    order = data_order(config, parts)
    plan = build_plan(config, order, step=0, position=0, can_evaluate=bool(len(held_out)))
    found.num_steps, num_micro_batches = plan.max_steps, plan.num_micro_batches
    found.num_epochs = order.epochs_at(num_micro_batches)
    found.global_batch_size = config.global_batch_size
    found.lines += [
        f"split       {len(train)} to train on, {len(held_out)} held out for the eval loss",
        f"batch       {config.global_batch_size} images a step = {config.train.micro_batch_size} x "
        f"{config.train.accumulation} accumulated x {config.train.num_workers} workers",
        f"length      {found.num_steps} steps, {found.num_epochs:.1f} epochs of {order.samples_per_epoch} samples",
    ]
    _explain_shares(config, parts, order.num_seen(num_micro_batches), found)
    if parts.num_left_out:
        text = f"{parts.num_left_out} images are evaluated, so their copies are not trained on"
        found.warnings.append(text)
    by_address = _by_address(parts)
    if len(held_out) and by_address:
        found.warnings.append(
            f"images of {', '.join(by_address)} are told apart by their addresses, so a copy of a held-out image is "
            'trained on unnoticed. dataset.identify_by = "content" reads every image once, and finds copies.'
        )
    codes, names = train.codes("dataset")
    repeats = np.array([parts.sections[name].repeats for name in names])[codes]
    sizes = np.bincount(train.codes("bucket")[0], weights=repeats)
    smaller = int((sizes % config.train.micro_batch_size > 0).sum())
    if smaller and len(train) < 10 * config.train.micro_batch_size * max(1, len(found.buckets)):
        found.warnings.append(f"{smaller} buckets end an epoch with a smaller micro-batch; its images count the same")
    every = plan.evaluate
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
    if not len(held_out) and config.eval.holdout > 0:
        found.warnings.append("too few different images to hold one out; there is no eval loss")


def _by_address(parts: Split) -> list[str]:
    """Datasets of which the listing identifies the images."""
    codes, names = parts.train.whole.codes("dataset")
    return [names[code] for code in np.unique(codes[~parts.train.whole.flags("verify")])]


def _explain_shares(config: Config, parts: Split, num_seen: list[int], found: Explanation) -> None:
    """What each dataset contributes, where there are several, or one that is not used all the time."""
    trained = [section for section in config.datasets if section.role != "eval"]
    counts, (_, names) = parts.train.counts("dataset"), parts.train.codes("dataset")
    seen = dict(zip(names, num_seen, strict=True))
    for section in trained:
        count = counts.get(section.name, 0)
        when = [f"from {section.start}"] if section.start.value else []
        when += [f"to {section.end}"] if section.end.value else []
        how = [f"{count} samples"]
        how += [f"each {section.repeats} times an epoch"] if section.repeats > 1 else []
        how += [f"weight {section.weight:g}"] if section.weight != 1 else []
        how += [" ".join(when)] if when else []
        if len(trained) > 1 or when:
            found.lines.append(f"dataset     {section.name}: {', '.join(how)}; {seen.get(section.name, 0)} seen in all")
        if count and seen[section.name] < count * section.repeats:
            found.warnings.append(
                f'dataset "{section.name}" is not seen whole: {seen[section.name]} of the '
                f"{count * section.repeats} samples of one epoch. Train longer, or set dataset.start and dataset.end "
                "differently."
            )


def _explain_model(config: Config, model: str, found: Explanation) -> None:
    revision = config.model.revision or None
    shapes = unet_weight_shapes(model, revision=revision, variant=config.model.variant or None)
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    adapter = config.adapter
    if adapter.kind == "full":
        found.num_adapter_parameters = num_parameters
        found.lines.append(f"training    the whole U-Net: {num_parameters / 1e6:,.0f} M parameters")
    else:
        modules, found.num_adapter_parameters = count_adapter_parameters(
            shapes,
            adapter.rank,
            adapter.targets,
            kind=adapter.kind,
            factor=adapter.factor,
            blocks=adapter.arguments(0)["blocks"],
        )
        if not modules:
            rehearse(config, model)  # which says why
        found.lines.append(
            f"adapter     {adapter.kind} rank {adapter.rank} on {modules} layers: "
            f"{found.num_adapter_parameters / 1e6:.2f} M parameters beside {num_parameters / 1e6:,.0f} M frozen ones"
        )
    for part in ("text_encoder", "text_encoder_2"):
        if getattr(config, part).rank:
            added = _text_adapter_parameters(config, model, part)
            found.num_adapter_parameters += added
            found.lines.append(f"            and lora rank {getattr(config, part).rank} on {part}: {added / 1e6:.2f} M")
    check_num_blocks(shapes, config.train.gradient_checkpointing)
    if needs_rehearsal(config):
        rehearse(config, model)
    scheduler_config = read_part_config(model, "scheduler", revision=revision)
    check_schedule(config, scheduler_config)
    warning = objective_warning(config.loss.objective, scheduler_config)
    if warning:
        found.warnings.append(warning)
    if num_parameters < _TRUE_UNET_PARAMETERS:
        found.lines.append("memory      a small model: not estimated")
        return
    found.memory_gib = estimate_memory_gib(config, num_parameters, found.num_adapter_parameters)
    found.lines.append(
        f"memory      estimated at {found.memory_gib:.1f} GiB per worker at {config.largest_edge} px with "
        f"micro_batch_size {config.train.micro_batch_size}, "
        f'gradient_checkpointing "{config.train.gradient_checkpointing}"'
    )


def estimate_memory_gib(config: Config, num_parameters: int, num_adapter_parameters: int) -> float:
    """Weights, adapter with optimizer, workspace, and the larger of a step's activations and a validation image's.

    An estimate, not a measurement: live tensors counted on the true architecture. docs/numerics.md says how.
    """
    weight_bytes = {"bf16": 2, "fp16": 2, "fp32": 4}[config.model.dtype]
    images = config.train.micro_batch_size * (config.largest_edge / 1024) ** 2
    activations = _activations_gib(config) * weight_bytes / 2
    # masters, gradients and two moments in fp32, and the copy and gradient in the U-Net's precision
    trained = num_adapter_parameters * (16 + 2 * weight_bytes + (4 if config.ema.decay else 0)) / GIB
    step = activations * images
    drawing = _VAE_GIB + _TILE_GIB if config.validation.prompts else 0.0
    is_full = config.adapter.kind == "full"
    frozen_bytes = 0 if is_full else QUANTIZED_BYTES.get(config.model.quantize, weight_bytes)
    frozen = num_parameters * frozen_bytes
    if config.text_encoder.rank or config.text_encoder_2.rank:  # then both are there, whichever learns
        frozen += _TEXT_ENCODER_PARAMETERS * QUANTIZED_BYTES.get(config.model.quantize_text_encoder, weight_bytes)
        frozen += _TEXT_ENCODER_2_PARAMETERS * QUANTIZED_BYTES.get(config.model.quantize_text_encoder_2, weight_bytes)
    return frozen / GIB + max(step, drawing) + trained + _CONTEXT_GIB


def _text_adapter_parameters(config: Config, model: str, part: str) -> int:
    """Of the LoRA of a text encoder, from its config: four square matrices and, with all-linear, the MLP's two."""
    section = getattr(config, part)
    shape = read_part_config(model, part, revision=config.model.revision or None)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    # the last layer of encoder 1 is never read, so it has no adapter
    num_layers = shape["num_hidden_layers"] - (part == "text_encoder")
    per_layer = 4 * 2 * width + (2 * (width + inner) if section.targets == "all-linear" else 0)
    return int(section.rank * per_layer * num_layers)


def _activations_gib(config: Config) -> float:
    """Of one 1024² image in bf16."""
    row = ACTIVATIONS_GIB["attention" if config.adapter.targets == ("attention",) else "all-linear"]
    mode = config.train.gradient_checkpointing
    if isinstance(mode, str):
        return row[mode]
    # The blocks with the most activations come first: scripts/bench_memory.py activations, docs/memory.md.
    freed = _FREED_GIB[0] * min(mode, _NUM_WIDE_BLOCKS) + _FREED_GIB[1] * max(0, mode - _NUM_WIDE_BLOCKS)
    return max(row["none"] - freed, row["transformer"])


def _explain_disk(config: Config, plan: CachePlan, model: str, found: Explanation) -> None:
    config_2 = read_part_config(model, "text_encoder_2", revision=config.model.revision or None)
    width = read_part_config(model, "unet", revision=config.model.revision or None)["cross_attention_dim"]
    text_bytes = plan.num_missing_text * 2 * (77 * plan.num_chunks * width + config_2["projection_dim"])
    latent_bytes = 0
    for bucket, count in plan.missing_by_bucket().items():
        height, latent_width = (edge // 8 for edge in parse_bucket_key(bucket))
        latent_bytes += count * 2 * 2 * 4 * height * latent_width  # mean and std, 4 channels, bf16
    # masters, two moments, and the average
    checkpoints = (config.checkpoint.keep + 1) * (16 if config.ema.decay else 12) * found.num_adapter_parameters
    exports = sum(_export_bytes(name, config, found.num_adapter_parameters) for name in export_formats(config))
    found.disk_gib = (text_bytes + latent_bytes + checkpoints + exports) / GIB
    found.lines.append(
        f"disk        {(text_bytes + latent_bytes) / GIB:.2f} GiB more cache, "
        f"{(checkpoints + exports) / GIB:.2f} GiB checkpoints and LoRA files in {config.run.output}"
    )


def _export_bytes(format_name: str, config: Config, num_adapter_parameters: int) -> int:
    bytes_per_weight = 4 if config.export.dtype == "fp32" else 2
    if is_whole_model(format_name):
        return bytes_per_weight * _WHOLE_MODEL_PARAMETERS
    wider = (config.export.svd_rank or 4 * config.adapter.rank) / config.adapter.rank if "svd" in format_name else 1
    return round(bytes_per_weight * wider * num_adapter_parameters)


def check_num_blocks(shapes: Mapping[str, tuple[int, ...]], checkpointing: str | int) -> None:
    """
    Raises:
        ConfigError: more transformer blocks are to be recomputed than there are.
    """
    blocks = {found[0] for name in shapes if (found := re.search(r".*\.transformer_blocks\.\d+(?=\.)", name))}
    if isinstance(checkpointing, int) and checkpointing > len(blocks):
        raise ConfigError(
            f"train.gradient_checkpointing = {checkpointing}, but this U-Net has {len(blocks)} transformer blocks. "
            'Give a number up to that, or "transformer" for all of them.'
        )


def _enlargements(index: Index) -> tuple[int, float]:
    """(images of which a sample is enlarged, how many times at most)."""
    codes, buckets = index.codes("bucket")
    target = np.array([parse_bucket_key(bucket) for bucket in buckets]).reshape(-1, 2)[codes]
    original = np.stack([index.table.column(f"original_{edge}").to_numpy() for edge in ("height", "width")], axis=1)
    scales = (target / original).max(axis=1)
    images = index.table.column("image_hash").filter(pa.array(scales > 1.0))
    return pc.count_distinct(images).as_py(), float(scales.max(initial=0.0))
