"""An image's pixels and mask for the encoder, or why not: what is the image's fault, and what is this machine's."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from sdxl_ray.cache.images import UnreadableImage, load_pixels, load_pixels_and_alpha
from sdxl_ray.cache.masks import load_mask_file, mask_cells
from sdxl_ray.errors import StorageError
from sdxl_ray.records import ImageRecord

PAUSE_S = 3.0  # before the second attempt; stores and web servers have had several by then

Loaded = TypeVar("Loaded")


def load_image(record: ImageRecord) -> tuple[np.ndarray, np.ndarray | None]:
    """(height, width, 3) uint8 and, where the record has a mask, (height / 8, width / 8) uint8.

    Raises:
        UnreadableImage: it or its mask cannot be decoded, or is not the one that was scanned; or its listing was
            trusted, so that nobody has opened it before, and it is not there.
        OSError, StorageError: this machine cannot read it, twice. Where somebody has read it before (`record.verify`),
            that says nothing about the image.
        MemoryError: likewise.
    """
    if record.mask == "alpha":
        pixels, alpha = _load_twice(load_pixels_and_alpha, record, is_known=record.verify)
        return pixels, mask_cells(alpha, record)
    pixels = _load_twice(load_pixels, record, is_known=record.verify)
    # Mask files are always opened by the scan.
    return pixels, _load_twice(load_mask_file, record, is_known=True) if record.mask else None


def is_web(error: OSError | StorageError) -> bool:
    """Whether it is a web server that did not give the image."""
    return str(getattr(error, "filename", None) or "").startswith(("http://", "https://"))


def reason_of(error: OSError | StorageError) -> str:
    """In words, without the name of the file where the system's error holds it apart."""
    return getattr(error, "strerror", None) or str(error)


def not_given(error: OSError | StorageError) -> UnreadableImage:
    """What cannot be read, as a reason to skip the image."""
    return UnreadableImage(f"cannot be read: {reason_of(error)}", "unreadable")


def _load_twice(load: Callable[[ImageRecord], Loaded], record: ImageRecord, *, is_known: bool) -> Loaded:
    for is_last in (False, True):
        try:
            return load(record)
        except (OSError, StorageError) as error:
            if not is_known and _is_gone(error):
                raise not_given(error) from None
            if is_last:
                raise
        time.sleep(PAUSE_S)
    raise AssertionError("unreachable")


def _is_gone(error: OSError | StorageError) -> bool:
    """Whether the image is not there, or is a pipe or device, or its web server refuses it for good, whoever asks."""
    if isinstance(error, PermissionError):
        return is_web(error)
    return isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.EINVAL
