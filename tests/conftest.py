"""Shared by all tests: no network, no telemetry, and one tiny SDXL for the whole session."""

import os

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny SDXL. Tests that change it copy it first."""
    from sdxl_ray.sdxl.tiny import write_tiny_sdxl

    return str(write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl"))
