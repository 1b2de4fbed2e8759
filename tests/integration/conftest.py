"""One local Ray for the integration tests, and settings small enough for two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdxl_ray.cache.index import Index
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.config.load import config_from_dict
from sdxl_ray.config.schema import Config
from sdxl_ray.connection import connect
from sdxl_ray.tracking.metrics import read_metrics


@pytest.fixture(scope="package")
def local_ray():
    """For this folder only: the unit tests run without Ray."""
    import ray

    connect("local")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """One cache folder for all runs: content-addressed, so they cannot disturb each other."""
    return tmp_path_factory.mktemp("cache")


def small_config(output: Path, cache: Path, name: str, model: str, /, **changes) -> Config:
    """The photographs of the package at 64 px, a few steps. `changes` are sections: train={"num_workers": 2}.

    A list is what [[dataset]] says instead: dataset=[{"path": ...}, {"path": ...}].
    """
    settings = {
        "run": {"name": name, "output": str(output)},
        "model": {"path": model, "dtype": "fp32"},
        "dataset": {"path": "builtin:photographs", "resolution": 64, "bucket_step": 32},
        "cache": {"path": str(cache), "vae_dtype": "fp32"},
        "adapter": {"rank": 4},
        "train": {"duration": "8 steps", "micro_batch_size": 2, "num_workers": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-3},
        "eval": {"holdout": 0.15, "every": "4 steps", "num_timesteps": 2},
        "checkpoint": {"every": "4 steps"},
        "tracking": {"tensorboard": False},
        "cluster": {"accelerator": "cpu"},
    }
    for section, values in changes.items():
        if isinstance(values, list):
            settings[section] = values
        else:
            settings.setdefault(section, {}).update(values)
    return config_from_dict(settings)


def actor_processes(class_name: str) -> list[int]:
    """Process ids of the living actors of this Ray whose class is called so. Other Rays of the machine are not met."""
    from ray.util.state import list_actors

    alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return sorted(actor.pid for actor in alive if class_name in actor.class_name)


def must_not_connect() -> None:
    """For `build_cache` over a cache to which nothing is missing."""
    raise AssertionError("a complete cache needs no Ray")


def read_all(cache: str, index_path: str) -> tuple[int, int]:
    """Read every entry that an index names, with its checksum; how many different latents and captions there are."""
    index, reader = Index.read(index_path), ShardReader(cache)
    latents: dict[str, str] = {}
    captions: dict[str, str] = {}
    for row in range(len(index)):
        sample = index[row]
        latents.update(zip(sample.latent_keys, sample.latent_shards, strict=True))
        captions.update(zip(sample.text_keys, sample.text_shards, strict=True))
    for key, shard in (latents | captions).items():
        assert reader.read(shard, key)
    return len(latents), len(captions)


def assert_same_training(found: Path, expected: Path) -> None:
    """To the bit: the losses of every step and evaluation, and every tensor of the exported LoRA."""
    for name in ("train/loss", "eval/loss"):
        values = [
            {line["step"]: line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line}
            for folder in (found, expected)
        ]
        assert values[0] == values[1], name
        assert values[1], name
    files = [sorted((folder / "export").glob("*.safetensors")) for folder in (found, expected)]
    assert len(files[0]) == len(files[1]) > 0
    for mine, theirs in zip(*files, strict=True):
        tensors, others = load_file(mine), load_file(theirs)
        assert tensors.keys() == others.keys()
        assert all(tensors[name].equal(other) for name, other in others.items())


def flip_a_bit(shard: Path) -> None:
    """In the last tensor of a shard: its header stays readable, one entry's checksum does not fit any more."""
    content = bytearray(shard.read_bytes())
    content[-2] ^= 0x10
    shard.write_bytes(content)
