"""Which samples are in which step: a pure function of the index, the seed and the position, not a stream's accident.

An epoch is one list of micro-batches, each within one bucket, that does not depend on the number of workers. The run is
the epochs' lists one after the other; at every step, rank r takes items position + r, position + W + r, ... What has to
be saved is the position: the number of micro-batches consumed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_ray.diffusion.randomness import keyed_generator


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one bucket that one rank feeds at once."""

    number: int  # counted from the start of the run
    epoch: int
    rows: tuple[int, ...]  # of the list of training samples
    repeats: tuple[int, ...]  # which repeat of the sample in this epoch, so that repeats draw different noise


class DataOrder:
    """The endless list of micro-batches of a run."""

    def __init__(self, buckets: Sequence[str], repeats: Sequence[int], *, micro_batch_size: int, seed: int) -> None:
        """
        Args:
            buckets: the bucket of each training sample.
            repeats: how often each sample is seen in an epoch.
        """
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        entries: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
            entries[bucket].extend((row, repeat) for repeat in range(count))
        self._entries = {bucket: np.array(items, dtype=np.int64) for bucket, items in sorted(entries.items())}
        self.samples_per_epoch = sum(len(items) for items in self._entries.values())
        self.micro_batches_per_epoch = sum(math.ceil(len(items) / micro_batch_size) for items in self._entries.values())
        self._cached: tuple[int, list[MicroBatch]] = (-1, [])

    def __getitem__(self, number: int) -> MicroBatch:
        epoch, place = divmod(number, self.micro_batches_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self.epoch(epoch))
        return self._cached[1][place]

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """Every sample once per repeat: shuffled in its bucket, cut, and the pieces of all buckets shuffled together.

        A bucket's remainder makes a smaller micro-batch. It is exact, since the loss is normalised by the weight of the
        whole step; nothing is dropped or doubled.
        """
        draw = keyed_generator(self.seed, epoch, "order")
        size = self.micro_batch_size
        pieces = []
        for items in self._entries.values():
            shuffled = items[draw.permutation(len(items))]
            pieces += [shuffled[start : start + size] for start in range(0, len(items), size)]
        first = epoch * self.micro_batches_per_epoch
        return [
            MicroBatch(
                number=first + place,
                epoch=epoch,
                rows=tuple(pieces[piece][:, 0].tolist()),
                repeats=tuple(pieces[piece][:, 1].tolist()),
            )
            for place, piece in enumerate(draw.permutation(len(pieces)))
        ]


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

    def remaining(self, position: int, world_rank: int) -> Iterator[MicroBatch]:
        """What one rank still has to do from `position` on."""
        while position < self.num_micro_batches:
            for number in self.of_step(position, world_rank):
                yield self.order[number]
            position = self.next_position(position)


def run_length(
    *, steps: int | None, epochs: int | None, order: DataOrder, micro_batches_per_step: int, step: int, position: int
) -> tuple[int, int]:
    """(max_steps, num_micro_batches) of a run that is given in steps or in epochs, seen from where it stands.

    A resumed run may have another number of workers. In epochs, the data stays what it was and the steps change; in
    steps, the other way round.
    """
    if epochs is not None:
        num_micro_batches = max(epochs * order.micro_batches_per_epoch, position)
        return step + math.ceil((num_micro_batches - position) / micro_batches_per_step), num_micro_batches
    assert steps is not None
    return steps, position + max(0, steps - step) * micro_batches_per_step


def split_holdout(image_hashes: Sequence[str], share: float, max_images: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out), by content: copies of an image stay on one side, and adding images moves none.

    Of the images that `share` catches, those with the `max_images` smallest hashes are held out and the others trained
    on; there, adding an image can give one back to training, and never the reverse. Where `share` > 0 catches none of a
    small collection, the image with the smallest hash is held out; at least one image is always left to train on.
    """
    if share <= 0 or len(set(image_hashes)) < 2:
        return list(range(len(image_hashes))), []
    held_out = {digest for digest in image_hashes if int(digest[:8], 16) / 2**32 < share}
    ordered = sorted(set(image_hashes))
    held_out = set(sorted(held_out)[:max_images]) or {ordered[0]}
    if len(held_out) == len(ordered):
        held_out.discard(ordered[-1])
    train = [row for row, digest in enumerate(image_hashes) if digest not in held_out]
    evaluation = [row for row, digest in enumerate(image_hashes) if digest in held_out]
    return train, evaluation
