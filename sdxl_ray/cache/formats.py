"""Bytes to an opened image: the formats that are read, and the plug-ins that some of them need."""

from __future__ import annotations

import functools
import importlib
import io
import warnings

from PIL import Image, ImageOps

# Pillow's own limit is off: what was scanned is held to dataset.max_pixels, what was not to the size that was listed.
Image.MAX_IMAGE_PIXELS = None

# Odd EXIF, a truncated palette: nothing that one could do about it, and failures raise. Once for the process, because
# `warnings.catch_warnings` in one thread undoes that of another.
warnings.filterwarnings("ignore", module=r"PIL\.")

ORIENTATION_TAG = 0x0112  # of EXIF

# Formats that Pillow reads with a plug-in: (what imports, what pip installs).
PLUGINS = {"HEIC": ("pillow_heif", "pillow-heif"), "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin")}
# What Pillow and its plug-ins call the formats that are read; MPO, a JPEG with more than one image, comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "HEIC", "JXL", "TIFF", "GIF", "BMP", "DIB", "MPO")
_OTHER_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl")  # than JPEG's
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"})


def open_image(content: bytes) -> Image.Image:
    """`Image.open`, with the plug-in that the format needs, if it is installed. Reads the header only.

    Raises:
        PIL.UnidentifiedImageError: none of the formats that datasets have. Pillow knows 40 more, whatever a file's name
            says; EPS would be handed to Ghostscript, a program.
    """
    kind = _needs_plugin("", content)
    if kind:
        _register_plugin(kind)
    Image.init()  # the first time 50 ms
    return Image.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN])


def decode(content: bytes) -> Image.Image:
    """The first frame, whole and upright. Keeps mode and colour profile.

    Raises whatever Pillow raises.
    """
    with open_image(content) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def may_be_jpeg(path: str) -> bool:
    """Whether a file's name leaves it open: parts of tables and addresses on the web often do not end in a format's.

    A JPEG that is called cat.png is none here. The scan could tell, but what earlier scans found does not say it.
    """
    return not path.lower().endswith(_OTHER_SUFFIXES)


def png_has_late_notes(content: bytes) -> bool:
    """Whether EXIF or text, which can hold EXIF or XMP, comes after a PNG's pixels; exiftool writes it there."""
    at, after_pixels = 8, False
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        after_pixels = after_pixels or kind == b"IDAT"
        if after_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        at += 12 + length
    return False


def missing_plugin_hint(path: str, content: bytes) -> str:
    """What to install so that the file can be read; empty where that would not help.

    Told by the first bytes. Some HEIC files do not say which kind of HEIF they are; of those the name decides.
    """
    kind = _needs_plugin(path, content)
    if not kind or _register_plugin(kind):
        return ""
    package = PLUGINS[kind][1]
    return f"{kind} needs {package}: pip install {package}"


def _needs_plugin(path: str, content: bytes) -> str:
    """A key of `PLUGINS`, or empty."""
    if content.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")):
        return "JPEG XL"
    if content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
        kinds = {brands[at : at + 4] for at in range(0, len(brands), 4)}
        if kinds & _HEIC_BRANDS or (b"avif" not in kinds and path.lower().endswith((".heic", ".heif"))):
            return "HEIC"
    return ""


@functools.cache
def _register_plugin(kind: str) -> bool:
    """Once per process, and only when such a file is met: whether Pillow can read the format from now on."""
    try:
        plugin = importlib.import_module(PLUGINS[kind][0])
    except ImportError:
        return False
    if kind == "HEIC":  # the other one registers itself
        plugin.register_heif_opener()
    return True
