"""A cache folder over the months: what is in it, is it whole, what does nobody need any more."""

from __future__ import annotations

import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_ray.cache import index, manifest
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, check_shard, mark_damaged
from sdxl_ray.cache.store import ShardStore, keys_from_hex
from sdxl_ray.storage import Folder

GIB = 2**30
DAY_S = 24 * 3600
_YOUNG_S = DAY_S  # files of this age may belong to a job that has not written its index yet


@dataclass(frozen=True)
class Stats:
    """What a cache folder holds."""

    num_entries: dict[str, int]  # of each bucket, and of "text"
    gib: dict[str, float]
    num_unused: int  # entries that no index mentions
    unusable: list[str]  # files that are damaged, or of another version of the format
    datasets: dict[str, tuple[int, float]]  # name -> samples, days since it was used

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{'bucket':>12}  {'entries':>9}  {'GiB':>8}"]
        lines += [f"{kind:>12}  {count:>9,}  {self.gib[kind]:>8.2f}" for kind, count in self.num_entries.items()]
        lines.append(f"{'all':>12}  {sum(self.num_entries.values()):>9,}  {sum(self.gib.values()):>8.2f}")
        lines += [
            f"dataset {name}: {num:,} samples, used {days:.0f} days ago" for name, (num, days) in self.datasets.items()
        ]
        lines.append(f"{self.num_unused:,} entries are in no dataset (sdxl-ray cache --prune)")
        lines += [f"cannot be used: {name}" for name in self.unusable]
        return lines


def stats(cache: str) -> Stats:
    """Counts and sizes, from the shards' headers and the indexes."""
    store = ShardStore(cache)
    counts = np.bincount(store.shard_numbers, minlength=len(store.names))
    num_entries: Counter[str] = Counter()
    size: defaultdict[str, float] = defaultdict(float)
    for name, count, num_bytes in zip(store.names, counts.tolist(), store.sizes, strict=True):
        kind = name.split("/")[-2]
        num_entries[kind] += count
        size[kind] += num_bytes / GIB
    used, datasets = np.empty(0, "S16"), {}
    for found in _indexes(store.folder):
        used = np.union1d(used, found.keys)
        datasets[found.name] = (found.num_samples, found.days_unused)
    return Stats(
        num_entries=dict(sorted(num_entries.items())),
        gib=dict(size),
        num_unused=int((~np.isin(store.keys, used)).sum()),
        unusable=store.damaged,
        datasets=datasets,
    )


def verify(cache: str, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, list[str]]:
    """Read every shard and compare every checksum. Damaged entries are marked, so that they count as missing.

    Returns:
        the damaged keys of each shard; a shard that cannot be read at all has all of its keys.
    """
    store = ShardStore(cache)
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda name: check_shard(store.folder, name), store.names)
        for done, (name, damaged) in enumerate(zip(store.names, results, strict=True), start=1):
            for key in damaged:
                mark_damaged(cache, name, key)
            if damaged:
                found[name] = damaged
            progress(done, len(store.names))
    for name in store.damaged:
        found[name] = []
    return found


@dataclass(frozen=True)
class Pruned:
    """What `prune` deleted, or would delete."""

    shards: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    gib: float = 0.0

    def lines(self, *, done: bool) -> list[str]:
        """For a person."""
        if not self.shards and not self.datasets:
            return ["nothing to prune: every entry is in use, or younger than a day"]
        verb = "deleted" if done else "would delete"
        lines = [f"{verb} dataset {name}" for name in self.datasets]
        lines.append(f"{verb} {len(self.shards)} shards, {self.gib:.2f} GiB")
        return lines if done else [*lines, "Nothing was deleted: add --yes."]


def prune(cache: str, *, keep_days: float, dry_run: bool) -> Pruned:
    """Delete what no dataset uses any more: indexes that no run has used for `keep_days`, then shards of which no index
    mentions an entry, and files that are no shards. What is younger than a day stays: its job may still be running.

    A shard with one entry in use stays whole.
    """
    store = ShardStore(cache)
    folder, now = store.folder, time.time()
    used, old = np.empty(0, "S16"), []
    for found in _indexes(folder):
        if found.days_unused > keep_days:
            old.append(found.name)
        else:
            used = np.union1d(used, found.keys)
    in_use = np.bincount(store.shard_numbers[np.isin(store.keys, used)], minlength=len(store.names)) > 0
    unused = {name for name, needed in zip(store.names, in_use.tolist(), strict=True) if not needed} | set(
        store.damaged
    )
    entries = {entry.name: entry for entry in [*folder.list("latents"), *folder.list("text")]}
    shards = sorted(name for name in unused if name in entries and now - entries[name].mtime_ns / 1e9 > _YOUNG_S)
    if not dry_run:
        for name in shards:
            folder.delete(name)
            if name + DAMAGED_SUFFIX in entries:
                folder.delete(name + DAMAGED_SUFFIX)
        for name in old:
            for entry in folder.list(f"datasets/{name}"):
                folder.delete(entry.name)
    return Pruned(shards, old, sum(entries[name].size for name in shards) / GIB)


@dataclass(frozen=True)
class _Found:
    """One index of the cache."""

    name: str
    num_samples: int
    days_unused: float
    keys: np.ndarray  # 'S16', of all its entries and prompts


def _indexes(folder: Folder) -> Iterator[_Found]:
    entries = {entry.name: entry for entry in folder.list("datasets")}
    for name in entries:
        parent, _, last = name.rpartition("/")
        if last != index.FILE_NAME:
            continue
        last_used = max(entry.mtime_ns for other, entry in entries.items() if other.rpartition("/")[0] == parent)
        try:
            table = pq.read_table(io.BytesIO(folder.read(name)), columns=["latent_keys", "text_keys"])
        except (pa.ArrowException, OSError):
            continue  # damaged: it says nothing about what is used, and the next run over its dataset replaces it
        keys = [key for column in table.columns for key in pa.compute.list_flatten(column).to_pylist()]
        try:
            prompts = json.loads(folder.read(f"{parent}/{manifest.FILE_NAME}"))["prompts"]
            keys += [place["key"] for place in prompts.values()]
        except (OSError, ValueError, KeyError, TypeError):
            prompts = {}
        yield _Found(
            parent.rpartition("/")[2], table.num_rows, (time.time() - last_used / 1e9) / DAY_S, keys_from_hex(keys)
        )
