"""From a trained state to the verified LoRA files, and the facts that go into their headers. No Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import sdxl_ray
from sdxl_ray.export.metadata import DatasetFacts, TrainingFacts, build_metadata, tag_frequency
from sdxl_ray.export.model_card import SampleImage, write_model_card
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.verify import export_adapter
from sdxl_ray.export.whole_model import BaseModel
from sdxl_ray.records import ExportedFile, parse_bucket_key
from sdxl_ray.sdxl.components import resolve_model
from sdxl_ray.sdxl.sampling import file_stem
from sdxl_ray.train.data import Data, Samples
from sdxl_ray.train.preflight import export_formats
from sdxl_ray.train.setup import Training

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

_PIECE = 100_000  # images whose captions are Python objects at a time


def export_run(
    config: Config, training: Training, folder: Path, *, name: str, sample_folder: Path | None, started_at: float | None
) -> list[ExportedFile]:
    """Write and verify the LoRA of a state, with its model card. Afterwards the U-Net has no adapter.

    Args:
        sample_folder: validation images of this state, for the model card.
        started_at: seconds since 1970, for the header; None if unknown.
    """
    state, spec = training.state, adapter_spec(config)
    facts = training_facts(config, training.data, state.step, training, name=name, started_at=started_at)
    with state.evaluated_weights(average=config.ema.export):
        state.masters.restore()
        files = export_adapter(
            state.unet,
            folder=folder,
            name=name,
            spec=spec,
            metadata=build_metadata(facts, spec),
            formats=export_formats(config),
            dtype=config.export.dtype,
            text_encoders={part: state.text.encoder(part) for part in state.text.stops} if state.text else None,
            svd_rank=config.export.svd_rank,
            base=BaseModel(
                resolve_model(config.model.path),
                revision=config.model.revision or None,
                variant=config.model.variant or None,
            ),
            unet_weights=state.masters.state_dict() if config.adapter.kind == "full" else None,
            prediction_type=config.loss.objective,
            zero_terminal_snr=config.loss.zero_terminal_snr,
            empty_prompt_is_zeros=config.loss.caption_dropout_to == "zeros",
        )
    write_model_card(folder, facts, spec, files, sample_images(config, sample_folder))
    return files


def adapter_spec(config: Config) -> AdapterSpec:
    """What was trained, for headers and model cards."""
    adapter = config.adapter
    targets = adapter.targets[0] if len(adapter.targets) == 1 else adapter.targets
    return AdapterSpec(
        adapter.kind,
        adapter.rank,
        adapter.scaling_alpha,
        targets,
        rank_stabilized=adapter.rank_stabilized,
        factor=adapter.factor,
        text_encoder_rank=config.text_encoder.rank,
        text_encoder_2_rank=config.text_encoder_2.rank,
    )


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
    plan, loss = training.plan, config.loss
    trigger_words = (dataset.trigger_word for dataset in config.datasets if dataset.trigger_word)
    return TrainingFacts(
        name=name,
        base_model=config.model.path,
        num_steps=num_steps,
        prediction_type=config.loss.objective,
        resolution_hw=(config.largest_edge, config.largest_edge),
        trigger_phrase=next(trigger_words, None),
        num_epochs=round(plan.order.epochs_at(training.state.position)),
        datasets=dataset_facts(config, data.train),
        buckets={parse_bucket_key(bucket): count for bucket, count in data.train.counts("bucket").items() if count},
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation,
        num_workers=config.train.num_workers,
        learning_rate=config.optimizer.learning_rate,
        lr_schedule=config.lr_schedule.name,
        warmup_steps=config.lr_schedule.warmup.in_steps(
            plan.max_steps, plan.order.micro_batches_per_epoch / plan.micro_batches_per_step
        ),
        optimizer=config.optimizer.name,
        mixed_precision=config.model.dtype,
        quantization=config.model.quantize if config.model.quantize != "none" else None,
        gradient_checkpointing=config.train.gradient_checkpointing not in ("none", 0),
        text_encoder_learning_rates=tuple(
            section.learning_rate or config.optimizer.learning_rate
            for section in (config.text_encoder, config.text_encoder_2)
            if section.rank
        ),
        ema_decay=config.ema.decay or None,
        weighting=loss.weighting if loss.weighting != "constant" else None,
        min_snr_gamma=loss.min_snr_gamma if loss.weighting in ("min_snr", "soft_min_snr") else None,
        zero_terminal_snr=loss.zero_terminal_snr or None,
        error=loss.error if loss.error != "mse" else None,
        huber_c=loss.huber_c if loss.error in ("huber", "smooth_l1") else None,
        huber_schedule=loss.huber_schedule if loss.error in ("huber", "smooth_l1") else None,
        noise_offset=loss.offset_noise or None,
        multires_noise_discount=loss.multires_noise_discount or None,
        multires_noise_levels=loss.multires_noise_levels if loss.multires_noise_discount else None,
        input_perturbation=loss.input_perturbation or None,
        timestep_range=(loss.timestep_min, loss.timestep_max),
        caption_dropout=loss.caption_dropout or None,
        seed=config.run.seed,
        started_at=started_at,
        finished_at=time.time(),
        trainer_version=sdxl_ray.__version__,
    )


def dataset_facts(config: Config, samples: Samples) -> tuple[DatasetFacts, ...]:
    """Of each dataset that was trained on. An image counts once, at however many sizes, mirrored or not."""
    codes, names = samples.codes("dataset")
    hashes = samples.whole.image_hashes()[samples.rows]
    facts = []
    for dataset in config.datasets:
        if dataset.name not in names:
            continue
        places = np.flatnonzero(codes == names.index(dataset.name))
        if not len(places):
            continue  # all of its images are held out
        _, first = np.unique(hashes[places], return_index=True)
        facts.append(
            DatasetFacts(
                dataset.name,
                num_images=len(first),
                repeats=dataset.repeats,
                tags=tag_frequency(_captions(samples, samples.rows[places[first]])),
                regularization=dataset.role == "regularization",
            )
        )
    return tuple(facts)


def _captions(samples: Samples, rows: np.ndarray) -> Iterator[list[str]]:
    column = samples.whole.table.column("captions")
    for start in range(0, len(rows), _PIECE):
        yield from column.take(rows[start : start + _PIECE]).to_pylist()
