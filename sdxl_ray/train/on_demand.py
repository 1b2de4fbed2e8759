"""With cache.mode = "ondemand": which samples the run needs first, so that they are encoded first. No torch."""

from __future__ import annotations

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
    ranks = np.full(len(index), np.iinfo(np.int64).max // 2)  # copies of held-out images are never needed
    # Their loss is computed before the first step.
    ranks[parts.held_out.rows] = np.arange(len(parts.held_out))
    order = data_order(config, parts)
    number, rank = position, len(parts.held_out)
    left = len(parts.train)
    epochs = 0
    while left and epochs < 2:  # a run that goes on in the middle of an epoch meets the rest in the next
        micro_batch = order[number]
        for place in micro_batch.rows:
            row = parts.train.rows[place]
            if ranks[row] >= np.iinfo(np.int64).max // 2:
                ranks[row] = rank
                rank, left = rank + 1, left - 1
        number += 1
        epochs += order[number].epoch != micro_batch.epoch
    return ranks
