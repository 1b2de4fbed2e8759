"""A cache folder over the months: what is in it, is it whole, what does nobody need any more."""

from __future__ import annotations

import binascii
import contextlib
import io
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_ray.cache import generations, index
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, check_shard, mark_damaged
from sdxl_ray.cache.store import KEY_DTYPE, ShardStore, hex_strings, keys_from_hex
from sdxl_ray.errors import CacheError
from sdxl_ray.storage import FileEntry, Folder

GIB = 2**30
DAY_S = 24 * 3600
_YOUNG_S = DAY_S  # files of this age may belong to a job that is still running


@dataclass(frozen=True)
class Stats:
    """What a cache folder holds."""

    num_entries: dict[str, int]  # of each bucket, and of "text"
    gib: dict[str, float]
    num_unused: int | None  # entries in shards that no index mentions; None: an index cannot be read
    num_unused_kept: int | None  # entries that no index mentions, in shards of which others are in use
    num_twice: int  # entries that are in another shard too
    unusable: list[str]  # files that are damaged
    other_versions: list[str]  # shards of another version of the format
    datasets: dict[str, tuple[int, float]]  # name of the index's folder -> samples, days since it was used

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{'bucket':>12}  {'entries':>9}  {'GiB':>8}"]
        lines += [f"{kind:>12}  {count:>9,}  {self.gib[kind]:>8.2f}" for kind, count in self.num_entries.items()]
        lines.append(f"{'all':>12}  {sum(self.num_entries.values()):>9,}  {sum(self.gib.values()):>8.2f}")
        lines += self._lines_of_datasets()
        if self.num_unused is None:
            lines.append("how many entries are in no dataset is not known: an index cannot be read, see below")
        else:
            lines.append(f"{self.num_unused:,} entries are in no dataset (sdxl-ray cache --prune)")
        if self.num_unused_kept:
            lines.append(
                f"{self.num_unused_kept:,} more are in no dataset, but in shards that are still in use: they stay"
            )
        if self.num_twice:
            lines.append(f"{self.num_twice:,} entries are in two shards, which only takes room")
        if self.other_versions:
            lines.append(
                f"{len(self.other_versions):,} shards are of another version of sdxl-ray, and stay: "
                f"{', '.join(self.other_versions[:3])}{', ...' if len(self.other_versions) > 3 else ''}"
            )
        lines += [f"cannot be used: {name}" for name in self.unusable]
        return lines

    def _lines_of_datasets(self) -> Iterator[str]:
        """One for each dataset, whatever it was cached with."""
        states = defaultdict(list)
        for folder, (num, days) in self.datasets.items():
            states[_dataset_of(folder)].append((days, num))
        for name, found in states.items():
            (days, num), *others = sorted(found)
            line = f"dataset {name}: {num:,} samples, used {_ago(days)}"
            if others:
                line += f"; {len(others)} other states of it, the oldest used {_ago(others[-1][0])}"
            yield line


def _ago(days: float) -> str:
    return f"{days:.0f} days ago"


def _dataset_of(folder: str) -> str:
    """Its name, without the digest."""
    return re.sub(r"-[0-9a-f]{10,}$", "", folder)


def stats(cache: str) -> Stats:
    """Counts and sizes, from the shards' headers and the indexes.

    Raises:
        CacheError: there is no cache.
    """
    store = _open(cache)
    counts = np.bincount(store.shard_numbers, minlength=len(store.names))
    num_entries: Counter[str] = Counter()
    size: defaultdict[str, float] = defaultdict(float)
    for name, count, num_bytes in zip(store.names, counts.tolist(), store.sizes, strict=True):
        kind = name.split("/")[-2]
        num_entries[kind] += count
        size[kind] += num_bytes / GIB
    used, datasets, unreadable = np.empty(0, KEY_DTYPE), {}, []
    for found in _indexes(store.folder):
        if found.problem:
            unreadable.append(f"datasets/{found.name}/{index.FILE_NAME}")
            continue
        used = np.union1d(used, found.keys)
        datasets[found.name] = (found.num_samples, found.days_unused)
    is_used = np.isin(store.keys, used)
    of_shards_in_use = _in_use(store, is_used)[store.shard_numbers]
    return Stats(
        num_entries=dict(sorted(num_entries.items())),
        gib=dict(size),
        num_unused=None if unreadable else int((~of_shards_in_use).sum()),
        num_unused_kept=None if unreadable else int((of_shards_in_use & ~is_used).sum()),
        num_twice=int((store.keys[1:] == store.keys[:-1]).sum()),
        unusable=[*store.damaged, *unreadable],
        other_versions=store.other_versions,
        datasets=datasets,
    )


def _open(cache: str) -> ShardStore:
    store = ShardStore(cache)
    if not (store.names or store.damaged or store.other_versions or store.folder.list("datasets", hidden_folders=True)):
        raise CacheError(f"{store.folder.path}: there is no cache. Is cache.path right? `sdxl-ray cache` fills it.")
    return store


def _in_use(store: ShardStore, is_used: np.ndarray) -> np.ndarray:
    """For each shard of `store.names`, whether one of its entries is used. `is_used`: for each of `store.keys`."""
    return np.bincount(store.shard_numbers[is_used], minlength=len(store.names)) > 0


def verify(cache: str, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, list[str]]:
    """Read every shard and compare every checksum. Damaged entries are marked, so that they count as missing.

    What is marked already is told again only where a dataset needs it and no other shard has it.

    Returns:
        the damaged keys of each shard: all of them where it cannot be read to its end, and none where the file is no
        shard, which counts as missing anyway.

    Raises:
        StorageError: a file cannot be read for a reason that says nothing about what is in it.
    """
    store = ShardStore(cache)
    found: dict[str, list[str]] = {}

    def check(number: int) -> list[str]:
        result = check_shard(store.folder, store.names[number])
        damaged = _keys_of(store, number) if result is None else result
        if damaged:  # at once: another job may replace the shard at any time
            mark_damaged(cache, store.names[number], *damaged)
        return damaged

    with ThreadPoolExecutor(4) as threads:
        for number, damaged in enumerate(threads.map(check, range(len(store.names)))):
            if damaged:
                found[store.names[number]] = damaged
            progress(number + 1, len(store.names))
    known = {key for name, damaged in found.items() for key in damaged if key in store.marked.get(name, ())}
    if known:
        told = known - _settled(store, sorted(known))
        found = {
            name: [key for key in damaged if key in told or key not in store.marked.get(name, ())]
            for name, damaged in found.items()
        }
    found = {name: damaged for name, damaged in found.items() if damaged}
    for name in store.damaged:
        if name not in store.marked and check_shard(store.folder, name) is None:  # still
            mark_damaged(cache, name)
            found[name] = []
    return found


def _settled(store: ShardStore, keys: list[str]) -> set[str]:
    """Those of the keys that another shard has, or that no dataset mentions."""
    wanted, indexes = keys_from_hex(keys), list(_indexes(store.folder))
    settled = store.find(wanted) >= 0  # the store does not count what is marked
    if not any(index_found.problem for index_found in indexes):
        settled |= ~np.isin(wanted, np.concatenate([np.empty(0, KEY_DTYPE), *(each.keys for each in indexes)]))
    return {key for key, is_settled in zip(keys, settled.tolist(), strict=True) if is_settled}


def _keys_of(store: ShardStore, number: int) -> list[str]:
    keys: list[str] = hex_strings(store.keys[store.shard_numbers == number]).to_pylist()
    return keys


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
        states = Counter(map(_dataset_of, self.datasets))
        lines = [f"{verb} {num} states of dataset {name}" for name, num in states.items() if num > 1]
        lines += [f"{verb} dataset {name}" for name in self.datasets if states[_dataset_of(name)] == 1]
        lines.append(f"{verb} {len(self.shards)} shards, {self.gib:.2f} GiB")
        return lines if done else [*lines, "Nothing was deleted: add --yes."]


def prune(cache: str, *, keep_days: float, dry_run: bool) -> Pruned:
    """Delete what no dataset uses any more: indexes that no run has used for `keep_days`, then shards of which no index
    mentions an entry, and files that are no shards. What is younger than a day stays: its job may still be running,
    and marks what it uses each hour.

    A shard with one entry in use stays whole, and one without entries for `keep_days`: it says that a shard is done,
    and a run may wait for it. A run that cannot write to the cache cannot mark what it uses: it is not seen here.

    Raises:
        CacheError: there is no cache; an index cannot be read, so that nobody knows what it uses. No shard is deleted.
    """
    store = _open(cache)
    folder, kept_days = store.folder, max(keep_days, _YOUNG_S / DAY_S)
    old = _old(folder, kept_days)
    shards, entries = _unused(store, old, kept_days)
    if not dry_run:
        # Reading all indexes takes a while: a run may have begun to use something since.
        old = sorted(set(old) & set(_old(folder, kept_days)))
        for name in old:
            for entry in folder.list(f"datasets/{name}"):
                folder.delete(entry.name)
        shards, entries = _unused(store, (), kept_days)
        for name in shards:
            folder.delete(name)
            if name + DAMAGED_SUFFIX in entries:
                folder.delete(name + DAMAGED_SUFFIX)
        _remove_empty_folders(folder, old)
    return Pruned(shards, old, sum(entries[name].size for name in shards) / GIB)


def _unused(store: ShardStore, old: Sequence[str], kept_days: float) -> tuple[list[str], dict[str, FileEntry]]:
    """The shards that no dataset needs but those of the folders `old`; and all files beside them."""
    folder, used = store.folder, np.empty(0, KEY_DTYPE)
    for found in _indexes(folder):
        if found.problem:
            raise CacheError(
                f"{folder.path}/datasets/{found.name}/{index.FILE_NAME}: {found.problem}, so that nobody knows what it "
                "uses. No shard was deleted. Delete its folder, and run `sdxl-ray cache` for its dataset."
            )
        if found.name not in old:
            used = np.union1d(used, found.keys)
    in_use = _in_use(store, np.isin(store.keys, used))
    num_entries = np.bincount(store.shard_numbers, minlength=len(store.names))
    kept_s: dict[str, float] = dict.fromkeys(store.damaged, _YOUNG_S)
    for name, needed, num in zip(store.names, in_use.tolist(), num_entries.tolist(), strict=True):
        if not needed:
            kept_s[name] = _YOUNG_S if num else kept_days * DAY_S
    entries, now = {entry.name: entry for entry in [*folder.list("latents"), *folder.list("text")]}, time.time()
    shards = [name for name, kept in kept_s.items() if name in entries and now - entries[name].mtime_ns / 1e9 > kept]
    return sorted(shards), entries


def _remove_empty_folders(folder: Folder, emptied: Sequence[str]) -> None:
    """Those of datasets with nothing in them, or only an earlier version's lock: emptied now, or a day ago."""
    if folder.local is None:  # cloud storage has no folders
        return
    for path in (folder.local / "datasets").glob("*/"):
        is_young = time.time() - path.stat().st_mtime < _YOUNG_S
        if (path.name in emptied or not is_young) and all(inside.name.startswith(".") for inside in path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class _Found:
    """One index of the cache."""

    name: str
    num_samples: int
    days_unused: float
    keys: np.ndarray  # 'S16', of all its entries and prompts
    problem: str = ""  # why it cannot be read


def _files(folder: Folder) -> dict[str, list[FileEntry]]:
    """Name -> files of each dataset's folder. Earlier versions have made hidden ones."""
    found = defaultdict(list)
    for entry in folder.list("datasets", hidden_folders=True):
        _, _, rest = entry.name.partition("/")
        if rest.count("/") == 1:
            found[rest.partition("/")[0]].append(entry)
    return found


def _days_unused(files: Iterable[FileEntry]) -> float:
    return (time.time() - max(file.mtime_ns for file in files) / 1e9) / DAY_S


def _old(folder: Folder, days: float) -> list[str]:
    """Folders that no run has used for so long: with an index, or only files of ours, of runs that were refused."""
    old = []
    for name, files in _files(folder).items():
        inside = {file.name.rpartition("/")[2] for file in files}
        if (index.FILE_NAME in inside or inside <= {*generations.FILES}) and _days_unused(files) > days:
            old.append(name)
    return old


def _indexes(folder: Folder) -> Iterator[_Found]:
    for name, files in _files(folder).items():
        parent, days_unused = f"datasets/{name}", _days_unused(files)
        entry = next((file for file in files if file.name == f"{parent}/{index.FILE_NAME}"), None)
        if entry is None:
            continue
        try:
            content = io.BytesIO(folder.read(entry.name))
            table = pq.read_table(content, columns=["latent_keys", "text_keys"])
            keys = [_from_hex(chunk.flatten()) for column in table.columns for chunk in column.chunks]
        except FileNotFoundError:
            continue  # deleted meanwhile
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or ' '.join(str(error).split())})"
            yield _Found(name, 0, days_unused, np.empty(0, KEY_DTYPE), problem)
            continue
        # Without its manifest a collection is used by nobody, and the prompts are encoded again in seconds.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            prompts = json.loads(folder.read(f"{parent}/{generations.MANIFEST}"))["prompts"]
            keys.append(keys_from_hex(place["key"] for place in prompts.values()))
        yield _Found(name, table.num_rows, days_unused, np.concatenate([np.empty(0, KEY_DTYPE), *keys]))


def _from_hex(keys: pa.Array) -> np.ndarray:
    """Keys as the store has them, without a Python object for each of them."""
    if not len(keys):
        return np.empty(0, KEY_DTYPE)
    start, end = np.frombuffer(keys.buffers()[1], np.int32)[[keys.offset, keys.offset + len(keys)]]
    return np.frombuffer(binascii.unhexlify(keys.buffers()[2][start:end]), KEY_DTYPE)
