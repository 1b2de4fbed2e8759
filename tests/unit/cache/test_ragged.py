"""Rows of different lengths in two arrays."""

import itertools

import numpy as np
import pytest

from sdxl_ray.cache.ragged import Ragged

ROWS = [[10, 11], [], [20], [], [30, 31, 32], []]


@pytest.fixture
def ragged():
    """With two entries behind the rows."""
    return Ragged(np.array([*itertools.chain(*ROWS), 98, 99]), np.array([len(row) for row in ROWS], np.int32))


def test_an_entry_knows_its_row_and_its_place_there(ragged):
    entries = np.array([5, 0, 2, 3, 1, 4])
    rows, places = ragged.rows_of(entries), ragged.place_in_row(entries)
    assert rows.tolist() == [4, 0, 2, 4, 0, 4]
    assert [ROWS[row][place] for row, place in zip(rows, places, strict=True)] == ragged.values[entries].tolist()


def test_what_belongs_to_no_row_is_of_the_one_behind_the_last(ragged):
    assert ragged.rows_of(np.array([6, 7])).tolist() == [6, 6]


def test_the_values_of_a_row(ragged):
    assert [ragged.of_row(row).tolist() for row in range(6)] == ROWS


def test_nothing():
    nothing = Ragged(np.empty(0, "S16"), np.empty(0, np.int32))
    assert nothing.rows_of(np.empty(0, int)).tolist() == nothing.place_in_row(np.empty(0, int)).tolist() == []
    values, counts = nothing
    assert (len(values), len(counts)) == (0, 0)
