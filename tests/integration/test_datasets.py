"""Several datasets at once, from sources of every kind, through all of stage 1 and into training."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdxl_ray.cache import generations
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.check import explain
from sdxl_ray.config.load import with_overrides
from sdxl_ray.tracking.metrics import read_metrics
from sdxl_ray.train.data import load_data
from sdxl_ray.train.launch import fit

from .conftest import must_not_connect, read_all, small_config

pytestmark = pytest.mark.usefixtures("local_ray")


def image_bytes(number: int, height: int = 80, width: int = 80) -> bytes:
    """A PNG that the VAE can tell from the others."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True)
    for number in numbers:
        size = ((80, 80), (72, 110), (120, 90))[number % 3]
        (folder / f"{number:02d}.png").write_bytes(image_bytes(number, *size))
        (folder / f"{number:02d}.txt").write_text(f"drawing {number}\npicture {number}", encoding="utf-8")
    return folder


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in images.items():
            for suffix, data in ((".png", content), (".txt", f"a member called {name}".encode())):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    """A folder at two resolutions and mirrored, a tar with a copy of one of its images, a table, an eval folder."""
    folder = tmp_path_factory.mktemp("datasets")
    drawings = write_folder(folder / "drawings", range(8))
    Image.new("RGB", (30, 30)).save(drawings / "icon.png")
    (drawings / "icon.txt").write_text("an icon", encoding="utf-8")
    copy = (drawings / "03.png").read_bytes()
    shards = write_tar(folder / "shards.tar", {"copy": copy} | {f"{n}": image_bytes(n) for n in range(20, 24)})
    table = {"image": [image_bytes(n) for n in range(30, 35)], "caption": [f"row {n}" for n in range(30, 35)]}
    pq.write_table(pa.table(table), folder / "table.parquet")
    held_out = write_folder(folder / "held_out", range(40, 42))
    (held_out / "copy.png").write_bytes(image_bytes(30))
    (held_out / "copy.txt").write_text("row 30 once more", encoding="utf-8")
    plain = {"resolution": 64, "bucket_step": 32}
    return small_config(
        folder / "runs",
        folder / "cache",
        "several",
        tiny_model,
        dataset=[
            {"path": str(drawings), "resolution": [64, 96], "bucket_step": 32, "flip": True, "min_size": 60},
            {"path": str(shards), "role": "regularization", "weight": 0.5, **plain},
            {"path": str(folder / "table.parquet"), "repeats": 2, "trigger_word": "ohwx", **plain},
            {"path": str(held_out), "role": "eval", **plain},
        ],
        train={"duration": "4 steps"},
        eval={"every": "4 steps"},
        export={"formats": ["kohya"]},
    )


@pytest.fixture(scope="module")
def built(config):
    """(what `check` says before, what encoding came to)"""
    return explain(config), build_cache(config)


def test_check_says_what_will_happen_and_it_does(config, built):
    before, result = built
    drawings, shards, table, held_out = (dataset.path for dataset in config.datasets)
    lines = before.lines
    assert f"images      8 of 9 in {drawings}, 32 samples with their sizes and mirror images" in lines
    assert "            skipped icon.png: its shorter edge has 30 pixels, dataset.min_size is 60" in lines
    assert f"images      5 of 5 in {shards} (regularization)" in lines
    assert f"images      5 of 5 in {table}" in lines
    assert f"images      3 of 3 in {held_out} (eval)" in lines
    # 8 images twice and mirrored, 4 of the tar, 5 of the table, 2 to evaluate; the two copies are encoded already.
    # 2 captions each of the 8, 5 and 5 as they are, the first of the 3 to evaluate, and the empty one.
    assert f"cache       43 images and 30 captions to encode, into {config.cache.path}" in lines
    assert "split       41 to train on, 3 held out for the eval loss" in lines
    assert "1 images are evaluated, so their copies are not trained on" in before.warnings
    assert before.buckets == result.buckets
    assert (result.num_latents_encoded, result.num_captions_encoded) == (43, 30)
    assert [Path(item.path).name for item in result.skipped] == ["icon.png"]
    assert "dataset.min_size is 60" in Path(result.skipped_path).read_text()


def test_an_image_in_two_places_is_encoded_once_and_each_dataset_keeps_its_captions(config, built):
    _, result = built
    assert read_all(config.cache.path, result.index_path) == (43, 29)  # and the empty prompt
    index = Index.read(result.index_path)
    samples = [index[row] for row in range(len(index))]
    assert Counter(sample.dataset for sample in samples) == {"drawings": 32, "shards": 5, "table": 5, "held_out": 3}
    copies = [sample for sample in samples if sample.path.endswith(("drawings/03.png", "shards.tar/copy.png"))]
    shared = Counter(sample.latent_keys for sample in copies)
    assert len(copies) == 5
    assert sorted(shared.values()) == [1, 1, 1, 2]
    captions = {sample.dataset: sample.captions for sample in copies}
    assert captions == {"drawings": ("drawing 3", "picture 3"), "shards": ("a member called copy",)}
    assert all(sample.captions[0].startswith("ohwx") for sample in samples if sample.dataset == "table")

    again = build_cache(config, connect=must_not_connect)
    assert (again.num_latents_encoded, again.num_captions_encoded) == (0, 0)
    assert explain(config).lines.count(f"cache       0 images and 0 captions to encode, into {config.cache.path}") == 1


@pytest.mark.slow
def test_a_run_trains_on_all_of_them_and_evaluates_only_what_it_should(config, built, monkeypatch):
    monkeypatch.setattr(generations, "_MARK_EVERY_S", 0.5)
    result = fit(config)
    assert result.step == 4
    used = Path(built[1].index_path).with_name("used")  # the cache has heard of it all the time
    assert used.stat().st_mtime > (result.run_folder / "data" / "index.parquet").stat().st_mtime
    assert [file.format for file in result.exports] == ["kohya"]
    lines = read_metrics(result.run_folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 4]
    data = load_data(config, result.run_folder / "data" / "index.parquet")
    assert data.train.counts("dataset") == {"drawings": 32, "held_out": 0, "shards": 5, "table": 4}
    assert data.held_out.counts("dataset") == {"drawings": 0, "held_out": 3, "shards": 0, "table": 0}


def test_a_dataset_that_is_left_out_leaves_the_others_encoded(config, built):
    """Another selection is another index over the same entries."""
    fewer = with_overrides(config, {"dataset.table.disabled": True, "dataset.drawings.flip": False})
    result = build_cache(fewer, connect=must_not_connect)
    assert (result.num_latents_encoded, result.num_captions_encoded) == (0, 0)
    assert result.num_samples == 16 + 5 + 3
    assert result.index_path != built[1].index_path
