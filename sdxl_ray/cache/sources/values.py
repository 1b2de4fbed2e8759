"""Values of a table's row, or of a .json file, as an image's captions, size and point of interest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def texts_of(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """The captions of the first column that has any: a text, or a list of alternatives."""
    for column in columns:
        value = row.get(column)
        values = value if isinstance(value, list | tuple) else [value]
        texts = tuple(str(text).strip() for text in values if isinstance(text, str | int | float) and not _is_nan(text))
        texts = tuple(text for text in texts if text)
        if texts:
            return texts
    return ()


def size_of(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) in pixels, where both columns have a number above 0."""
    if len(columns) != 2:
        return None
    height, width = (_number(row.get(column)) for column in columns)
    return (int(height), int(width)) if height >= 1 and width >= 1 else None


def focus_of(
    row: Mapping[str, Any], columns: Sequence[str], original_hw: tuple[int, int] | None
) -> tuple[float, float] | None:
    """The point of interest as shares of height and width; None where there is none, or it is outside the image.

    Where one of the two numbers is above 1, both are pixels, which takes the image's size.
    """
    if len(columns) != 2:
        return None
    y, x = (_number(row.get(column)) for column in columns)
    if y > 1 or x > 1:
        if original_hw is None:
            return None
        y, x = y / original_hw[0], x / original_hw[1]
    return (y, x) if 0 <= y <= 1 and 0 <= x <= 1 else None


def _number(value: Any) -> float:
    """NaN where it is none: every comparison with it fails."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _is_nan(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))
