"""Look at each image: a content hash, the size as a person sees it, or the reason why not.

A new file is read whole, for its hash, and its header is parsed; pixels are decoded once, later, in images.py. Where
the listing is trusted to identify images, only the first bytes are read. What was found is remembered in memo.py.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdxl_ray.cache.formats import ORIENTATION_TAG, missing_plugin_hint, open_image, png_has_late_notes
from sdxl_ray.cache.sources import read_bytes, read_start
from sdxl_ray.errors import StorageError
from sdxl_ray.records import Listed, Problem

SHOW_PROGRESS_FROM = 300  # new files: fewer take no time worth showing
_ROTATED_BY_A_QUARTER = (5, 6, 7, 8)
_HEADER_BYTES = 64 * 1024  # EXIF with its thumbnail ends before, nearly always
_THREADS = 32  # of which most wait for a disk or a network


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """One image as it was found. `problem`, in words, and `kind` are empty where it can be used."""

    image_hash: str  # sha256, hex; of the content, or of address and stamp where the listing is trusted
    height: int  # after EXIF rotation
    width: int
    problem: str = ""
    kind: Problem = ""


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
                raise _too_large(f"{height}x{width}", max_pixels)
            identity = f"{address}\0{listed.stamp}".encode()
        else:
            identity = _read_file(address)
            height, width = _hw(identity, listed, max_pixels)
    except _Unusable as problem:
        return ScannedFile("", 0, 0, str(problem), problem.kind)
    return ScannedFile(hashlib.sha256(identity).hexdigest(), height, width)


class _Unusable(Exception):
    """The text is the problem."""

    def __init__(self, problem: str, kind: Problem = "damaged") -> None:
        super().__init__(problem)
        self.kind = kind


def _too_large(size: str, max_pixels: int) -> _Unusable:
    return _Unusable(f"{size} pixels (height x width) is more than dataset.max_pixels = {max_pixels}", "too_large")


def _read_file(address: str, length: int = -1) -> bytes:
    """A file, or its start. What Pillow makes of the bytes is another matter, although it raises OSErrors too."""
    try:
        content = read_bytes(address) if length < 0 else read_start(address, length)
    except (OSError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _Unusable(f"cannot be read: {reason}", "unreadable") from None
    except ValueError as error:  # the data is at fault: an empty cell of a table, a tar file cut short
        raise _Unusable(str(error)) from None
    if not content:
        raise _Unusable("the file is empty")
    return content


def _hw(content: bytes, listed: Listed, max_pixels: int) -> tuple[int, int]:
    try:
        return header_hw(content, max_pixels)
    except TooManyPixels as error:
        raise _too_large(str(error), max_pixels) from None
    except UnidentifiedImageError:
        hint = missing_plugin_hint(listed.path, content[:64])
        if hint:
            raise _Unusable(hint, "needs_package") from None
        raise _Unusable("not an image that Pillow can read") from None
    except Exception as error:  # damaged bytes make Pillow raise nearly anything: AVIF's parser a RuntimeError
        raise _Unusable(f"damaged header: {error}") from None


def _hw_from_start(listed: Listed, max_pixels: int) -> tuple[int, int]:
    """From as little of the file as will do: 64 KiB, 1 MiB, all of it."""
    address = listed.address or listed.path
    for length in (_HEADER_BYTES, 16 * _HEADER_BYTES):
        start = _read_file(address, length)
        try:
            return _webp_hw(start, max_pixels) or header_hw(start, max_pixels)
        except TooManyPixels as error:
            raise _too_large(str(error), max_pixels) from None
        except Exception:  # cut short, perhaps; whatever it is, it shows again on the whole file
            if len(start) < length:
                return _hw(start, listed, max_pixels)
    return _hw(_read_file(address), listed, max_pixels)


def _webp_hw(start: bytes, max_pixels: int) -> tuple[int, int] | None:
    """What `header_hw` gives for a WebP, from its first 30 bytes; Pillow wants the whole file for that.

    The first chunk: "WebP Container Specification" (developers.google.com/speed/webp/docs/riff_container; RFC 9649,
    section 2). In it the header of lossy pixels (RFC 6386, 9.1) or of lossless ones (RFC 9649, section 3). None:
    another format, or notes behind the pixels (EXIF, XMP) may turn the image.

    Raises:
        TooManyPixels
    """
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(start) < 30:
        return None
    kind = start[12:16]
    if kind == b"VP8X" and not start[20] & 0x0C:  # 8: EXIF, 4: XMP
        width, height = (1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(start[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    elif kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        return None
    if height * width > max_pixels:
        raise TooManyPixels(f"{height}x{width}")
    return height, width


class TooManyPixels(Exception):
    """The text is the size, as "height x width" is written: 6000x4000."""


def header_hw(content: bytes, max_pixels: float = math.inf) -> tuple[int, int]:
    """(height, width) as a person sees the image: cameras store portrait photographs lying down, with an EXIF note.

    Raises:
        TooManyPixels: found before anything is decoded.
    """
    with open_image(content) as image:
        width, height = image.size
        if height * width > max_pixels:
            raise TooManyPixels(f"{height}x{width}")
        if image.format == "TIFF":  # Pillow turns these itself, so `size` is upright already
            return height, width
        if image.format == "PNG" and not png_has_late_notes(content):
            exif = Image.Image.getexif(image)  # PNG's own getexif decodes all pixels first, to reach late notes
        else:
            exif = image.getexif()
    return (width, height) if exif.get(ORIENTATION_TAG, 1) in _ROTATED_BY_A_QUARTER else (height, width)


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


def scan_all(
    scan: Callable[..., Iterator[ScannedFile]], progress: Callable[[str, int, int], None]
) -> Callable[..., Iterator[ScannedFile]]:
    """`scan`, which is called for one part of the files after another and tells of each, with a progress of all.

    Args:
        progress: called with ("scan", done, total): of the parts so far.
    """
    before = 0

    def scan_part(files: Sequence[Listed], **options: Any) -> Iterator[ScannedFile]:
        nonlocal before
        start = before
        before += len(files)
        return scan(files, progress=lambda done, total: progress("scan", start + done, start + total), **options)

    return scan_part


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
