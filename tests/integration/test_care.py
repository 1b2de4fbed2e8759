"""Looking after a cache from the command line: --stats, --verify, --prune, --preview."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sdxl_ray.cache.index import Index
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.cli import app
from sdxl_ray.config.load import dump_config, with_overrides

from .conftest import flip_a_bit, must_not_connect, read_all, small_config
from .test_datasets import write_folder

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("care")
    images = write_folder(folder / "drawings", range(9))
    (images / "notes.png").write_bytes(b"not a picture at all")
    (images / "notes.txt").write_text("some notes", encoding="utf-8")
    dataset = {"path": str(images), "resolution": 64, "bucket_step": 16}
    cache = {"batch_size": 1}
    return small_config(folder / "runs", folder / "cache", "care", tiny_model, dataset=[dataset], cache=cache)


@pytest.fixture(scope="module")
def built(config):
    return build_cache(config)


@pytest.fixture
def command(config, tmp_path, monkeypatch):
    """`sdxl-ray cache CONFIG ...` in this process, where Ray is connected already; what it printed."""
    settings = tmp_path / "care.toml"
    settings.write_text(dump_config(config))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["cache", str(settings), *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def shards(config, kind: str) -> list[Path]:
    return sorted(Path(config.cache.path).glob(f"{kind}/**/*.safetensors"))


def test_stats_count_what_is_there(config, built, command):
    said = command("--stats")
    words = {tuple(line.split()[:2]) for line in said.splitlines()}
    assert {(bucket, str(count)) for bucket, count in built.buckets.items()} <= words
    assert ("text", "19") in words  # two captions each, and the empty prompt
    assert ("all", "28") in words
    assert "dataset drawings: 9 samples, used 0 days ago" in said
    assert "0 entries are in no dataset" in said


def entries(config, index_path: str) -> dict[str, dict[str, torch.Tensor]]:
    index, reader = Index.read(index_path), ShardReader(config.cache.path)
    samples = [index[row] for row in range(len(index))]
    places = {
        key: shard
        for sample in samples
        for key, shard in zip(
            (*sample.latent_keys, *sample.text_keys), (*sample.latent_shards, *sample.text_shards), strict=True
        )
    }
    # Copies: what is read lies in the file, which these tests damage.
    return {
        key: {name: tensor.clone() for name, tensor in reader.read(shard, key).items()} for key, shard in places.items()
    }


@pytest.mark.slow
def test_verify_encodes_again_what_is_damaged_and_only_that(config, built, command):
    assert "every entry is as it was written" in command("--verify")
    before = entries(config, built.index_path)
    times = {path: path.stat().st_mtime_ns for kind in ("latents", "text") for path in shards(config, kind)}
    victims = [next(path for path in times if path.parent.name == name) for name in ("64x64", "text")]
    for victim in victims:
        flip_a_bit(victim)
        times.pop(victim)
    said = command("--verify")
    for victim in victims:
        assert f"{victim.relative_to(config.cache.path)}: 1 entries are damaged" in said
    assert "encoded 1 images and 1 captions" in said
    after = entries(config, build_cache(config, connect=must_not_connect).index_path)
    assert after.keys() == before.keys()
    assert all(after[key][name].equal(tensor) for key, found in before.items() for name, tensor in found.items())
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())

    said = command("--verify")
    assert "every entry is as it was written" in said
    assert "nothing to encode" in said


@pytest.mark.slow
def test_prune_deletes_what_no_dataset_uses_only_when_told_to(config, built, command, tmp_path):
    other = write_folder(tmp_path / "other", range(60, 63))
    build_cache(with_overrides(config, {"dataset.path": str(other), "dataset.name": "other"}))
    cache = Path(config.cache.path)
    before = {path for path in cache.rglob("*") if path.is_file()}
    assert "nothing to prune" in command("--prune")

    (dataset,) = cache.glob("datasets/other-*")
    long_ago = time.time() - 40 * 24 * 3600
    for path in [*dataset.iterdir(), *shards(config, "latents"), *shards(config, "text")]:
        os.utime(path, (long_ago, long_ago))
    said = command("--prune")
    assert f"would delete dataset {dataset.name}" in said
    assert "Nothing was deleted: add --yes." in said
    assert {path for path in cache.rglob("*") if path.is_file()} == before

    said = command("--prune", "--yes")
    assert f"deleted dataset {dataset.name}" in said
    assert not dataset.exists()
    again = build_cache(config, connect=must_not_connect)
    assert (again.num_latents_encoded, again.num_captions_encoded) == (0, 0)
    assert read_all(config.cache.path, again.index_path) == (9, 18)
    assert "nothing to prune" in command("--prune")


def test_preview_is_one_page_that_names_what_is_skipped(config, built, command, tmp_path):
    page = tmp_path / "sheet.html"
    said = command("--preview", str(page))
    assert f"contact sheet: {page}" in said
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/') >= 9
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "notes.png" in text and "not an image" in text
    assert "drawing 3" in text
    assert all(bucket.replace("x", " x ") in text for bucket in built.buckets)
