"""With cache.mode = "ondemand": which samples the run needs first, so that they are encoded first. No torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from sdxl_ray.cache.index import Index
from sdxl_ray.train.data import data_order, split

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


def order_of_need(config: Config, index: Index, position: int) -> np.ndarray:
    """The rank of each row of the index: those held out, then those to train on in the order of the plan.

    Args:
        position: number of the micro-batch with which the run begins or goes on.
    """
    parts = split(config, index)
    order = data_order(config, parts)
    epochs = [int(order.epochs_at(position))]
    epochs.append(epochs[0] + 1)  # a run that goes on in the middle of an epoch meets the rest in the next
    needed = [np.empty(0, np.int64)]
    for number in epochs:
        with contextlib.suppress(IndexError):  # the last dataset has ended
            epoch = order.epoch(number)
            done = max(0, position - epoch.first)
            needed.append(epoch.rows[sum(len(batch.rows) for batch in epoch[:done]) :])
    # The loss of those held out is computed before the first step.
    rows = np.concatenate([parts.held_out.rows, parts.train.rows[np.concatenate(needed)]])
    ranks = np.full(len(index), len(rows))  # what is needed much later, or never
    ranks[rows[::-1]] = np.arange(len(rows))[::-1]  # of several uses the first
    return ranks
