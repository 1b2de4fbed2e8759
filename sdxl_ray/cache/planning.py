"""What the cache should hold for these datasets and this model, and what of it is still missing. No Ray, no torch.

    collection ─▶ keys that no shard has ─▶ missing shards          `plan_cache`

`plan_cache` is all that `sdxl-ray check` needs, and the first half of `sdxl-ray cache`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_ray.cache import index
from sdxl_ray.cache.collection import Collection, EncodedWith, Scan, collect
from sdxl_ray.cache.foreseen import Content, content_of
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.missing import missing_latents, missing_text, text_ranks
from sdxl_ray.cache.ragged import Ragged
from sdxl_ray.cache.scan import scan_each
from sdxl_ray.cache.shards import shard_name, text_key
from sdxl_ray.cache.skipped import Skipped, SkippedImages, check_readable, unreadable_of
from sdxl_ray.cache.store import ShardStore, hex_strings, keys_from_hex
from sdxl_ray.records import ImageRecord, bucket_key
from sdxl_ray.sdxl.fingerprint import text_fingerprint, vae_fingerprint
from sdxl_ray.storage import Folder, open_folder

if TYPE_CHECKING:
    from sdxl_ray.config.schema import CacheSection, DatasetSection, ModelSection


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
    """The samples, what is there, and the work that is left.

    Entries are numbered: latents row after row, crop after crop; captions row after row, then the prompts.
    `missing_latents` and `missing_text` have an int64 array of entry numbers for each shard that is to be written.
    """

    model: str
    name: str  # for a person, of the datasets
    made_with: dict[str, Any]  # settings, for the manifest
    store: ShardStore
    collection: Collection
    prompts: dict[str, str]  # text that is needed besides captions (validation prompts, "") -> its key
    vae_fingerprint: str
    text_fingerprint: str
    num_chunks: int
    keeps_latents: bool  # false with cache.mode = "off"
    order: np.ndarray | None = None  # rank of each crop of each row, where training needs them in an order of its own
    missing_latents: list[np.ndarray] = field(default_factory=list)
    missing_text: list[np.ndarray] = field(default_factory=list)
    _content: Content | None = None  # None: it has to be found out again

    @property
    def content(self) -> Content:
        """What index and manifest say. Made when it is asked for, and anew after each change of the plan."""
        if self._content is None:
            self._content = content_of(self)
        return self._content

    @property
    def folder(self) -> Folder:
        """Of this collection's index, below the cache. Named by its content: see `generations`."""
        return open_folder(f"{self.store.folder.path}/datasets/{self.name}-{self.content.digest}")

    @property
    def buckets(self) -> Counter[str]:
        counts = self.collection.table.column("bucket").value_counts().to_pylist()
        return Counter({item["values"]: item["counts"] for item in counts if item["counts"]})

    @property
    def num_samples(self) -> int:
        return len(self.collection)

    @property
    def num_images(self) -> int:
        return sum(self.collection.num_images.values())

    @property
    def skipped(self) -> SkippedImages:
        return self.collection.skipped

    @property
    def num_missing_latents(self) -> int:
        return sum(map(len, self.missing_latents))

    @property
    def num_missing_text(self) -> int:
        return sum(map(len, self.missing_text))

    @property
    def num_missing(self) -> int:
        return self.num_missing_latents + self.num_missing_text

    @property
    def index_path(self) -> str:
        return f"{self.folder.path}/{index.FILE_NAME}"

    @property
    def skipped_path(self) -> str:
        return f"{self.folder.path}/skipped.csv"

    @property
    def max_tokens(self) -> int:
        return max_tokens(self.num_chunks)

    def num_long_captions(self) -> int:
        """Captions of which the encoders see only the first `max_tokens`; known once they are encoded."""
        keys = np.unique(self.collection.keys("text_keys").values)
        return int((self.store.num_tokens(keys) > self.max_tokens).sum())

    def missing_by_bucket(self) -> Counter[str]:
        """How many latents of each bucket are missing."""
        keys, bucket = self.latent_keys(), self.collection.table.column("bucket")
        missing: Counter[str] = Counter()
        for entries in self.missing_latents:
            missing[bucket[int(keys.rows_of(entries[:1])[0])].as_py()] += len(entries)
        return missing

    # ---- entries

    def latent_keys(self) -> Ragged:
        """Of each row, 'S16'."""
        return self.collection.keys("latent_keys")

    def text_keys(self) -> Ragged:
        """The same of captions; the keys of the prompts follow."""
        captions = self.collection.keys("text_keys")
        return Ragged(np.concatenate([captions.values, keys_from_hex(self.prompts.values())]), captions.counts)

    def missing_keys(self) -> np.ndarray:
        """'S16', of latents and captions."""
        kinds = (self.latent_keys().values, self.missing_latents), (self.text_keys().values, self.missing_text)
        return np.concatenate([keys[:0] if not shards else keys[np.concatenate(shards)] for keys, shards in kinds])

    # ---- work items

    def latent_shards(self) -> Iterator[LatentShard]:
        """Of `missing_latents`, made one by one: all at once would take gigabytes."""
        keys = self.latent_keys()
        for entries in self.missing_latents:
            rows, variants = keys.rows_of(entries), keys.place_in_row(entries)
            records = self.collection.records(rows.tolist(), variants.tolist())
            texts = tuple(hex_strings(keys.values[entries]).to_pylist())
            name = shard_name("latents", texts, bucket_key(records[0].bucket_hw))
            yield LatentShard(name, texts, tuple(records))

    def text_shards(self) -> Iterator[TextShard]:
        """Of `missing_text`, made one by one."""
        keys = self.text_keys()
        captions = pa.chunked_array(
            [chunk.flatten() for chunk in self.collection.table.column("captions").chunks] or [[]], pa.string()
        )
        prompts = list(self.prompts)
        num_captions = int(keys.counts.sum())
        for entries in self.missing_text:
            taken = tuple(
                captions[number].as_py() if number < num_captions else prompts[number - num_captions]
                for number in entries.tolist()
            )
            texts = tuple(hex_strings(keys.values[entries]).to_pylist())
            yield TextShard(shard_name("text", texts), texts, taken)


def plan_cache(
    datasets: Sequence[DatasetSection],
    model: ModelSection,
    cache: CacheSection,
    *,
    model_path: str,
    prompts: Iterable[str] | None = (),
    scan: Scan = scan_each,
) -> CachePlan:
    """Find out what has to be encoded. Reads new files only.

    Args:
        model_path: a local folder or a Hub id (`resolve_model` of model.path).
        prompts: texts to encode besides the captions and "": validation prompts. None: no text is encoded beforehand.
        scan: how new files are scanned; the pipeline passes one that shows progress, and uses Ray for many.

    Raises:
        DatasetError: no images, too many unreadable ones, ambiguous or missing captions.
    """
    revision, variant = model.revision or None, model.variant or None
    vae = vae_fingerprint(model_path, cache.vae_dtype, revision=revision, variant=variant)
    text = text_fingerprint(model_path, revision=revision, variant=variant)
    collection = collect(
        datasets,
        Memo(open_folder(cache.path)),
        encoded_with=EncodedWith(vae, text, cache.caption_chunks, text_online=cache.text == "online"),
        scan=scan,
    )
    plan = CachePlan(
        model=model_path,
        name=_collection_name([dataset.name for dataset in datasets]),
        made_with={
            "datasets": [dataset.model_dump(mode="json", exclude=_OF_TRAINING) for dataset in datasets],
            "model": model.path,
            "vae_fingerprint": vae,
            "text_fingerprint": text,
            "vae_dtype": cache.vae_dtype,
            "caption_chunks": cache.caption_chunks,
        },
        store=ShardStore(cache.path),
        collection=collection,
        prompts={
            prompt: text_key(prompt, text, cache.caption_chunks)
            for prompt in (() if prompts is None else ("", *prompts))
        },
        vae_fingerprint=vae,
        text_fingerprint=text,
        num_chunks=cache.caption_chunks,
        keeps_latents=cache.mode != "off",
    )
    find_missing(plan)
    check_readable(plan, datasets)
    return plan


def find_missing(plan: CachePlan, *, in_order: np.ndarray | None = None) -> None:
    """Cut what the store lacks into shards, always in the same way: the same gap always makes the same shards.

    Args:
        in_order: rank of each crop of each row, one row after another, where training will need them in that order;
            else in the order of the listing.
    """
    plan.order = in_order if in_order is not None else plan.order
    latents, captions = plan.latent_keys(), plan.text_keys()
    plan.missing_latents = []
    if plan.keeps_latents:
        table = index.Index(plan.collection.table.select(["bucket", "mask"]))
        codes, buckets = table.codes("bucket")
        masked = np.asarray(pc.not_equal(table.table.column("mask"), "").to_numpy(), dtype=bool)
        plan.missing_latents = missing_latents(latents, codes, buckets, masked, plan.order, plan.store)
    plan.missing_text = missing_text(captions.values, text_ranks(latents.counts, captions, plan.order), plan.store)
    plan._content = None


def drop_undecodable(plan: CachePlan, undecodable: Mapping[str, Skipped]) -> None:
    """Take out the samples of these latent keys, whose pixels turned out damaged."""
    plan.skipped.extend(unreadable_of(plan, undecodable))
    counts = plan.latent_keys().counts
    kept = np.ones(len(counts), bool)
    kept[list(plan.collection.rows_with(undecodable))] = False
    plan.collection.keep(kept)
    if plan.order is not None:
        plan.order = plan.order[np.repeat(kept, counts)]
    plan._content = None


def max_tokens(num_chunks: int) -> int:
    """What the encoders read of a caption, with its two markers."""
    return 75 * num_chunks + 2


# Settings that decide how samples are used in training, not what is encoded.
_OF_TRAINING = {"repeats", "weight", "start", "end", "crop_epochs", "max_unreadable", "prior_prediction"}


_NAME_BYTES = 100  # file systems take 255, and a digest follows


def _collection_name(datasets: Sequence[str]) -> str:
    """For a person: of the first dataset, and how many there are. Not hidden, so without dots in front."""
    first = datasets[0].lstrip(".").encode(errors="ignore")[:_NAME_BYTES].decode(errors="ignore").strip()
    others = f"-and-{len(datasets) - 1}" if len(datasets) > 1 else ""
    return f"{first or 'dataset'}{others}"
