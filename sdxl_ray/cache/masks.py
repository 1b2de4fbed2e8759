"""How much each latent pixel of an image counts: from the image's own transparency, or from a mask file."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from sdxl_ray.cache.formats import decode
from sdxl_ray.cache.images import UnreadableImage, averageable, opened, reasons
from sdxl_ray.cache.sources import read_bytes
from sdxl_ray.records import ImageRecord

# The scan holds masks to dataset.max_pixels. This is for one of a record that does not know the mask's bytes.
MAX_MASK_PIXELS = 250_000_000


def mask_cells(mask: Image.Image | None, record: ImageRecord) -> np.ndarray:
    """(height / 8, width / 8) uint8 of the record's bucket: how much each latent pixel counts, 255 fully.

    Resized, cropped, mirrored like the image; a latent pixel gets the mean of its 8x8 pixels.

    Args:
        mask: L, upright, of the image's aspect and any size: white counts. None: everything counts.
    """
    if mask is None:
        return np.full([edge // 8 for edge in record.bucket_hw], 255, np.uint8)
    vertical, horizontal = mask.height / record.resized_hw[0], mask.width / record.resized_hw[1]
    (top, left), (height, width) = record.crop_top_left, record.bucket_hw
    box = (left * horizontal, top * vertical, (left + width) * horizontal, (top + height) * vertical)
    box = (*box[:2], min(box[2], mask.width), min(box[3], mask.height))
    # BOX is the mean of an area, and where it enlarges, the nearest pixel: it does not blur a mask's edges.
    cells = np.asarray(mask.resize((width, height), Image.Resampling.BOX, box=box).reduce(8))
    return np.ascontiguousarray(cells[:, ::-1]) if record.flip else cells


def load_mask_file(record: ImageRecord) -> np.ndarray:
    """`mask_cells` of the image at the address `record.mask`; what is transparent there does not count.

    Raises:
        UnreadableImage: the mask cannot be decoded, is not the one that was scanned, or has another aspect than the
            image.
        OSError: this machine cannot read the file, which says nothing about the mask.
    """
    return mask_cells(_read_mask(record), record)


def _read_mask(record: ImageRecord) -> Image.Image:
    """The mask file, upright, as L."""
    what = f"its mask {record.mask}"
    try:
        content = read_bytes(record.mask)
    except ValueError as error:
        raise UnreadableImage(f"{what}: {error}", "mask") from None
    # Else it would be stored under the hash of the old one, and used for that when it is put back.
    if record.mask_hash and hashlib.sha256(content).hexdigest() != record.mask_hash:
        raise UnreadableImage(f"{what} changed while it was being cached; run `sdxl-ray cache` again", "changed")
    with reasons(f"{what} cannot be decoded", "mask"):
        with opened(content, record.mask, what=f"{what} ") as header:
            width, height = header.size
        if width * height > MAX_MASK_PIXELS:
            raise UnreadableImage(f"{what} has {height}x{width} pixels, more than {MAX_MASK_PIXELS:,}", "mask")
        image = averageable(decode(content))
        if image.mode == "RGBa":  # colour times transparency
            image = Image.merge("RGB", image.split()[:3])
        mask = image.convert("L")
    expected_height = mask.width * record.original_hw[0] / record.original_hw[1]
    if abs(mask.height - expected_height) > max(0.01 * expected_height, 1):
        height, width = record.original_hw
        raise UnreadableImage(
            f"{what} is {mask.height}x{mask.width} pixels (height x width), the image {height}x{width}: not the same "
            "aspect",
            "mask",
        )
    return mask
