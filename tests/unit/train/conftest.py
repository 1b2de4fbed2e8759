"""Settings and index of the tiny cache, for tests that train on it."""

import pytest


@pytest.fixture
def config(tiny_cache):
    return tiny_cache[0]


@pytest.fixture
def index_path(tiny_cache):
    return tiny_cache[1]
