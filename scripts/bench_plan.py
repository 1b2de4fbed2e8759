"""How long does a run take to know the order of its data, and how much memory?

    python scripts/bench_plan.py                                    # a million samples in 64 buckets
    python scripts/bench_plan.py --samples 10000000 --buckets 256

Two fresh processes: one that has the columns only, up to "walk through"; one that reads an index.parquet of that many
samples, written to a temporary folder, and does what a worker does before its first step. "peak" is the most that the
process has held so far, "held" what it holds now, each over what it held after the imports. `split` holds images out
and sorts by sample_id. No GPU, no model, no images.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# What the project holds itself to, for a million samples in 64 buckets.
LIMIT_S = 3.0
LIMIT_MIB = 500.0

Row = tuple[str, float, float, float]  # what, seconds, peak MiB, held MiB


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=1_000_000)
    arguments.add_argument("--buckets", type=int, default=64)
    arguments.add_argument("--micro-batch-size", type=int, default=4)
    given = arguments.parse_args()
    print(f"{given.samples:,} samples in {given.buckets} buckets, micro-batches of {given.micro_batch_size}")
    print(f"{'':14}{'seconds':>9}{'peak MiB':>11}{'held MiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for measure in (plan_alone, from_the_index):
            for what, seconds, peak_mib, held_mib in in_a_fresh_process(measure, vars(given) | {"folder": folder}):
                print(f"{what:14}{seconds:9.2f}{peak_mib:11.0f}{held_mib:11.0f}")
                is_epoch = measure is plan_alone and (given.samples, given.buckets) == (1_000_000, 64)
                if is_epoch and (seconds > LIMIT_S or peak_mib > LIMIT_MIB):
                    raise SystemExit(f"{what}: more than {LIMIT_S:g} s or {LIMIT_MIB:g} MiB")


def plan_alone(given: dict[str, Any], measured: Callable[[str], Any]) -> None:
    """The order from two columns of numbers."""
    from sdxl_ray.train.order import DataOrder

    buckets = np.random.default_rng(0).integers(0, given["buckets"], given["samples"]).astype(np.int32)
    repeats = np.ones(given["samples"], dtype=np.int64)
    with measured("first epoch"):
        order = DataOrder(buckets, repeats, micro_batch_size=given["micro_batch_size"], seed=0)
        order[0]
    for name in ("next epoch", "one more"):
        with measured(name):
            order[order.start_of_epoch(2 if name == "one more" else 1)]
    with measured("walk through"):  # Python objects, one at a time: spread over the whole epoch of a run
        assert sum(len(micro_batch.rows) for micro_batch in order.epoch(2)) == given["samples"]


def from_the_index(given: dict[str, Any], measured: Callable[[str], Any]) -> None:
    """What a worker does before its first step, from a file."""
    from sdxl_ray.cache.index import Index
    from sdxl_ray.config.load import config_from_dict
    from sdxl_ray.train.data import data_order, split

    path = Path(given["folder"]) / "index.parquet"
    writer = multiprocessing.get_context("spawn").Process(target=write_samples, args=(path, given))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    config = config_from_dict({"dataset": {"path": "images", "name": "images"}})
    with measured("index"):
        index = Index.read(path)
    with measured("split"):
        parts = split(config, index)
    with measured("order"):
        order = data_order(config, parts)
        order[0]
    with measured("digest"):
        assert parts.train.digest
    with measured("1000 samples"):
        assert all(parts.train[place].dataset == "images" for place in order.epoch(0).rows[:1000])


def write_samples(path: Path, given: dict[str, Any]) -> None:
    """An index.parquet with plausible rows, by columns."""
    import pyarrow as pa

    from sdxl_ray.cache.index import SCHEMA, write_index

    draw = np.random.default_rng(0)
    buckets = [f"{64 * number}x1024" for number in range(1, given["buckets"] + 1)]
    tables = []
    for start in range(0, given["samples"], 100_000):
        rows = range(start, min(start + 100_000, given["samples"]))
        hashes = [hashlib.sha256(str(row).encode()).hexdigest() for row in rows]
        shards = [f"latents/1024x1024/{row // 64:032x}.safetensors" for row in rows]
        tables.append(
            pa.table(
                {
                    "sample_id": [digest[:32] for digest in hashes],
                    "dataset": ["images"] * len(rows),
                    "path": [f"/data/images/{row // 1000:04d}/{row:08d}.jpg" for row in rows],
                    "address": [""] * len(rows),
                    "image_hash": hashes,
                    "verify": [True] * len(rows),
                    "bucket": [buckets[number] for number in draw.integers(0, len(buckets), len(rows))],
                    **{
                        name: pa.array([1024] * len(rows), pa.int32())
                        for name in ("original_height", "original_width", "resized_height", "resized_width")
                    },
                    **{name: pa.array([[0]] * len(rows), pa.list_(pa.int32())) for name in ("crop_tops", "crop_lefts")},
                    "flip": [False] * len(rows),
                    "mask": [""] * len(rows),
                    "mask_hash": [""] * len(rows),
                    "scaled_jpeg": [False] * len(rows),
                    "caption_bases": pa.array([[0]] * len(rows), pa.list_(pa.int32())),
                    "captions": [[f"a photograph of the thing with number {row}, in daylight"] for row in rows],
                    "latent_keys": [[digest[32:]] for digest in hashes],
                    "latent_shards": [[shard] for shard in shards],
                    "text_keys": [[digest[16:48]] for digest in hashes],
                    "text_shards": [[shard.replace("latents/1024x1024", "text")] for shard in shards],
                }
            ).select(SCHEMA.names)
        )
    write_index(str(path), tables)


# ---- measuring -------------------------------------------------------------------------------------------------------


def in_a_fresh_process(measure: Callable[..., None], given: dict[str, Any]) -> list[Row]:
    """The rows that `measure` gives, without what this process has already touched."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(measure, given, results))
    process.start()
    rows: list[Row] = results.get(timeout=900)
    process.join()
    if process.exitcode:
        sys.exit(f"{measure.__name__} failed: see above")
    return rows


def _run(measure: Callable[..., None], given: dict[str, Any], results: Any) -> None:
    import sdxl_ray.train.data  # noqa: F401  (imports are not what is measured)

    rows: list[Row] = []
    before = _memory_mib("VmRSS")

    @contextmanager
    def measured(what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        rows.append((what, time.perf_counter() - begun, _memory_mib("VmHWM") - before, _memory_mib("VmRSS") - before))

    try:
        measure(given, measured)
    finally:
        results.put(rows)


def _memory_mib(what: str) -> float:
    """VmHWM, the most this process has held so far, or VmRSS, what it holds now; elsewhere than on Linux the former."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 2**10 for line in status.read_text().splitlines() if line.startswith(what))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


if __name__ == "__main__":
    main()
