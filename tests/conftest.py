"""Shared by all tests: no network, no telemetry, and one tiny SDXL for the whole session."""

import os

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread per process: tiny tensors are no faster with more, and threads on busy cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny SDXL. Tests that change it copy it first."""
    from sdxl_ray.sdxl.tiny import write_tiny_sdxl

    return str(write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> tuple:
    """(config, path of the index) of a small data set that is already encoded, without Ray. Read only."""
    from tests.tiny import cache_without_ray, tiny_config, write_images

    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "images")
    config = tiny_config(folder, tiny_model)
    return config, cache_without_ray(config)
