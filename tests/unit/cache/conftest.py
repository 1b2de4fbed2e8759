"""A small data set, for the tests that do not make one of their own."""

import pytest

from tests.unit.cache.planned import add_images, config_of


@pytest.fixture
def images(tmp_path):
    return add_images(tmp_path / "images")


@pytest.fixture
def config(tmp_path, images, tiny_model):
    return config_of(tmp_path, tiny_model, images)
