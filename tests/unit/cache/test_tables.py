"""Rows found among millions. What becomes of large tables is in test_collection.py and test_text_memo.py."""

import numpy as np
import pytest

from sdxl_ray.cache.tables import find_rows

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
