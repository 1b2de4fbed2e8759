import dataclasses
import functools
import hashlib
import io
import math
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_ray.cache import images
from sdxl_ray.cache.buckets import Geometry, Unfit, place
from sdxl_ray.cache.formats import decode
from sdxl_ray.cache.images import UnreadableImage, load_pixels, load_pixels_and_alpha
from sdxl_ray.cache.scan import header_hw, scan_file
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.records import ImageRecord, Listed

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
UNDO = {  # what to do to an upright picture so that a viewer which obeys EXIF's orientation shows it upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image, format, *, orientation=1, **options):
    """The file's bytes; stored turned, so that the orientation's tag makes it upright."""
    if orientation > 1:
        image = image.transpose(UNDO[orientation])
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif if format == "TIFF" else exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    """Away from black and white, where what LANCZOS overshoots would be cut off."""
    values = np.random.default_rng(0).integers(80, 176, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values if channels == 3 else values[..., 0])


def smooth(height, width):
    """Without edges, so that lossy formats stay within a few levels."""
    down, across = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([down * 200 // height, across * 200 // width, (down + across) * 200 // (height + width)], -1).astype(
            np.uint8
        )
    )


def picture(height, width):
    """Detail of all sizes that is not symmetric in any way, like a photograph: PSNR of it means something."""
    values = np.zeros((height, width, 3))
    draw = np.random.default_rng(0)
    for octave in range(2, 2 + int(math.log2(min(height, width)))):
        coarse = draw.normal(0, 1, (2**octave, 2**octave, 3))
        layer = [Image.fromarray(coarse[..., channel].astype(np.float32)) for channel in range(3)]
        resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in layer]
        values += np.stack(resized, -1) * 40 / octave
    return Image.fromarray(np.clip(values + 128, 0, 255).astype(np.uint8))


def psnr(one, other):
    """Decibels between two images of 8 bits; inf where they are equal."""
    error = np.mean((np.asarray(one, dtype=float) - np.asarray(other, dtype=float)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def record_of(path, content, *, buckets, crop="center", **fields):
    """The record of a file that is written to `path`; `buckets` are texts as in the settings."""
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    original_hw = header_hw(content)
    (geometry,) = Geometry.of(DatasetSection(buckets=buckets, crop=crop, max_upscale=0, max_cut=1))
    found = place(original_hw, digest, geometry)
    assert not isinstance(found, Unfit)
    record = ImageRecord(str(path), digest, original_hw, found.bucket_hw, found.resized_hw, found.crops[0])
    return dataclasses.replace(record, **fields)


def whole(path, content, **fields):
    """A record that neither resizes nor crops."""
    path.write_bytes(content)
    hw = header_hw(content)
    record = ImageRecord(str(path), hashlib.sha256(content).hexdigest(), hw, hw, hw, (0, 0))
    return dataclasses.replace(record, **fields)


@pytest.fixture
def rgb(tmp_path):
    """Content -> its pixels, unresized."""
    return lambda content: load_pixels(whole(tmp_path / "whole", content))


# ---- resize and crop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random", "bottom_right"])
@pytest.mark.parametrize("hw", [(256, 304), (304, 256), (256, 256)])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_without_resizing_the_crop_is_exactly_where_the_record_says(tmp_path, hw, crop, orientation, flip):
    """Each pixel holds its own coordinates."""
    down, across = np.mgrid[0 : hw[0], 0 : hw[1]]
    upright = np.stack([down % 256, across % 256, down // 256 * 16 + across // 256], -1).astype(np.uint8)
    content = encode(Image.fromarray(upright), "PNG", orientation=orientation)
    record = record_of(tmp_path / "cat.png", content, buckets=["256x256"], crop=crop, flip=flip)
    assert record.original_hw == record.resized_hw == hw
    pixels = load_pixels(record)
    top, left = record.crop_top_left
    assert pixels.shape == (256, 256, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    expected = upright[top : top + 256, left : left + 256]
    assert np.array_equal(pixels, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("hw", [(300, 1000), (1000, 300), (97, 211), (64, 50), (500, 500)])
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_resized_crop_is_the_crop_of_the_resized_image(tmp_path, hw, crop, orientation):
    image = noise(*hw)
    content = encode(image, "PNG", orientation=orientation)
    record = record_of(tmp_path / "cat.png", content, buckets=["128x192"], crop=crop)
    height, width = record.resized_hw
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = record.crop_top_left
    expected = resized[top : top + 128, left : left + 192].astype(int)
    assert np.abs(load_pixels(record).astype(int) - expected).max() <= 2  # rounding


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
@pytest.mark.parametrize(("hw", "bucket"), [((333, 500), "128x192"), ((70, 90), "128x192"), ((400, 90), "64x256")])
def test_torchs_lanczos_is_pillows(tmp_path, monkeypatch, mode, hw, bucket):
    """Before torch 2.12 there is only Pillow's."""
    if images._torch_lanczos() is None:
        pytest.skip("this torch has no LANCZOS")
    content = encode(picture(*hw).convert(mode), "TIFF")
    record = record_of(tmp_path / "cat.tif", content, buckets=[bucket])
    fast = load_pixels(record)
    monkeypatch.setattr(images, "_torch_lanczos", lambda: None)
    assert psnr(fast, load_pixels(record)) > 55


@pytest.mark.parametrize("hw", [(1, 1), (3, 20000), (20000, 3)])
def test_extreme_shapes_need_no_extreme_memory(tmp_path, hw):
    """3x20000 px covers 512x64 at 512x3413333, which nobody computes."""
    record = record_of(tmp_path / "cat.png", encode(noise(*hw), "PNG"), buckets=["64x512", "512x64"])
    assert load_pixels(record).shape == (*record.bucket_hw, 3)


def grating(edge, period, degrees=0.0):
    """Grey stripes of all brightnesses, `period` pixels apart, which `edge` x `edge` pixels can hold."""
    down, across = np.mgrid[0:edge, 0:edge]
    phase = across * math.cos(math.radians(degrees)) + down * math.sin(math.radians(degrees))
    values = np.round(127.5 + 127.5 * np.sin(2 * np.pi * phase / period)).astype(np.uint8)
    assert values.std() > 80
    return Image.fromarray(values)


# Stripes cannot be drawn where they lie less than two pixels apart in the result. These come to 0.95 at most.
@pytest.mark.parametrize("degrees", [0, 90, 30])
@pytest.mark.parametrize("period", [2.05, 2.2, 2.4, 2.7, 3.7, 5.0, 9.0, 20.0])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 85}), ("JPEG", {"quality": 95}), ("PNG", {"compress_level": 0}), ("WEBP", {"quality": 90})],
)
def test_a_fine_grating_comes_out_grey_not_as_moire(tmp_path, format, options, period, degrees):
    """Without a low-pass it would come back as stripes of a hundred levels, at a wavelength that is not there."""
    image = grating(512, period, degrees).convert("RGB")
    record = record_of(tmp_path / "cat", encode(image, format, **options), buckets=["24x24"])
    pixels = load_pixels(record)[3:-3, 3:-3]  # the edge of the image is an edge
    assert pixels.std() < 1
    assert abs(pixels.mean() - 127.5) < 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_fine_grating_of_full_size_comes_out_grey(tmp_path, mode):
    """At a quarter of the size and a bit, as photographs are resized; a decoder's own halving left 20 levels of it."""
    record = record_of(tmp_path / "cat", encode(grating(1152, 2.4).convert(mode), "JPEG"), buckets=["256x256"])
    assert load_pixels(record)[8:-8, 8:-8].std() < 1
    scaled = load_pixels(dataclasses.replace(record, scaled_jpeg=True))
    assert scaled[8:-8, 8:-8].std() > 10  # which is why it has to be asked for


# ---- JPEGs decoded at a fraction of their size -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored_hw", "resized_hw", "expected"),
    [
        ((2304, 2304), (1024, 1024), 1),
        ((4607, 4608), (1024, 1024), 1),
        ((4608, 4608), (1024, 1024), 2),
        ((4608, 9999), (1024, 1024), 2),
        ((4000, 6000), (832, 1248), 2),  # 24 megapixels
        ((4000, 6000), (416, 624), 2),
        ((8192, 8192), (512, 512), 4),
        ((16384, 16384), (512, 512), 8),
        ((100, 100), (1024, 1024), 1),
    ],
)
def test_how_much_smaller_a_jpeg_is_decoded(stored_hw, resized_hw, expected):
    assert images.jpeg_reduction(stored_hw, resized_hw) == expected


@functools.cache
def large_jpeg(hw, orientation, mode):
    return encode(picture(*hw).convert(mode), "JPEG", orientation=orientation, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(  # odd sizes: the last pixel of a reduced row is half beyond the edge
    ("hw", "mode"), [((607, 999), "RGB"), ((999, 607), "RGB"), ((607, 999), "L"), ((999, 607), "CMYK")]
)
def test_a_reduced_jpeg_is_the_whole_one(tmp_path, monkeypatch, hw, mode, orientation):
    """In place, turned and mirrored as it is, in every mode. Were a row's last half pixel taken for a whole: 47 dB."""
    content = large_jpeg(hw, orientation, mode)
    flip = orientation % 2 == 0
    record = record_of(tmp_path / "cat.jpg", content, buckets=["128x128"], crop="random", flip=flip, scaled_jpeg=True)
    decoded = []
    resize = images._resize_and_crop
    monkeypatch.setattr(
        images, "_resize_and_crop", lambda image, *rest: decoded.append(image.size) or resize(image, *rest)
    )
    reduced, complete = load_pixels(record), load_pixels(dataclasses.replace(record, scaled_jpeg=False))
    assert [sorted(size) for size in decoded] == [[304, 500], [607, 999]]
    assert psnr(reduced, complete) > 50


@pytest.mark.parametrize(("edge", "reduction"), [(155, 2), (515, 4), (1027, 8)])
def test_every_reduction_is_within_45_db(tmp_path, edge, reduction):
    record = record_of(
        tmp_path / "cat.jpg", large_jpeg((edge, edge + 1), 1, "RGB"), buckets=["32x32"], scaled_jpeg=True
    )
    assert images.jpeg_reduction(record.original_hw, record.resized_hw) == reduction
    assert 45 < psnr(load_pixels(record), load_pixels(dataclasses.replace(record, scaled_jpeg=False))) < 80


def test_a_jpeg_is_decoded_whole_unless_its_record_says_otherwise(tmp_path):
    content = large_jpeg((515, 516), 1, "RGB")
    record = record_of(tmp_path / "cat.jpg", content, buckets=["32x32"])
    assert images._decode(content, record)[0].size == (516, 515)
    assert images._decode(content, dataclasses.replace(record, scaled_jpeg=True))[0].size == (129, 129)


def test_a_multi_picture_jpeg_is_reduced_too(tmp_path):
    """As some telephones write them: the second picture is a depth map or a preview."""
    photograph = picture(600, 600)
    content = encode(photograph, "MPO", save_all=True, append_images=[picture(100, 100)], quality=95)
    assert decode(content).size == (600, 600)
    record = record_of(tmp_path / "cat.jpg", content, buckets=["128x128"], scaled_jpeg=True)
    assert images._decode(content, record)[0].size == (300, 300)
    assert psnr(load_pixels(record), photograph.resize((128, 128), Image.Resampling.LANCZOS)) > 40


# ---- orientation, colour, transparency -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_come_out_upright(rgb, format, orientation):
    upright = smooth(48, 64)
    options = {
        "WEBP": {"lossless": True, "exact": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(format, {})
    content = encode(upright, format, orientation=orientation, **options)
    found = rgb(content).astype(int)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - np.asarray(upright)).max() <= (4 if format in ("JPEG", "AVIF") else 0)
    assert np.array_equal(np.asarray(decode(content).convert("RGB")), found)


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(rgb, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    image = noise(16, 24)
    assert np.array_equal(rgb(encode(image, "PNG", exif=exif.tobytes())), np.asarray(image))


def test_an_srgb_profile_changes_nothing(rgb):
    image = noise(32, 32)
    assert np.abs(rgb(encode(image, "PNG", icc_profile=SRGB)).astype(int) - np.asarray(image)).max() <= 1


def matrix_profile(primaries, gamma):
    """An ICC profile of version 2: red, green and blue as XYZ under D50, one power as the curve of all three."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    tags = {b"desc": b"desc" + struct.pack(">4xI", 5) + b"test\0" + bytes(78), b"cprt": b"text" + bytes(4) + b"CC0\0"}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        tags[name] = b"XYZ " + bytes(4) + fixed(*xyz)
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = b"curv" + struct.pack(">4xIH", 1, round(gamma * 256)) + bytes(2)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(tag))
        body += tag
    header = struct.pack(">I4xI4s4s4s", 132 + len(table) - 4 + len(body), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + body


# Colour space from Adobe RGB (1998), adapted to D50: brucelindbloom.com, "RGB/XYZ Matrices"
ADOBE_RGB = matrix_profile(
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 563 / 256
)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_adobe_rgb_comes_out_as_srgb(rgb, format):
    """By hand: to light, through both spaces' matrices (brucelindbloom.com, D50), and along sRGB's curve."""
    content = encode(Image.new("RGB", (16, 16), (128, 160, 128)), format, icc_profile=ADOBE_RGB, quality=100)
    light = (np.array([128, 160, 128]) / 255) ** (563 / 256)
    xyz = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]) @ light
    to_srgb = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    expected = (1.055 * (to_srgb @ xyz) ** (1 / 2.4) - 0.055) * 255
    assert np.abs(rgb(content)[8, 8] - expected).max() <= (2 if format in ("JPEG", "WEBP") else 1)
    assert np.abs(expected - (128, 160, 128)).max() > 10


def wide_gamut_profile():
    """sRGB's profile with red and green swapped: a colour space that is surely another one."""
    swapped = bytearray(SRGB)
    tags = {bytes(SRGB[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(SRGB[128:132], "big"), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        SRGB[green + 4 : green + 12],
        SRGB[red + 4 : red + 12],
    )
    return bytes(swapped)


@pytest.mark.parametrize("alpha", [None, 255])
def test_a_colour_profile_is_applied(rgb, alpha):
    image = smooth(32, 32)
    expected = np.asarray(image)[..., [1, 0, 2]]
    if alpha is not None:
        image.putalpha(alpha)
    found = rgb(encode(image, "PNG", icc_profile=wide_gamut_profile())).astype(int)
    assert np.abs(found - expected).max() <= 2


def test_a_colour_profile_is_for_colours_not_for_the_white_below(rgb):
    image = Image.new("RGBA", (8, 8), (0, 200, 0, 128))
    found = rgb(encode(image, "PNG", icc_profile=wide_gamut_profile())).astype(int)
    assert np.abs(found - (228, 127, 127)).max() <= 3  # half red, which green is there, over white


def test_a_profile_applied_after_the_resize_gives_what_it_gives_before(tmp_path):
    image = picture(400, 500)
    record = record_of(tmp_path / "cat.png", encode(image, "PNG", icc_profile=ADOBE_RGB), buckets=["128x160"])
    source = ImageCms.ImageCmsProfile(io.BytesIO(ADOBE_RGB))
    before = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    assert psnr(before, image) < 40
    assert psnr(load_pixels(record), before.resize((160, 128), Image.Resampling.LANCZOS)) > 45


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], SRGB], ids=["nonsense", "cut off", "not for grey"])
def test_a_profile_that_does_not_fit_is_ignored(rgb, profile):
    grey = noise(16, 16, 1)
    assert np.array_equal(rgb(encode(grey, "PNG", icc_profile=profile)), np.asarray(grey.convert("RGB")))


def test_cmyk(rgb):
    """Pure inks, so that any sensible conversion agrees."""
    image = Image.new("CMYK", (48, 16))
    image.paste((0, 255, 255, 0), (16, 0, 32, 16))
    image.paste((0, 0, 0, 255), (32, 0, 48, 16))
    found = rgb(encode(image, "JPEG", quality=100, subsampling=0)).astype(int)
    for column, colour in ((8, (255, 255, 255)), (24, (255, 0, 0)), (40, (0, 0, 0))):
        assert np.abs(found[8, column] - colour).max() <= 4


@pytest.mark.parametrize(
    ("format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")], ids=["png", "tiff", "tiff big endian"]
)
def test_16_bit_greys_are_scaled_not_clipped(rgb, format, dtype):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=dtype)
    content = encode(Image.fromarray(values), format)
    assert decode(content).mode.startswith("I;16")
    assert rgb(content)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_a_transparent_16_bit_grey_is_white_and_the_others_are_scaled(rgb):
    values = np.array([[0, 257, 258, 65535]], "<u2")
    content = encode(Image.fromarray(values), "PNG", transparency=257)
    assert decode(content).mode == "I;16"
    assert rgb(content)[0, :, 0].tolist() == [0, 255, 1, 255]


def test_transparency_of_16_bit_greys_that_is_the_mask(tmp_path):
    values = np.repeat(np.array([[257, 258, 25700, 65535]], "<u2"), 16, axis=1).repeat(64, axis=0)
    content = encode(Image.fromarray(values), "PNG", transparency=258)
    pixels, alpha = load_pixels_and_alpha(record_of(tmp_path / "cat.png", content, buckets=["64x64"], mask="alpha"))
    assert pixels[0, ::16, 0].tolist() == [1, 1, 100, 255]
    assert np.asarray(alpha)[0, ::16].tolist() == [255, 0, 255, 255]


def test_big_endian_tiff_is_what_the_test_above_says():
    content = encode(Image.fromarray(np.zeros((2, 2), ">u2")), "TIFF")
    assert (content[:2], decode(content).mode) == (b"MM", "I;16B")


def test_32_bit_greys(rgb):
    def greys(*values, dtype):
        return rgb(encode(Image.fromarray(np.array([values], dtype)), "TIFF"))[0, :, 0].tolist()

    assert greys(0, 257, 65535, 10**6, -5, dtype=np.int32) == [0, 1, 255, 255, 0]
    assert greys(0, 0.5, 1.0, np.nan, dtype=np.float32) == [0, 128, 255, 0]
    assert greys(0, 257.4, 65535, dtype=np.float32) == [0, 1, 255]


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(rgb, mode, alpha):
    value = 100
    image = Image.new(mode, (8, 8), (value, value, value, alpha) if mode == "RGBA" else (value, alpha))
    found = rgb(encode(image, "PNG")).astype(int)
    assert np.abs(found - (value * alpha + 255 * (255 - alpha)) / 255).max() <= 1


def test_what_is_hidden_by_transparency_does_not_bleed_into_what_is_seen(tmp_path):
    """Red under full transparency beside blue: the edge goes from blue to white, never to red or black."""
    values = np.zeros((256, 256, 4), np.uint8)
    values[:, :129] = (255, 0, 0, 0)
    values[:, 129:] = (0, 0, 255, 255)
    record = record_of(tmp_path / "cat.png", encode(Image.fromarray(values), "PNG"), buckets=["64x64"])
    row = load_pixels(record)[32].astype(int)
    assert row[0].tolist() == [255, 255, 255]
    assert row[-1].tolist() == [0, 0, 255]
    assert row[:, 2].min() >= 253
    assert np.abs(row[:, 0] - row[:, 1]).max() <= 2


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "tRNS"])
@pytest.mark.parametrize("profile", [None, SRGB])
def test_transparency_that_is_the_mask_leaves_the_colours_as_they_are(tmp_path, kind, profile):
    """The loss weighs these pixels; white mixed into them, or put beside them, would be learnt with them."""
    values = np.full((64, 64, 4), 100, np.uint8)
    if kind in ("RGBA", "LA"):
        values[:32, :, 3], values[32:, :, 3] = 0, 64
        content = encode(Image.fromarray(values).convert(kind), "PNG", icc_profile=profile)
    else:
        image = Image.fromarray(values[..., :3])
        image = image.convert("P", palette=Image.Palette.ADAPTIVE) if kind == "P" else image
        transparent = image.getpixel((0, 0))
        content = encode(image, "PNG", transparency=transparent, icc_profile=profile)
    record = record_of(tmp_path / "cat.png", content, buckets=["32x32"])
    assert load_pixels(record).min() > 190  # laid on white
    for load in (load_pixels, lambda record: load_pixels_and_alpha(record)[0]):
        assert np.abs(load(dataclasses.replace(record, mask="alpha")).astype(int) - 100).max() <= 1


def test_what_a_mask_leaves_out_is_averaged_like_the_rest(tmp_path):
    """Of two columns in turns, one of them masked: the mean of both, as an image without transparency gives."""
    values = np.full((64, 64, 4), 255, np.uint8)
    values[:, ::2] = (200, 40, 0, 0)
    values[:, 1::2] = (0, 40, 200, 255)
    plain = record_of(tmp_path / "plain.png", encode(Image.fromarray(values[..., :3]), "PNG"), buckets=["16x16"])
    record = record_of(tmp_path / "cat.png", encode(Image.fromarray(values), "PNG"), buckets=["16x16"], mask="alpha")
    assert np.array_equal(load_pixels(record), load_pixels(plain))
    assert load_pixels(record)[8, 8].tolist() == [100, 40, 100]


def test_a_transparent_palette_entry_is_white(rgb):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert rgb(encode(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert rgb(encode(image, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_a_transparent_colour_of_an_rgb_image_is_white(rgb):
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (40, 50, 60))
    assert rgb(encode(image, "PNG", transparency=(10, 20, 30))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["1", "P"])
def test_palettes_and_one_bit_are_averaged_not_thinned(tmp_path, mode):
    """Pillow resizes these by dropping pixels; half of the pixels white must give grey."""
    values = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(values.astype(np.uint8)).convert(mode)
    pixels = load_pixels(record_of(tmp_path / "cat.png", encode(image, "PNG"), buckets=["64x64"]))
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - 128).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(rgb, format):
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "lime", "blue")]
    content = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.array_equal(rgb(content), np.asarray(frames[0]))


def test_one_bit(rgb):
    assert rgb(encode(Image.fromarray(np.array([[True, False]])), "PNG")).tolist() == [[[255] * 3, [0] * 3]]


# ---- what was listed and what is there -------------------------------------------------------------------------------


def test_a_file_that_changed_after_the_scan(tmp_path):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=["64x64"])
    (tmp_path / "cat.png").write_bytes(encode(noise(9, 8), "PNG"))
    with pytest.raises(UnreadableImage) as error:
        load_pixels(record)
    assert str(error.value) == "changed while it was being cached; run `sdxl-ray cache` again"
    assert error.value.kind == "changed"


@pytest.mark.parametrize("load", [load_pixels, load_pixels_and_alpha])
def test_a_listing_that_gives_another_size(tmp_path, load):
    """Found before anything is decoded, so that a table cannot let a decompression bomb in."""
    image = Image.new("RGBA", (800, 600), (9, 9, 9, 9))
    content = encode(image, "PNG")
    record = whole(tmp_path / "cat.png", content[:200], verify=False, image_hash="listed", mask="alpha")
    assert record.original_hw == (600, 800)
    with pytest.raises(UnreadableImage, match=r"^is 600x800 pixels \(height x width\), but was listed as 768x1024$"):
        load(dataclasses.replace(record, original_hw=(768, 1024)))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_listing_that_gives_the_size_before_turning(tmp_path, format):
    content = encode(noise(48, 64), format, orientation=6)
    record = whole(tmp_path / "cat", content, verify=False, image_hash="listed")
    assert load_pixels(record).shape == (48, 64, 3)
    with pytest.raises(UnreadableImage, match=r"^is 48x64 pixels \(height x width\), but was listed as 64x48$"):
        load_pixels(dataclasses.replace(record, original_hw=(64, 48)))


def with_late_orientation(png, orientation):
    """The PNG with EXIF behind its pixels, where exiftool writes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    return png[:-12] + chunk + png[-12:]


def test_a_note_that_the_scan_of_a_start_did_not_see(tmp_path):
    """With dataset.identify_by = "listing": there is no table that says anything."""
    content = with_late_orientation(encode(noise(200, 300), "PNG"), 6)
    assert len(content) > 64 * 1024
    (tmp_path / "cat.png").write_bytes(content)
    found = scan_file(Listed(str(tmp_path / "cat.png"), "1-1"), 10**6, by_listing=True)
    assert (found.height, found.width) == (200, 300)
    seen = whole(tmp_path / "cat.png", content, verify=False)
    assert load_pixels(seen).shape == (300, 200, 3)  # where it is read whole
    with pytest.raises(UnreadableImage) as error:
        load_pixels(dataclasses.replace(seen, original_hw=(200, 300)))
    assert str(error.value) == (
        "is turned by a note behind its pixels, which a scan of its start does not see: set dataset.identify_by = "
        '"content"'
    )
    assert error.value.kind == "changed"


def test_an_image_identified_by_its_listing_is_not_hashed(tmp_path):
    record = whole(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), verify=False, image_hash="listed")
    assert load_pixels(record).shape == (8, 8, 3)


def test_the_address_is_read_not_the_path(tmp_path):
    content = encode(noise(8, 8), "PNG")
    record = whole(tmp_path / "cat.png", content, address=str(tmp_path / "cat.png"))
    assert load_pixels(dataclasses.replace(record, path="for people")).shape == (8, 8, 3)


def test_a_file_that_cannot_be_read_here_is_not_called_damaged(tmp_path):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=["64x64"])
    (tmp_path / "cat.png").unlink()
    with pytest.raises(FileNotFoundError):
        load_pixels(record)


def test_an_address_that_means_nothing_is_a_reason(tmp_path, monkeypatch):
    def fail(address):
        raise ValueError("row 7 of a.parquet holds no image")

    monkeypatch.setattr(images, "read_bytes", fail)
    with pytest.raises(UnreadableImage, match=r"^row 7 of a\.parquet holds no image$") as error:
        load_pixels(ImageRecord("a.parquet/7", "00", (8, 8), (8, 8), (8, 8), (0, 0)))
    assert error.value.kind == "changed"


def test_whatever_a_decoder_raises_is_a_reason(tmp_path, monkeypatch):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=["64x64"])

    def fail(content):
        raise RuntimeError("Failed to decode frame 0")  # as Pillow's AVIF plugin does

    monkeypatch.setattr(images, "open_image", fail)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: Failed to decode frame 0$") as error:
        load_pixels(record)
    assert error.value.kind == "damaged"


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("torch: expected scalar type Byte")])
@pytest.mark.parametrize("load", [load_pixels, load_pixels_and_alpha])
def test_what_goes_wrong_in_resizing_is_no_fault_of_the_image(tmp_path, monkeypatch, error, load):
    record = record_of(tmp_path / "cat.png", encode(noise(200, 300), "PNG"), buckets=["64x64"])

    def fail(*arguments):
        raise error

    monkeypatch.setattr(images, "_torch_lanczos", lambda: fail)
    with pytest.raises(type(error)) as raised:
        load(record)
    assert raised.value is error


def test_torch_without_memory_is_a_want_of_memory(monkeypatch):
    """As it says it itself; what a user is told then begins with "MemoryError"."""
    import torch

    lanczos = images._torch_lanczos()
    if lanczos is None:
        pytest.skip("this torch has no LANCZOS")

    def fail(text):
        def interpolate(*arguments, **settings):
            raise RuntimeError(text)

        monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
        return lanczos(np.zeros((8, 8, 3), np.uint8), (8, 8), (4, 4))

    allocator = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    with pytest.raises(MemoryError, match="can't allocate memory"):
        fail(allocator)
    with pytest.raises(RuntimeError, match=r"^another bug$"):
        fail("another bug")


@pytest.mark.parametrize("text", ["out of memory error when reading image file", "Insufficient memory (case 4)"])
def test_a_decoder_without_memory_says_nothing_about_the_image(tmp_path, monkeypatch, text):
    """It is skipped, since its bytes may be the reason; and tried again, since they may not."""
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=["64x64"])

    def fail(content):
        raise OSError(text)

    monkeypatch.setattr(images, "open_image", fail)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: ") as error:
        load_pixels(record)
    assert error.value.kind == "unreadable"


def test_a_reason_travels_with_its_kind():
    error = pickle.loads(pickle.dumps(UnreadableImage("cannot be read: gone", "unreadable")))
    assert (str(error), error.kind) == ("cannot be read: gone", "unreadable")


def test_edges_of_what_is_half_transparent_have_no_specks(tmp_path):
    """LANCZOS overshoots beside an edge; white and a little more is white, not black."""
    values = np.zeros((256, 256, 4), np.uint8)
    values[:, 129:, :3] = 255
    values[..., 3] = 128
    record = record_of(tmp_path / "cat.png", encode(Image.fromarray(values), "PNG"), buckets=["64x64"])
    row = load_pixels(record)[32].astype(int)
    assert np.abs(row[:28] - 127).max() <= 2
    assert row[33:].min() >= 240


def test_beside_a_mask_file_what_is_transparent_is_white(tmp_path):
    """Only transparency that is itself the mask is taken off."""
    values = np.full((64, 64, 4), 100, np.uint8)
    values[..., 3] = 0
    content = encode(Image.fromarray(values), "PNG")
    record = record_of(tmp_path / "cat.png", content, buckets=["32x32"], mask=str(tmp_path / "cat-mask.png"))
    assert load_pixels(record).min() == 255
