"""One file to pixels: upright, sRGB, resized without aliasing, cropped where buckets.py said.

The order is for speed: all that can wait until the image is small comes after the resize.

    read the bytes, check that they are the ones that were scanned       _read_scanned
    open and decode; a JPEG at 1/2, 1/4 or 1/8 where the record says so  _decode
    a mode that can be averaged: no palettes, transparency multiplied    averageable
    LANCZOS, which turns patterns finer than a pixel grey; crop          _resize_and_crop
    colour profile, white below transparency, RGB                        _to_srgb
    upright, mirrored                                                    _turn

Transparency that is the image's mask is taken off before all of that: what its mask leaves out is seen by the VAE too,
and is to be the picture's own, not white.

Of what can go wrong, only what the file's own bytes decide is a reason to skip the image (`reasons`): decoding, the
mode, the colour profile. That a machine has no memory left for resizing is no fault of the image.

What each choice costs and gains: `python scripts/decode_quality.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from sdxl_ray.cache.formats import ORIENTATION_TAG, missing_plugin_hint, open_image, png_has_late_notes
from sdxl_ray.cache.sources import read_bytes
from sdxl_ray.records import ImageRecord, Problem

# Pillow gives freed pixel memory back to the system, which then clears it page by page for the next image: half of the
# time of decoding 24 MP. So it keeps some, in blocks of 16 MiB.
with contextlib.suppress(AttributeError):  # not among the functions that Pillow promises to keep
    Image.core.set_blocks_max(4)

# A JPEG's decoder can shrink as it goes, in 0.65 of the time (`ImageRecord.scaled_jpeg`). (n, m): to 1/n where what is
# left is at least m times the size that is needed. Photographs then come out as from all pixels, to 45 dB or better;
# with only 2 times left of 1/4 it can be 38 dB. But the decoder cuts frequencies off in each block of 8 x 8 apart, so
# that of stripes of 2.4 pixels a quarter is left, as moire; a larger m does not help.
_REDUCTIONS = ((8, 4.0), (4, 4.0), (2, 2.25))


class UnreadableImage(Exception):
    """The pixels cannot be had; the image is skipped and listed with this reason."""

    def __init__(self, reason: str, kind: Problem = "damaged") -> None:
        super().__init__(reason)
        self.kind = kind


class _Turn(NamedTuple):
    """How stored pixels become upright ones: rows and columns swapped, then top and bottom, then left and right."""

    swap: bool
    upside_down: bool
    mirror: bool


# EXIF's eight orientations.
_TURNS = {
    1: _Turn(False, False, False),
    2: _Turn(False, False, True),
    3: _Turn(False, True, True),
    4: _Turn(False, True, False),
    5: _Turn(True, False, False),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(True, True, False),
}


class _Window(NamedTuple):
    """A crop of the resized image, in pixels."""

    top: int
    left: int
    height: int
    width: int


# ---- an image --------------------------------------------------------------------------------------------------------


def load_pixels(record: ImageRecord) -> np.ndarray:
    """(height, width, 3) uint8 sRGB of the record's bucket; mirrored where it says so.

    What is transparent is laid on white; or, where transparency is the mask (`record.mask`), as opaque as all else.

    Raises:
        UnreadableImage: the file cannot be decoded, or is not the one that was listed.
        OSError: this machine cannot read the file, which says nothing about the image.
        MemoryError: likewise.
    """
    content = _read_scanned(record)
    with reasons(_UNDECODABLE):
        image, turn, stored_hw = _decode(content, record)
    return _pixels_of(image, turn, stored_hw, record)


def load_pixels_and_alpha(record: ImageRecord) -> tuple[np.ndarray, Image.Image | None]:
    """What `load_pixels` gives, and how opaque the image is: L, upright, whole, not mirrored; None where it is all.

    Raises what `load_pixels` raises.
    """
    content = _read_scanned(record)
    with reasons(_UNDECODABLE):
        image, turn, stored_hw = _decode(content, record)
        alpha = None
        image = _in_8_bits(image)
        if image.has_transparency_data:
            alpha = Image.fromarray(_turn(np.asarray(image.convert("RGBA").getchannel("A")), turn))
    return _pixels_of(image, turn, stored_hw, record), alpha


def _read_scanned(record: ImageRecord) -> bytes:
    """The file's bytes, which are the ones that were scanned."""
    try:
        content = read_bytes(record.address or record.path)
    except ValueError as error:
        raise UnreadableImage(str(error), "changed") from None
    if record.verify and hashlib.sha256(content).hexdigest() != record.image_hash:
        raise UnreadableImage("changed while it was being cached; run `sdxl-ray cache` again", "changed")
    return content


_UNDECODABLE = "cannot be decoded"


@contextlib.contextmanager
def reasons(what: str, kind: Problem = "damaged") -> Iterator[None]:
    """Damaged bytes make Pillow raise nearly anything, AVIF's decoder a RuntimeError: all of it is a reason to skip.

    So only for what works on a file's bytes. Where a decoder says that it had too little memory, as Pillow's do with an
    OSError, they may be damaged or not: the image is skipped, and tried again in the next run.
    """
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:
        is_memory = kind == "damaged" and "memory" in str(error).lower()
        raise UnreadableImage(f"{what}: {error}", "unreadable" if is_memory else kind) from None


def opened(content: bytes, path: str, *, what: str = "") -> Image.Image:
    """`open_image`, for bytes that the scan could open.

    Args:
        what: begins the reason: "its mask cat.png ".

    Raises:
        UnreadableImage: not on this machine, which lacks a package that the one of the scan has.
        PIL.UnidentifiedImageError: see `open_image`.
    """
    try:
        return open_image(content)
    except UnidentifiedImageError:
        hint = missing_plugin_hint(path, content[:64])
        if hint:
            node = socket.gethostname()
            raise UnreadableImage(f"{what}cannot be decoded on {node}: {hint}", "needs_package") from None
        raise


def _decode(content: bytes, record: ImageRecord) -> tuple[Image.Image, _Turn, tuple[float, float]]:
    """The first frame as stored, how to turn it, and its height and width.

    Those are fractions where a JPEG was decoded at 1/2 (`scaled_jpeg`): a row of 101 pixels gives 51, of which the last
    is half beyond the edge.
    """
    with opened(content, record.path) as image:
        width, height = image.size
        if not record.verify and sorted((height, width)) != sorted(record.original_hw):  # before a bomb is decoded
            raise _not_as_listed((height, width), record)
        reduction = 1
        if image.format in ("JPEG", "MPO"):
            turn = _TURNS.get(image.getexif().get(ORIENTATION_TAG, 1), _TURNS[1])
            resized_hw = record.resized_hw[::-1] if turn.swap else record.resized_hw
            reduction = jpeg_reduction((height, width), resized_hw) if record.scaled_jpeg else 1
            if reduction > 1:
                image.draft(None, (width // reduction, height // reduction))
            image.load()
        else:  # a PNG's notes may come after its pixels; a TIFF is turned as it is loaded
            image.load()
            width, height = image.size
            turn = _TURNS.get(image.getexif().get(ORIENTATION_TAG, 1), _TURNS[1])
        upright_hw = (width, height) if turn.swap else (height, width)
        if not record.verify and upright_hw != record.original_hw:
            if image.format == "PNG" and png_has_late_notes(content):
                raise UnreadableImage(
                    "is turned by a note behind its pixels, which a scan of its start does not see: set "
                    'dataset.identify_by = "content"',
                    "changed",
                )
            raise _not_as_listed(upright_hw, record)
        return image, turn, (height / reduction, width / reduction)


def _not_as_listed(found_hw: tuple[int, int], record: ImageRecord) -> UnreadableImage:
    (height, width), (listed_height, listed_width) = found_hw, record.original_hw
    return UnreadableImage(
        f"is {height}x{width} pixels (height x width), but was listed as {listed_height}x{listed_width}", "other_size"
    )


def _pixels_of(image: Image.Image, turn: _Turn, stored_hw: tuple[float, float], record: ImageRecord) -> np.ndarray:
    """(height, width, 3) uint8 of the record's bucket from what `_decode` gives."""
    profile = image.info.get("icc_profile")
    window = _Window(*record.crop_top_left, *record.bucket_hw)
    resized_hw, window = _before_turning(turn, record.resized_hw, window)
    with reasons(_UNDECODABLE):
        image = _in_8_bits(image)
        if record.mask == "alpha" and image.has_transparency_data:
            image = image.convert("RGBA").convert("RGB")  # the colours behind the transparency, as the file has them
        image = averageable(image)
    pixels = _resize_and_crop(image, stored_hw, resized_hw, window)
    with reasons(_UNDECODABLE):
        pixels = _to_srgb(pixels, image.mode, profile)
    return np.ascontiguousarray(_turn(pixels, turn._replace(mirror=turn.mirror != record.flip)))


def jpeg_reduction(stored_hw: tuple[int, int], resized_hw: tuple[int, int]) -> int:
    """1, 2, 4 or 8: how much smaller a JPEG can be decoded without a difference that matters in photographs."""
    ratio = min(stored / resized for stored, resized in zip(stored_hw, resized_hw, strict=True))
    return next((reduction for reduction, margin in _REDUCTIONS if ratio >= reduction * margin), 1)


def _before_turning(turn: _Turn, resized_hw: tuple[int, int], window: _Window) -> tuple[tuple[int, int], _Window]:
    """Size of the resized image and the crop in it, as they lie before the image is turned upright.

    Turning a crop of one megapixel is cheap; turning 24 takes as long as decoding them.
    """
    top, left, height, width = window
    if turn.upside_down:
        top = resized_hw[0] - height - top
    if turn.mirror:
        left = resized_hw[1] - width - left
    if turn.swap:
        return (resized_hw[1], resized_hw[0]), _Window(left, top, width, height)
    return resized_hw, _Window(top, left, height, width)


def _turn(pixels: np.ndarray, turn: _Turn) -> np.ndarray:
    """A view of (height, width, ...) pixels."""
    if turn.swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if turn.upside_down else 1, :: -1 if turn.mirror else 1]


# ---- resize ----------------------------------------------------------------------------------------------------------


def averageable(image: Image.Image) -> Image.Image:
    """The image as L, RGB, CMYK or RGBa, which is colour times transparency: the modes whose pixels can be averaged."""
    image = _in_8_bits(image)
    if image.has_transparency_data:
        return image if image.mode == "RGBa" else image.convert("RGBA").convert("RGBa")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 and 32 bits as L, or LA where one of them is transparent; other images as they are.

    By division, not by clipping, which is what Pillow's own conversions do.
    """
    if not image.mode.startswith("I;16") and image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    transparent = image.info.get("transparency")  # of a PNG: a grey of 16 bits
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(values)
        if values.size and values.max() <= 1.0:
            values = values * 65535.0
        values = np.round(values)
    values = np.clip(values, 0, 65535).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def _resize_and_crop(
    image: Image.Image, stored_hw: tuple[float, float], resized_hw: tuple[int, int], window: _Window
) -> np.ndarray:
    """(height, width) or (height, width, channels) uint8: the window of the image resized to `resized_hw`.

    LANCZOS widens its kernel when it shrinks, so fine patterns turn grey instead of into moiré. torch's gives the same
    to a level or two (72 dB) in a tenth of the time: it uses the processor's vector instructions.

    Args:
        stored_hw: what of the image is to be seen, from its top left corner; its size, or less than a pixel below.
    """
    top, left, height, width = window
    if resized_hw == stored_hw:
        return _pixels(image, (left, top, left + width, top + height))
    lanczos = _torch_lanczos()
    # A strip of 10x30000 px covers its bucket at 512x1536000, which nobody needs whole; Pillow computes just the crop.
    needs_most = resized_hw[0] * resized_hw[1] <= 4 * height * width
    if lanczos is None or image.mode == "L" or not needs_most:
        vertical, horizontal = stored_hw[0] / resized_hw[0], stored_hw[1] / resized_hw[1]  # stored pixels per resized
        box = (left * horizontal, top * vertical, (left + width) * horizontal, (top + height) * vertical)
        box = (*box[:2], min(box[2], stored_hw[1]), min(box[3], stored_hw[0]))  # not past the edge by rounding
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    resized = lanczos(_pixels(image, (0, 0, *image.size)), stored_hw, resized_hw)
    return resized[top : top + height, left : left + width]


def _pixels(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """(height, width[, channels]) uint8 of the box (left, top, right, bottom).

    In bands, because `np.asarray(image)` passes large images through memory that the system clears first, page by page:
    84 ms against 21 for 24 MP.
    """
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, *([] if image.mode == "L" else [len(image.getbands())])), np.uint8)
    for start in range(top, bottom, 64):
        end = min(start + 64, bottom)
        pixels[start - top : end - top] = np.asarray(image.crop((left, start, right, end)))
    return pixels


@functools.cache
def _torch_lanczos() -> Callable[[np.ndarray, tuple[float, float], tuple[int, int]], np.ndarray] | None:
    """(pixels, stored_hw, resized_hw) -> (height, width, channels) uint8; None before torch 2.12, which has none."""
    import torch
    from torch.nn import functional

    if not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
        return None

    def lanczos(pixels: np.ndarray, stored_hw: tuple[float, float], resized_hw: tuple[int, int]) -> np.ndarray:
        # Scales, not sizes: the last stored pixel may be a fraction. A trifle above, or 1195 may come out as 1194.
        scales = tuple(resized / stored * (1 + 1e-9) for resized, stored in zip(resized_hw, stored_hw, strict=True))
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, C, H, W), channels last in memory
        try:
            resized = functional.interpolate(planes, scale_factor=scales, mode="lanczos", antialias=True)
        except RuntimeError as error:  # "DefaultCPUAllocator: can't allocate memory"; users are told what to do then
            if "allocate memory" not in str(error):
                raise
            raise MemoryError(str(error)) from None
        return resized[0].permute(1, 2, 0).numpy()[: resized_hw[0], : resized_hw[1]]

    return lanczos


# ---- colour ----------------------------------------------------------------------------------------------------------


def _to_srgb(pixels: np.ndarray, mode: str, profile: bytes | None) -> np.ndarray:
    """(height, width, 3) uint8 in the sRGB colour space: profile applied, transparency laid over white.

    Args:
        mode: L, RGB, CMYK or RGBa, as `averageable` gives.
    """
    if mode == "RGB" and not profile:
        return pixels
    if mode == "RGBa":
        alpha = pixels[..., 3:]
        if not profile:  # colour times alpha is there already; LANCZOS overshoots, so it may exceed alpha
            return np.minimum(pixels[..., :3].astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
        colours = _apply_profile(_image(pixels, mode).convert("RGBA").convert("RGB"), profile)
        white = Image.new("RGB", colours.size, "white")
        return np.asarray(Image.composite(colours, white, Image.fromarray(np.ascontiguousarray(alpha[..., 0]))))
    image = _apply_profile(_image(pixels, mode), profile)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _image(pixels: np.ndarray, mode: str) -> Image.Image:
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels))


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Adobe RGB, Display P3 and CMYK profiles to sRGB; one that does not fit its image is ignored, as viewers do."""
    transform = _transform_to_srgb(profile, image.mode) if profile else None
    return ImageCms.applyTransform(image, transform) or image if transform else image


@functools.lru_cache(maxsize=64)  # a camera writes the same profile into all its images
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):  # OSError: not a profile at all
        return None
