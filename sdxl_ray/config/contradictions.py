"""Settings that are fine alone but not together."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sdxl_ray.config.method_contradictions import method_contradictions
from sdxl_ray.config.schema import Config, DatasetSection
from sdxl_ray.errors import ConfigError
from sdxl_ray.storage import check_address

CAPTION_SOURCES = ("textfile", "column", "filename", "instance_prompt", "empty", "skip")
SHARED_BY_TRIALS = ("run", "model", "dataset", "cache", "sweep", "cluster", "tracking")  # sections that no sweep varies

_ONE_SLASH = re.compile(r"((?:s3|gs|gcs|abfss?|hf):)/?[^/]")  # s3:/bucket
_NO_TEXT = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npz", ".safetensors", ".jpg", ".jpeg", ".png", ".webp")
_SMALLEST_EDGE = 64  # pixels: 8 latent pixels, which the U-Net still halves twice
_LARGEST_EDGE = 4096  # pixels
_MEGAPIXELS = (0.05, 8.0)


def contradictions(config: Config) -> list[tuple[str, str]]:
    """(key, problem) of each. A problem names the other key too; datasets are counted from 1: `dataset.2.repeats`."""
    found = []
    for number, dataset in enumerate(config.dataset, start=1):
        if not dataset.disabled:
            found += [(f"dataset.{number}.{name}", problem) for name, problem in _in_dataset(dataset, config)]
    return [
        *found,
        *_in_addresses(config),
        *_among_datasets(config),
        *_in_cache(config),
        *_in_lengths(config),
        *method_contradictions(config),
        *_in_sweep(config),
    ]


def _in_dataset(dataset: DatasetSection, config: Config) -> Iterator[tuple[str, str]]:
    """(name of the setting, problem)"""
    yield from _in_captions(dataset)
    yield from _in_tags(dataset, config)
    yield from _in_sizes(dataset)
    yield from _in_images(dataset)
    yield from _in_role(dataset, config)


def _in_captions(dataset: DatasetSection) -> Iterator[tuple[str, str]]:
    for source in dataset.captions:
        if source not in CAPTION_SOURCES:
            yield "captions", f'"{source}" is not a source; known: {", ".join(CAPTION_SOURCES)}'
    for source in _repeated(dataset.captions):
        yield "captions", f'"{source}" is there twice'
    for source in dataset.captions[:-1]:
        if source in ("empty", "skip"):
            yield "captions", f'"{source}" decides about images without a caption: nothing can come after it'
    if dataset.captions == ("skip",):
        yield "captions", 'is only "skip", which leaves out every image. Put a source before it.'
    if "instance_prompt" in dataset.captions and not dataset.instance_prompt:
        yield "instance_prompt", 'is empty, but dataset.captions has "instance_prompt". Write the prompt.'
    if dataset.instance_prompt and "instance_prompt" not in dataset.captions:
        yield (
            "instance_prompt",
            'is set, but dataset.captions never uses it. Add "instance_prompt" to dataset.captions.',
        )
    for name, source in (
        ("caption_columns", "column"),
        ("caption_lists", "column"),
        ("caption_extension", "textfile"),
        ("caption_lines", "textfile"),
    ):
        if source not in dataset.captions and getattr(dataset, name) != DatasetSection.model_fields[name].default:
            yield name, f'is set, but dataset.captions never uses it. Add "{source}" to dataset.captions.'
    if dataset.caption_extension.lower().endswith(_NO_TEXT):
        yield (
            "caption_extension",
            f'is "{dataset.caption_extension}", but caption files are read as plain text, whole. Write the captions '
            "into a table beside the images (metadata.jsonl); of a WebDataset the .json is read by dataset.captions = "
            '["column"].',
        )
    for pattern, replacement in dataset.caption_replace:
        if "\b" in pattern:
            yield (
                "caption_replace",
                f"{pattern!r} holds a backspace: TOML's meaning of \\b in double quotes. Write it in single quotes.",
            )
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            yield "caption_replace", f"{pattern!r} is not a regular expression: {error}"
            continue
        try:
            compiled.sub(replacement, "")
        except (re.error, IndexError) as error:
            yield "caption_replace", f"{replacement!r} cannot take the place of {pattern!r}: {error}"


def _in_tags(dataset: DatasetSection, config: Config) -> Iterator[tuple[str, str]]:
    changes_tags = dataset.shuffle_tags or dataset.tag_dropout > 0
    if dataset.keep_tags and not changes_tags:
        yield (
            "keep_tags",
            f"is {dataset.keep_tags}, but all tags stay as they are. Set dataset.shuffle_tags = true or "
            "dataset.tag_dropout.",
        )
    if dataset.caption_variants > 1 and not changes_tags:
        yield (
            "caption_variants",
            f"is {dataset.caption_variants}, but all variants would be the same. Set dataset.shuffle_tags = true or "
            "dataset.tag_dropout.",
        )
    if changes_tags and dataset.caption_variants == 1 and config.cache.text == "cached":
        yield (
            "caption_variants",
            "is 1, but with dataset.shuffle_tags or dataset.tag_dropout every epoch would see the same order. Set it "
            'to 8, say; or cache.text = "online", which makes a new variant each time.',
        )
    if dataset.caption_variants > 1 and config.cache.text == "online":
        yield (
            "caption_variants",
            f'is {dataset.caption_variants}, but with cache.text = "online" each epoch makes a new variant. '
            "Remove dataset.caption_variants.",
        )


def _in_sizes(dataset: DatasetSection) -> Iterator[tuple[str, str]]:
    yield from _in_resolution(dataset)
    own = {f"{height}x{width}" for height, width in dataset.own_buckets if height % 8 == width % 8 == 0}
    for size in dataset.buckets:
        if size == "square" and len(dataset.buckets) > 1:
            yield "buckets", '"square" stands alone: dataset.buckets = ["square"]'
        elif size not in own and size != "square":
            yield "buckets", f'"{size}" is not HEIGHTxWIDTH in multiples of 8 pixels, such as "832x1216"'
    if own and len(dataset.resolution) > 1:
        yield "resolution", "has several sizes, but dataset.buckets leaves no choice. Remove one of the two."
    for size in _repeated(dataset.buckets):
        yield "buckets", f'"{size}" is there twice'
    for smallest, largest in (("min_size", "max_size"), ("min_aspect", "max_aspect")):
        low, high = getattr(dataset, smallest), getattr(dataset, largest)
        if high and low > high:
            yield smallest, f"is {low}, above dataset.{largest} = {high}: no image is left"
    if not dataset.upscale and dataset.max_upscale != DatasetSection.model_fields["max_upscale"].default:
        yield (
            "max_upscale",
            f"is {dataset.max_upscale:g}, but dataset.upscale = false enlarges no image. Remove dataset.max_upscale.",
        )
    elif 0 < dataset.max_upscale < 1:
        yield (
            "max_upscale",
            f"is {dataset.max_upscale:g}, below 1: images that need no enlarging would be skipped too. Set 1 or more; "
            "dataset.min_size skips small images.",
        )


def _in_resolution(dataset: DatasetSection) -> Iterator[tuple[str, str]]:
    unit, step = dataset.resolution_unit, dataset.bucket_step
    as_unit = f'dataset.resolution_unit = "{unit}"'
    for value in dataset.resolution:
        text = f"{value:.0f}" if value == round(value) else f"{value:g}"
        if unit == "megapixels":
            low, high = _MEGAPIXELS
            if not low <= value <= high:
                other = ' For pixels: dataset.resolution_unit = "edge".' if value >= _SMALLEST_EDGE else ""
                yield "resolution", f"{text} is not between {low:g} and {high:g} megapixels ({as_unit}).{other}"
            elif 1024 * math.sqrt(value) < step and not dataset.own_buckets:
                yield (
                    "resolution",
                    f"{text} megapixels is less than one bucket of dataset.bucket_step = {step}: raise the one, or "
                    "lower the other",
                )
        elif value != round(value) or value < _SMALLEST_EDGE:
            other = ' For megapixels: dataset.resolution_unit = "megapixels".' if value <= _MEGAPIXELS[1] else ""
            yield "resolution", f"{text} is not a whole number of at least {_SMALLEST_EDGE} pixels ({as_unit}).{other}"
        elif value > _LARGEST_EDGE:
            yield "resolution", f"{text} is above {_LARGEST_EDGE} pixels: SDXL was made for 1024 ({as_unit})"
        elif unit == "shorter_side" and value % 8 and not dataset.own_buckets:
            yield "resolution", f"a shorter side of {text} is not a multiple of 8 pixels"
        elif unit == "edge" and value % step and not dataset.own_buckets:
            yield "resolution", f"{text} is not a multiple of dataset.bucket_step = {step}"
    for value in _repeated(dataset.resolution):
        yield (
            "resolution",
            f"{value:g} is there twice. These are several sizes of each image, not width and height. To see images "
            "more often, set dataset.repeats.",
        )


def _in_images(dataset: DatasetSection) -> Iterator[tuple[str, str]]:
    if dataset.crop_variants > 1 and dataset.crop != "random":
        yield (
            "crop_variants",
            f'is {dataset.crop_variants}, but dataset.crop = "{dataset.crop}" cuts at one place. '
            'Set dataset.crop = "random".',
        )
    if dataset.crop_epochs > 1 and dataset.crop_variants == 1:
        yield "crop_epochs", f"is {dataset.crop_epochs}, but dataset.crop_variants = 1: there is no next crop"
    if dataset.crop == "focus" and len(dataset.focus_columns) != 2:
        yield (
            "focus_columns",
            f'must be two names, of the columns with y and x, for dataset.crop = "focus"; '
            f"found {list(dataset.focus_columns)}",
        )
    if len(dataset.size_columns) not in (0, 2):
        yield (
            "size_columns",
            f"must be two names, of the columns with height and width, or none; found {list(dataset.size_columns)}",
        )
    for name in ("mask_suffix", "mask_column"):
        if dataset.mask != "file" and getattr(dataset, name) != DatasetSection.model_fields[name].default:
            yield name, f'is set, but dataset.mask = "{dataset.mask}" does not use it. Set dataset.mask = "file".'
    if dataset.revision and not dataset.path.startswith("hf://"):
        yield "revision", "is set, but dataset.path is not a Hugging Face dataset: hf://org/name"


def _in_role(dataset: DatasetSection, config: Config) -> Iterator[tuple[str, str]]:
    start, end, duration = dataset.start, dataset.end, config.train.duration
    if dataset.role == "eval":
        changed = {
            "repeats": dataset.repeats != 1,
            "weight": dataset.weight != 1,
            "start": start.value,
            "end": end.value,
        }
        for name, is_set in changed.items():
            if is_set:
                yield (
                    name,
                    'is set, but dataset.role = "eval": the eval loss always takes each image once. '
                    f"Remove dataset.{name}.",
                )
        return
    if end.value and end.unit == start.unit and end.value <= start.value:
        yield "end", f'"{end}" is not after dataset.start = "{start}"'
    if start.value and start.unit == duration.unit and start.value >= duration.value:
        yield "start", f'"{start}" is not before the end of the run: train.duration = "{duration}"'


def _in_addresses(config: Config) -> Iterator[tuple[str, str]]:
    """Cloud addresses that can never work. `check_address` shows no key that one may hold."""
    paths = {f"dataset.{number}.path": dataset.path for number, dataset in enumerate(config.dataset, start=1)}
    for key, path in {**paths, "cache.path": config.cache.path}.items():
        try:
            check_address(path)
        except ConfigError as error:
            yield key, str(error)
        slip = _ONE_SLASH.match(path)
        if slip and not os.path.lexists(slip[1]):
            yield key, f"names a folder of this machine called {slip[1]}, which is not there. Write {slip[1]}//..."
    if config.cache.path.startswith("hf://"):
        yield "cache.path", "hf:// is for reading only. Give a folder, s3://, gs:// or abfs://."


def _among_datasets(config: Config) -> Iterator[tuple[str, str]]:
    first: dict[str, int] = {}
    for number, dataset in enumerate(config.dataset, start=1):
        if dataset.name and first.setdefault(dataset.name, number) != number:
            yield (
                f"dataset.{number}.name",
                f'"{dataset.name}" is the dataset.name of dataset {first[dataset.name]} too',
            )
    trained_on = [dataset for dataset in config.datasets if dataset.role != "eval"]
    if not config.datasets:
        yield "dataset", "all are left out. Set dataset.disabled = false in one."
    elif not trained_on:
        yield "dataset", 'none is trained on. One needs dataset.role = "train".'
    elif all(dataset.start.value for dataset in trained_on):
        yield "dataset", 'none takes part in the first step. One needs dataset.start = "0 steps".'


def _in_cache(config: Config) -> Iterator[tuple[str, str]]:
    cache = config.cache
    if cache.max_encoders and cache.max_encoders < cache.num_encoders:
        yield "cache.max_encoders", f"is {cache.max_encoders}, below cache.num_encoders = {cache.num_encoders}"


def _in_lengths(config: Config) -> Iterator[tuple[str, str]]:
    warmup, duration = config.lr_schedule.warmup.duration, config.train.duration
    if warmup is not None and warmup.unit == duration.unit and warmup.value > duration.value:
        yield "lr_schedule.warmup", f'"{warmup}" is longer than train.duration = "{duration}"'
    for key, every in (
        ("train.duration", duration),
        ("eval.every", config.eval.every),
        ("validation.every", config.validation.every),
        ("checkpoint.every", config.checkpoint.every),
    ):
        if every.value == 0:
            yield key, "must be at least 1 step or 1 epoch"


def _in_sweep(config: Config) -> Iterator[tuple[str, str]]:
    evaluates = config.eval.holdout > 0 or any(dataset.role == "eval" for dataset in config.datasets)
    if config.sweep.parameters and not evaluates:
        yield (
            "eval.holdout",
            "is 0, but sweep.metric needs an eval loss. Set eval.holdout = 0.05, say, or give a dataset "
            'dataset.role = "eval".',
        )
    for path in config.sweep.parameters:
        if path.partition(".")[0] in SHARED_BY_TRIALS:
            text = "cannot vary between trials, which share the model, the cache and the cluster"
            yield f"sweep.parameters.{path}", text


def _repeated(items: Sequence[Any]) -> list[Any]:
    return [item for item, count in Counter(items).items() if count > 1]
