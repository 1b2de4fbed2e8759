"""What the cache should hold for this dataset and model, and what of it is still missing. No Ray, no torch.

    list ─▶ scan ─▶ captions ─▶ buckets ─▶ keys ─▶ missing shards

`plan_cache` is all that `sdxl-ray check` needs, and the first half of `sdxl-ray cache`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray.cache.buckets import assign_bucket, make_buckets
from sdxl_ray.cache.captions import CaptionRules, attach_captions
from sdxl_ray.cache.scan import ScannedFile, list_images, read_memo, scan_images, write_memo
from sdxl_ray.cache.shards import ShardStore, latent_key, shard_name, text_key
from sdxl_ray.errors import DatasetError, storage_errors
from sdxl_ray.records import EncodedSample, ImageRecord, bucket_key
from sdxl_ray.sdxl.fingerprint import text_fingerprint, vae_fingerprint

if TYPE_CHECKING:
    from sdxl_ray.config.schema import CacheSection, DatasetSection, ModelSection

ENTRIES_PER_SHARD = 64
# The decoded pixels of a shard travel as one Ray block; larger ones would fill the object store of a small machine.
_MAX_SHARD_PIXEL_BYTES = 96 * 2**20
MAX_TOKENS = 77


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is left out."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class LatentShard:
    """One work item: a shard that is still missing."""

    name: str
    keys: tuple[str, ...]
    records: tuple[ImageRecord, ...]


@dataclass(frozen=True, slots=True)
class TextShard:
    """One work item: a shard that is still missing."""

    name: str
    keys: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass
class CachePlan:
    """The samples, what is there, and the work that is left."""

    model: str
    folder: Path  # of this dataset's index, below the cache
    store: ShardStore
    samples: list[EncodedSample]
    records: dict[str, ImageRecord]  # by latent key
    prompts: dict[str, str]  # text that is needed besides captions (validation prompts, "") -> its key
    skipped: list[Skipped]
    num_images: int  # found, before anything was skipped
    vae_fingerprint: str
    text_fingerprint: str
    missing_latents: list[LatentShard] = field(default_factory=list)
    missing_text: list[TextShard] = field(default_factory=list)

    @property
    def buckets(self) -> Counter[str]:
        return Counter(sample.bucket for sample in self.samples)

    @property
    def num_missing_latents(self) -> int:
        return sum(len(shard.keys) for shard in self.missing_latents)

    @property
    def num_missing_text(self) -> int:
        return sum(len(shard.keys) for shard in self.missing_text)

    @property
    def index_path(self) -> Path:
        return self.folder / "index.parquet"

    @property
    def skipped_path(self) -> Path:
        return self.folder / "skipped.csv"

    def num_long_captions(self) -> int:
        """Captions of which the encoders see only the first 77 tokens; known once they are encoded."""
        keys = {key for sample in self.samples for key in sample.text_keys}
        return sum(self.store.num_tokens.get(key, 0) > MAX_TOKENS for key in keys)


def plan_cache(
    dataset: DatasetSection,
    model: ModelSection,
    cache: CacheSection,
    *,
    model_path: str,
    prompts: Iterable[str] = (),
    scan: Callable[..., list[ScannedFile]] = scan_images,
) -> CachePlan:
    """Find out what has to be encoded. Reads new files only.

    Args:
        model_path: a local folder or a Hub id (`resolve_model` of model.path).
        prompts: texts to encode besides the captions: validation prompts.
        scan: how new files are scanned; the pipeline passes one that shows progress, and uses Ray for large folders.

    Raises:
        DatasetError: no images, too many unreadable ones, ambiguous or missing captions.
    """
    root = Path(cache.path)
    files = _scan(dataset, root / "scan.parquet", scan)
    usable = [file for file in files if not file.problem]
    skipped = [Skipped(file.path, file.problem) for file in files if file.problem]

    rules = CaptionRules(dataset.captions, dataset.instance_prompt, dataset.trigger_word)
    captions, unreadable = attach_captions([file.path for file in usable], rules)
    skipped += [Skipped(path, reason) for path, reason in unreadable.items()]

    revision, variant = model.revision or None, model.variant or None
    vae = vae_fingerprint(model_path, cache.vae_dtype, revision=revision, variant=variant)
    text = text_fingerprint(model_path, revision=revision, variant=variant)
    buckets = make_buckets(dataset.resolution, dataset.bucket_step)
    samples, records = [], {}
    occurrences: Counter[str] = Counter()
    for file in usable:
        if file.path not in captions:
            continue
        record = ImageRecord(file.path, file.image_hash, (file.height, file.width), captions[file.path])
        record = assign_bucket(record, buckets, dataset.crop)
        sample = _sample(record, vae, text, dataset.repeats, occurrences)
        samples.append(sample)
        records[sample.latent_key] = record
    samples.sort(key=lambda sample: sample.sample_id)  # the same order wherever the files lie

    plan = CachePlan(
        model=model_path,
        folder=root / "datasets" / _dataset_name(dataset, vae, text),
        store=ShardStore(root),
        samples=samples,
        records=records,
        prompts={prompt: text_key(prompt, text) for prompt in ("", *prompts)},
        skipped=skipped,
        num_images=len(files),
        vae_fingerprint=vae,
        text_fingerprint=text,
    )
    find_missing(plan)
    check_readable(plan, dataset.max_unreadable)
    return plan


def find_missing(plan: CachePlan) -> None:
    """Cut what the store lacks into shards. Sorted keys, so that the same gap always makes the same shards."""
    here = plan.store.locations
    by_bucket: dict[str, list[str]] = defaultdict(list)
    for key in sorted({sample.latent_key for sample in plan.samples} - here.keys()):
        by_bucket[bucket_key(plan.records[key].bucket_hw or (0, 0))].append(key)
    plan.missing_latents = [
        LatentShard(shard_name("latents", keys, bucket), tuple(keys), tuple(plan.records[key] for key in keys))
        for bucket, missing in by_bucket.items()
        for keys in _chunks(missing, shard_length(bucket))
    ]
    texts = {
        key: caption for sample in plan.samples for key, caption in zip(sample.text_keys, sample.captions, strict=True)
    }
    texts.update({key: prompt for prompt, key in plan.prompts.items()})
    plan.missing_text = [
        TextShard(shard_name("text", keys), tuple(keys), tuple(texts[key] for key in keys))
        for keys in _chunks(sorted(texts.keys() - here.keys()), ENTRIES_PER_SHARD)
    ]


def shard_length(bucket: str) -> int:
    """Entries of one shard: 64, fewer where their decoded pixels would exceed 96 MiB (30 at 1024²)."""
    height, width = map(int, bucket.split("x"))
    return max(1, min(ENTRIES_PER_SHARD, _MAX_SHARD_PIXEL_BYTES // (3 * height * width)))


def drop_undecodable(plan: CachePlan, undecodable: Sequence[Skipped], memo_path: Path) -> None:
    """Take out images whose pixels turned out damaged, and remember them: not tried again until they change."""
    reason_of_path = {item.path: item.reason for item in undecodable}
    reasons = {  # by content, since a copy of a damaged image is as damaged
        sample.image_hash: reason_of_path[sample.path] for sample in plan.samples if sample.path in reason_of_path
    }
    plan.skipped += [
        Skipped(sample.path, reasons[sample.image_hash]) for sample in plan.samples if sample.image_hash in reasons
    ]
    plan.samples = [sample for sample in plan.samples if sample.image_hash not in reasons]
    memo = read_memo(memo_path)
    for identity, file in list(memo.items()):
        if reasons.get(file.image_hash, "").startswith("cannot be decoded"):
            memo[identity] = dataclasses.replace(file, problem=reasons[file.image_hash])
    write_memo(memo_path, memo.values())


def check_readable(plan: CachePlan, max_unreadable: float) -> None:
    """Stop before training on a fraction of the images without anybody noticing.

    Raises:
        DatasetError: more than `max_unreadable` of the images were skipped, or all of them.
    """
    # A quotient, not a product: 0.29 * 100 is less than 29.
    if plan.samples and len(plan.skipped) / plan.num_images <= max_unreadable:
        return
    write_skipped(plan)
    shown = "\n".join(f"  {item.path}: {item.reason}" for item in plan.skipped[:20])
    more = f"\n  and {len(plan.skipped) - 20} more" if len(plan.skipped) > 20 else ""
    if not plan.samples:
        limit, cure = "which leaves none", "Repair them."
    else:
        limit = f"more than dataset.max_unreadable = {max_unreadable:g} allows"
        cure = "Repair or remove them, or raise dataset.max_unreadable."
    raise DatasetError(
        f"{len(plan.skipped)} of {plan.num_images} images cannot be used, {limit}:\n{shown}{more}\n"
        f"The whole list: {plan.skipped_path}\n{cure}"
    )


def write_skipped(plan: CachePlan) -> None:
    """skipped.csv beside the index: every image left out, with its reason."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "reason"))
    writer.writerows((item.path, item.reason) for item in plan.skipped)
    with storage_errors("writing the list of skipped images", plan.skipped_path, "Free some space and run again."):
        plan.folder.mkdir(parents=True, exist_ok=True)
        temporary = plan.skipped_path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            temporary.write_text(text.getvalue(), encoding="utf-8")
            temporary.replace(plan.skipped_path)
        finally:
            temporary.unlink(missing_ok=True)


def _scan(dataset: DatasetSection, memo_path: Path, scan: Callable[..., list[ScannedFile]]) -> list[ScannedFile]:
    listed = list_images(dataset.path)
    memo = read_memo(memo_path)
    # Looked at again: what was refused for its size, since the limit may have changed, and what could not be read,
    # since a network drive may be back.
    usable_memo = {
        identity: file
        for identity, file in memo.items()
        if file.height * file.width <= dataset.max_pixels
        and "dataset.max_pixels" not in file.problem
        and not file.problem.startswith("cannot be read")
    }
    files = scan(listed, memo=usable_memo, max_pixels=dataset.max_pixels)
    if any(memo.get(file.identity) != file for file in files):
        write_memo(memo_path, (memo | {file.identity: file for file in files}).values())
    return files


def _sample(record: ImageRecord, vae: str, text: str, repeats: int, occurrences: Counter[str]) -> EncodedSample:
    conditioning = record.micro_conditioning
    assert record.resized_hw is not None
    latent = latent_key(record.image_hash, conditioning.target_hw, record.resized_hw, conditioning.crop_top_left, vae)
    texts = tuple(text_key(caption, text) for caption in record.captions)
    identity = hashlib.sha256(repr((latent, texts)).encode()).hexdigest()[:24]
    occurrences[identity] += 1  # the same image with the same captions, in two places: two samples
    return EncodedSample(
        sample_id=identity if occurrences[identity] == 1 else f"{identity}-{occurrences[identity]}",
        path=record.path,
        image_hash=record.image_hash,
        original_hw=conditioning.original_hw,
        crop_top_left=conditioning.crop_top_left,
        target_hw=conditioning.target_hw,
        captions=record.captions,
        latent_key=latent,
        text_keys=texts,
        repeats=repeats,
    )


def _dataset_name(dataset: DatasetSection, vae: str, text: str) -> str:
    """Readable, and different whenever the index would be."""
    identity = hashlib.sha256(f"{dataset.model_dump_json()}|{vae}|{text}".encode()).hexdigest()[:10]
    return f"{Path(dataset.path).name or 'root'}-{identity}"


def _chunks(items: Sequence[str], length: int) -> list[Sequence[str]]:
    return [items[start : start + length] for start in range(0, len(items), length)]
