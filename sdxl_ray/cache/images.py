"""One file to pixels: upright, sRGB, resized without aliasing, cropped where buckets.py said."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from sdxl_ray.records import ImageRecord


class UnreadableImage(Exception):
    """The pixels cannot be decoded; the image is skipped and listed with this reason."""


def load_pixels(record: ImageRecord) -> np.ndarray:
    """(height, width, 3) uint8 sRGB of the record's bucket.

    Raises:
        UnreadableImage: the file cannot be decoded, or is not the one that was scanned.
        OSError: this machine cannot read the file, which says nothing about the image.
    """
    if record.resized_hw is None or record.bucket_hw is None or record.crop_top_left is None:
        raise ValueError(f"{record.path} has no bucket yet")
    content = Path(record.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != record.image_hash:
        raise UnreadableImage("changed while it was being cached; run `sdxl-ray cache` again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF or a truncated palette; failures raise
        try:
            image = to_srgb(decode(content))
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes make Pillow raise nearly anything: AVIF's decoder a RuntimeError
            raise UnreadableImage(f"cannot be decoded: {error}") from None
    return np.asarray(_resize_and_crop(image, record.resized_hw, record.crop_top_left, record.bucket_hw))


def _resize_and_crop(
    image: Image.Image, resized_hw: tuple[int, int], crop_top_left: tuple[int, int], bucket_hw: tuple[int, int]
) -> Image.Image:
    """The crop at `crop_top_left` of the image resized to `resized_hw`.

    Only the crop is computed: a strip of 10x30000 px covers its bucket at 512x1536000, which nobody needs whole.
    """
    vertical, horizontal = image.height / resized_hw[0], image.width / resized_hw[1]  # source pixels per resized pixel
    (top, left), (height, width) = crop_top_left, bucket_hw
    box = (left * horizontal, top * vertical, (left + width) * horizontal, (top + height) * vertical)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # not past the edge by rounding
    # LANCZOS widens its kernel when it shrinks, so fine patterns turn grey instead of into moiré.
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def decode(content: bytes) -> Image.Image:
    """The first frame, upright. Keeps mode and colour profile."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB in the sRGB colour space: profiles applied, 16 bits scaled to 8, transparency laid over white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scaled_to_8_bits(image)
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
    alpha = None
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    image = _apply_profile(image, profile)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greys by division, not by clipping, which is what Pillow's own conversion does."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" and values.size and values.max() <= 1.0:
        values = values * 65535.0
    return Image.fromarray(np.clip(np.round(values / 257.0), 0, 255).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Adobe RGB, Display P3 and CMYK profiles to sRGB; one that does not fit its image is ignored, as viewers do."""
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # OSError: not a profile at all
        return image
    return converted or image
