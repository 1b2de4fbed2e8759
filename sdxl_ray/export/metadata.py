"""The header of a LoRA file: what browsers show about it, and what its maker wants to know in a year.

    ss_*         kohya's keys; A1111's browser shows base version, tags, model and output name
    modelspec.*  Stability's model metadata standard 1.0.1 (github.com/Stability-AI/ModelSpec)

All values are strings, as safetensors demands. A file is passed around, so nothing of the machine goes in: no absolute
path, no caption longer than a tag. What depends on the tensors (hashes, the folded alpha) is added by `formats`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from sdxl_ray.export.spec import AdapterSpec

MODEL_ARCHITECTURE = "stable-diffusion-xl-v1-base"
ARCHITECTURE = f"{MODEL_ARCHITECTURE}/lora"
_MAX_TAGS = 1000  # per dataset; a header is read whole before the first tensor
_MAX_COUNTED = 1_000_000  # different tags counted at once, some 100 MiB
_MAX_WORDS_PER_TAG = 4


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """The images that were trained on, of one dataset.

    tags  how many of its images have each tag, as `tag_frequency` counts them
    """

    name: str
    num_images: int
    repeats: int = 1
    tags: Mapping[str, int] = field(default_factory=dict)
    regularization: bool = False


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What is worth knowing about a finished training. `None` and empty mean unknown, and are left out of the file.

    name             the run's, and the file's without suffix
    base_model       Hub id or file; of a path, the last part is kept
    prediction_type  "epsilon", "v_prediction" or "sample"
    text_encoder_learning_rates  of the text encoders that were trained, in order
    weighting, error  as loss.weighting and loss.error: "min_snr", "huber"
    timestep_range   the least and the most noisy level that was seen
    resolution_hw    what the buckets' area comes from, pixels
    buckets          {(height, width): number of images}
    started_at, finished_at   seconds since 1970, UTC
    """

    name: str
    base_model: str
    num_steps: int
    prediction_type: str = "epsilon"
    resolution_hw: tuple[int, int] = (1024, 1024)
    trigger_phrase: str | None = None
    description: str | None = None
    author: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    num_epochs: int | None = None
    datasets: tuple[DatasetFacts, ...] = ()
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    micro_batch_size: int | None = None
    accumulation: int = 1
    num_workers: int = 1
    learning_rate: float | None = None
    lr_schedule: str | None = None
    warmup_steps: int | None = None
    optimizer: str | None = None
    mixed_precision: str | None = None
    gradient_checkpointing: bool | None = None
    text_encoder_learning_rates: tuple[float, ...] = ()
    ema_decay: float | None = None
    weighting: str | None = None
    min_snr_gamma: float | None = None
    zero_terminal_snr: bool | None = None
    error: str | None = None
    huber_c: float | None = None
    huber_schedule: str | None = None
    noise_offset: float | None = None
    multires_noise_discount: float | None = None
    multires_noise_levels: int | None = None
    input_perturbation: float | None = None
    timestep_range: tuple[int, int] = (0, 999)
    caption_dropout: float | None = None
    quantization: str | None = None
    seed: int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    trainer_version: str | None = None

    @property
    def num_images(self) -> int:
        return sum(dataset.num_images for dataset in self.datasets)

    @property
    def global_batch_size(self) -> int | None:
        """Samples per optimizer step, over all workers."""
        return self.micro_batch_size and self.micro_batch_size * self.accumulation * self.num_workers


def build_metadata(facts: TrainingFacts, spec: AdapterSpec) -> dict[str, str]:
    """The whole header but for what only `formats` knows. What is unknown is left out; kohya's "None" helps nobody."""
    return _strings({**_kohya(facts, spec), **_modelspec(facts), "sdxl_ray.adapter": _as_trained(spec)})


def plain_lora_metadata(metadata: Mapping[str, str], *, rank: int) -> dict[str, str]:
    """The header of a plain LoRA that stands in for what was trained."""
    header = {key: value for key, value in metadata.items() if key != "ss_network_args"}
    if "ss_network_module" in header:
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{rank}.0"}
    return header


def whole_model_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of a whole model: without `ss_*`, by which programs know a LoRA."""
    header = {key: value for key, value in metadata.items() if not key.startswith("ss_")}
    if "modelspec.architecture" in header:
        header["modelspec.architecture"] = MODEL_ARCHITECTURE
    return header


def public_name(model: str) -> str:
    """`someone/some-model` as it is, of any path the last part: where a file lay is nobody's business."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not model.endswith((".safetensors", ".ckpt")):
        return model
    return _last_part(model)


def tag_frequency(images: Iterable[Iterable[str]]) -> dict[str, int]:
    """How many images have each tag, most frequent first; split at commas, stripped, in lower case, as kohya does.

    Pieces of more than four words are sentences rather than tags. They would make the header megabytes long, and
    publish a data set's captions with every copy of the file.

    Args:
        images: the captions of each image. A tag in several captions of an image counts once.
    """
    counts: Counter[str] = Counter()
    for captions in images:
        tags = {" ".join(piece.split()).lower() for caption in captions for piece in caption.split(",")}
        counts.update(tag for tag in tags if 0 < len(tag.split()) <= _MAX_WORDS_PER_TAG)
        if len(counts) > _MAX_COUNTED:  # the rare ones go: they would not reach the file
            counts = Counter(dict(counts.most_common(_MAX_COUNTED // 2)))
    return dict(counts.most_common(_MAX_TAGS))


def _kohya(facts: TrainingFacts, spec: AdapterSpec) -> dict[str, Any]:
    """`ss_*`, as train_network.py names them. Resolutions are (width, height) here and nowhere else in this package."""
    height, width = facts.resolution_hw
    trained, regularization = (
        {_last_part(dataset.name): dataset for dataset in facts.datasets if dataset.regularization is wanted}
        for wanted in (False, True)
    )
    buckets = [
        {"resolution": [bucket_width, bucket_height], "count": count}
        for (bucket_height, bucket_width), count in sorted(facts.buckets.items())
    ]
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": False,
        "ss_sd_model_name": public_name(facts.base_model),
        "ss_output_name": facts.name,
        **_network(spec),
        "ss_steps": facts.num_steps,
        "ss_max_train_steps": facts.num_steps,
        "ss_epoch": facts.num_epochs,
        "ss_num_epochs": facts.num_epochs,
        "ss_num_train_images": _images_per_epoch(trained.values()) or None,
        "ss_num_reg_images": _images_per_epoch(regularization.values()),
        "ss_batch_size_per_device": facts.micro_batch_size,
        "ss_total_batch_size": facts.global_batch_size,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": _one_or_list(facts.text_encoder_learning_rates),
        "ss_lr_scheduler": facts.lr_schedule,
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_optimizer": facts.optimizer,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_seed": facts.seed,
        **_objective(facts),
        "ss_caption_dropout_rate": facts.caption_dropout,
        "ss_resolution": f"({width}, {height})",
        "ss_enable_bucket": len(buckets) > 1,
        "ss_bucket_info": json.dumps({"buckets": {str(i): bucket for i, bucket in enumerate(buckets)}})
        if buckets
        else None,
        "ss_dataset_dirs": json.dumps(_folders(trained)),
        "ss_reg_dataset_dirs": json.dumps(_folders(regularization)) if regularization else None,
        "ss_tag_frequency": json.dumps(
            {name: dict(dataset.tags) for name, dataset in trained.items()}, ensure_ascii=False
        ),
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_training_comment": facts.description,
    }


def _network(spec: AdapterSpec) -> dict[str, Any]:
    """Which code of kohya's made the network, and its arguments: by these, browsers tell kinds apart.

    LyCORIS's module is named for all but plain LoRA; its arguments are those of its README: algo, factor, dora_wd.
    """
    if spec.kind == "full":
        return {}
    found: dict[str, Any] = {"ss_network_dim": spec.rank, "ss_network_alpha": float(spec.alpha)}
    arguments: dict[str, str] = {}
    if spec.kind == "dora":
        arguments = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    elif spec.kind in ("loha", "lokr"):
        arguments = {"algo": spec.kind}
        if spec.kind == "lokr":
            arguments["factor"] = str(spec.factor)
    if spec.rank_stabilized:
        arguments["rs_lora"] = "True"
    found["ss_network_module"] = "networks.lora" if spec.kind == "lora" else "lycoris.kohya"
    return {**found, "ss_network_args": json.dumps(arguments) if arguments else None}


def _objective(facts: TrainingFacts) -> dict[str, Any]:
    """Under kohya's names. Its `ss_loss_type` calls mean absolute error "l1" and mean squared error "l2"."""
    multires = facts.multires_noise_discount or None
    losses = {"mse": "l2", "mae": "l1"}
    return {
        "ss_min_snr_gamma": facts.min_snr_gamma,
        "ss_debiased_estimation": (facts.weighting or "").startswith("debiased") if facts.weighting else None,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_loss_type": losses.get(facts.error or "", facts.error),
        "ss_huber_c": facts.huber_c,
        "ss_huber_schedule": facts.huber_schedule,
        "ss_noise_offset": facts.noise_offset,
        "ss_multires_noise_discount": multires,
        "ss_multires_noise_iterations": facts.multires_noise_levels if multires else None,
        "ss_ip_noise_gamma": facts.input_perturbation,
        "ss_ema_decay": facts.ema_decay,
    }


def _one_or_list(rates: tuple[float, ...]) -> Any:
    """As kohya's --text_encoder_lr takes them: one number for both, or a list."""
    if len(set(rates)) <= 1:
        return rates[0] if rates else None
    return list(rates)


def _images_per_epoch(datasets: Iterable[DatasetFacts]) -> int:
    return sum(dataset.num_images * dataset.repeats for dataset in datasets)


def _folders(datasets: Mapping[str, DatasetFacts]) -> dict[str, dict[str, int]]:
    return {name: {"n_repeats": dataset.repeats, "img_count": dataset.num_images} for name, dataset in datasets.items()}


def _modelspec(facts: TrainingFacts) -> dict[str, Any]:
    """`modelspec.*` in the standard's order: MUST, SHOULD, CAN."""
    height, width = facts.resolution_hw
    finished = facts.finished_at and datetime.fromtimestamp(facts.finished_at, UTC).isoformat(timespec="seconds")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": facts.name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.description": facts.description,
        "modelspec.author": facts.author,
        "modelspec.date": finished,
        "modelspec.license": facts.license,
        "modelspec.usage_hint": f"Use '{facts.trigger_phrase}' in the prompt." if facts.trigger_phrase else None,
        "modelspec.tags": ", ".join(facts.tags) or None,
        "modelspec.trigger_phrase": facts.trigger_phrase,
        "modelspec.prediction_type": "v" if facts.prediction_type == "v_prediction" else facts.prediction_type,
        "modelspec.timestep_range": "{},{}".format(*facts.timestep_range),
    }


def _as_trained(spec: AdapterSpec) -> str:
    """Rank and alpha before any folding, for whoever wants to train the same again; what is at its default is left
    out."""
    said = {"kind": spec.kind, "rank": spec.rank, "alpha": spec.alpha, "targets": spec.targets}
    if spec.kind == "full":
        said = {"kind": "full"}
    others = {
        "rank_stabilized": spec.rank_stabilized,
        "factor": spec.factor if spec.kind == "lokr" else None,
        "text_encoder_rank": spec.text_encoder_rank,
        "text_encoder_2_rank": spec.text_encoder_2_rank,
    }
    return json.dumps({**said, **{name: value for name, value in others.items() if value}})


def _last_part(path: str) -> str:
    return PurePosixPath(PureWindowsPath(path).as_posix()).name or path


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}
