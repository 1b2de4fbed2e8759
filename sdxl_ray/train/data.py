"""The samples of a run and its plan, from the config and the index. No torch: the driver needs these too, and is quick.

index ─▶ split ─▶ order ─▶ plan
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from sdxl_ray.cache.generations import MANIFEST
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.errors import CacheError, DatasetError
from sdxl_ray.records import SAMPLE_ID_VERSION, EncodedSample
from sdxl_ray.sdxl.components import resolve_model, unet_identity
from sdxl_ray.storage import read_bytes
from sdxl_ray.train.holdout import is_one_of, split_holdout
from sdxl_ray.train.order import DataOrder, Span
from sdxl_ray.train.plan import Every, Plan, run_length

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config, DatasetSection
    from sdxl_ray.config.units import Duration

_DIGEST_CHUNK = 100_000


class Samples(Sequence[EncodedSample]):
    """Some rows of an index, in an order of their own. A sample becomes an object when it is asked for."""

    def __init__(self, whole: Index, rows: np.ndarray) -> None:
        self.whole = whole
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> EncodedSample: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> EncodedSample | Samples:
        if isinstance(place, slice):
            return Samples(self.whole, self.rows[place])
        return self.whole[int(self.rows[place])]

    def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
        """(int32 code of each sample, the sorted names that the codes stand for) of "bucket" or "dataset"."""
        codes, names = self.whole.codes(column)
        return codes[self.rows], names

    def counts(self, column: str) -> dict[str, int]:
        """How many samples have each value of "bucket" or "dataset"; none is left out by name."""
        codes, names = self.codes(column)
        return {name: int(count) for name, count in zip(names, np.bincount(codes, minlength=len(names)), strict=True)}

    @property
    def digest(self) -> str:
        """Changes whenever the samples do; the order of the data depends on them."""
        ids = self.whole.sample_ids()
        digest = hashlib.sha256()
        for start in range(0, len(self), _DIGEST_CHUNK):
            text = b"\n".join(ids[self.rows[start : start + _DIGEST_CHUNK]].tolist())
            digest.update(b"\n" + text if start else text)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Which samples are trained on and which are only evaluated."""

    train: Samples
    held_out: Samples
    num_left_out: int  # images that are not trained on although their dataset is, because they are evaluated
    sections: Mapping[str, DatasetSection]  # by name: role, weight, repeats, start, end


@dataclass(frozen=True)
class Data(Split):
    """The samples of a run, split, with the way to their tensors."""

    reader: ShardReader
    prompts: Mapping[str, tuple[str, str]]  # text -> (shard, key) of its embedding
    vae: str  # fingerprints of what the samples are encoded with
    text_encoders: str

    @property
    def digest(self) -> str:
        return self.train.digest


def load_data(config: Config, index_path: str | Path, wait: Callable[[str], None] | None = None) -> Data:
    """The index, split as the config says, and a reader of the cache.

    Args:
        wait: called with the name of a shard that is not there yet; see `ShardReader`.

    Raises:
        CacheError: the index is missing, damaged, or of another config.
        DatasetError: no image is left to train on.
    """
    parts = split(config, Index.read(index_path))
    folder = str(index_path).rpartition("/")[0] or "."
    try:
        manifest = json.loads(read_bytes(f"{folder}/{MANIFEST}"))
        prompts = {text: (place["shard"], place["key"]) for text, place in manifest["prompts"].items()}
        vae, text_encoders = str(manifest["vae_fingerprint"]), str(manifest["text_fingerprint"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{folder}/{MANIFEST}: cannot be read ({error!r}). Run `sdxl-ray cache`: it is written anew."
        ) from None
    cache = config.cache
    return Data(
        train=parts.train,
        held_out=parts.held_out,
        num_left_out=parts.num_left_out,
        sections=parts.sections,
        reader=ShardReader(cache.path, local_path=cache.local_path, local_gib=cache.local_gib, wait=wait),
        prompts=prompts,
        vae=vae,
        text_encoders=text_encoders,
    )


def split(config: Config, index: Index) -> Split:
    """Training and held-out samples, each sorted by sample_id, so that no order depends on where files lie.

    Datasets of role "eval" are held out whole, and then eval.holdout takes nothing from the others. Otherwise it takes
    its share of the images of role "train". Either way, an image that is evaluated is trained on nowhere: not as a copy
    in another dataset, nor mirrored, nor at another resolution. Mirrored images are not evaluated.

    Raises:
        CacheError: the index has a dataset that the config does not have.
        DatasetError: no image is left to train on.
    """
    sections = {section.name: section for section in config.datasets}
    codes, names = index.codes("dataset")
    unknown = [name for name in names if name not in sections]
    if unknown:
        raise CacheError(
            f'the index has samples of dataset "{unknown[0]}", the config has {", ".join(sections) or "none"}. '
            "Run `sdxl-ray cache` with this config."
        )
    role = np.array([sections[name].role for name in names], dtype=object)
    is_train, is_eval = (np.flatnonzero(role == wanted) for wanted in ("train", "eval"))
    hashes = index.image_hashes()
    evaluated = np.isin(codes, is_eval)
    if not any(section.role == "eval" for section in sections.values()):
        candidates = np.flatnonzero(np.isin(codes, is_train))
        _, held_out = split_holdout(hashes[candidates], config.eval.holdout, config.eval.max_images)
        evaluated[candidates[held_out]] = True
    is_copy = is_one_of(hashes, np.unique(hashes[evaluated])) & ~evaluated

    order = np.argsort(index.sample_ids(), kind="stable")
    parts = Split(
        train=Samples(index, order[~(evaluated | is_copy)[order]]),
        held_out=Samples(index, order[(evaluated & ~index.flags("flip"))[order]]),
        num_left_out=len(np.unique(hashes[is_copy])),
        sections=sections,
    )
    if not len(parts.train):
        raise DatasetError(
            f"no image is left to train on: of {len(index)} samples, {evaluated.sum()} are held out for the eval loss "
            f"and {is_copy.sum()} are copies of these. Add images, or set dataset.role and eval.holdout differently."
        )
    return parts


def data_order(config: Config, data: Split) -> DataOrder:
    """The order of the training samples, with its phases where datasets begin or end during the run."""
    buckets, _ = data.train.codes("bucket")
    datasets, names = data.train.codes("dataset")
    sections = [data.sections[name] for name in names]
    return DataOrder(
        buckets,
        np.array([section.repeats for section in sections], dtype=np.int64)[datasets],
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        datasets=datasets,
        spans=[Span(section.name, section.start, section.end) for section in sections],
        micro_batches_per_step=config.train.num_workers * config.train.accumulation,
    )


def build_plan(config: Config, order: DataOrder, *, step: int, position: int, can_evaluate: bool) -> Plan:
    """The run as seen from `step` and `position`, which are 0 for a new one.

    Periods in epochs (eval.every and the like) are as long as the first phase's epochs, however many datasets take part
    later: they stay the same number of steps all through the run.

    Raises:
        ConfigError: before the run's end no dataset takes part any more.
    """
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
    """The settings that a resumed run has to share with the run that it continues.

    The hash of the samples says nothing of what they are encoded with, so that is listed beside it.
    """
    model = resolve_model(config.model.path)
    unet = unet_identity(model, revision=config.model.revision or None, variant=config.model.variant or None)
    identity = {
        "model (U-Net)": unet,
        "model (VAE, with cache.vae_dtype)": data.vae,
        "model (text encoders)": data.text_encoders,
        "model.dtype": config.model.dtype,
        **_adapter_identity(config),
        "loss.objective": config.loss.objective,
        "run.seed": config.run.seed,
        "train.micro_batch_size": config.train.micro_batch_size,
        "eval.holdout": config.eval.holdout,
        "eval.max_images": config.eval.max_images,
        "cache.vae_dtype": config.cache.vae_dtype,
        "cache.text": config.cache.text,
        "cache.caption_chunks": config.cache.caption_chunks,
        "datasets": ", ".join(sorted(data.sections)),
        **{f'dataset "{name}"': _dataset_identity(data.sections[name]) for name in sorted(data.sections)},
        # With the version, so that a checkpoint of an earlier one does not look as if its images had changed.
        "the training images and captions (hash)": f"v{SAMPLE_ID_VERSION} {data.digest}",
    }
    # Those at their default are not written down, so that a setting that a later version adds does not stand in the way
    # of --resume.
    for key in _METHOD:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value != type(getattr(config, section)).model_fields[name].default:
            identity[key] = value
    borders = [border for section in data.sections.values() for border in (section.start, section.end)]
    if any(border.value and border.unit == "steps" for border in borders):
        # Elsewhere the number of workers may change; here it would move the borders among the data.
        per_step = config.train.num_workers * config.train.accumulation
        identity["train.num_workers x train.accumulation (a dataset starts or ends at a step)"] = per_step
    return identity


def _adapter_identity(config: Config) -> dict[str, Any]:
    """What decides which weights there are and how they began."""
    adapter = config.adapter
    identity: dict[str, Any] = {
        "adapter.kind": adapter.kind,
        "adapter.rank": adapter.rank,
        "adapter.alpha": adapter.scaling_alpha,
        "adapter.targets": ", ".join(adapter.targets),
    }
    if adapter.blocks:
        identity["adapter.blocks"] = "; ".join(
            f"{pattern}: rank {rule.rank}, alpha {rule.alpha}, learning rate x {rule.learning_rate_scale:g}"
            for pattern, rule in adapter.blocks.items()
        )
    for part in ("text_encoder", "text_encoder_2"):
        section = getattr(config, part)
        if section.rank:
            identity[part] = f"rank {section.rank}, alpha {section.scaling_alpha:g}, {section.targets}"
    return identity


# Settings of training methods that decide which weights there are, how they began, or what the optimizer remembers.
_METHOD = (
    "model.quantize", "adapter.rank_stabilized", "adapter.init", "adapter.factor", "loss.zero_terminal_snr",
    "optimizer.name", "optimizer.lora_plus_ratio",
)  # fmt: skip


# Settings that decide what a sample brings into an epoch and are not in its sample_id; likewise.
_DRAWN_FROM = (
    "crop_epochs", "caption_prefix", "trigger_word", "caption_suffix", "tag_separator", "shuffle_tags", "keep_tags",
    "tag_dropout", "caption_variants", "prior_prediction",
)  # fmt: skip


def _dataset_identity(section: DatasetSection) -> str:
    """What decides the order, the draws and the weights of its samples besides themselves, in a line."""

    def border(at: Duration, otherwise: str) -> str:
        return str(at) if at.value else otherwise

    text = (
        f"role {section.role}, repeats {section.repeats}, weight {section.weight:g}, "
        f"from {border(section.start, 'the start')} to {border(section.end, 'the end')}"
    )
    fields = type(section).model_fields
    changed = [name for name in _DRAWN_FROM if getattr(section, name) != fields[name].default]
    return ", ".join([text, *(f"{name} {getattr(section, name)!r}" for name in changed)])
