"""Killed encoders, dying decoders, several jobs at once: every entry is there once, whole, not encoded again."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import ray

from sdxl_ray.cache.jobs import actors, lost_shards, ray_jobs
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.cache.store import ShardStore
from sdxl_ray.config.load import dump_config
from sdxl_ray.errors import CacheError
from tests.s3 import answering

from .conftest import actor_processes, must_not_connect, read_all, small_config
from .test_datasets import image_bytes, write_folder

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]


def test_a_killed_encoder_is_replaced_and_loses_nothing(tmp_path, tiny_model):
    """kill -9 once shards are there, while the images of the last one are still on their way."""
    held_back = threading.Event()
    sizes = ((64, 140), (72, 110), (80, 80), (120, 90))  # the tallest are in the last shard

    def answer(number: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        at = int(Path(path).stem)
        if at >= 150:
            held_back.wait(120)
        content = image_bytes(at, *sizes[at // 50])
        return 200, {"Content-Length": str(len(content))}, content

    with answering(answer) as (address, _):
        with (tmp_path / "images.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "caption", "height", "width"))
            for number in range(200):
                rows.writerow((f"{address}/{number}.png", f"picture {number}", *sizes[number // 50]))
        dataset = {"path": str(tmp_path / "images.csv"), "resolution": 64, "bucket_step": 16}
        config = small_config(tmp_path / "runs", tmp_path / "cache", "killed", tiny_model, dataset=[dataset])
        killed: list[int] = []

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "images" and done and not killed:
                killed.extend(actor_processes("WriteLatentShard"))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
                held_back.set()

        result = build_cache(config, progress=kill)
    assert killed
    assert result.num_latents_encoded == result.num_samples == 200
    assert read_all(config.cache.path, result.index_path) == (200, 200)
    assert_each_once(config.cache.path)
    assert not list(Path(config.cache.path).glob("**/.tmp-*"))
    assert build_cache(config, connect=must_not_connect).num_latents_encoded == 0


def assert_each_once(cache: str) -> None:
    keys = Counter(ShardStore(cache).keys.tolist())
    assert max(keys.values()) == 1


def decoder_that_dies_of(name: str):
    """Of an image of that name its process dies, as by a segmentation fault. Made here, so that it travels by value."""

    def decode(row, cache=""):
        import os
        import signal

        from sdxl_ray.cache.jobs import actors

        load = actors.load_image

        def load_or_die(record):
            if record.path.endswith(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return load(record)

        actors.load_image = load_or_die
        try:
            return actors.decode_shard(row, cache)
        finally:
            actors.load_image = load

    return decode


def test_an_image_that_kills_its_decoder_is_named_and_the_others_are_encoded(tmp_path, tiny_model, monkeypatch):
    images = write_folder(tmp_path / "images", range(12))
    dataset = {"path": str(images), "resolution": 64, "bucket_step": 16}
    config = small_config(tmp_path / "runs", tmp_path / "cache", "deadly", tiny_model, dataset=[dataset])
    deadly = sorted(path.name for path in images.glob("*.png"))[5]
    with monkeypatch.context() as patch:
        for module in (ray_jobs, lost_shards):
            patch.setattr(module, "decode_shard", decoder_that_dies_of(deadly))
        result = build_cache(config)
    assert [(Path(item.path).name, item.reason, item.kind) for item in result.skipped] == [
        (
            deadly,
            "its decoder ended the process that read it (too little memory, or a fault in the decoder)",
            "unreadable",
        )
    ]
    assert result.num_latents_encoded == result.num_samples == 11
    assert read_all(config.cache.path, result.index_path)[0] == 11
    assert_each_once(config.cache.path)
    assert build_cache(config).num_latents_encoded == 1  # with another decoder it can be read


def test_a_decoder_that_dies_of_whatever_it_is_given_ends_the_job(tmp_path, tiny_model, monkeypatch):
    """Where more shards are lost than a job may lose: the node is at fault."""
    images = write_folder(tmp_path / "images", range(3))
    dataset = {"path": str(images), "resolution": 64, "bucket_step": 16}
    config = small_config(tmp_path / "runs", tmp_path / "cache", "dying", tiny_model, dataset=[dataset])
    monkeypatch.setattr(ray_jobs, "decode_shard", decoder_that_dies_of(""))
    monkeypatch.setattr(ray_jobs, "_LOST_AT_MOST", 0)
    monkeypatch.setattr(ray_jobs, "_TASK_RETRIES", 0)
    with pytest.raises(CacheError, match=r"^encoding failed: .* died unexpectedly.*Finished shards are kept"):
        build_cache(config)


def test_an_encoder_that_dies_each_time_is_not_started_for_ever(tmp_path, tiny_model, monkeypatch):
    """It is no fault of an image: nothing is skipped."""

    class Dying(actors.WriteLatentShard):
        def written(self, item, row):
            import os
            import signal

            self.ready()
            os.kill(os.getpid(), signal.SIGKILL)

    images = write_folder(tmp_path / "images", range(3))
    dataset = {"path": str(images), "resolution": 64, "bucket_step": 16}
    config = small_config(tmp_path / "runs", tmp_path / "cache", "dying", tiny_model, dataset=[dataset])
    monkeypatch.setattr(ray_jobs, "WriteLatentShard", Dying)
    monkeypatch.setattr(ray_jobs, "_ACTOR_RETRIES", 1)
    with pytest.raises(CacheError, match=r"^encoding failed: the process that encodes on .* has died 1 times\."):
        build_cache(config)
    assert ray.data.DataContext.get_current().max_errored_blocks == 0  # of other jobs, such as those of captions


def test_two_jobs_may_fill_one_cache_at_the_same_time(tmp_path, tiny_model):
    """Two drivers, each with a Ray of its own, datasets that overlap in half."""
    both = write_folder(tmp_path / "both", range(24))
    configs = []
    for name, numbers in (("one", range(24, 36)), ("two", range(36, 48))):
        own = write_folder(tmp_path / name, numbers)
        datasets = [{"path": str(path), "resolution": 64, "bucket_step": 16} for path in (both, own)]
        config = small_config(tmp_path / "runs", tmp_path / "cache", name, tiny_model, dataset=datasets)
        (tmp_path / f"{name}.toml").write_text(dump_config(config))
        configs.append(config)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "sdxl_ray", "cache", str(tmp_path / f"{config.run.name}.toml")],
            env={**os.environ, "RAY_ADDRESS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for config in configs
    ]
    try:
        said = [job.communicate(timeout=280)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    for config in configs:
        again = build_cache(config, connect=must_not_connect)
        assert (again.num_latents_encoded, again.num_captions_encoded) == (0, 0)
        assert read_all(config.cache.path, again.index_path) == (36, 72)
    datasets = [{"path": str(tmp_path / name), "resolution": 64, "bucket_step": 16} for name in ("both", "one", "two")]
    union = small_config(tmp_path / "runs", tmp_path / "cache", "union", tiny_model, dataset=datasets)
    assert build_cache(union, connect=must_not_connect).num_samples == 48
    assert not list(Path(configs[0].cache.path).glob("**/.tmp-*"))
