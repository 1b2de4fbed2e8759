"""How fast stage 1 is, part by part, against bare Python on the same cores.

    python scripts/bench_cache.py                          all parts, on Debian's backgrounds (apt install
                                                           gnome-backgrounds mate-backgrounds) or the package's own
    python scripts/bench_cache.py decode --images ~/photos one part

scan    headers and hashes, one thread
decode  decode, crop and resize: in a multiprocessing.Pool, through Ray Data, and the whole stage with a cheap VAE
ondemand  how long training waits for data that is encoded while it runs, on cores of its own
again   planning for 100,000 images, and once more with nothing changed
rows    memory of a million images on the driver, and so of ten million

Needs no accelerator: encoding at full size is scripts/bench_encode.py's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

BACKGROUNDS = Path("/usr/share/backgrounds")
PHOTOGRAPHS = Path(__file__).parents[1] / "sdxl_ray" / "demo" / "photographs"
SMALLEST_MP = 2.0  # of photographs elsewhere than in the package, whose own are small
MIB = 2**20

Table = list[tuple[str, str]]
_encoder: Any = None  # of each process of a pool


def main() -> None:
    """All parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=sorted(PARTS), help="only this one")
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--variants", type=int, default=4, help="decode: random crops of each photograph, at most 32")
    parser.add_argument("--copies", type=int, default=1, help="decode: of each photograph, as if they were others")
    parser.add_argument("--resolution", type=int, default=512, help="decode")
    parser.add_argument("--count", type=int, default=100_000, help="again: images")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows: images")
    options = parser.parse_args()
    options.images = options.images or (BACKGROUNDS if BACKGROUNDS.exists() else PHOTOGRAPHS)
    if options.part:
        for name, value in PARTS[options.part](options):
            print(f"| {name} | {value} |", flush=True)
        return
    print(f"{os.cpu_count()} cores, {options.images}\n\n| what | figure |\n|---|---|", flush=True)
    for part in PARTS:  # a process each, so that no part's memory or Ray is the next one's
        names = ("images", "variants", "copies", "resolution", "count", "rows")
        given = [f"--{name}={getattr(options, name)}" for name in names]
        subprocess.run([sys.executable, __file__, part, *given], check=True)


# ---- scan ------------------------------------------------------------------------------------------------------------


def bench_scan(options: argparse.Namespace) -> Table:
    """One thread, files in the page cache."""
    from sdxl_ray.cache.scan import scan_file

    table: Table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, files in (("1 MP JPEG", _one_megapixel(Path(folder))), ("photographs", _photographs(options.images))):
            listed = [_listed(path) for path in files]
            contents = [path.read_bytes() for path in files]
            mib = sum(map(len, contents)) / MIB
            seconds = _timed(lambda listed=listed: [scan_file(each, 10**9, by_listing=True) for each in listed])
            table.append((f"header scan, {name}", f"{len(files) / seconds:,.0f} images/s per core"))
            seconds = _timed(lambda listed=listed: [scan_file(each, 10**9) for each in listed])
            text = f"{len(files) / seconds:,.0f} images/s per core"
            text += f" ({mib / len(files):.2f} MiB each, {mib / seconds:,.0f} MiB/s)"
            table.append((f"header scan with content hash, {name}", text))
    return table


def _one_megapixel(folder: Path) -> list[Path]:
    from PIL import Image

    files = []
    sources = _photographs(PHOTOGRAPHS)
    for number in range(200):
        path = folder / f"{number}.jpg"
        image = Image.open(sources[number % len(sources)]).convert("RGB").resize((1152, 896))
        image.save(path, quality=85)
        files.append(path)
    return files


# ---- decode ----------------------------------------------------------------------------------------------------------


def bench_decode(options: argparse.Namespace) -> Table:
    """The same work items in a bare pool, through Ray Data, and as a whole `sdxl-ray cache`."""
    import ray
    import ray.data

    from sdxl_ray.cache.jobs.actors import decode_shard
    from sdxl_ray.cache.jobs.pools import Node, share_cluster
    from sdxl_ray.cache.jobs.ray_rows import quiet
    from sdxl_ray.cache.jobs.reports import packed, unpacked
    from sdxl_ray.cache.pipeline import build_cache
    from sdxl_ray.connection import connect

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        model = _model_with_a_cheap_vae(Path(folder) / "model")
        config = _config(Path(folder), options, model=model)
        # Pools are as fast from the start as later: for them one copy of each photograph is enough.
        (Path(folder) / "once").mkdir()
        once = argparse.Namespace(**{**vars(options), "copies": 1})
        items = [
            {"shard": packed(asdict(shard))}
            for shard in _plan(_config(Path(folder) / "once", once, model=model)).latent_shards()
        ]
        num = sum(len(unpacked(item["shard"])["keys"]) for item in items)
        with multiprocessing.get_context("forkserver").Pool(cores, initializer=_warm) as pool:
            pool.map(_nothing, range(4 * cores))  # every worker has started and imported
            bare = num / _timed(lambda: pool.map(_decode, items, chunksize=1))
        with multiprocessing.get_context("forkserver").Pool(cores, _load, (config.model.path,)) as pool:
            pool.map(_nothing, range(4 * cores))
            with_vae = num / _timed(lambda: pool.map(_decode_and_encode, items, chunksize=1))
        connect("local")
        share = share_cluster([Node(cores, 0)], len(items), num_encoders=0, accelerator="cpu")
        quiet()

        def through_ray(items: list[dict[str, str]] = items) -> None:
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            dataset = dataset.map(decode_shard, num_cpus=share.cpus_per_decode)
            pool = ray.data.ActorPoolStrategy(size=1)
            sink = dataset.map_batches(CountPixels, batch_size=1, compute=pool, num_cpus=share.cpus_per_actor)
            for _ in sink.iter_rows():
                pass

        through_ray(items[: 2 * cores])  # its workers have started too, as those of the pool
        with_ray = num / _timed(through_ray)
        result = build_cache(config)
        whole = result.num_latents_encoded / result.stage_seconds["images"]
        ray.shutdown()
    worked = dict(result.worker_seconds)
    busy = worked["decode"] / result.stage_seconds["images"] / cores
    return [
        (f"decode and crop, multiprocessing.Pool({cores})", f"{bare:.1f} images/s"),
        ("the same through Ray Data", f"{with_ray:.1f} images/s, {with_ray / bare:.2f} of it"),
        (f"decode, crop and a cheap VAE, multiprocessing.Pool({cores})", f"{with_vae:.1f} images/s"),
        ("whole stage with that VAE, all copies, start included",
         f"{whole:.1f} images/s, {whole / with_vae:.2f} of it, {whole / bare:.2f} of the pool that only decodes"),
        ("where its time goes", f"decoding {busy:.0%} of all cores; encoding {worked['encode']:.1f} s of one actor in "
         f"{result.stage_seconds['images']:.1f} s for {result.num_latents_encoded} crops"),
    ]  # fmt: skip


class CountPixels:
    """A sink: what an encoder without any work would do."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"num": [len(batch["pixels"][0])]}


def _warm() -> None:
    import sdxl_ray.cache.jobs.actors  # noqa: F401


def _load(model: str) -> None:
    import torch

    from sdxl_ray.cache.encode import LatentEncoder

    global _encoder
    torch.set_num_threads(1)
    _encoder = LatentEncoder(model, dtype="fp32", device=torch.device("cpu"), batch_size=0, revision="", variant="")


def _decode_and_encode(item: dict[str, str]) -> int:
    from sdxl_ray.cache.jobs.actors import decode_shard

    pixels = decode_shard(item)["pixels"]
    _encoder.encode(list(pixels), [""] * len(pixels))
    return len(pixels)


def _nothing(_: int) -> None:
    time.sleep(0.2)


def _decode(item: dict[str, str]) -> int:
    from sdxl_ray.cache.jobs.actors import decode_shard

    return len(decode_shard(item)["pixels"])


def _model_with_a_cheap_vae(folder: Path) -> str:
    """The small model, with a VAE that costs next to nothing: on one machine's cores a dearer one takes from decoding.

    One channel, no residual blocks on the way down, no attention: 6 ms for 512² on one core, in fp32. builtin:tiny's
    own takes 0.2 s, and seconds for 1024², nearly all of it attention over 16,384 latent pixels.
    """
    from diffusers import AutoencoderKL

    from sdxl_ray.sdxl.tiny import vae_config, write_tiny_sdxl

    write_tiny_sdxl(folder)
    cheap = {"block_out_channels": (1, 1, 1, 1), "layers_per_block": 0, "norm_num_groups": 1}
    cheap["mid_block_add_attention"] = False
    AutoencoderKL(**vae_config() | cheap).save_pretrained(folder / "vae")
    return str(folder)


def _config(folder: Path, options: argparse.Namespace, *, model: str = "builtin:tiny", **dataset: Any) -> Any:
    from sdxl_ray.config.load import config_from_dict

    links = folder / "images"
    if not dataset:
        links.mkdir()
        for number, path in enumerate(_photographs(options.images)):
            (links / f"{number:03d}{path.suffix}").symlink_to(path)
            for copy in range(1, options.copies):  # bytes after an image's end change its hash, and not its pixels
                (links / f"{number:03d}-{copy}{path.suffix}").write_bytes(path.read_bytes() + bytes(copy))
        crops = {"crop": "random", "crop_variants": options.variants}
        caption = {"captions": ["instance_prompt"], "instance_prompt": "a picture"}
        dataset = {"path": str(links), "resolution": options.resolution, **caption, **crops}
    return config_from_dict(
        {
            "model": {"path": model},
            "dataset": dataset,
            "cache": {"path": str(folder / "cache"), "vae_dtype": "fp32"},
            "cluster": {"accelerator": "cpu"},
        }
    )


def _plan(config: Any) -> Any:
    from sdxl_ray.cache.planning import plan_cache
    from sdxl_ray.sdxl.components import resolve_model

    return plan_cache(config.datasets, config.model, config.cache, model_path=resolve_model(config.model.path))


# ---- ondemand --------------------------------------------------------------------------------------------------------


def bench_ondemand(options: argparse.Namespace) -> Table:
    """A run over an empty cache, each epoch with other crops, and what each ten steps of it waited."""
    from sdxl_ray import fit
    from sdxl_ray.config.load import with_overrides

    waits: list[tuple[int, float, float]] = []  # encoded so far, share of the time waited, images/s of training
    encoded: list[tuple[float, int, int]] = []  # when, done, total

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["stage"] == "images":
            encoded.append((time.perf_counter(), event["done"], event["total"]))
        if event["event"] == "metrics" and "perf/data_wait_share" in event["values"]:
            values = event["values"]
            waits.append((encoded[-1][1], values["perf/data_wait_share"], values["perf/images_per_s"]))

    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), options, model=_model_with_a_cheap_vae(Path(folder) / "model"))
        settings = {
            "run.output": folder,
            "run.name": "ondemand",
            "model.dtype": "fp32",
            "cache.mode": "ondemand",
            "train.duration": f"{options.variants} epochs",
            "train.num_workers": 1,
            "train.micro_batch_size": 4,
            "train.log_every": 10,
        }
        fit(with_overrides(config, settings), on_event=watch)
    began, ended = encoded[0], next(item for item in encoded if item[1] == encoded[-1][1])
    pace = (ended[1] - began[1]) / (ended[0] - began[0])
    meanwhile = [item for item in waits if item[0] < ended[1]]
    later = meanwhile[1:] or sys.exit("encoding was over before twenty steps were; give more --variants")
    return [
        ("ondemand: encoding beside training", f"{pace:.1f} images/s, over after {len(meanwhile) * 10} steps"),
        ("training, first ten steps", f"{waits[0][2]:.1f} images/s, {waits[0][1]:.1%} of the time waiting for data"),
        ("training, further steps while images are encoded",
         f"{sum(item[2] for item in later) / len(later):.1f} images/s, waiting "
         f"{sum(item[1] for item in later) / len(later):.1%}, at most {max(item[1] for item in later):.1%}"),
    ]  # fmt: skip


# ---- again -----------------------------------------------------------------------------------------------------------


def bench_again(options: argparse.Namespace) -> Table:
    """`sdxl-ray check` twice over small images of different bytes and captions: what `cache` does before it encodes."""
    from sdxl_ray.config.load import dump_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _many_images(folder / "images", options.count)
        config = _config(folder, options, path=str(folder / "images"), resolution=64, captions=["textfile"])
        (folder / "many.toml").write_text(dump_config(config))
        command = [sys.executable, "-m", "sdxl_ray", "check", str(folder / "many.toml")]
        first, again = (_timed(lambda: subprocess.run(command, check=True, stdout=sys.stderr)) for _ in range(2))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return [
        (f"list, scan and plan {options.count:,} images of 64 px, each with a caption file", f"{first:.1f} s"),
        ("once more, nothing changed", f"{again:.1f} s; peak of both {peak:,.0f} MiB"),
    ]


def _many_images(folder: Path, count: int) -> None:
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.effect_noise((72, 64), 60).convert("RGB").save(content, "JPEG")
    for number in range(count):
        parent = folder / f"{number // 1000:03d}"
        if number % 1000 == 0:
            parent.mkdir(parents=True)
        # What follows the end of the picture is not shown, and makes another file of it.
        (parent / f"{number:06d}.jpg").write_bytes(content.getvalue() + number.to_bytes(8, "little"))
        (parent / f"{number:06d}.txt").write_text(f"picture number {number}, grey, noise")


# ---- rows ------------------------------------------------------------------------------------------------------------


def bench_rows(options: argparse.Namespace) -> Table:
    """Peak memory of planning and of writing the index, at two sizes; the difference is what an image costs.

    Memory that no file stands behind: what lies in memory-mapped temporary files goes when something needs the room.
    """
    peaks = {}
    for rows in (options.rows // 2, options.rows):
        script = f"from scripts.bench_cache import plan_rows; plan_rows({rows})"
        found = subprocess.run(
            [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        peaks[rows] = json.loads(found.stdout.splitlines()[-1])
    (few, small), (many, large) = peaks.items()
    per_row = (large["peak"] - small["peak"]) / (many - few)
    fixed = small["peak"] - few * per_row
    return [
        (f"planning and index of {many:,} images", f"{large['seconds']:.0f} s, peak {large['peak'] / MIB:,.0f} MiB"),
        ("bytes per image on the driver, beyond what is mapped from files", f"{per_row:.0f}"),
        ("so ten million take", f"{(fixed + 10_000_000 * per_row) / 2**30:.2f} GiB"),
    ]


def plan_rows(num_rows: int) -> None:
    """In a process of its own: everything the driver does for `num_rows` images except opening them."""
    from unittest import mock

    from sdxl_ray.cache import collection
    from sdxl_ray.cache.foreseen import index_tables
    from sdxl_ray.cache.index import write_index
    from sdxl_ray.cache.scan import ScannedFile
    from sdxl_ray.records import Listed

    def listing(section: Any, memo: Any) -> Iterator[Listed]:
        for number in range(num_rows):
            yield Listed(
                path=f"/data/collection/part-{number // 1000:05d}/photograph-{number:08d}.jpg",
                stamp=f"{number}-0",
                texts=(f"a photograph of a street with people and the number {number} on a wall, 35 mm, evening",),
            )

    def scan(files: Any, **_: Any) -> list[ScannedFile]:
        sizes = [(1000 + 37 * (number % 40), 1500) for number in range(len(files))]
        import hashlib

        return [
            ScannedFile(hashlib.sha256(file.path.encode()).hexdigest(), *size)
            for file, size in zip(files, sizes, strict=True)
        ]

    from sdxl_ray.cache.planning import plan_cache
    from sdxl_ray.sdxl.components import resolve_model

    watcher = _AnonymousMemory()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            Path(folder), argparse.Namespace(), path="/data/collection", captions=["column"], instance_prompt=""
        )
        started = time.monotonic()
        with mock.patch.object(collection, "list_dataset", listing):
            plan = plan_cache(
                config.datasets, config.model, config.cache, model_path=resolve_model(config.model.path), scan=scan
            )
        write_index(plan.index_path, index_tables(plan))
        seconds = time.monotonic() - started
    print(json.dumps({"peak": watcher.peak, "seconds": seconds}))


class _AnonymousMemory(threading.Thread):
    """The peak of this process's memory that is no file's, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, kib * 1024)
            time.sleep(0.1)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _photographs(folder: Path) -> list[Path]:
    from PIL import Image, UnidentifiedImageError

    smallest_mp = 0.0 if folder.resolve() == PHOTOGRAPHS.resolve() else SMALLEST_MP
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
            continue
        try:
            with Image.open(path) as image:
                if image.width * image.height >= smallest_mp * 1e6:
                    found.append(path)
        except UnidentifiedImageError:
            continue
    if not found:
        sys.exit(f"{folder}: no photographs of {smallest_mp:g} MP or more. Give --images FOLDER.")
    return found


def _listed(path: Path) -> Any:
    from sdxl_ray.records import Listed

    return Listed(str(path), "x")


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


PARTS = {
    "scan": bench_scan,
    "decode": bench_decode,
    "ondemand": bench_ondemand,
    "again": bench_again,
    "rows": bench_rows,
}

if __name__ == "__main__":
    main()
