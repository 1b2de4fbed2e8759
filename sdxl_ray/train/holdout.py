"""Images that are held out of training, to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_holdout(image_hashes: Sequence[str] | np.ndarray, share: float, max_images: int) -> tuple[np.ndarray, ...]:
    """(rows to train on, rows held out), by content: copies of an image stay on one side, and adding images moves none.

    Of the images that `share` catches, those with the `max_images` smallest hashes are held out and the others trained
    on; there, adding an image can give one back to training, and never the reverse. Where `share` > 0 catches none of a
    small collection, the image with the smallest hash is held out; at least one image is always left to train on.

    Args:
        image_hashes: 64 hexadecimal digits each; strings, or an array of "S64".
    """
    hashes = np.asarray(image_hashes, dtype="S64")
    rows = np.arange(len(hashes))
    if share <= 0 or not len(hashes) or (hashes == hashes[0]).all():
        return rows, rows[:0]
    # The first eight digits decide nearly everything and are quick to compare; whole hashes are slow to sort.
    numbers = first_digits(hashes)
    caught = np.unique(numbers[numbers / 2**32 < share])[:max_images]
    candidates = hashes[numbers <= (caught[-1] if len(caught) else numbers.min())]
    held_out = np.unique(candidates)[: max_images if len(caught) else 1]
    is_held_out = is_one_of(hashes, held_out)
    if is_held_out.all():
        is_held_out = is_one_of(hashes, held_out[:-1])
    return rows[~is_held_out], rows[is_held_out]


def is_one_of(hashes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(N,) bool: which of `hashes` ("S64") are among `chosen`. Quick where these are few."""
    found = np.isin(first_digits(hashes), first_digits(chosen))
    found[found] = np.isin(hashes[found], chosen)
    return found


def first_digits(hashes: np.ndarray) -> np.ndarray:
    """The number that the first eight hexadecimal digits of each hash ("S64") are, (N,) uint32."""
    digits = np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), 64)[:, :8]
    values = np.where(digits >= ord("a"), digits - ord("a") + 10, digits - ord("0")).astype(np.uint32)
    return values @ (np.uint32(16) ** np.arange(7, -1, -1, dtype=np.uint32))
