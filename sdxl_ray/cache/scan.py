"""Find the images: a content hash, the size as a person sees it, or the reason why not.

A new file is read whole, for its hash, and its header is parsed; pixels are decoded once, later, in images.py. What was
found is remembered by (path, size, modification time), so that a second run over unchanged files only lists the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sdxl_ray.cache.shards import write_table
from sdxl_ray.errors import DatasetError, storage_errors

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"})
SHOW_PROGRESS_FROM = 300  # new files: fewer take no time worth showing
_EXIF_ORIENTATION = 0x0112
_ROTATED_BY_A_QUARTER = (5, 6, 7, 8)

# Our own limit (dataset.max_pixels) is checked on the header, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """One file as it was found. `problem` is empty where the image can be used."""

    path: str
    size: int  # bytes
    mtime_ns: int
    image_hash: str  # sha256 of the bytes, hex
    height: int  # after EXIF rotation
    width: int
    problem: str = ""

    @property
    def identity(self) -> tuple[str, int, int]:
        return (self.path, self.size, self.mtime_ns)


def list_images(folder: str | Path) -> list[tuple[str, int, int]]:
    """(path, size, mtime_ns) of every image file below `folder`, sorted by path; hidden ones are left out.

    Links are followed; a folder reached twice, as in a loop of links, is read once. A file whose name is not UTF-8 is
    listed under an escaped name (`caf\\xe9.jpg`), which then "cannot be read": such a name fits in no index.

    Raises:
        DatasetError: the folder does not exist, is a file, or holds no image; or a folder cannot be looked into.
    """
    root = Path(folder)
    if not root.exists():
        raise DatasetError(f"dataset.path: {root} does not exist. Set it to the folder that holds your images.")
    if not root.is_dir():
        raise DatasetError(f"dataset.path: {root} is a file, expected a folder of images.")
    found = sorted(_walk(root))
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"dataset.path: no images in {root} or its subfolders. Looked for {kinds}")
    return found


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    seen: set[tuple[int, int]] = set()
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            status = Path(folder).stat()
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # deleted while we look
            continue
        except OSError as error:
            raise DatasetError(
                f"dataset.path: the folder {_printable(folder)} cannot be read: {error.strerror}. "
                "Allow it, or move it out of dataset.path."
            ) from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError):  # a link to itself: reported below if it is called like an image
                if entry.is_dir():
                    pending.append(entry.path)
                    continue
            if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122  (a Path per file doubles the time)
                continue
            try:
                file = entry.stat()
                yield (_printable(entry.path), file.st_size, file.st_mtime_ns)
            except OSError:  # a dangling link, or deleted while we look
                yield (_printable(entry.path), 0, 0)


def _printable(path: str) -> str:
    """The path with bytes that are not UTF-8 escaped; they would stop the terminal, Parquet and CSV."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def scan_file(identity: tuple[str, int, int], max_pixels: int) -> ScannedFile:
    """Read one file: hash its bytes, parse its header."""
    path, size, mtime_ns = identity

    def unusable(problem: str) -> ScannedFile:
        return ScannedFile(path, size, mtime_ns, "", 0, 0, problem)

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return unusable(f"cannot be read: {error.strerror or error}")
    if not content:
        return unusable("the file is empty")
    try:
        height, width = header_hw(content, max_pixels)
    except TooManyPixels as error:
        return unusable(f"{error} is more than dataset.max_pixels = {max_pixels}")
    except UnidentifiedImageError:
        return unusable("not an image that Pillow can read")
    except Exception as error:  # damaged bytes make Pillow raise nearly anything: AVIF's parser a RuntimeError
        return unusable(f"damaged header: {error}")
    return ScannedFile(path, size, mtime_ns, hashlib.sha256(content).hexdigest(), height, width)


class TooManyPixels(Exception):
    """The text is the size, as "width x height"."""


def header_hw(content: bytes, max_pixels: float = math.inf) -> tuple[int, int]:
    """(height, width) as a person sees the image: cameras store portrait photographs lying down, with an EXIF note.

    Raises:
        TooManyPixels: found before anything is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF; only what it cannot read matters here
        with Image.open(io.BytesIO(content)) as image:
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
    files: Sequence[tuple[str, int, int]],
    *,
    memo: Mapping[tuple[str, int, int], ScannedFile],
    max_pixels: int,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScannedFile]:
    """Every file, in the order given; those in `memo` are not opened. In threads: reading and hashing free the GIL.

    `progress` is called with (done, total) of the new files now and then; not at all where they are few.
    """
    unknown = [file for file in files if file not in memo]
    scanned = {}
    with ThreadPoolExecutor(num_threads or min(32, 4 * (os.cpu_count() or 1))) as threads:
        for done, file in enumerate(threads.map(lambda file: scan_file(file, max_pixels), unknown), start=1):
            scanned[file.identity] = file
            if len(unknown) >= SHOW_PROGRESS_FROM and (done % 100 == 0 or done == len(unknown)):
                progress(done, len(unknown))
    return [memo.get(file) or scanned[file] for file in files]


def read_memo(path: Path) -> dict[tuple[str, int, int], ScannedFile]:
    """What earlier runs found. A memo is never needed for correctness, so a damaged one is as good as none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return {}
    try:
        rows = pq.read_table(path).to_pylist()
        files = [ScannedFile(**row) for row in rows]
    except (pa.ArrowException, OSError, TypeError) as error:
        warnings.warn(f"{path}: {error}; the images are scanned again", stacklevel=2)
        return {}
    return {file.identity: file for file in files}


def write_memo(path: Path, files: Iterable[ScannedFile]) -> None:
    """Replaces the memo in one move; of two jobs writing at once the later wins, and nothing but time is lost."""
    with storage_errors("writing the list of scanned images", path, "Free some space; nothing encoded is lost."):
        write_table(path, [asdict(file) for file in files])
