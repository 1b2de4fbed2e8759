"""With cache.mode = "ondemand": what the run needs first, so that it is encoded first. No torch."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import numpy as np

from sdxl_ray.cache.index import Index
from sdxl_ray.train.data import Split, data_order, split
from sdxl_ray.train.order import DataOrder, crop_of

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

_MOST_SAMPLES = 5_000_000  # of epochs after the second one; a million take 0.2 s


def order_of_need(config: Config, index: Index, position: int) -> np.ndarray:
    """The rank of each latent, (latents,) int64: row after row, of each row crop after crop.

    First those held out, then those to train on in the order of the plan, in the crop that each epoch uses; then first
    crops that no epoch was looked at for, second ones, and so on.

    Args:
        position: number of the micro-batch with which the run begins or goes on.
    """
    parts = split(config, index)
    order = data_order(config, parts)
    counts = index.num_crops().astype(np.int64)
    starts = np.cumsum(counts) - counts
    # The loss of those held out is computed before the first step.
    needed = [starts[parts.held_out.rows]]

    datasets, names = parts.train.codes("dataset")
    crop_epochs = np.array([parts.sections[name].crop_epochs for name in names], dtype=np.int64)
    first = int(order.epochs_at(position))
    num_samples = 0
    for number in range(first, _last_epoch(config, order, parts, first) + 1):
        if number > first + 1 and num_samples > _MOST_SAMPLES:
            break
        with contextlib.suppress(IndexError):  # the last dataset has ended
            epoch = order.epoch(number)
            done = max(0, position - epoch.first)
            places = epoch.rows[epoch.num_samples(done) :]
            rows = parts.train.rows[places]
            needed.append(starts[rows] + crop_of(number, crop_epochs[datasets[places]], counts[rows]))
            num_samples += len(places)
    return _ranks(needed, counts, starts)


def _last_epoch(config: Config, order: DataOrder, parts: Split, first: int) -> int:
    """The one in which every crop has had its turn or the run ends. The next at least: a run that goes on in the middle
    of an epoch meets there what it has already done of this one."""
    train = config.train
    turns = max(section.crop_variants * section.crop_epochs for section in parts.sections.values())
    if train.duration.unit == "epochs":
        end = train.duration.value
    else:
        end = math.ceil(order.epochs_at(train.duration.value * train.num_workers * train.accumulation))
    return max(first + 1, min(first + turns, end - 1))


def _ranks(needed: list[np.ndarray], counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of entries in the order in which they are needed, whichever come several times, the place of the first time."""
    ranks = np.full(int(counts.sum()), -1)
    num_ranked = 0
    for entries in needed:
        new = entries[ranks[entries] < 0]
        ranks[new[::-1]] = num_ranked + np.arange(len(new))[::-1]  # of several uses the first
        num_ranked += len(new)
    crops = np.arange(len(ranks)) - np.repeat(starts, counts)
    return np.where(ranks < 0, num_ranked + crops, ranks)
