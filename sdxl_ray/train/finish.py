"""From a trained state to the verified LoRA files, and the facts that go into their headers. No Ray."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import sdxl_ray
from sdxl_ray.export.formats import AdapterSpec
from sdxl_ray.export.metadata import DatasetFacts, TrainingFacts, build_metadata
from sdxl_ray.export.model_card import SampleImage, write_model_card
from sdxl_ray.export.verify import export_adapter
from sdxl_ray.records import ExportedFile, parse_bucket_key
from sdxl_ray.sdxl.sampling import file_stem
from sdxl_ray.train.data import Data
from sdxl_ray.train.setup import Training

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


def export_run(
    config: Config, training: Training, folder: Path, *, name: str, sample_folder: Path | None, started_at: float | None
) -> list[ExportedFile]:
    """Write and verify the LoRA of a state, with its model card. Afterwards the U-Net has no adapter.

    Args:
        sample_folder: validation images of this state, for the model card.
        started_at: seconds since 1970, for the header; None if unknown.
    """
    training.state.masters.restore()
    spec = AdapterSpec(config.adapter.kind, config.adapter.rank, config.adapter.scaling_alpha, config.adapter.targets)
    facts = training_facts(config, training.data, training.state.step, training, name=name, started_at=started_at)
    files = export_adapter(
        training.state.unet,
        folder=folder,
        name=name,
        spec=spec,
        metadata=build_metadata(facts, spec),
        formats=config.export.formats,
        dtype=config.export.dtype,
    )
    write_model_card(folder, facts, spec, files, sample_images(config, sample_folder))
    return files


def sample_images(config: Config, folder: Path | None) -> list[SampleImage]:
    """The validation images that lie in `folder`, with their prompts."""
    if folder is None:
        return []
    numbered = [
        (folder / f"{number:02d}_{file_stem(prompt)}.png", prompt)
        for number, prompt in enumerate(config.validation.prompts)
    ]
    return [SampleImage(path, prompt) for path, prompt in numbered if path.exists()]


def training_facts(
    config: Config, data: Data, num_steps: int, training: Training, *, name: str, started_at: float | None
) -> TrainingFacts:
    """What the headers of the exported files say about the run."""
    plan = training.plan
    buckets = Counter(sample.bucket for sample in data.train)
    captions = tuple(caption for sample in data.train for caption in sample.captions)
    return TrainingFacts(
        name=name,
        base_model=config.model.path,
        num_steps=num_steps,
        prediction_type=config.loss.objective,
        resolution_hw=(config.dataset.resolution, config.dataset.resolution),
        trigger_phrase=config.dataset.trigger_word or None,
        num_epochs=round(training.state.position / plan.order.micro_batches_per_epoch),
        datasets=(DatasetFacts(Path(config.dataset.path).name, len(data.train), config.dataset.repeats, captions),),
        buckets={parse_bucket_key(bucket): count for bucket, count in sorted(buckets.items())},
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation,
        num_workers=config.train.num_workers,
        learning_rate=config.optimizer.learning_rate,
        lr_schedule=config.lr_schedule.name,
        warmup_steps=config.lr_schedule.warmup.in_steps(
            plan.max_steps, plan.order.micro_batches_per_epoch / plan.micro_batches_per_step
        ),
        optimizer="AdamW",
        mixed_precision=config.model.dtype,
        gradient_checkpointing=config.train.gradient_checkpointing != "none",
        min_snr_gamma=config.loss.min_snr_gamma or None,
        caption_dropout=config.loss.caption_dropout or None,
        seed=config.run.seed,
        started_at=started_at,
        finished_at=time.time(),
        trainer_version=sdxl_ray.__version__,
    )
