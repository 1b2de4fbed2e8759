"""Formats that need a plug-in: read with it, and without it named."""

import dataclasses
import hashlib
import socket
import sys

import pytest

from sdxl_ray.cache import formats
from sdxl_ray.cache.formats import may_be_jpeg, missing_plugin_hint, open_image
from sdxl_ray.cache.images import UnreadableImage, load_pixels
from sdxl_ray.cache.masks import load_mask_file
from sdxl_ray.cache.sources import IMAGE_SUFFIXES
from sdxl_ray.records import ImageRecord
from tests.unit.cache.test_images import encode, noise, psnr, smooth, whole

HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
BARE_HEIF_HEAD = b"\0\0\0\x14ftypmif1\0\0\0\0mif1" + bytes(64)
JXL_STREAM = b"\xff\x0a" + bytes(64)
JXL_BOXES = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "
WITHOUT_HEIC = "HEIC needs pillow-heif: pip install pillow-heif"
WITHOUT_JXL = "JPEG XL needs pillow-jxl-plugin: pip install pillow-jxl-plugin"


@pytest.fixture
def no_plugins(monkeypatch):
    for plugin, _ in formats.PLUGINS.values():
        monkeypatch.setitem(sys.modules, plugin, None)
    formats._register_plugin.cache_clear()
    yield
    formats._register_plugin.cache_clear()


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("cat.heic", HEIC_HEAD, WITHOUT_HEIC),
        ("cat.jpg", HEIC_HEAD, WITHOUT_HEIC),  # as telephones' exports are often called
        ("cat.HEIF", BARE_HEIF_HEAD, WITHOUT_HEIC),
        ("cat.jxl", JXL_STREAM, WITHOUT_JXL),
        ("cat.png", JXL_BOXES, WITHOUT_JXL),
        ("cat.avif", BARE_HEIF_HEAD, ""),
        ("cat.heic", b"a text", ""),
        ("cat.jxl", b"", ""),
        ("cat.heic", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", ""),
        ("cat.mp4", b"\0\0\0\x18ftypisom\0\0\0\0mp41", ""),
    ],
)
def test_what_to_install(no_plugins, name, content, hint):
    assert missing_plugin_hint(name, content) == hint


@pytest.mark.parametrize(
    ("name", "content", "hint"), [("cat.heic", HEIC_HEAD, WITHOUT_HEIC), ("cat.png", JXL_STREAM, WITHOUT_JXL)]
)
def test_a_machine_without_the_package_says_so_when_it_decodes(no_plugins, tmp_path, name, content, hint):
    """The one that scanned the image has it, or the image would not have come so far. It is not damaged."""
    path, hw = tmp_path / name, (64, 64)
    path.write_bytes(content)
    record = ImageRecord(str(path), hashlib.sha256(content).hexdigest(), hw, hw, hw, (0, 0))
    with pytest.raises(UnreadableImage) as error:
        load_pixels(record)
    assert (str(error.value), error.value.kind) == (
        f"cannot be decoded on {socket.gethostname()}: {hint}",
        "needs_package",
    )
    masked = dataclasses.replace(record, mask=str(path))
    with pytest.raises(UnreadableImage) as error:
        load_mask_file(masked)
    assert (str(error.value), error.value.kind) == (
        f"its mask {path} cannot be decoded on {socket.gethostname()}: {hint}",
        "needs_package",
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/images/cat.jpg", True),
        ("/images/cat.JFIF", True),
        ("/images/list.parquet/7", True),
        ("https://example.org/cat.png?width=2000", True),
        ("/images/cat.PNG", False),
        ("s3://bucket/00.tar/cat.webp", False),
        ("cat.jpg.avif", False),
    ],
)
def test_a_name_may_say_that_an_image_is_no_jpeg(path, expected):
    assert may_be_jpeg(path) == expected


def test_every_ending_of_images_is_a_jpegs_or_not():
    assert {ending for ending in IMAGE_SUFFIXES if may_be_jpeg(f"cat{ending}")} == {".jpg", ".jpeg", ".jfif"}


def test_no_hint_for_what_pillow_reads(no_plugins):
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"):
        assert missing_plugin_hint(f"cat.{format.lower()}", encode(noise(16, 16), format)) == ""


def test_no_plugin_is_looked_for_before_such_a_file_is_met(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_register_plugin", lambda kind: pytest.fail("looked for"))
    load_pixels(whole(tmp_path / "cat.png", encode(noise(64, 64), "PNG")))
    with pytest.raises(pytest.fail.Exception):
        open_image(HEIC_HEAD)


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_with_its_plugin(tmp_path, orientation):
    heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    heif.register_heif_opener()
    content = encode(smooth(64, 128), "HEIF", quality=95, orientation=orientation)
    assert missing_plugin_hint("cat.heic", content) == ""
    with open_image(content) as image:
        turned = orientation == 6 and image.getexif().get(0x0112, 1) == 6  # the plug-in turns it by itself
        hw = image.size if turned else image.size[::-1]
    assert hw == (64, 128)
    path = tmp_path / "cat.heic"
    path.write_bytes(content)
    record = ImageRecord(str(path), "listed", hw, hw, hw, (0, 0), verify=False)
    assert psnr(load_pixels(record), smooth(64, 128)) > 35


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_xl_with_its_plugin(tmp_path, orientation):
    pytest.importorskip("pillow_jxl", reason="pip install pillow-jxl-plugin")
    content = encode(smooth(64, 128), "JXL", orientation=orientation)
    assert missing_plugin_hint("cat.jxl", content) == ""
    path = tmp_path / "cat.jxl"
    path.write_bytes(content)
    record = ImageRecord(str(path), "listed", (64, 128), (64, 128), (64, 128), (0, 0), verify=False)
    assert psnr(load_pixels(record), smooth(64, 128)) > 35
