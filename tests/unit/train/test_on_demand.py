"""In which order a run needs its entries. .venv/bin/pytest tests/unit/train/test_on_demand.py"""

import dataclasses
import time

import numpy as np
import pytest

from sdxl_ray.cache.index import Index
from sdxl_ray.config.load import with_overrides
from sdxl_ray.train import on_demand
from sdxl_ray.train.data import data_order, split
from sdxl_ray.train.on_demand import order_of_need
from sdxl_ray.train.order import DataOrder


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


# ---- several crops ---------------------------------------------------------------------------------------------------


def in_crops(index, num_crops):
    """The same samples, the first with one crop, the next with `num_crops`, and so on in turns."""

    def with_crops(row):
        sample, num = index[row], num_crops if row % 2 else 1
        keys = tuple(f"{100 * row + crop:032x}" for crop in range(num))
        return dataclasses.replace(sample, crops=((0, 0),) * num, latent_keys=keys, latent_shards=("x",) * num)

    return Index.of(with_crops(row) for row in range(len(index)))


def cropped(config, num_crops, crop_epochs=1, **train):
    dataset = {"dataset.crop": "random", "dataset.crop_variants": num_crops, "dataset.crop_epochs": crop_epochs}
    return with_overrides(config, {**dataset, "train.duration": "50 epochs", **train})


def keys_in_order(ranks, index):
    keys = [key for row in range(len(index)) for key in index[row].latent_keys]
    assert len(keys) == len(ranks)
    return [keys[entry] for entry in np.argsort(ranks, kind="stable")]


def keys_used(config, index, first):
    """By the run from micro-batch `first` on, each when it is first used, as `BatchBuilder` reads them."""
    parts = split(config, index)
    order, (section,) = data_order(config, parts), parts.sections.values()
    used = [parts.held_out[row].latent_keys[0] for row in range(len(parts.held_out))]
    for number in range(first, first + 40 * order.micro_batches_per_epoch):
        micro_batch = order[number]
        for row in micro_batch.rows:
            sample = parts.train[row]
            used.append(sample.latent_keys[micro_batch.epoch // section.crop_epochs % len(sample.crops)])
    return list(dict.fromkeys(used))


@pytest.mark.parametrize("position", [0, 8])
@pytest.mark.parametrize("crop_epochs", [1, 2])
def test_crops_come_in_the_order_in_which_epochs_use_them(config, index, position, crop_epochs):
    index, config = in_crops(index, 4), cropped(config, 4, crop_epochs)
    expected = keys_used(config, index, position)
    found = keys_in_order(order_of_need(config, index, position), index)
    assert found[: len(expected)] == expected
    # What is never used are further crops of the held-out images, second ones first.
    held_out = {key for row in split(config, index).held_out.rows for key in index[int(row)].latent_keys[1:]}
    assert set(found[len(expected) :]) == held_out
    assert found[len(expected) :] == sorted(held_out, key=lambda key: (int(key, 16) % 100, key))


def test_each_dataset_has_crop_epochs_of_its_own(config, index):
    """The first epoch's crops come first, whatever was there before."""
    once, twice = (order_of_need(cropped(config, 4, number), in_crops(index, 4), 0) for number in (1, 2))
    assert once.tolist() != twice.tolist()
    num_first = len(split(config, index).held_out) + len(split(config, index).train)
    assert np.argsort(once)[:num_first].tolist() == np.argsort(twice)[:num_first].tolist()


def test_no_further_than_the_run_goes(config, index, monkeypatch):
    asked = []
    plain = DataOrder.epoch
    monkeypatch.setattr(DataOrder, "epoch", lambda order, number: asked.append(number) or plain(order, number))
    for duration, expected in (("50 epochs", range(5)), ("3 epochs", range(3)), ("1 epochs", range(2))):
        asked.clear()
        order_of_need(cropped(config, 4, **{"train.duration": duration}), in_crops(index, 4), 0)
        assert asked == list(expected)[: 4 + 1], duration
    asked.clear()
    order_of_need(cropped(config, 1), in_crops(index, 4), 0)
    assert asked == [0, 1]


def test_of_a_large_collection_two_epochs_are_enough(config, index, monkeypatch):
    """The rest comes crop by crop."""
    monkeypatch.setattr(on_demand, "_MOST_SAMPLES", 5)
    index, config = in_crops(index, 4), cropped(config, 4)
    found = keys_in_order(order_of_need(config, index, 0), index)
    parts = split(config, index)
    num_certain = len(parts.held_out) + len(parts.train) + sum(len(each.crops) > 1 for each in parts.train)
    assert found[:num_certain] == keys_used(config, index, 0)[:num_certain]
    crops = [int(key, 16) % 100 for key in found[num_certain:]]
    assert crops == sorted(crops)


def test_a_million_crops_are_ranked_in_seconds(config, index):
    """250,000 rows of 4 crops."""
    num_rows = 250_000
    order = DataOrder(np.arange(num_rows) % 40, np.ones(num_rows, int), micro_batch_size=4, seed=7)
    counts = np.full(num_rows, 4)
    started = time.monotonic()
    needed = [4 * order.epoch(number).rows.astype(np.int64) + number for number in range(2)]
    ranks = on_demand._ranks(needed, counts, 4 * np.arange(num_rows))
    assert sorted(ranks[ranks < 2 * num_rows].tolist()) == list(range(2 * num_rows))
    assert time.monotonic() - started < 5


def test_a_dataset_that_ends_with_the_run(config, index):
    ends = with_overrides(config, {"train.duration": "1 epochs", "dataset.end": "1 epochs"})
    assert order_of_need(ends, index, 0).tolist() == order_of_need(config, index, 0).tolist()
