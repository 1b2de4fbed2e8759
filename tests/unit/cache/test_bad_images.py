"""Files as they are found in the wild, through the header's parser and the decoder: read right, or a reason given."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, UnidentifiedImageError

from sdxl_ray.cache import images
from sdxl_ray.cache.formats import open_image
from sdxl_ray.cache.images import UnreadableImage, load_pixels
from sdxl_ray.cache.scan import header_hw, scan_file
from sdxl_ray.records import ImageRecord, Listed
from tests.unit.cache.test_images import encode, noise, picture, psnr, record_of, smooth, whole


def unscanned(path, content, hw):
    """The record of a file whose header may not be readable, as a table without sizes' checks would give it."""
    path.write_bytes(content)
    return ImageRecord(str(path), "listed", hw, (64, 64), (64, 64), (0, 0), verify=False)


def png(width, height, depth, colour_type, rows):
    """A PNG by hand, for what Pillow does not write; rows without their filter byte."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ---- not an image ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a cat on a mat\n",
        b"<html><body>404 Not Found</body></html>",
        bytes(4096),
        b"\xff\xd8\xff",
        b"\x89PNG\r\n",
    ],
    ids=["empty", "text", "web page", "zeros", "a JPEG's first bytes", "a PNG's first bytes"],
)
def test_what_is_called_an_image_but_is_none(tmp_path, content):
    with pytest.raises(Exception):  # noqa: B017  (scan.py makes a reason of any)
        header_hw(content)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: "):
        load_pixels(unscanned(tmp_path / "cat.jpg", content, (64, 64)))


@pytest.mark.parametrize("format", ["EPS", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF"])
def test_a_format_that_nobody_means_is_no_image(tmp_path, format):
    """Pillow would open what is called cat.jpg by its content, an EPS with the help of Ghostscript."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(encode(noise(64, 64), format))
    found = scan_file(Listed(path=str(path), stamp="1"), max_pixels=10**6)
    assert found.problem == "not an image that Pillow can read"
    with pytest.raises(UnidentifiedImageError):
        open_image(path.read_bytes())
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: cannot identify image file"):
        load_pixels(unscanned(path, path.read_bytes(), (64, 64)))


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "DIB"])
def test_a_format_that_is_meant_is_read_whatever_its_name(tmp_path, format):
    path = tmp_path / "cat.jpg"
    path.write_bytes(encode(noise(64, 48), format))
    found = scan_file(Listed(path=str(path), stamp="1"), max_pixels=10**6)
    assert (found.problem, found.height, found.width) == ("", 64, 48)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "AVIF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_file_that_ends_early_is_unreadable_not_half_grey(tmp_path, format, share):
    content = encode(noise(64, 64), format)
    record = unscanned(tmp_path / "cat", content[: int(len(content) * share)], (64, 64))
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: "):
        load_pixels(record)


def test_a_large_jpeg_that_ends_early_is_unreadable_at_half_its_size_too(tmp_path):
    content = encode(picture(700, 700), "JPEG")
    record = record_of(tmp_path / "cat.jpg", content[: len(content) // 2], buckets=["128x128"], scaled_jpeg=True)
    assert images.jpeg_reduction(record.original_hw, record.resized_hw) == 2
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: .*truncated"):
        load_pixels(record)


def test_a_progressive_jpeg_that_ends_early_is_unreadable(tmp_path):
    content = encode(noise(200, 200), "JPEG", progressive=True)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: .*truncated"):
        load_pixels(unscanned(tmp_path / "cat.jpg", content[: len(content) // 2], (200, 200)))


def test_flipped_bits_never_escape_as_anything_but_a_reason(tmp_path):
    """Whatever the decoders make of damage, it is pixels or an UnreadableImage."""
    draw = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        sound = np.frombuffer(encode(smooth(64, 64), format), np.uint8)
        for _ in range(15):
            damaged = sound.copy()
            damaged[draw.integers(0, len(sound), 8)] ^= draw.integers(1, 256, 8, dtype=np.uint8)
            try:
                pixels = load_pixels(unscanned(tmp_path / "cat", damaged.tobytes(), (64, 64)))
            except UnreadableImage:
                continue
            assert pixels.shape == (64, 64, 3)


# ---- bombs and odd shapes --------------------------------------------------------------------------------------------


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    """60,000 x 60,000 pixels in three kilobytes; decoded, 10 GiB."""
    bomb = png(60000, 60000, 8, 2, [bytes(180001)] * 16)
    assert len(bomb) < 5000
    with pytest.raises(Exception, match="60000x60000"):
        header_hw(bomb, 250_000_000)
    with pytest.raises(UnreadableImage, match=r"^is 60000x60000 pixels \(height x width\), but was listed as 64x64$"):
        load_pixels(unscanned(tmp_path / "cat.png", bomb, (64, 64)))


def test_a_bomb_in_the_notes_of_a_png_is_a_reason(tmp_path):
    """A text chunk of a megabyte of zeros' worth; Pillow refuses to inflate it, and the image with it."""
    content = encode(noise(64, 64), "PNG")
    note = b"iTXtComment\0\1\0\0\0" + zlib.compress(bytes(80_000_000))
    chunk = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: "):
        load_pixels(unscanned(tmp_path / "cat.png", content[:33] + chunk + content[33:], (64, 64)))


@pytest.mark.parametrize(
    ("hw", "bucket"), [((1, 1), (1024, 1024)), ((10, 30000), (512, 2048)), ((30000, 10), (2048, 512))]
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_odd_shapes_fill_their_bucket(tmp_path, format, hw, bucket):
    record = record_of(tmp_path / "cat", encode(noise(*hw), format), buckets=[])
    assert record.bucket_hw == bucket
    assert load_pixels(record).shape == (*bucket, 3)


@pytest.mark.parametrize(
    "name",
    [
        "a\nb.png",
        "📷 café.png",
        "x" * 251 + ".png",
        "猫" * 83 + ".png",
        " .png",
        "-rf.png",
        "a%20b#c?.png",
        "tar:1+2:x.png",
    ],
    ids=["newline", "emoji", "255 bytes", "255 bytes of kanji", "blank", "dash", "like a URL", "like an address"],
)
def test_any_name(tmp_path, name):
    content = encode(noise(64, 64), "PNG")
    assert np.array_equal(load_pixels(whole(tmp_path / name, content)), np.asarray(noise(64, 64)))


# ---- colour as it is found -------------------------------------------------------------------------------------------


def test_a_cmyk_jpeg_of_adobes_programs_is_not_a_negative(tmp_path):
    """They store inks inverted and say so by a marker; read by the letter, white paper is black."""
    content = encode(Image.new("CMYK", (64, 64), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in content[:200]
    assert load_pixels(whole(tmp_path / "cat.jpg", content)).min() >= 253


def test_a_cmyk_jpeg_as_ycck(tmp_path):
    """The same inks as luma and chroma, which is how Photoshop writes them: the marker's last byte is 2."""
    # Paper is (255, 255, 255, 255), inverted; its first three as luma and chroma, inverted once more, (0, 128, 128).
    content = bytearray(encode(Image.new("CMYK", (64, 64), (255, 127, 127, 0)), "JPEG", quality=100, subsampling=0))
    assert load_pixels(whole(tmp_path / "cat.jpg", bytes(content)))[0, 0, 0] <= 2  # as inks, cyan
    content[content.index(b"Adobe") + 11] = 2
    assert load_pixels(whole(tmp_path / "cat.jpg", bytes(content))).min() >= 252


def test_a_cmyk_jpeg_is_resized_in_inks(tmp_path):
    inks = picture(400, 500).convert("CMYK")
    record = record_of(tmp_path / "cat.jpg", encode(inks, "JPEG", quality=97, subsampling=0), buckets=["128x160"])
    expected = inks.convert("RGB").resize((160, 128), Image.Resampling.LANCZOS)
    assert psnr(load_pixels(record), expected) > 40


def test_a_profile_for_cmyk_on_an_rgb_image_is_ignored(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    content = encode(noise(64, 64), "PNG", icc_profile=lab)
    assert np.array_equal(load_pixels(whole(tmp_path / "cat.png", content)), np.asarray(noise(64, 64)))


def test_16_bits_per_colour(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
    content = png(64, 64, 16, 2, [row.astype(">u2").tobytes() for row in values])
    found = load_pixels(whole(tmp_path / "cat.png", content)).astype(float)
    assert np.abs(found - values / 257).max() <= 1


def test_16_bits_per_colour_with_transparency(tmp_path):
    values = np.full((64, 64, 4), 65535, np.uint16)
    values[..., 3] = 0
    content = png(64, 64, 16, 6, [row.astype(">u2").tobytes() for row in values * 0])
    assert load_pixels(whole(tmp_path / "cat.png", content)).min() == 255


@pytest.mark.parametrize("alpha", [0, 255])
def test_grey_with_transparency(tmp_path, alpha):
    content = encode(Image.new("LA", (64, 64), (100, alpha)), "PNG")
    assert np.unique(load_pixels(whole(tmp_path / "cat.png", content))).tolist() == [100 if alpha else 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_is_its_first_frame(tmp_path, format):
    frames = [smooth(64, 64), noise(64, 64), noise(64, 64).rotate(90)]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert psnr(load_pixels(whole(tmp_path / "cat", content)), frames[0]) > (60 if format == "WEBP" else 30)


def test_avif(tmp_path):
    content = encode(smooth(128, 128), "AVIF")
    assert psnr(load_pixels(record_of(tmp_path / "cat.avif", content, buckets=["64x64"])), smooth(64, 64)) > 35
