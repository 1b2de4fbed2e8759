"""In which order a run needs its entries. .venv/bin/pytest tests/unit/train/test_on_demand.py"""

import numpy as np
import pytest

from sdxl_ray.cache.index import Index
from sdxl_ray.config.load import with_overrides
from sdxl_ray.train.data import data_order, split
from sdxl_ray.train.on_demand import order_of_need


@pytest.fixture
def config(tiny_cache):
    return tiny_cache[0]


@pytest.fixture
def index(tiny_cache):
    return Index.read(tiny_cache[1])


def rows_used(config, index, first, last):
    """Rows of the index in the order of micro-batches `first` to `last`."""
    parts = split(config, index)
    order = data_order(config, parts)
    return [int(parts.train.rows[place]) for number in range(first, last) for place in order[number].rows]


@pytest.mark.parametrize("position", [0, 2, 5])
def test_held_out_images_first_and_then_as_the_run_goes_on(config, index, position):
    ranks = order_of_need(config, index, position)
    held_out = split(config, index).held_out.rows
    assert sorted(ranks[held_out].tolist()) == list(range(len(held_out)))
    parts = split(config, index)
    end = position + 2 * data_order(config, parts).micro_batches_per_epoch
    expected = list(dict.fromkeys(rows_used(config, index, position, end)))
    found = np.argsort(ranks, kind="stable")[len(held_out) :][: len(expected)].tolist()
    assert found == expected
    assert len(expected) == len(parts.train)


def test_a_dataset_that_ends_with_the_run(config, index):
    ends = with_overrides(config, {"train.duration": "1 epochs", "dataset.end": "1 epochs"})
    assert order_of_need(ends, index, 0).tolist() == order_of_need(config, index, 0).tolist()
