"""The missing shards, as one Ray Data job after another: all at once would fill the driver and the object store."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict

import ray.data
from ray.data import ExecutionResources

from sdxl_ray.cache.jobs.pools import Share
from sdxl_ray.cache.jobs.ray_rows import InThread, quiet
from sdxl_ray.cache.jobs.reports import packed
from sdxl_ray.cache.jobs.room import Reserved
from sdxl_ray.cache.planning import LatentShard, TextShard

Wave = dict[str, bytes]  # name of each shard -> its work item

# Shards of one Ray Data job: each starts new encoders, which load the model, so it should last minutes; and what waits
# takes 4 kB a shard, on the driver and in the object store. The first is short, since nothing runs while it is made.
_SHARDS_AT_FIRST = 2_048
_SHARDS_PER_ENCODER = 512
_SHARDS_AT_MOST = 16_384


def waves_of(
    shards: Iterator[LatentShard | TextShard], share: Share, reserved: Reserved | None
) -> Generator[tuple[Wave, ray.data.Dataset], None, None]:
    """The work of one Ray Data job after another. Each is made while the one before it runs, until it is closed."""
    over = threading.Event()  # nobody wants the rest

    def make(size: int) -> tuple[Wave, ray.data.Dataset] | None:
        wave = {}
        for shard in itertools.islice(shards, size):
            if over.is_set():
                return None
            wave[shard.name] = packed(asdict(shard))
        if not wave:
            return None
        if reserved is None:  # nobody waits for the first of them, and there may be another job like this one
            wave = _from_anywhere(wave)
        return wave, dataset_of(wave, reserved)

    size = min(_SHARDS_AT_MOST, max(_SHARDS_AT_FIRST, _SHARDS_PER_ENCODER * share.num_actors))
    made = make(_SHARDS_AT_FIRST)
    try:
        while made is not None:
            following = InThread(lambda: make(size))
            yield made
            made = following.result()
    finally:
        over.set()


def _from_anywhere(wave: Wave) -> Wave:
    """The same shards, from one of them on and round to the one before it.

    Two jobs that fill the same gap side by side would encode each shard twice, and find none of the other's.
    """
    names = list(wave)
    start = random.SystemRandom().randrange(len(names))  # no seed of the driver's: that of the other may be the same
    return {name: wave[name] for name in (*names[start:], *names[:start])}


def dataset_of(wave: Mapping[str, bytes], reserved: Reserved | None) -> ray.data.Dataset:
    """A row for each shard, which is a block and a task of its own; what training has is left alone."""
    quiet()
    dataset = ray.data.from_items([{"shard": shard} for shard in wave.values()], override_num_blocks=len(wave))
    if reserved is not None:
        dataset.context.execution_options.exclude_resources = ExecutionResources(cpu=reserved.cpus, gpu=reserved.gpus)
    return dataset
