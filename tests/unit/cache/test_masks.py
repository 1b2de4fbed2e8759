import dataclasses
import hashlib

import numpy as np
import pytest
from PIL import Image

from sdxl_ray.cache import masks
from sdxl_ray.cache.images import UnreadableImage, load_pixels, load_pixels_and_alpha
from sdxl_ray.cache.masks import load_mask_file, mask_cells
from tests.unit.cache.test_images import encode, noise, record_of


def half_white(height, width):
    """White from the middle of the width on."""
    values = np.zeros((height, width), np.uint8)
    values[:, width // 2 :] = 255
    return Image.fromarray(values)


def with_mask(tmp_path, mask, *, image_hw=(256, 384), buckets=("256x256",), **fields):
    """The record of an image whose mask is a file."""
    (tmp_path / "cat-mask.png").write_bytes(encode(mask, "PNG"))
    content = encode(noise(*image_hw), "PNG")
    return record_of(tmp_path / "cat.png", content, buckets=buckets, mask=str(tmp_path / "cat-mask.png"), **fields)


@pytest.mark.parametrize("scale", [4, 1, 0.5, 0.125])
def test_a_mask_of_any_size_lies_where_the_image_does(tmp_path, scale):
    mask = half_white(int(256 * scale), int(384 * scale))
    cells = load_mask_file(with_mask(tmp_path, mask))
    assert (cells.shape, cells.dtype) == ((32, 32), np.uint8)
    assert np.array_equal(cells, np.repeat([[0] * 16 + [255] * 16], 32, 0))


def test_a_mask_is_cropped_like_the_image(tmp_path):
    mask = half_white(256, 384)
    assert load_mask_file(with_mask(tmp_path, mask, crop="top_left"))[0].tolist() == [0] * 24 + [255] * 8
    assert load_mask_file(with_mask(tmp_path, mask, crop="top_right"))[0].tolist() == [0] * 8 + [255] * 24


def test_a_mask_is_mirrored_like_the_image(tmp_path):
    mask = half_white(256, 384)
    assert load_mask_file(with_mask(tmp_path, mask, crop="top_left", flip=True))[0].tolist() == [255] * 8 + [0] * 24


def test_a_latent_pixel_gets_the_mean_of_its_area(tmp_path):
    values = np.zeros((256, 256), np.uint8)
    values[:, 8 * 4 + 2 :] = 255  # the fifth latent pixel is white but for two columns
    record = with_mask(tmp_path, Image.fromarray(values), image_hw=(256, 256))
    assert load_mask_file(record)[3, :7].tolist() == [0, 0, 0, 0, 191, 255, 255]


def test_a_mask_is_resized_like_the_image(tmp_path):
    """A 500x750 image in a 256x256 bucket, its mask four times as fine: where the image is white, the mask is."""
    image, mask = half_white(500, 750), half_white(2000, 3000)
    (tmp_path / "mask.png").write_bytes(encode(mask, "PNG"))
    for crop in ("center", "random", "bottom_left"):
        record = record_of(
            tmp_path / "cat.png", encode(image, "PNG"), buckets=["256x256"], crop=crop, mask=str(tmp_path / "mask.png")
        )
        expected = load_pixels(record)[..., 0].reshape(32, 8, 32, 8).mean((1, 3))
        assert np.abs(load_mask_file(record) - expected).max() <= 16  # half a pixel of eight at the one edge


def test_a_masks_own_orientation_is_obeyed(tmp_path):
    record = with_mask(tmp_path, half_white(256, 384))
    (tmp_path / "cat-mask.png").write_bytes(encode(half_white(256, 384), "PNG", orientation=6))
    assert load_mask_file(record)[0].tolist() == [0] * 16 + [255] * 16


def test_the_images_orientation_is_not_the_masks(tmp_path):
    """The mask was drawn over the upright image."""
    record = with_mask(tmp_path, half_white(256, 384))
    content = encode(noise(256, 384), "JPEG", orientation=6)
    turned = record_of(tmp_path / "cat.jpg", content, buckets=["256x256"], mask=record.mask)
    assert np.array_equal(load_mask_file(turned), load_mask_file(record))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16", "CMYK"])
def test_a_mask_in_any_mode(tmp_path, mode):
    mask = half_white(256, 384)
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    else:
        mask = mask.convert("RGB").convert(mode)
    record = with_mask(tmp_path, half_white(256, 384))
    (tmp_path / "cat-mask.png").write_bytes(encode(mask, "TIFF"))
    assert load_mask_file(record)[0].tolist() == [0] * 16 + [255] * 16


def test_what_is_transparent_in_a_mask_does_not_count(tmp_path):
    """White painted on a transparent layer."""
    mask = Image.new("RGBA", (384, 256), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (192, 0, 384, 256))
    assert load_mask_file(with_mask(tmp_path, mask))[0].tolist() == [0] * 16 + [255] * 16


def test_a_mask_of_another_aspect_is_refused_with_both_sizes(tmp_path):
    record = with_mask(tmp_path, half_white(256, 384))
    (tmp_path / "cat-mask.png").write_bytes(encode(half_white(260, 384), "PNG"))
    with pytest.raises(UnreadableImage) as caught:
        load_mask_file(record)
    assert caught.value.kind == "mask"
    assert str(caught.value) == (
        f"its mask {record.mask} is 260x384 pixels (height x width), the image 256x384: not the same aspect"
    )


def test_a_small_masks_rounded_edge_is_no_other_aspect(tmp_path):
    record = with_mask(tmp_path, half_white(257, 384), image_hw=(640, 960), buckets=["64x96"])
    assert load_mask_file(record).shape == (8, 12)
    (tmp_path / "cat-mask.png").write_bytes(encode(half_white(11, 16), "PNG"))
    assert load_mask_file(record).shape == (8, 12)


def test_a_damaged_mask_is_named(tmp_path):
    record = with_mask(tmp_path, noise(256, 384, 1))
    (tmp_path / "cat-mask.png").write_bytes(encode(noise(256, 384, 1), "PNG")[:3000])
    with pytest.raises(UnreadableImage, match=r"^its mask .*cat-mask\.png cannot be decoded: ") as error:
        load_mask_file(record)
    assert error.value.kind == "mask"


def test_a_mask_that_was_edited_since_the_scan_is_not_the_one_that_is_meant(tmp_path):
    """It would be stored as the old one."""
    record = with_mask(tmp_path, half_white(256, 384))
    digest = hashlib.sha256((tmp_path / "cat-mask.png").read_bytes()).hexdigest()
    known = dataclasses.replace(record, mask_hash=digest)
    assert np.array_equal(load_mask_file(known), load_mask_file(record))
    (tmp_path / "cat-mask.png").write_bytes(encode(Image.new("L", (384, 256), 255), "PNG"))
    with pytest.raises(UnreadableImage) as error:
        load_mask_file(known)
    assert (str(error.value), error.value.kind) == (
        f"its mask {record.mask} changed while it was being cached; run `sdxl-ray cache` again",
        "changed",
    )
    assert load_mask_file(record).min() == 255  # where nobody knows its bytes, it is taken as it is


def test_a_bomb_of_a_mask_is_not_decoded(tmp_path, monkeypatch):
    record = with_mask(tmp_path, half_white(256, 384))
    monkeypatch.setattr(masks, "MAX_MASK_PIXELS", 1000)
    monkeypatch.setattr(masks, "decode", lambda content: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"has 256x384 pixels, more than 1,000$"):
        load_mask_file(record)


def test_a_missing_mask_says_nothing_about_the_image(tmp_path):
    record = with_mask(tmp_path, half_white(256, 384))
    (tmp_path / "cat-mask.png").unlink()
    with pytest.raises(FileNotFoundError):
        load_mask_file(record)


# ---- an image's own transparency -------------------------------------------------------------------------------------


def alpha_cells(record):
    _, alpha = load_pixels_and_alpha(record)
    return mask_cells(alpha, record)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "tRNS"])
def test_an_images_own_transparency_as_its_mask(tmp_path, kind):
    grey = Image.new("L", (384, 256), 100)
    if kind in ("RGBA", "LA"):
        image = grey.convert(kind)
        image.putalpha(half_white(256, 384))
        content = encode(image, "PNG")
    else:
        grey.paste(7, (0, 0, 192, 256))
        image = grey.convert("P") if kind == "P" else grey
        content = encode(image, "PNG", transparency=7)
    record = record_of(tmp_path / "cat.png", content, buckets=["256x256"], mask="alpha")
    assert alpha_cells(record)[0].tolist() == [0] * 16 + [255] * 16


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P")])
def test_an_image_without_transparency_counts_everywhere(tmp_path, format, mode):
    content = encode(Image.new(mode, (300, 200), 3), format)
    cells = alpha_cells(record_of(tmp_path / "cat", content, buckets=["64x128"], mask="alpha"))
    assert np.array_equal(cells, np.full((8, 16), 255, np.uint8))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_transparency_is_turned_with_its_image(tmp_path, format, orientation, flip):
    """Where white would shine through the black image, it does not count. The corners differ."""
    image = Image.new("RGBA", (384, 256), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 160, 64))
    image.paste((0, 0, 0, 0), (320, 192, 384, 256))
    content = encode(image, format, orientation=orientation, **({"lossless": True} if format == "WEBP" else {}))
    record = record_of(tmp_path / "cat", content, buckets=["256x384"], mask="alpha", flip=flip)
    pixels, alpha = load_pixels_and_alpha(record)
    assert np.array_equal(pixels, load_pixels(record))
    assert pixels.max() == 0
    on_white = load_pixels(dataclasses.replace(record, mask=""))
    seen = 255 - on_white[..., 0].reshape(32, 8, 48, 8).mean((1, 3))
    assert (seen < 128).sum() == 20 * 8 + 8 * 8
    assert np.abs(mask_cells(alpha, record) - seen).max() <= 2


def test_a_finer_mask_is_averaged_not_thinned(tmp_path):
    values = np.zeros((512, 512), np.uint8)
    values[:, ::2] = 255
    cells = load_mask_file(with_mask(tmp_path, Image.fromarray(values), image_hw=(256, 256)))
    assert np.abs(cells.astype(int) - 127).max() <= 1


def test_what_is_half_transparent_in_a_mask_counts_half(tmp_path):
    mask = Image.new("RGBA", (384, 256), (255, 255, 255, 128))
    assert set(load_mask_file(with_mask(tmp_path, mask)).flat) == {128}


def test_a_mask_that_was_edited_is_found_out_where_its_image_is_known_by_the_listing_alone(tmp_path):
    record = with_mask(tmp_path, half_white(256, 384), verify=False)
    digest = hashlib.sha256((tmp_path / "cat-mask.png").read_bytes()).hexdigest()
    known = dataclasses.replace(record, mask_hash=digest)
    (tmp_path / "cat-mask.png").write_bytes(encode(Image.new("L", (384, 256), 255), "PNG"))
    with pytest.raises(UnreadableImage, match="changed while it was being cached"):
        load_mask_file(known)
