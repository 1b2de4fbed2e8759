"""Rows found among millions. What becomes of large tables is in test_collection.py and test_text_memo.py."""

import numpy as np
import pyarrow as pa
import pytest

from sdxl_ray.cache import tables
from sdxl_ray.cache.tables import find_rows, gather

IDENTITIES = np.array([b"d\0", b"a", b"c", b"c\0x"], "S3")  # some end in zeros


@pytest.mark.parametrize("is_sorted", [True, False])
def test_each_wanted_one_is_found_where_it_is(is_sorted):
    order = np.argsort(IDENTITIES, kind="stable")
    wanted = np.array([b"c\0x", b"x", b"d", b"", b"a", b"c"], "S3")
    rows = find_rows(IDENTITIES[order], wanted) if is_sorted else find_rows(IDENTITIES, wanted, order)
    assert (rows < 0).tolist() == [False, True, False, True, False, False]
    assert (IDENTITIES[order] if is_sorted else IDENTITIES)[rows[rows >= 0]].tolist() == wanted[rows >= 0].tolist()


def test_among_none_nothing_is_found_and_of_none_neither():
    assert find_rows(np.empty(0, "S3"), IDENTITIES).tolist() == [-1] * 4
    assert find_rows(IDENTITIES[1:3], np.empty(0, "S3")).tolist() == []


@pytest.mark.parametrize("limit", [0, 4, 5, 99])
def test_no_piece_is_lost_whether_the_rows_lie_in_memory_or_in_a_file(monkeypatch, limit):
    monkeypatch.setattr(tables, "ROWS_IN_MEMORY", limit)
    schema = pa.schema([("number", pa.int32()), ("name", pa.dictionary(pa.int32(), pa.string()))])
    rows = [{"number": number, "name": f"name {number % 3}"} for number in range(9)]
    pieces = (pa.Table.from_pylist(rows[start : start + 2], schema) for start in range(0, 9, 2))
    assert gather(pieces, schema).to_pylist() == rows
