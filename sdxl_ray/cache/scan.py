"""Look at each image: a content hash, the size as a person sees it, or the reason why not.

A new file is read whole, for its hash, and its header is parsed; pixels are decoded once, later, in images.py. Where
the listing is trusted to identify images, only the first bytes are read. What was found is remembered in memo.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from sdxl_ray.cache.images import missing_plugin_hint, open_image
from sdxl_ray.cache.sources import read_bytes, read_start
from sdxl_ray.errors import StorageError
from sdxl_ray.records import Listed

SHOW_PROGRESS_FROM = 300  # new files: fewer take no time worth showing
CANNOT_BE_READ = "cannot be read"
TOO_LARGE = "dataset.max_pixels"
_EXIF_ORIENTATION = 0x0112
_ROTATED_BY_A_QUARTER = (5, 6, 7, 8)
_HEADER_BYTES = 64 * 1024  # EXIF with its thumbnail ends before, nearly always
_THREADS = 32  # of which most wait for a disk or a network

# Our own limit (dataset.max_pixels) is checked on the header, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """One image as it was found. `problem` is empty where it can be used."""

    image_hash: str  # sha256, hex; of the content, or of address and stamp where the listing is trusted
    height: int  # after EXIF rotation
    width: int
    problem: str = ""


def scan_file(listed: Listed, max_pixels: int, *, by_listing: bool = False) -> ScannedFile:
    """Read one file: hash its bytes, parse its header.

    Args:
        by_listing: identify it by its address and stamp, and read no more than the header; not even that where the
            listing knows its size.
    """
    address = listed.address or listed.path
    try:
        if by_listing:
            height, width = listed.original_hw or _hw_from_start(listed, max_pixels)
            if height * width > max_pixels:
                raise _Unusable(f"{width}x{height} is more than {TOO_LARGE} = {max_pixels}")
            identity = f"{address}\0{listed.stamp}".encode()
        else:
            identity = _read(address)
            height, width = _hw(identity, listed, max_pixels)
    except _Unusable as problem:
        return ScannedFile("", 0, 0, str(problem))
    return ScannedFile(hashlib.sha256(identity).hexdigest(), height, width)


class _Unusable(Exception):
    """The text is the problem."""


def _read(address: str, length: int = -1) -> bytes:
    """A file, or its start. What Pillow makes of the bytes is another matter, although it raises OSErrors too."""
    try:
        content = read_bytes(address) if length < 0 else read_start(address, length)
    except (OSError, StorageError) as error:
        raise _Unusable(f"{CANNOT_BE_READ}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:  # the data is at fault: an empty cell of a table, a tar file cut short
        raise _Unusable(str(error)) from None
    if not content:
        raise _Unusable("the file is empty")
    return content


def _hw(content: bytes, listed: Listed, max_pixels: int) -> tuple[int, int]:
    try:
        return header_hw(content, max_pixels)
    except TooManyPixels as error:
        raise _Unusable(f"{error} is more than {TOO_LARGE} = {max_pixels}") from None
    except UnidentifiedImageError:
        hint = missing_plugin_hint(listed.path, content[:64])
        raise _Unusable(hint or "not an image that Pillow can read") from None
    except Exception as error:  # damaged bytes make Pillow raise nearly anything: AVIF's parser a RuntimeError
        raise _Unusable(f"damaged header: {error}") from None


def _hw_from_start(listed: Listed, max_pixels: int) -> tuple[int, int]:
    """From as little of the file as will do: 64 KiB, 1 MiB, all of it."""
    address = listed.address or listed.path
    for length in (_HEADER_BYTES, 16 * _HEADER_BYTES):
        start = _read(address, length)
        try:
            return header_hw(start, max_pixels)
        except Exception as error:  # cut short, perhaps; whatever it is, it shows again on the whole file
            if len(start) < length or isinstance(error, TooManyPixels):
                return _hw(start, listed, max_pixels)
    return _hw(_read(address), listed, max_pixels)


class TooManyPixels(Exception):
    """The text is the size, as "width x height"."""


def header_hw(content: bytes, max_pixels: float = math.inf) -> tuple[int, int]:
    """(height, width) as a person sees the image: cameras store portrait photographs lying down, with an EXIF note.

    Raises:
        TooManyPixels: found before anything is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF; only what it cannot read matters here
        with open_image(content) as image:
            width, height = image.size
            if height * width > max_pixels:
                raise TooManyPixels(f"{width}x{height}")
            if image.format == "TIFF":  # Pillow turns these itself, so `size` is upright already
                return height, width
            if image.format == "PNG" and not _png_has_late_notes(content):
                exif = Image.Image.getexif(image)  # PNG's own getexif decodes all pixels first, to reach late notes
            else:
                exif = image.getexif()
    return (width, height) if exif.get(_EXIF_ORIENTATION, 1) in _ROTATED_BY_A_QUARTER else (height, width)


def _png_has_late_notes(content: bytes) -> bool:
    """Whether EXIF or text, which can hold EXIF or XMP, comes after the pixels; exiftool writes it there."""
    at, after_pixels = 8, False
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        after_pixels = after_pixels or kind == b"IDAT"
        if after_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        at += 12 + length
    return False


def scan_images(
    files: Sequence[Listed],
    *,
    max_pixels: int,
    by_listing: Sequence[bool] = (),
    num_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScannedFile]:
    """Every file, in the order given; see `scan_each`."""
    return list(
        scan_each(files, max_pixels=max_pixels, by_listing=by_listing, num_threads=num_threads, progress=progress)
    )


def scan_each(
    files: Sequence[Listed],
    *,
    max_pixels: int,
    by_listing: Sequence[bool] = (),
    num_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[ScannedFile]:
    """Every file, in the order given, as they come. In threads: reading and hashing free the GIL.

    `progress` is called with (done, total) now and then; not at all where they are few.
    """
    trusted = by_listing or [False] * len(files)

    def scan(piece: range) -> list[ScannedFile]:
        return [scan_file(files[at], max_pixels, by_listing=trusted[at]) for at in piece]

    pieces = [range(start, min(start + 16, len(files))) for start in range(0, len(files), 16)]
    done = 0
    with ThreadPoolExecutor(num_threads or min(_THREADS, 4 * (os.cpu_count() or 1))) as threads:
        for found in threads.map(scan, pieces):
            yield from found
            done += len(found)
            if len(files) >= SHOW_PROGRESS_FROM and (done % 128 == 0 or done == len(files)):
                progress(done, len(files))
