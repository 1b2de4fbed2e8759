"""An image's pixels and mask for the encoder, or why not: what is the image's fault, and what is this machine's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np

from sdxl_ray.cache.images import UnreadableImage, load_mask, load_pixels
from sdxl_ray.cache.scan import CANNOT_BE_READ
from sdxl_ray.errors import StorageError
from sdxl_ray.records import ImageRecord

PAUSE_S = 3.0  # before the second attempt; stores and web servers have had several by then
# Of the refusals 408 and 429 mean "later", all others are for good.
_GONE = re.compile(r"\bnot found\b|\bHTTP 4(?!08|29)\d\d\b", re.IGNORECASE)


def load_image(record: ImageRecord) -> tuple[np.ndarray, np.ndarray | None]:
    """(height, width, 3) uint8 and, where the record has a mask, (height / 8, width / 8) uint8.

    Raises:
        UnreadableImage: it cannot be decoded; or its listing was trusted, so that nobody has opened it before, and it
            is not there.
        OSError, StorageError: this machine cannot read it, twice. Where somebody has read it before (`record.verify`),
            that says nothing about the image.
    """
    pixels = _read(load_pixels, record, is_known=record.verify)
    if not record.mask:
        return pixels, None
    # Mask files are always opened by the scan.
    return pixels, _read(load_mask, record, is_known=record.verify or record.mask != "alpha")


def is_web(error: OSError | StorageError) -> bool:
    """Whether it is a web server that did not give the image."""
    return str(getattr(error, "filename", None) or "").startswith(("http://", "https://"))


def reason_of(error: OSError | StorageError) -> str:
    """In words, without the name of the file where the system's error holds it apart."""
    return getattr(error, "strerror", None) or str(error)


def _read(load: Callable[[ImageRecord], np.ndarray], record: ImageRecord, *, is_known: bool) -> np.ndarray:
    for is_last in (False, True):
        try:
            return load(record)
        except (OSError, StorageError) as error:
            if not is_known and _is_gone(error, record):
                raise UnreadableImage(f"{CANNOT_BE_READ}: {reason_of(error)}") from None
            if is_last:
                raise
        time.sleep(PAUSE_S)
    raise AssertionError("unreachable")


def _is_gone(error: OSError | StorageError, record: ImageRecord) -> bool:
    """Whether the image is not there, or refused for good, whoever asks."""
    if isinstance(error, FileNotFoundError):
        return True
    _, _, told = reason_of(error).rpartition(record.path.rpartition("/")[2])  # a file may be called "not found.png"
    return _GONE.search(told) is not None
