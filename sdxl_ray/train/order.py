"""Which samples are in which step: a pure function of the index, the seed and the position, not a stream's accident.

An epoch is one list of micro-batches, each within one bucket, that does not depend on the number of workers. The run is
the epochs' lists one after the other; at every step, rank r takes items position + r, position + W + r, ... What has to
be saved is the position: the number of micro-batches consumed.

Where datasets begin or end during the run, the run has phases, each with its own set of datasets. A border in epochs is
at the end of an epoch. One in steps cuts the running epoch short: a new epoch begins there, with the new set.

Everything is kept in NumPy columns, and micro-batches are made when they are asked for: a million samples cost some ten
MiB and a tenth of a second an epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from sdxl_ray.diffusion.randomness import keyed_generator
from sdxl_ray.errors import ConfigError

if TYPE_CHECKING:  # which needs pydantic, and benchmarks on rented machines have none
    from sdxl_ray.config.units import Duration


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one bucket that one rank feeds at once."""

    number: int  # counted from the start of the run
    epoch: int
    rows: tuple[int, ...]  # of the list of training samples
    repeats: tuple[int, ...]  # which repeat of the sample in this epoch, so that repeats draw different noise


@dataclass(frozen=True, slots=True)
class Span:
    """When a dataset takes part. No `end`, or one of 0: to the end of the run."""

    name: str
    start: Duration | None = None
    end: Duration | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run with one set of datasets; it goes on until the next one begins."""

    first: int  # number of its first micro-batch
    first_epoch: int
    active: frozenset[int]  # numbers of the datasets that take part
    micro_batches_per_epoch: int  # 0: none takes part, and the run cannot go on
    border: str  # where it begins, as the config says it


class Epoch(Sequence[MicroBatch]):
    """The micro-batches of one epoch, made as they are asked for.

    rows, repeats   (N,) int32: the samples in the order in which they are used, and which repeat each one is
    """

    def __init__(self, number: int, first: int, rows: np.ndarray, repeats: np.ndarray, ends: np.ndarray) -> None:
        """`ends` (M,): where each micro-batch ends in `rows`. `first`: number of the first one in the run."""
        self.number = number
        self.first = first
        self.rows = rows
        self.repeats = repeats
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def num_samples(self, num_micro_batches: int) -> int:
        """In the first so many micro-batches."""
        return int(self._ends[num_micro_batches - 1]) if num_micro_batches else 0

    @overload
    def __getitem__(self, place: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, place: slice) -> list[MicroBatch]: ...
    def __getitem__(self, place: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"epoch {self.number} has {len(self)} micro-batches, asked for number {place}")
        place %= len(self)
        start, end = (int(self._ends[place - 1]) if place else 0), int(self._ends[place])
        return MicroBatch(
            number=self.first + place,
            epoch=self.number,
            rows=tuple(self.rows[start:end].tolist()),
            repeats=tuple(self.repeats[start:end].tolist()),
        )


def crop_of(epoch: int, crop_epochs: Any, num_crops: Any) -> Any:
    """Which crop of an image an epoch uses: each for `crop_epochs` epochs, in turns. Of numbers, or of arrays."""
    return epoch // crop_epochs % num_crops


class DataOrder:
    """The endless list of micro-batches of a run."""

    def __init__(
        self,
        buckets: Sequence[str] | np.ndarray,
        repeats: Sequence[int] | np.ndarray,
        *,
        micro_batch_size: int,
        seed: int,
        datasets: np.ndarray | None = None,
        spans: Sequence[Span] = (),
        micro_batches_per_step: int = 1,
    ) -> None:
        """
        Args:
            buckets: the bucket of each training sample: its name, or a number that sorts as the names do.
            repeats: how often each sample is seen in an epoch.
            datasets: the dataset of each sample, as a row of `spans`. None: all are of one.
            spans: when each dataset takes part. Empty: always.
            micro_batches_per_step: of all workers, for borders that are given in steps.
        """
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.spans = tuple(spans) or (Span("the dataset"),)
        self._micro_batches_per_step = micro_batches_per_step
        counts = np.asarray(repeats, dtype=np.int64)
        codes = np.unique(np.asarray(buckets), return_inverse=True)[1].astype(np.int32)
        num_buckets = int(codes.max()) + 1 if len(codes) else 0
        self._datasets = np.zeros(len(codes), np.int32) if datasets is None else np.asarray(datasets, dtype=np.int32)

        # Each sample as often as it is seen in an epoch: bucket after bucket, in a bucket by row, of a row by repeat.
        rows = np.argsort(codes, kind="stable").astype(np.int32)
        self._rows = np.repeat(rows, counts[rows])
        ends = np.cumsum(counts[rows])
        self._repeats = (np.arange(len(self._rows)) - np.repeat(ends - counts[rows], counts[rows])).astype(np.int32)
        self._buckets = codes[self._rows]

        sizes = np.bincount(
            self._datasets * num_buckets + codes, weights=counts, minlength=len(self.spans) * num_buckets
        )
        self._sizes = sizes.astype(np.int64).reshape(len(self.spans), num_buckets)  # entries by dataset and bucket
        self.phases = self._find_phases()
        self.micro_batches_per_epoch = self.phases[0].micro_batches_per_epoch
        self.samples_per_epoch = int(self._sizes[sorted(self.phases[0].active)].sum())
        self._epoch: Epoch | None = None
        self._entries: tuple[Phase, np.ndarray] | None = None

    def __getitem__(self, number: int) -> MicroBatch:
        epoch = self._epoch
        if epoch is None or not 0 <= number - epoch.first < len(epoch):
            phase = self._phase_at(number)
            if number < 0 or not phase.micro_batches_per_epoch:
                raise IndexError(f"micro-batch {number}: no dataset takes part from {phase.border} on")
            epoch = self._epoch = self.epoch(
                phase.first_epoch + (number - phase.first) // phase.micro_batches_per_epoch
            )
        return epoch[number - epoch.first]

    def epoch(self, epoch: int) -> Epoch:
        """Every sample once per repeat: shuffled in its bucket, cut, and the pieces of all buckets shuffled together.

        A bucket's remainder makes a smaller micro-batch. It is exact, since the loss is normalised by the weight of the
        whole step; nothing is dropped or doubled. Where a border in steps cuts the epoch, its end is left out.
        """
        phase, after = self._phase_of(epoch)
        if not phase.micro_batches_per_epoch:
            raise IndexError(f"epoch {epoch}: no dataset takes part from {phase.border} on")
        entries = self._entries_of(phase)
        draw = keyed_generator(self.seed, epoch, "order")
        size = self.micro_batch_size

        sizes = self._sizes[sorted(phase.active)].sum(0)
        bucket_ends = np.cumsum(sizes)
        bucket_starts = bucket_ends - sizes
        used = np.flatnonzero(sizes)
        shuffled = np.concatenate([bucket_starts[bucket] + draw.permutation(sizes[bucket]) for bucket in used])
        starts = np.concatenate([np.arange(bucket_starts[bucket], bucket_ends[bucket], size) for bucket in used])
        stops = np.concatenate([np.minimum(starts[1:], starts[:-1] + size), bucket_ends[-1:]])

        pieces = draw.permutation(len(starts))
        first = self.start_of_epoch(epoch)
        if after is not None:
            pieces = pieces[: after.first - first]
        lengths = (stops - starts)[pieces]
        ends = np.cumsum(lengths)
        # Piece i's items are at starts[i], starts[i] + 1, ...: its start less what comes before, plus a running count.
        places = shuffled[np.repeat(starts[pieces] - (ends - lengths), lengths) + np.arange(ends[-1])]
        chosen = entries[places]
        return Epoch(epoch, first, self._rows[chosen], self._repeats[chosen], ends)

    def start_of_epoch(self, epoch: int) -> int:
        """The number of its first micro-batch."""
        phase, _ = self._phase_of(epoch)
        return phase.first + (epoch - phase.first_epoch) * phase.micro_batches_per_epoch

    def epochs_at(self, position: int) -> float:
        """How many epochs, those cut short among them, are done after `position` micro-batches."""
        phase = self._phase_at(position)
        return phase.first_epoch + (position - phase.first) / max(1, phase.micro_batches_per_epoch)

    def num_seen(self, num_micro_batches: int) -> list[int]:
        """How many images of each dataset the run has seen after so many micro-batches, repeats among them."""
        seen = np.zeros(len(self.spans), np.int64)
        ends = [*(phase.first for phase in self.phases[1:]), num_micro_batches]
        for phase, end in zip(self.phases, ends, strict=True):
            end = min(end, num_micro_batches)
            if end <= phase.first or not phase.micro_batches_per_epoch:
                break
            epochs, rest = divmod(end - phase.first, phase.micro_batches_per_epoch)
            active = sorted(phase.active)
            seen[active] += epochs * self._sizes[active].sum(1)
            if rest:
                epoch = self.epoch(phase.first_epoch + epochs)
                seen += np.bincount(self._datasets[epoch.rows[: epoch.num_samples(rest)]], minlength=len(seen))
        return [int(number) for number in seen]

    def check_length(self, num_micro_batches: int) -> None:
        """
        Raises:
            ConfigError: before the end of a run of this length no dataset takes part any more.
        """
        last = self.phases[-1]
        if last.micro_batches_per_epoch or num_micro_batches <= last.first:
            return
        lines = [
            f'  dataset "{span.name}": from {span.start if _is_set(span.start) else "the start"} '
            f"to {span.end if _is_set(span.end) else 'the end'}" + ("" if sizes.any() else ", but it has no image")
            for span, sizes in zip(self.spans, self._sizes, strict=True)
        ]
        raise ConfigError(
            f"from {last.border} on no dataset takes part, but the run goes on:\n"
            + "\n".join(lines)
            + "\nLet one of them begin earlier (dataset.start) or end later (dataset.end), or shorten train.duration."
        )

    # ---- phases

    def _find_phases(self) -> tuple[Phase, ...]:
        """From the start of the run, border by border."""
        borders = [border for span in self.spans for border in (span.start, span.end) if border and _is_set(border)]
        phases = [self._phase(0, 0, "the start")]
        while (phase := phases[-1]).micro_batches_per_epoch:
            per_epoch = phase.micro_batches_per_epoch
            ahead = []
            for border in borders:
                if border.unit == "steps":
                    ahead.append((border.value * self._micro_batches_per_step, str(border)))
                else:
                    ahead.append((phase.first + (border.value - phase.first_epoch) * per_epoch, str(border)))
            for number, text in sorted(ahead):
                done = number - phase.first
                if done <= 0 or self._active(number, phase.first_epoch + done // per_epoch) == phase.active:
                    continue
                phases.append(self._phase(number, phase.first_epoch + math.ceil(done / per_epoch), text))
                break
            else:
                break
        return tuple(phases)

    def _phase(self, first: int, first_epoch: int, border: str) -> Phase:
        active = self._active(first, first_epoch)
        sizes = self._sizes[sorted(active)].sum(0)
        return Phase(first, first_epoch, active, int((-(-sizes // self.micro_batch_size)).sum()), border)

    def _active(self, number: int, epoch: int) -> frozenset[int]:
        """The datasets with samples that take part from a micro-batch on, which is in `epoch`."""

        def reached(border: Duration | None) -> bool:
            if border is None:
                return True
            steps = border.unit == "steps"
            return border.value * self._micro_batches_per_step <= number if steps else border.value <= epoch

        return frozenset(
            row
            for row, span in enumerate(self.spans)
            if self._sizes[row].any() and reached(span.start) and not (_is_set(span.end) and reached(span.end))
        )

    def _phase_at(self, number: int) -> Phase:
        return self.phases[bisect_right(self.phases, number, key=lambda phase: phase.first) - 1]

    def _phase_of(self, epoch: int) -> tuple[Phase, Phase | None]:
        """The epoch's phase, and the next one."""
        place = bisect_right(self.phases, epoch, key=lambda phase: phase.first_epoch)
        return self.phases[place - 1], (self.phases[place] if place < len(self.phases) else None)

    def _entries_of(self, phase: Phase) -> np.ndarray:
        """Which entries take part, (N,) int32, in their order."""
        if self._entries is None or self._entries[0] != phase:
            takes_part = np.isin(self._datasets, sorted(phase.active))
            self._entries = (phase, np.flatnonzero(takes_part[self._rows]).astype(np.int32))
        return self._entries[1]


def _is_set(border: Duration | None) -> bool:
    return border is not None and border.value > 0
