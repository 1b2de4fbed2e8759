"""The index of a plan, foreseen: what is missing gets the name of the shard that it will be in.

collection + where everything is, or will be ─▶ index.parquet, manifest.json, and the digest of both
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sdxl_ray.cache import index
from sdxl_ray.cache.collection import HASH_BYTES, ID_BYTES
from sdxl_ray.cache.shards import KEY_BYTES, shard_name
from sdxl_ray.cache.store import ShardStore, hex_strings, keys_from_hex
from sdxl_ray.cache.tables import PIECE, fixed_bytes, fixed_column, gather

if TYPE_CHECKING:
    from sdxl_ray.cache.planning import CachePlan

_DIGEST_LENGTH = 16  # hex digits


@dataclass(frozen=True)
class Content:
    """What index and manifest of a plan will say."""

    index: str  # `digest_of` its rows
    manifest: bytes

    @property
    def digest(self) -> str:
        """Of both, for the name of their folder."""
        return hashlib.sha256(self.index.encode() + self.manifest).hexdigest()[:_DIGEST_LENGTH]


def content_of(plan: CachePlan) -> Content:
    """Looks at every row: seconds for a million."""
    manifest = {**plan.made_with, "num_samples": plan.num_samples, "prompts": places_of_prompts(plan)}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return Content(index.digest_of(index_tables(plan)), text.encode())


def index_tables(plan: CachePlan) -> Iterator[pa.Table]:
    """index.parquet in pieces."""
    table = plan.collection.table
    shards = {"latent_keys": None if not plan.keeps_latents else latent_places(plan), "text_keys": text_places(plan)}
    start = dict.fromkeys(shards, 0)
    repeated = repeated_ids(table)
    for first in range(0, len(table), PIECE):
        piece = table.slice(first, PIECE).combine_chunks()
        columns = {name: piece.column(name) for name in index.PLACED.names}
        ids = hex_strings(fixed_bytes(_only(piece.column("identity")), ID_BYTES)).to_pylist()
        for row in repeated.keys() & range(first, first + len(ids)):
            ids[row - first] += f"-{repeated[row] + 1}"
        columns["sample_id"] = pa.array(ids)
        columns["image_hash"] = hex_strings(fixed_bytes(_only(piece.column("image_hash")), HASH_BYTES))
        for kind, places in shards.items():
            lists = _only(piece.column(kind))
            values = lists.flatten()
            offsets = pa.array(np.concatenate([[0], np.cumsum(lists.value_lengths())]).astype(np.int32))
            keys = hex_strings(fixed_bytes(values, KEY_BYTES)).cast(pa.string())
            columns[kind] = pa.ListArray.from_arrays(offsets, keys)
            if places is None:
                names = pa.array([""] * len(values), pa.string())
            else:
                names = places.slice(start[kind], len(values)).cast(pa.string())
            start[kind] += len(values)
            columns[kind.replace("keys", "shards")] = pa.ListArray.from_arrays(offsets, names)
        yield pa.table({name: columns[name] for name in index.SCHEMA.names}).cast(index.SCHEMA)


def index_of(plan: CachePlan) -> index.Index:
    """The index as it will be, in memory."""
    return index.Index(gather(index_tables(plan), index.SCHEMA))


def places_of_prompts(plan: CachePlan) -> dict[str, dict[str, str]]:
    """Where the embedding of each of the plan's prompts is or will be: prompt -> "shard", "key"; sorted by prompt."""
    keys, wanted = plan.text_keys().values, keys_from_hex(plan.prompts.values())
    to_come: dict[str, str] = {}
    for entries in plan.missing_text:
        if np.isin(wanted, keys[entries]).any():
            here = hex_strings(keys[entries]).to_pylist()
            to_come |= dict.fromkeys(here, shard_name("text", here))
    return {
        prompt: {"shard": plan.store.shard_of(key) or to_come[key], "key": key}
        for prompt, key in sorted(plan.prompts.items())
    }


def latent_places(plan: CachePlan) -> pa.DictionaryArray:
    """The shard of each latent, of those that are missing the one to come."""
    keys, buckets = plan.latent_keys(), plan.collection.table.column("bucket")
    rows = keys.rows_of(np.array([entries[0] for entries in plan.missing_latents], np.int64))
    to_come = [
        shard_name("latents", hex_strings(keys.values[entries]).to_pylist(), buckets[row].as_py())
        for row, entries in zip(rows.tolist(), plan.missing_latents, strict=True)
    ]
    return _places(keys.values, plan.store, plan.missing_latents, to_come)


def text_places(plan: CachePlan) -> pa.DictionaryArray:
    """The same of captions, without the prompts."""
    keys = plan.text_keys()
    to_come = [shard_name("text", hex_strings(keys.values[entries]).to_pylist()) for entries in plan.missing_text]
    return _places(keys.values, plan.store, plan.missing_text, to_come).slice(0, int(keys.counts.sum()))


def _places(
    keys: np.ndarray, store: ShardStore, missing: Sequence[np.ndarray], to_come: Sequence[str]
) -> pa.DictionaryArray:
    here = store.find(keys)
    if missing:
        planned = np.concatenate(list(missing))
        numbers = np.repeat(np.arange(len(missing)), [len(entries) for entries in missing]) + len(store.names)
        order = np.argsort(keys[planned])
        place = np.minimum(np.searchsorted(keys[planned][order], keys), len(planned) - 1)
        match = (here < 0) & (keys[planned][order][place] == keys)
        here = np.where(match, numbers[order][place], here).astype(np.int32)
    if (here < 0).any():
        raise AssertionError("an entry is neither in a shard nor planned")
    return pa.DictionaryArray.from_arrays(pa.array(here), pa.array([*store.names, *to_come], pa.string()))


def repeated_ids(table: pa.Table) -> dict[int, int]:
    """Row -> how many rows before it have its identity: one image with the same captions, in two places."""
    identities = fixed_column(table.column("identity"), ID_BYTES)
    # By the dataset's name, so that their order in the config decides nothing.
    datasets, _ = index.Index(table.select(["dataset"])).codes("dataset")
    order = np.lexsort((np.arange(len(identities)), datasets, identities))
    again = np.flatnonzero(identities[order][1:] == identities[order][:-1]) + 1
    occurrences: Counter[bytes] = Counter()
    repeated = {}
    for row in order[again].tolist():
        occurrences[identities[row]] += 1
        repeated[row] = occurrences[identities[row]]
    return repeated


def _only(column: pa.ChunkedArray) -> pa.Array:
    """The one chunk of a combined column."""
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
