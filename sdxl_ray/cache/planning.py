"""What the cache should hold for these datasets and this model, and what of it is still missing. No Ray, no torch.

    collection ─▶ keys that no shard has ─▶ missing shards          `plan_cache`
    collection + where everything is, or will be ─▶ index.parquet    `CachePlan.index_tables`

`plan_cache` is all that `sdxl-ray check` needs, and the first half of `sdxl-ray cache`.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sdxl_ray.cache import index
from sdxl_ray.cache.collection import ID_BYTES, Collection, Scan, Skipped, collect, hex_strings
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.scan import scan_each
from sdxl_ray.cache.shards import shard_name, text_key
from sdxl_ray.cache.store import ShardStore, keys_from_hex
from sdxl_ray.cache.tables import PIECE, fixed_bytes, fixed_column, gather
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import ImageRecord, parse_bucket_key
from sdxl_ray.sdxl.fingerprint import text_fingerprint, vae_fingerprint
from sdxl_ray.storage import Folder, open_folder

if TYPE_CHECKING:
    from sdxl_ray.config.schema import CacheSection, DatasetSection, ModelSection

ENTRIES_PER_SHARD = 64
# The decoded pixels of a shard travel as one Ray block; larger ones would fill the object store of a small machine.
_MAX_SHARD_PIXEL_BYTES = 96 * 2**20
# Training on demand begins with the first shard of a bucket, so they are shorter.
_ON_DEMAND_SHORTER = 4


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

    An entry is one key of one row; `missing_latents` and `missing_text` are shards, each the numbers of its entries.
    Numbers of captions from `len(text keys)` on are those of `prompts`.
    """

    model: str
    folder: Folder  # of this collection's index, below the cache
    store: ShardStore
    collection: Collection
    prompts: dict[str, str]  # text that is needed besides captions (validation prompts, "") -> its key
    vae_fingerprint: str
    text_fingerprint: str
    num_chunks: int
    keeps_latents: bool  # false with cache.mode = "off"
    order: np.ndarray | None = None  # rank of each row, where training needs them in an order of its own
    missing_latents: list[np.ndarray] = field(default_factory=list)
    missing_text: list[np.ndarray] = field(default_factory=list)

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
    def skipped(self) -> list[Skipped]:
        return self.collection.skipped

    @property
    def num_missing_latents(self) -> int:
        return sum(map(len, self.missing_latents))

    @property
    def num_missing_text(self) -> int:
        return sum(map(len, self.missing_text))

    @property
    def index_path(self) -> str:
        return f"{self.folder.path}/{index.FILE_NAME}"

    @property
    def skipped_path(self) -> str:
        return f"{self.folder.path}/skipped.csv"

    @property
    def max_tokens(self) -> int:
        """What the encoders read of a caption, with its two markers."""
        return 75 * self.num_chunks + 2

    def num_long_captions(self) -> int:
        """Captions of which the encoders see only the first `max_tokens`; known once they are encoded."""
        keys = np.unique(self.collection.keys("text_keys")[0])
        return int((self.store.num_tokens(keys) > self.max_tokens).sum())

    def missing_by_bucket(self) -> Counter[str]:
        """How many latents of each bucket are missing."""
        _, counts = self.collection.keys("latent_keys")
        ends = np.cumsum(counts)
        bucket = self.collection.table.column("bucket")
        missing: Counter[str] = Counter()
        for entries in self.missing_latents:
            missing[bucket[int(np.searchsorted(ends, entries[0], side="right"))].as_py()] += len(entries)
        return missing

    # ---- work items

    def latent_shards(self) -> Iterator[LatentShard]:
        """Of `missing_latents`, made one by one: all at once would take gigabytes."""
        keys, counts = self.collection.keys("latent_keys")
        ends = np.cumsum(counts)
        for entries in self.missing_latents:
            rows = np.searchsorted(ends, entries, side="right")
            variants = entries - (ends[rows] - counts[rows])
            records = self.collection.records(rows.tolist(), variants.tolist())
            texts = tuple(hex_strings(keys[entries]).to_pylist())
            yield LatentShard(self._latent_name(entries, rows, keys), texts, tuple(records))

    def text_shards(self) -> Iterator[TextShard]:
        """Of `missing_text`, made one by one."""
        keys, counts = self._text_keys()
        captions = pa.chunked_array(
            [chunk.flatten() for chunk in self.collection.table.column("captions").chunks] or [[]], pa.string()
        )
        prompts = list(self.prompts)
        num_captions = int(counts.sum())
        for entries in self.missing_text:
            taken = tuple(
                captions[number].as_py() if number < num_captions else prompts[number - num_captions]
                for number in entries.tolist()
            )
            texts = tuple(hex_strings(keys[entries]).to_pylist())
            yield TextShard(shard_name("text", texts), texts, taken)

    # ---- the index

    def index_tables(self) -> Iterator[pa.Table]:
        """index.parquet in pieces: what is missing gets the name of the shard that it will be in."""
        latents = self._places("latent_keys", self.missing_latents) if self.keeps_latents else None
        text = self._places("text_keys", self.missing_text)
        start = {"latent_keys": 0, "text_keys": 0}
        repeated = self._repeated_ids()
        table = self.collection.table
        for first in range(0, len(table), PIECE):
            piece = table.slice(first, PIECE).combine_chunks()
            columns = {name: piece.column(name) for name in piece.schema.names if name in index.SCHEMA.names}
            ids = hex_strings(fixed_bytes(_only(piece.column("identity")), ID_BYTES)).to_pylist()
            for row in repeated.keys() & range(first, first + len(ids)):
                ids[row - first] += f"-{repeated[row] + 1}"
            columns["sample_id"] = pa.array(ids)
            columns["image_hash"] = hex_strings(fixed_bytes(_only(piece.column("image_hash")), 32))
            for kind, shards in (("latent_keys", latents), ("text_keys", text)):
                lists = _only(piece.column(kind))
                values = lists.flatten()
                offsets = pa.array(np.concatenate([[0], np.cumsum(lists.value_lengths())]).astype(np.int32))
                columns[kind] = pa.ListArray.from_arrays(
                    offsets, hex_strings(fixed_bytes(values, 16)).cast(pa.string())
                )
                if shards is None:
                    names = pa.array([""] * len(values), pa.string())
                else:
                    names = shards.slice(start[kind], len(values)).cast(pa.string())
                start[kind] += len(values)
                columns[kind.replace("keys", "shards")] = pa.ListArray.from_arrays(offsets, names)
            yield pa.table({name: columns[name] for name in index.SCHEMA.names}).cast(index.SCHEMA)

    def index(self) -> index.Index:
        """The index as it will be, in memory."""
        return index.Index(gather(self.index_tables(), index.SCHEMA))

    def _repeated_ids(self) -> dict[int, int]:
        """Row -> how many rows before it have its identity: one image with the same captions, in two places."""
        identities = fixed_column(self.collection.table.column("identity"), ID_BYTES)
        # By the dataset's name, so that their order in the config decides nothing.
        datasets, _ = index.Index(self.collection.table.select(["dataset"])).codes("dataset")
        order = np.lexsort((np.arange(len(identities)), datasets, identities))
        again = np.flatnonzero(identities[order][1:] == identities[order][:-1]) + 1
        occurrences: Counter[bytes] = Counter()
        repeated = {}
        for row in order[again].tolist():
            occurrences[identities[row]] += 1
            repeated[row] = occurrences[identities[row]]
        return repeated

    def _places(self, column: str, missing: Sequence[np.ndarray]) -> pa.DictionaryArray:
        """The shard of each entry, of those that are missing the one to come."""
        keys, counts = self._text_keys() if column == "text_keys" else self.collection.keys(column)
        here = self.store.find(keys)
        names = list(self.store.names)
        if missing:
            ends = np.cumsum(counts)
            planned = np.concatenate(list(missing))
            numbers = np.repeat(np.arange(len(missing)), [len(entries) for entries in missing]) + len(names)
            order = np.argsort(keys[planned])
            place = np.minimum(np.searchsorted(keys[planned][order], keys), len(planned) - 1)
            match = (here < 0) & (keys[planned][order][place] == keys)
            here = np.where(match, numbers[order][place], here).astype(np.int32)
            if column == "text_keys":
                names += [shard_name("text", hex_strings(keys[entries]).to_pylist()) for entries in missing]
            else:
                rows = (np.searchsorted(ends, entries, side="right") for entries in missing)
                names += [self._latent_name(entries, at, keys) for entries, at in zip(missing, rows, strict=True)]
        if (here[: int(counts.sum())] < 0).any():
            raise AssertionError("an entry is neither in a shard nor planned")
        return pa.DictionaryArray.from_arrays(pa.array(here), pa.array(names, pa.string()))

    def place_of_prompt(self, prompt: str) -> dict[str, str] | None:
        """Where a prompt's embedding is or will be, for the manifest."""
        key = text_key(prompt, self.text_fingerprint, self.num_chunks)
        shard = self.store.shard_of(key)
        if shard is None and key in self.prompts.values():
            shard = next((item.name for item in self.text_shards() if key in item.keys), None)
        return None if shard is None else {"shard": shard, "key": key}

    def _latent_name(self, entries: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> str:
        bucket = self.collection.table.column("bucket")[int(rows[0])].as_py()
        return shard_name("latents", hex_strings(keys[entries]).to_pylist(), bucket)

    def _text_keys(self) -> tuple[np.ndarray, np.ndarray]:
        keys, counts = self.collection.keys("text_keys")
        return np.concatenate([keys, keys_from_hex(self.prompts.values())]), counts


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
        vae=vae,
        text=text,
        num_chunks=cache.caption_chunks,
        text_online=cache.text == "online",
        scan=scan,
    )
    plan = CachePlan(
        model=model_path,
        folder=open_folder(f"{cache.path}/datasets/{_collection_name(datasets, cache, vae, text)}"),
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
        in_order: rank of each row, where training will need them in that order; else in the order of the listing.
    """
    plan.order = in_order if in_order is not None else plan.order
    plan.missing_latents = _missing_latents(plan) if plan.keeps_latents else []
    keys, counts = plan._text_keys()
    entries = _first_of_each(keys, _ranks(plan, counts, len(keys)))
    entries = entries[plan.store.find(keys[entries]) < 0]
    plan.missing_text = [
        entries[start : start + ENTRIES_PER_SHARD] for start in range(0, len(entries), ENTRIES_PER_SHARD)
    ]


def _missing_latents(plan: CachePlan) -> list[np.ndarray]:
    keys, counts = plan.collection.keys("latent_keys")
    entries = _first_of_each(keys, _ranks(plan, counts, len(keys)))
    entries = entries[plan.store.find(keys[entries]) < 0]
    rows = np.searchsorted(np.cumsum(counts), entries, side="right")
    table = index.Index(plan.collection.table.select(["bucket", "mask"]))
    codes, buckets = table.codes("bucket")
    masked = np.asarray(pa.compute.not_equal(table.table.column("mask"), "").to_numpy(), dtype=np.int8)
    kinds = 2 * codes[rows] + masked[rows]  # one shape and one set of tensors in each shard
    shards = []
    for kind in np.unique(kinds):
        length = shard_length(buckets[kind // 2])
        if plan.order is not None:
            length = max(1, length // _ON_DEMAND_SHORTER)
        of_kind = entries[kinds == kind]
        shards += [of_kind[start : start + length] for start in range(0, len(of_kind), length)]
    if plan.order is not None:
        ranks = _ranks(plan, counts, len(keys))
        shards.sort(key=lambda shard: int(ranks[shard[0]]))
    return shards


def _ranks(plan: CachePlan, counts: np.ndarray, num_entries: int) -> np.ndarray:
    """When each entry is needed: the order of its row; prompts first."""
    rows = np.repeat(np.arange(len(counts)), counts)
    ranks = rows if plan.order is None else plan.order[rows]
    return np.concatenate([ranks, np.full(num_entries - len(ranks), -1)])


def _first_of_each(keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """One entry for each different key, in the order of their ranks."""
    order = np.argsort(ranks, kind="stable")
    _, first = np.unique(keys[order], return_index=True)
    return order[np.sort(first)]


def shard_length(bucket: str) -> int:
    """Entries of one shard: 64, fewer where their decoded pixels would exceed 96 MiB (32 at 1024²)."""
    height, width = parse_bucket_key(bucket)
    return max(1, min(ENTRIES_PER_SHARD, _MAX_SHARD_PIXEL_BYTES // (3 * height * width)))


def drop_undecodable(plan: CachePlan, undecodable: dict[str, Skipped]) -> None:
    """Take out the samples of these latent keys, whose pixels turned out damaged."""
    keys, counts = plan.collection.keys("latent_keys")
    bad = np.isin(keys, keys_from_hex(undecodable))
    rows = np.repeat(np.arange(len(counts)), counts)[bad]
    reasons = dict(zip(rows.tolist(), hex_strings(keys[bad]).to_pylist(), strict=True))
    known = set(plan.skipped)
    for row, values in zip(reasons, plan.collection.rows(list(reasons)), strict=True):
        item = Skipped(values["path"], undecodable[reasons[row]].reason, values["dataset"])
        if item not in known:  # an image in several resolutions
            known.add(item)
            plan.skipped.append(item)
    kept = np.ones(len(counts), bool)
    kept[list(reasons)] = False
    plan.collection.keep(kept)
    if plan.order is not None:
        plan.order = plan.order[kept]


def check_readable(plan: CachePlan, datasets: Sequence[DatasetSection]) -> None:
    """Stop before training on a fraction of the images without anybody noticing.

    Raises:
        DatasetError: more than `max_unreadable` of a dataset's images were skipped, or all of them.
    """
    left = Counter(dict(zip(*_counts(plan.collection.table.column("dataset")), strict=True)))
    for dataset in datasets:
        unreadable = [item for item in plan.skipped if item.dataset == dataset.name and not item.by_choice]
        by_choice = [item for item in plan.skipped if item.dataset == dataset.name and item.by_choice]
        num_images = plan.collection.num_images[dataset.name]
        # A quotient, not a product: 0.29 * 100 is less than 29.
        if left[dataset.name] and len(unreadable) / num_images <= dataset.max_unreadable:
            continue
        write_skipped(plan)
        shown_items = unreadable or by_choice
        shown = "\n".join(f"  {item.path}: {item.reason}" for item in shown_items[:20])
        more = f"\n  and {len(shown_items) - 20} more" if len(shown_items) > 20 else ""
        if not left[dataset.name]:
            limit = "which leaves none"
            cure = "Repair them." if unreadable else "Change the settings named here, or add images."
            shown_items = [*unreadable, *by_choice]
        else:
            limit = f"more than dataset.max_unreadable = {dataset.max_unreadable:g} allows"
            cure = "Repair or remove them, or raise dataset.max_unreadable."
        raise DatasetError(
            f"{dataset.path}: {len(shown_items)} of {num_images} images cannot be used, {limit}:\n{shown}{more}\n"
            f"The whole list: {plan.skipped_path}\n{cure}"
        )


def _counts(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    counts = column.value_counts()
    return counts.field("values").to_pylist(), counts.field("counts").to_pylist()


def write_skipped(plan: CachePlan) -> None:
    """skipped.csv beside the index: every image left out, with its reason."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("dataset", "path", "reason"))
    writer.writerows((item.dataset, item.path, item.reason) for item in plan.skipped)
    plan.folder.write("skipped.csv", text.getvalue().encode())


# Settings that decide how samples are used in training, not what is encoded.
_OF_TRAINING = {"role", "repeats", "weight", "start", "end", "crop_epochs", "max_unreadable"}


def _collection_name(datasets: Sequence[DatasetSection], cache: CacheSection, vae: str, text: str) -> str:
    """Readable, and different whenever the index would be."""
    sections = [dataset.model_dump(mode="json", exclude=_OF_TRAINING) for dataset in datasets]
    identity = repr((sections, vae, text, cache.text, cache.caption_chunks, cache.mode == "off"))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    others = f"-and-{len(datasets) - 1}" if len(datasets) > 1 else ""
    return f"{datasets[0].name or 'dataset'}{others}-{digest}"


def _only(column: pa.ChunkedArray) -> pa.Array:
    """The one chunk of a combined column."""
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
