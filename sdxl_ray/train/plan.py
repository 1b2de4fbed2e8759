"""The whole run: which micro-batches each step feeds to which rank, and what is due when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdxl_ray.train.order import DataOrder, MicroBatch


@dataclass(frozen=True, slots=True)
class Share:
    """A micro-batch and its place among the samples of its step, which all ranks count alike."""

    micro_batch: MicroBatch
    step: int  # counted from 1
    first: int  # samples of the step before it
    total: int  # samples of the step, of all ranks together


@dataclass(frozen=True, slots=True)
class Every:
    """A period in steps; 0 is never. `last` adds the run's last step."""

    steps: int
    last: int = 0

    def due(self, step: int) -> bool:
        return (self.steps > 0 and step % self.steps == 0) or (self.last > 0 and step == self.last)


@dataclass(frozen=True)
class Plan:
    """The whole run: the data of each step and what is due when."""

    order: DataOrder
    num_workers: int
    accumulation: int
    max_steps: int
    num_micro_batches: int  # of the whole run; the last step may have fewer than the others
    log: Every
    evaluate: Every
    validate: Every
    save: Every
    max_grad_norm: float
    seed: int

    @property
    def micro_batches_per_step(self) -> int:
        return self.num_workers * self.accumulation

    def of_step(self, position: int, world_rank: int) -> list[int]:
        """One rank's micro-batches in the step that begins at `position`; none for some ranks in a short last step."""
        end = min(position + self.micro_batches_per_step, self.num_micro_batches)
        return list(range(position + world_rank, end, self.num_workers))

    def next_position(self, position: int) -> int:
        return min(position + self.micro_batches_per_step, self.num_micro_batches)

    def remaining(self, step: int, position: int, world_rank: int) -> Iterator[Share]:
        """What one rank still has to do after `step` steps and `position` micro-batches."""
        while position < self.num_micro_batches:
            step += 1
            end = self.next_position(position)
            of_all = [self.order[number] for number in range(position, end)]  # in order: one epoch is kept at a time
            starts = list(itertools.accumulate((len(micro_batch.rows) for micro_batch in of_all), initial=0))
            for number in self.of_step(position, world_rank):
                place = number - position
                yield Share(of_all[place], step, starts[place], starts[-1])
            position = end


def run_length(
    *, steps: int | None, epochs: int | None, order: DataOrder, micro_batches_per_step: int, step: int, position: int
) -> tuple[int, int]:
    """(max_steps, num_micro_batches) of a run that is given in steps or in epochs, seen from where it stands.

    A resumed run may have another number of workers. In epochs, the data stays what it was and the steps change; in
    steps, the other way round.

    Raises:
        ConfigError: before its end no dataset takes part any more.
    """
    if epochs is not None:
        num_micro_batches = max(order.start_of_epoch(epochs), position)
        max_steps = step + math.ceil((num_micro_batches - position) / micro_batches_per_step)
        is_empty = epochs > order.phases[-1].first_epoch  # then `start_of_epoch` stands still at the border
        order.check_length(num_micro_batches + is_empty)
        return max_steps, num_micro_batches
    assert steps is not None
    num_micro_batches = position + max(0, steps - step) * micro_batches_per_step
    order.check_length(num_micro_batches)
    return steps, num_micro_batches
