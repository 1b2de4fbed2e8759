"""Stage 1 on a local Ray: incremental, restartable, exact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from sdxl_ray.cache.jobs import ray_jobs
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.config.load import BUILTIN_PHOTOGRAPHS, dump_config, with_overrides
from sdxl_ray.connection import connect
from sdxl_ray.errors import CacheError, DatasetError, ModelError
from sdxl_ray.sdxl.tiny import write_tiny_sdxl

from .conftest import must_not_connect, read_all, small_config

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def photographs(tmp_path) -> Path:
    return Path(shutil.copytree(BUILTIN_PHOTOGRAPHS, tmp_path / "photographs"))


@pytest.fixture
def config(tmp_path, photographs, tiny_model):
    return with_overrides(
        small_config(tmp_path / "runs", tmp_path / "cache", "cached", tiny_model), {"dataset.path": str(photographs)}
    )


def shard_times(cache: Path) -> dict[str, int]:
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.glob("**/*.safetensors")}


def test_a_second_run_encodes_nothing_and_a_deleted_shard_only_itself(config, photographs):
    cache = Path(config.cache.path)
    first = build_cache(config)
    assert first.num_samples == first.num_latents_encoded == 21
    assert first.num_captions_encoded > 21  # several captions for some, and the empty prompt

    assert read_all(config.cache.path, first.index_path) == (21, first.num_captions_encoded - 1)

    second = build_cache(config, connect=must_not_connect)
    assert (second.num_latents_encoded, second.num_captions_encoded) == (0, 0)
    assert second.index_path == first.index_path

    before = shard_times(cache)
    victim = next(name for name in before if name.startswith("latents"))
    with safe_open(cache / victim, "pt") as shard:
        held, lost = len(shard.get_slice("mean")[:]), shard.get_tensor("mean").clone()
    (cache / victim).unlink()
    third = build_cache(config)
    assert third.num_latents_encoded == held
    after = shard_times(cache)
    assert {name for name in after if after[name] != before.get(name)} == {victim}
    with safe_open(cache / victim, "pt") as shard:
        assert shard.get_tensor("mean").equal(lost)

    (photographs / "cat_face.txt").write_text("a new caption for the cat\n")
    fourth = build_cache(config)
    assert (fourth.num_latents_encoded, fourth.num_captions_encoded) == (0, 1)


@pytest.mark.slow
def test_runs_with_other_validation_prompts_leave_each_other_theirs(config):
    """A run may still be reading its prompts when another one starts."""
    first = build_cache(with_overrides(config, {"validation.prompts": ["a red house"]}))
    second = build_cache(with_overrides(config, {"validation.prompts": ["a blue house"]}))
    assert (second.num_latents_encoded, second.num_captions_encoded) == (0, 1)
    for result, prompt in ((first, "a red house"), (second, "a blue house")):
        manifest = json.loads(Path(result.index_path).with_name("manifest.json").read_text())
        assert {prompt, ""} <= manifest["prompts"].keys()


@pytest.mark.slow
def test_a_scan_on_ray_is_the_scan_of_threads_and_shows_itself(config, monkeypatch):
    by_threads = build_cache(config)
    (Path(config.cache.path) / "scan.parquet").unlink()
    monkeypatch.setattr(ray_jobs, "SCAN_ON_RAY_FROM", 1)
    seen = []
    by_ray = build_cache(config, progress=lambda *event: seen.append(event))
    assert (by_ray.num_samples, by_ray.num_latents_encoded) == (by_threads.num_samples, 0)
    assert seen == [("scan", 21, 21)]


@pytest.mark.slow
def test_an_image_that_is_gone_when_it_is_decoded_is_skipped(config, photographs):
    """It is told, counts in max_unreadable, and leaves nothing behind; the other images of its shard are encoded."""

    def gone():
        (photographs / "coffee_cup.jpg").unlink()

    result = build_cache(config, connect=gone)
    assert [(Path(item.path).name, item.reason) for item in result.skipped] == [
        ("coffee_cup.jpg", "is not there any more")
    ]
    assert result.num_samples == result.num_latents_encoded == read_all(config.cache.path, result.index_path)[0] == 20
    again = build_cache(config, connect=must_not_connect)
    assert (again.num_latents_encoded, again.skipped) == (0, ())


@pytest.mark.slow
def test_an_image_that_only_a_node_cannot_read_is_an_error(config, monkeypatch):
    """As on a node that does not see the folder: not a skip, which would train on fewer images without a word."""

    def decode(row, cache=""):  # made here, so that it travels by value
        from sdxl_ray.cache.jobs import actors

        load = actors.load_image

        def load_some(record):
            if record.path.endswith("coffee_cup.jpg"):
                raise PermissionError(13, "Permission denied", record.path)
            return load(record)

        actors.load_image = load_some
        try:
            return actors.decode_shard(row, cache)
        finally:
            actors.load_image = load

    monkeypatch.setattr(ray_jobs, "decode_shard", decode)
    with pytest.raises(CacheError, match=r"cannot read .*coffee_cup\.jpg: Permission denied\. Is dataset\.path"):
        build_cache(config)


def test_a_model_that_the_encoders_cannot_load_is_the_users_model_error(config, tmp_path, tiny_model):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def spoil():
        (model / "text_encoder" / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"text_encoder/model\.safetensors is missing"):
        build_cache(with_overrides(config, {"model.path": str(model)}), connect=spoil)


@pytest.mark.slow
def test_another_vae_adds_entries_and_keeps_the_old_ones(config, tmp_path):
    build_cache(config)
    old = shard_times(Path(config.cache.path))
    other = write_tiny_sdxl(tmp_path / "other", seed=1)
    result = build_cache(with_overrides(config, {"model.path": str(other)}))
    assert result.num_latents_encoded == 21
    new = shard_times(Path(config.cache.path))
    assert old.items() <= new.items()
    assert len(new) > len(old)


@pytest.mark.slow
def test_unreadable_images_are_skipped_listed_and_not_tried_again(config, photographs):
    """Three are damaged in their pixels, three are no images at all; every other image keeps its own captions."""
    for number in range(3):
        damaged = photographs / f"damaged_{number}.jpg"
        damaged.write_bytes((photographs / "coffee_cup.jpg").read_bytes()[: 9000 + number])
        damaged.with_suffix(".txt").write_text("a damaged photograph")
    for name in ("astronaut.jpg", "retina.png", "grass.jpg"):
        (photographs / name).write_bytes(b"no image at all")
    config = with_overrides(config, {"dataset.max_unreadable": 0.5})
    result = build_cache(config)
    assert result.num_samples == 18
    reasons = {Path(item.path).name: item.reason for item in result.skipped}
    assert all("cannot be decoded" in reasons[f"damaged_{number}.jpg"] for number in range(3))
    assert all("not an image" in reasons[name] for name in ("astronaut.jpg", "retina.png", "grass.jpg"))
    listed = Path(result.skipped_path).read_text()
    assert all(name in listed for name in reasons)
    for row in pq.read_table(result.index_path).to_pylist():
        expected = Path(row["path"]).with_suffix(".txt").read_text().splitlines()
        assert row["captions"] == [line.strip() for line in expected if line.strip()]
        assert Path(row["path"]).name not in reasons

    again = build_cache(config, connect=must_not_connect)
    assert again.num_latents_encoded == 0
    assert len(again.skipped) == 6

    with pytest.raises(DatasetError) as raised:
        build_cache(with_overrides(config, {"dataset.max_unreadable": 0.1}), connect=must_not_connect)
    text = str(raised.value)
    assert "6 of 24 images cannot be used, more than dataset.max_unreadable = 0.1 allows" in text
    assert "damaged_0.jpg: cannot be decoded" in text
    assert "raise dataset.max_unreadable" in text


@pytest.mark.slow
def test_a_killed_driver_loses_at_most_unfinished_shards(config, tmp_path):
    """kill -9 as soon as the first shard is there; the next run encodes the rest only."""
    settings = tmp_path / "killed.toml"
    settings.write_text(dump_config(config))
    cache = Path(config.cache.path)
    driver = subprocess.Popen(
        [sys.executable, "-m", "sdxl_ray", "cache", str(settings)],
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not shard_times(cache) and time.monotonic() < deadline:
            time.sleep(0.05)
        finished = shard_times(cache)
        assert finished, "no shard was written in 90 s"
    finally:
        os.killpg(driver.pid, signal.SIGKILL)  # the whole group: driver, raylet, workers
        driver.wait()
    finished = shard_times(cache)
    result = build_cache(config, connect=lambda: connect("local"))
    assert result.num_samples == 21
    assert finished.items() <= shard_times(cache).items()
    assert read_all(config.cache.path, result.index_path)[0] == 21
    assert build_cache(config, connect=must_not_connect).num_latents_encoded == 0
