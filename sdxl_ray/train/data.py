"""The samples of a run and its plan, from the config and the index. No torch: the driver needs these too, and is quick.

index ─▶ split ─▶ order ─▶ plan
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.cache.shards import Location, ShardReader, read_index
from sdxl_ray.records import EncodedSample
from sdxl_ray.sdxl.components import resolve_model, unet_identity
from sdxl_ray.train.plan import DataOrder, Every, Plan, run_length, split_holdout

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


@dataclass(frozen=True)
class Data:
    """The samples of a run, split, with the way to their tensors."""

    train: list[EncodedSample]
    held_out: list[EncodedSample]
    locations: dict[str, Location]
    reader: ShardReader
    prompts: dict[str, Location]  # text -> where its embedding lies

    @property
    def digest(self) -> str:
        """Changes whenever the training samples do; the order of the data depends on them."""
        return hashlib.sha256("\n".join(sample.sample_id for sample in self.train).encode()).hexdigest()[:16]


def load_data(config: Config, index_path: str | Path) -> Data:
    """The index, split by content into training and held-out samples as the config says."""
    samples, locations = read_index(index_path)
    hashes = [sample.image_hash for sample in samples]
    train, held_out = split_holdout(hashes, config.eval.holdout, config.eval.max_images)
    manifest = json.loads((Path(index_path).parent / "manifest.json").read_text(encoding="utf-8"))
    return Data(
        train=[samples[row] for row in train],
        held_out=[samples[row] for row in held_out],
        locations=locations,
        reader=ShardReader(config.cache.path),
        prompts={text: Location(**place) for text, place in manifest["prompts"].items()},
    )


def data_order(config: Config, data: Data) -> DataOrder:
    """The order of the training samples."""
    return DataOrder(
        [sample.bucket for sample in data.train],
        [sample.repeats for sample in data.train],
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
    )


def build_plan(config: Config, order: DataOrder, *, step: int, position: int, can_evaluate: bool) -> Plan:
    """The run as seen from `step` and `position`, which are 0 for a new one."""
    train, per_step = config.train, config.train.num_workers * config.train.accumulation
    steps_per_epoch = order.micro_batches_per_epoch / per_step
    in_epochs = train.duration.unit == "epochs"
    max_steps, num_micro_batches = run_length(
        steps=None if in_epochs else train.duration.value,
        epochs=train.duration.value if in_epochs else None,
        order=order,
        micro_batches_per_step=per_step,
        step=step,
        position=position,
    )
    validates = bool(config.validation.prompts)
    return Plan(
        order=order,
        num_workers=train.num_workers,
        accumulation=train.accumulation,
        max_steps=max_steps,
        num_micro_batches=num_micro_batches,
        log=Every(train.log_every, last=max_steps),
        evaluate=Every(config.eval.every.in_steps(steps_per_epoch), last=max_steps) if can_evaluate else Every(0),
        validate=Every(config.validation.every.in_steps(steps_per_epoch), last=max_steps) if validates else Every(0),
        save=Every(config.checkpoint.every.in_steps(steps_per_epoch), last=max_steps),
        max_grad_norm=train.max_grad_norm,
        seed=config.run.seed,
    )


def run_identity(config: Config, data: Data) -> dict[str, Any]:
    """The settings that a resumed run has to share with the run that it continues."""
    model = resolve_model(config.model.path)
    unet = unet_identity(model, revision=config.model.revision or None, variant=config.model.variant or None)
    return {
        "model (U-Net)": unet,
        "model.dtype": config.model.dtype,
        "adapter.kind": config.adapter.kind,
        "adapter.rank": config.adapter.rank,
        "adapter.alpha": config.adapter.scaling_alpha,
        "adapter.targets": config.adapter.targets,
        "loss.objective": config.loss.objective,
        "run.seed": config.run.seed,
        "train.micro_batch_size": config.train.micro_batch_size,
        "eval.holdout": config.eval.holdout,
        "eval.max_images": config.eval.max_images,
        "dataset.repeats": config.dataset.repeats,
        "the training images and captions (hash)": data.digest,
    }
