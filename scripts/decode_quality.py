"""What reading an image quickly costs in quality, and what it gains: the figures behind sdxl_ray/cache/images.py.

    python scripts/decode_quality.py [FOLDER...] [--resolution 1024]

FOLDER holds JPEGs and PNGs, searched recursively; without one, the demo photographs and what is made of them: mosaics
of 12, 24 and 48 megapixels, as telephones and cameras give. Times are of one core's work, the best of three. The
reference decodes all pixels, applies the colour profile to all of them and resizes with Pillow's LANCZOS. Regular
patterns are measured apart: stripes too fine to be drawn, of which nothing should be left.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageCms

from sdxl_ray.cache import images
from sdxl_ray.cache.buckets import Geometry, Unfit, cover, place
from sdxl_ray.cache.formats import decode
from sdxl_ray.cache.images import load_pixels
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.records import ImageRecord

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "sdxl_ray" / "demo" / "photographs"
PERIODS = (2.05, 2.2, 2.4, 2.7, 3.0, 3.7, 5.0, 7.0, 9.0, 12.0, 15.0)  # pixels from stripe to stripe


def changed(**names: object) -> contextlib.AbstractContextManager[object]:
    """These names of sdxl_ray/cache/images.py have these values while the context lasts; it may be entered again."""
    return mock.patch.multiple(images, **names)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels between two images of 8 bits; 100 where they are equal."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else 100.0


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """(result, seconds of processor time)."""
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return result, best


def reference(content: bytes, record: ImageRecord) -> np.ndarray:
    """The record's pixels by the shortest program that gives them."""
    image = decode(content)
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a profile that cannot be used is no profile
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    (height, width), (top, left) = record.bucket_hw, record.crop_top_left
    vertical, horizontal = image.height / record.resized_hw[0], image.width / record.resized_hw[1]
    box = (left * horizontal, top * vertical, (left + width) * horizontal, (top + height) * vertical)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def mosaics(folder: Path) -> list[Path]:
    """JPEGs of 12, 24 and 48 megapixels, tiled with the demo photographs at their own size."""
    tiles = [
        Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.glob("*.*")) if path.suffix in (".jpg", ".png")
    ]
    paths = []
    for number, (height, width) in enumerate([(3024, 4032), (4000, 6000), (6000, 8000)]):
        mosaic = Image.new("RGB", (width, height))
        top, at = 0, number
        while top < height:
            left, lowest = 0, height
            while left < width:
                tile = tiles[at % len(tiles)]
                mosaic.paste(tile, (left, top))
                left, at, lowest = left + tile.width, at + 1, min(lowest, tile.height)
            top += lowest
        paths.append(folder / f"mosaic_{width}x{height}.jpg")
        mosaic.save(paths[-1], "JPEG", quality=92)
    return paths


def record_of(path: Path, geometry: Geometry) -> tuple[bytes, ImageRecord] | None:
    """A file that can be read, with its place."""
    try:
        content = path.read_bytes()
        image = decode(content)
    except Exception as error:  # any: the list is of whatever lies in the folder
        print(f"left out: {path}: {error}")
        return None
    original_hw = (image.height, image.width)
    found = place(original_hw, "", geometry)
    if isinstance(found, Unfit):
        return None
    return content, ImageRecord(
        str(path), "", original_hw, found.bucket_hw, found.resized_hw, found.crops[0], verify=False
    )


def speed_and_quality(files: list[tuple[bytes, ImageRecord]]) -> None:
    """One line for each way to read each file, summed up by kind of file."""
    ways = {
        "with Pillow's LANCZOS": (changed(_torch_lanczos=lambda: None), False),
        "load_pixels": (contextlib.nullcontext(), False),
        "dataset.jpeg_scaling = true": (contextlib.nullcontext(), True),
    }
    kinds: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for content, record in files:
        expected, seconds = timed(lambda content=content, record=record: reference(content, record))
        megapixels = math.prod(record.original_hw) / 1e6
        size = next(
            text for limit, text in ((4, "up to 4"), (10, "4 to 10"), (math.inf, "above 10")) if megapixels <= limit
        )
        kind = "JPEG" if content[:2] == b"\xff\xd8" else "PNG"
        rows = kinds.setdefault(f"{kind}, {size} MP", {})
        rows.setdefault("reference", []).append((100.0, seconds, megapixels))
        for way, (as_in_this_way, scaled) in ways.items():
            if scaled and kind.startswith("PNG"):
                continue
            as_asked = dataclasses.replace(record, scaled_jpeg=scaled)
            with as_in_this_way:
                found, seconds = timed(lambda as_asked=as_asked: load_pixels(as_asked))
            rows.setdefault(way, []).append((psnr(found, expected), seconds, megapixels))
    print(f"\n{'':34}{'images':>8}{'images/s':>10}{'MP/s':>8}{'PSNR lowest':>13}{'median':>8}")
    for kind, rows in sorted(kinds.items()):
        print(kind)
        for way, results in rows.items():
            quality, seconds, megapixels = zip(*results, strict=True)
            print(
                f"  {way:32}{len(results):8}{len(results) / sum(seconds):10.1f}{sum(megapixels) / sum(seconds):8.0f}"
                f"{min(quality):13.1f}{statistics.median(quality):8.1f}"
            )


def quality_by_margin(files: list[tuple[bytes, ImageRecord]]) -> None:
    """How much must be left of a JPEG that is decoded smaller."""
    margins = (1.0, 1.5, 2.0, 2.25, 2.5, 3.0, 4.0)
    print("\nJPEGs decoded at 1/n, then resized: PSNR lowest (median), by how many times the needed size is left")
    print(f"{'':6}" + "".join(f"{margin:>14}" for margin in margins))
    for reduction in (2, 4, 8):
        cells = []
        for margin in margins:
            found = []
            for content, record in files:
                small = tuple(round(edge / (reduction * margin)) for edge in record.original_hw)
                if content[:2] != b"\xff\xd8" or min(small) < 96:
                    continue
                small_hw = cover(record.original_hw, (small[0], small[1]))
                whole = dataclasses.replace(record, resized_hw=small_hw, bucket_hw=small_hw, crop_top_left=(0, 0))
                expected = load_pixels(whole)
                with changed(_REDUCTIONS=((reduction, 0.0),)):
                    found.append(psnr(load_pixels(dataclasses.replace(whole, scaled_jpeg=True)), expected))
            cells.append(f"{min(found):.1f} ({statistics.median(found):.1f})" if found else "-")
        print(f"1/{reduction:<4}" + "".join(f"{cell:>14}" for cell in cells))
    in_use = (f"1/{reduction} from {margin} times on" for reduction, margin in images._REDUCTIONS)
    print(f"in use: {', '.join(in_use)}")


def grating(edge: int, period: float, degrees: float) -> bytes:
    """A JPEG of edge x edge pixels: grey stripes of all brightnesses, `period` pixels from one to the next."""
    down, across = np.mgrid[0:edge, 0:edge]
    phase = across * math.cos(math.radians(degrees)) + down * math.sin(math.radians(degrees))
    values = np.round(127.5 + 127.5 * np.sin(2 * np.pi * phase / period)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def moire(folder: Path) -> None:
    """What is left of stripes that lie less than 1.3 pixels apart in the result."""
    print(
        "\nFine stripes in JPEGs: what is left of them, standard deviation of 255 levels (90 in the file), worst angle"
    )
    print(f"{'period, pixels':34}" + "".join(f"{period:>7}" for period in PERIODS))
    for times, reduction in ((4.5, 2), (16, 4), (32, 8)):
        small, edge = 64, round(64 * times)
        for way, scaled in (("all pixels", False), (f"decoded at 1/{reduction}", True)):
            cells = []
            for period in PERIODS:
                left = []
                for degrees in (0, 30, 45) if period / times < 1.3 else ():
                    (folder / "stripes.jpg").write_bytes(grating(edge, period, degrees))
                    record = ImageRecord(
                        *(str(folder / "stripes.jpg"), "", (edge, edge), (small, small), (small, small), (0, 0)),
                        verify=False,
                        scaled_jpeg=scaled,
                    )
                    left.append(float(load_pixels(record)[4:-4, 4:-4].std()))  # the image's edge is an edge
                cells.append(f"{max(left):7.1f}" if left else f"{'-':>7}")
            print(f"{f'{times} times smaller, {way}':34}" + "".join(cells))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--resolution", type=int, default=1024, help="edge of the square bucket (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (geometry,) = Geometry.of(DatasetSection(resolution=(arguments.resolution,)))

    with tempfile.TemporaryDirectory() as made:
        paths = sorted(
            path
            for folder in arguments.folders or [PHOTOGRAPHS]
            for path in folder.rglob("*")
            if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file()
        )
        if not arguments.folders:
            paths += mosaics(Path(made))
        files = [file for path in paths if (file := record_of(path, geometry))]
        print(f"{len(files)} images to buckets of about {arguments.resolution} x {arguments.resolution}")
        speed_and_quality(files)
        quality_by_margin(files)
        moire(Path(made))


if __name__ == "__main__":
    main()
