import hashlib
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_ray.cache.buckets import assign_bucket
from sdxl_ray.cache.images import UnreadableImage, decode, load_pixels, to_srgb
from sdxl_ray.cache.scan import header_hw
from sdxl_ray.records import ImageRecord

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def smooth(height, width):
    """Without edges, so that lossy formats stay within a few levels."""
    down, across = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([down * 200 // height, across * 200 // width, (down + across) * 200 // (height + width)], -1).astype(
            np.uint8
        )
    )


def record_of(path, content, *, buckets, crop="center"):
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return assign_bucket(ImageRecord(str(path), digest, header_hw(content)), buckets, crop)


def rgb(content):
    return np.asarray(to_srgb(decode(content)))


# ---- resize and crop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize(
    ("hw", "bucket"), [((256, 300), (256, 256)), ((300, 256), (256, 256)), ((256, 256), (256, 256))]
)
def test_without_resizing_the_crop_is_exactly_where_the_record_says(tmp_path, hw, bucket, crop):
    """Each pixel holds its own coordinates."""
    down, across = np.mgrid[0 : hw[0], 0 : hw[1]]
    image = Image.fromarray(np.stack([down % 256, across % 256, down // 256 * 16 + across // 256], -1).astype(np.uint8))
    record = record_of(tmp_path / "cat.png", encode(image, "PNG"), buckets=[bucket], crop=crop)
    assert record.resized_hw == hw
    pixels = load_pixels(record)
    top, left = record.crop_top_left
    assert pixels.shape == (*bucket, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(image)[top : top + bucket[0], left : left + bucket[1]])


@pytest.mark.parametrize("hw", [(300, 1000), (1000, 300), (97, 211), (64, 50), (500, 500)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_resized_crop_is_the_crop_of_the_resized_image(tmp_path, hw, crop):
    image = noise(*hw)
    record = record_of(tmp_path / "cat.png", encode(image, "PNG"), buckets=[(128, 192)], crop=crop)
    height, width = record.resized_hw
    whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = record.crop_top_left
    expected = whole[top : top + 128, left : left + 192].astype(int)
    assert np.abs(load_pixels(record).astype(int) - expected).max() <= 1  # rounding


@pytest.mark.parametrize("hw", [(1, 1), (3, 20000), (20000, 3)])
def test_extreme_shapes_need_no_extreme_memory(tmp_path, hw):
    """3x20000 px covers 512x64 at 512x3413333, which nobody computes."""
    record = record_of(tmp_path / "cat.png", encode(noise(*hw), "PNG"), buckets=[(64, 512), (512, 64)])
    assert load_pixels(record).shape == (*record.bucket_hw, 3)


def test_shrinking_a_fine_grating_gives_grey_not_moire(tmp_path):
    """A period of 2.9 px cannot be drawn at a quarter of the size; without a low-pass it would come back as stripes."""
    across = np.arange(2048)
    row = np.round(127.5 + 127.5 * np.sin(2 * np.pi * across / 2.9)).astype(np.uint8)
    image = Image.fromarray(np.repeat(row[None], 512, 0)).convert("RGB")
    assert np.asarray(image).std() > 80
    record = record_of(tmp_path / "cat.png", encode(image, "PNG"), buckets=[(128, 512)])
    pixels = load_pixels(record)[:, 8:-8]  # the edge of the image is an edge
    assert pixels.std() < 1
    assert abs(pixels.mean() - 127.5) < 1


# ---- orientation, colour, transparency -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_come_out_upright(format, orientation):
    upright = smooth(48, 64)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    content = encode(stored, format, exif=exif if format == "TIFF" else exif.tobytes(), **lossless)
    found = rgb(content).astype(int)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - np.asarray(upright)).max() <= (4 if format == "JPEG" else 0)


def test_an_srgb_profile_changes_nothing():
    image = noise(32, 32)
    assert np.abs(rgb(encode(image, "PNG", icc_profile=SRGB)).astype(int) - np.asarray(image)).max() <= 1


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


def test_a_colour_profile_is_applied():
    image = smooth(32, 32)
    found = rgb(encode(image, "PNG", icc_profile=wide_gamut_profile())).astype(int)
    assert np.abs(found - np.asarray(image)[..., [1, 0, 2]]).max() <= 2


def test_a_colour_profile_is_applied_under_transparency():
    image = smooth(32, 32)
    image.putalpha(255)
    found = rgb(encode(image, "PNG", icc_profile=wide_gamut_profile())).astype(int)
    assert np.abs(found - np.asarray(image)[..., [1, 0, 2]]).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], SRGB], ids=["nonsense", "cut off", "not for grey"])
def test_a_profile_that_does_not_fit_is_ignored(profile):
    grey = noise(16, 16, 1)
    assert np.array_equal(rgb(encode(grey, "PNG", icc_profile=profile)), np.asarray(grey.convert("RGB")))


def test_cmyk():
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
def test_16_bit_greys_are_scaled_not_clipped(format, dtype):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=dtype)
    content = encode(Image.fromarray(values), format)
    assert decode(content).mode.startswith("I;16")
    assert rgb(content)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_big_endian_tiff_is_what_the_test_above_says():
    content = encode(Image.fromarray(np.zeros((2, 2), ">u2")), "TIFF")
    assert (content[:2], decode(content).mode) == (b"MM", "I;16B")


def test_32_bit_greys():
    assert rgb(encode(Image.fromarray(np.array([[0, 257, 65535, 10**6]], np.int32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        1,
        255,
        255,
    ]
    assert rgb(encode(Image.fromarray(np.array([[0, 0.5, 1.0]], np.float32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode, alpha):
    value = 100
    image = Image.new(mode, (8, 8), (value, value, value, alpha) if mode == "RGBA" else (value, alpha))
    found = rgb(encode(image, "PNG")).astype(int)
    assert np.abs(found - (value * alpha + 255 * (255 - alpha)) / 255).max() <= 1


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert rgb(encode(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert rgb(encode(image, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_a_transparent_colour_of_an_rgb_image_is_white():
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (40, 50, 60))
    assert rgb(encode(image, "PNG", transparency=(10, 20, 30))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame(format):
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "lime", "blue")]
    content = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.array_equal(rgb(content), np.asarray(frames[0]))


def test_one_bit():
    assert rgb(encode(Image.fromarray(np.array([[True, False]])), "PNG")).tolist() == [[[255] * 3, [0] * 3]]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "GIF"])
def test_a_file_that_ends_early_is_unreadable_not_half_grey(tmp_path, format):
    content = encode(noise(64, 64), format)
    record = record_of(tmp_path / "cat", content[: len(content) * 3 // 4], buckets=[(64, 64)])
    with pytest.raises(UnreadableImage, match="cannot be decoded: "):
        load_pixels(record)


def test_whatever_a_decoder_raises_is_a_reason(tmp_path, monkeypatch):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=[(64, 64)])

    def fail(content):
        raise RuntimeError("Failed to decode frame 0")  # as Pillow's AVIF plugin does

    monkeypatch.setattr("sdxl_ray.cache.images.decode", fail)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: Failed to decode frame 0$"):
        load_pixels(record)


def test_a_file_that_changed_after_the_scan(tmp_path):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=[(64, 64)])
    (tmp_path / "cat.png").write_bytes(encode(noise(9, 8), "PNG"))
    with pytest.raises(UnreadableImage, match=r"^changed while it was being cached; run `sdxl-ray cache` again$"):
        load_pixels(record)


def test_a_file_that_cannot_be_read_here_is_not_called_damaged(tmp_path):
    record = record_of(tmp_path / "cat.png", encode(noise(8, 8), "PNG"), buckets=[(64, 64)])
    (tmp_path / "cat.png").unlink()
    with pytest.raises(FileNotFoundError):
        load_pixels(record)


def test_a_record_without_a_bucket_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"cat\.png has no bucket yet"):
        load_pixels(ImageRecord("cat.png", "00", (1, 1)))
