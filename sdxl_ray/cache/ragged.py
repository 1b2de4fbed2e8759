"""Rows of different lengths in two arrays: all their entries one after another, and how many each row has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Ragged:
    """An entry is known by its number in `values`. Unpacks as values, counts.

    values  of row 0, of row 1, and so on; entries of no row may follow
    counts  (rows,) how many each row has
    """

    values: np.ndarray
    counts: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.values, self.counts))

    def rows_of(self, entries: np.ndarray) -> np.ndarray:
        """The row of each entry."""
        return np.searchsorted(self._ends, entries, side="right")

    def place_in_row(self, entries: np.ndarray) -> np.ndarray:
        """Which of its row's each entry is: 0 for the first."""
        rows = self.rows_of(entries)
        return np.asarray(entries - (self._ends[rows] - self.counts[rows]))

    def of_row(self, row: int) -> np.ndarray:
        """The values of one row."""
        end = int(self._ends[row])
        return self.values[end - int(self.counts[row]) : end]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts, dtype=np.int64)
