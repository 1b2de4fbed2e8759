"""Values of a table's row, or of a .json file, as an image's captions, size and point of interest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def texts_of(row: Mapping[str, Any], columns: Sequence[str], tag_separator: str = "") -> tuple[str, ...]:
    """The captions of the first column that has any: a text, or a list.

    Args:
        tag_separator: a list is the tags of one caption, to be joined with it; empty: a list of alternatives.
    """
    for column in columns:
        value = row.get(column)
        values = value if isinstance(value, list | tuple) else [value]
        texts = tuple(str(text).strip() for text in values if isinstance(text, str | int | float) and not _is_nan(text))
        texts = tuple(text for text in texts if text)
        if texts:
            return (joined_tags(texts, tag_separator),) if tag_separator else texts
    return ()


def joined_tags(tags: Iterable[str], separator: str) -> str:
    """With a space behind each separator, unless it ends in one."""
    return (separator if separator[-1].isspace() else f"{separator} ").join(tags)


_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def json_value(content: bytes) -> Any:
    """`json.loads`, with U+FFFD for half of a character ("\\ud83d" alone), which no file's name or caption can hold.

    Raises:
        ValueError, RecursionError: it is no JSON; UnicodeDecodeError: nor text.
    """
    text = content.decode(json.detect_encoding(content), "surrogatepass")
    value = json.loads(text)
    return _whole(value) if _HALF.search(text) else value


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {_whole(key): _whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def size_of(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) in pixels, where both columns have a number above 0."""
    if len(columns) != 2:
        return None
    height, width = (_number(row.get(column)) for column in columns)
    return (int(height), int(width)) if height >= 1 and width >= 1 else None


def focus_of(
    row: Mapping[str, Any], columns: Sequence[str], original_hw: tuple[int, int] | None
) -> tuple[float, float] | None:
    """The point of interest as `as_shares` takes it; as shares where the image's size is known.

    None where there is none, or it is outside the image.
    """
    if len(columns) != 2:
        return None
    y, x = (_number(row.get(column)) for column in columns)
    if not (y >= 0 and x >= 0):
        return None
    return (y, x) if original_hw is None else as_shares((y, x), original_hw)


def as_shares(focus_yx: tuple[float, float] | None, original_hw: tuple[int, int]) -> tuple[float, float] | None:
    """A point of interest as shares of height and width; None where it is outside the image.

    Where one of the two numbers is above 1, both are pixels.
    """
    if focus_yx is None:
        return None
    y, x = focus_yx
    if y > 1 or x > 1:
        y, x = y / original_hw[0], x / original_hw[1]
    return (y, x) if 0 <= y <= 1 and 0 <= x <= 1 else None


def _number(value: Any) -> float:
    """NaN where it is none: every comparison with it fails."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _is_nan(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))
