"""What the cache lacks, cut into shards: arrays in, arrays out.

An entry is a key with its number: of latents, row after row, one for each crop; of captions, row after row, then the
prompts. A shard that is still missing is the numbers of its entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdxl_ray.cache.ragged import Ragged
from sdxl_ray.cache.store import ShardStore
from sdxl_ray.records import parse_bucket_key

ENTRIES_PER_SHARD = 64
# The decoded pixels of a shard travel as one Ray block; larger ones would fill the object store of a small machine.
_MAX_SHARD_PIXEL_BYTES = 96 * 2**20
# Training on demand begins with the first shard of a bucket, so they are shorter.
_ON_DEMAND_SHORTER = 4


def missing_latents(
    keys: Ragged,
    codes: np.ndarray,
    buckets: Sequence[str],
    masked: np.ndarray,
    order: np.ndarray | None,
    store: ShardStore,
) -> list[np.ndarray]:
    """The shards of images that are still missing, always cut in the same way: the same gap makes the same shards.

    Args:
        keys: of each row.
        codes: (rows,) int32, of each row its bucket's number in `buckets`.
        masked: (rows,) bool, of each row whether it has a mask.
        order: (entries,) int64, of each entry when training needs it: short shards then, in that order. None: bucket
            after bucket.

    Returns:
        Of each shard the numbers of its entries in `keys.values`, int64.
    """
    entries = first_of_each(keys.values, np.arange(len(keys.values)) if order is None else order)
    entries = entries[store.find(keys.values[entries]) < 0]
    rows = keys.rows_of(entries)
    shards = []
    for bucket in np.unique(codes[rows]):
        length = shard_length(buckets[bucket])
        if order is not None:
            length = max(1, length // _ON_DEMAND_SHORTER)
        for with_mask in (False, True):  # one shape and one set of tensors in each shard
            alike = entries[(codes[rows] == bucket) & (masked[rows] == with_mask)]
            shards += _cut(alike, length)
    if order is not None:
        shards.sort(key=lambda shard: int(order[shard[0]]))
    return shards


def missing_text(keys: np.ndarray, ranks: np.ndarray, store: ShardStore) -> list[np.ndarray]:
    """The shards of captions and prompts that are still missing, in the order of their ranks."""
    entries = first_of_each(keys, ranks)
    return _cut(entries[store.find(keys[entries]) < 0], ENTRIES_PER_SHARD)


def text_ranks(latent_counts: np.ndarray, captions: Ragged, order: np.ndarray | None) -> np.ndarray:
    """When each caption is needed: with the first of its row's crops. Prompts come first.

    Args:
        latent_counts: how many latents each row has.
        captions: of each row; the prompts follow.
        order: of each latent; None: row after row.
    """
    ranks = np.arange(len(latent_counts))
    if order is not None and len(latent_counts):
        ranks = np.minimum.reduceat(order, np.cumsum(latent_counts) - latent_counts)
    of_captions = np.repeat(ranks, captions.counts)
    return np.concatenate([of_captions, np.full(len(captions.values) - len(of_captions), -1)])


def first_of_each(keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """One entry for each different key, in the order of their ranks."""
    order = np.argsort(ranks, kind="stable")
    _, first = np.unique(keys[order], return_index=True)
    return order[np.sort(first)]


def shard_length(bucket: str) -> int:
    """Entries of one shard: 64, fewer where their decoded pixels would exceed 96 MiB (32 at 1024²)."""
    height, width = parse_bucket_key(bucket)
    return max(1, min(ENTRIES_PER_SHARD, _MAX_SHARD_PIXEL_BYTES // (3 * height * width)))


def _cut(entries: np.ndarray, length: int) -> list[np.ndarray]:
    return [entries[start : start + length] for start in range(0, len(entries), length)]
