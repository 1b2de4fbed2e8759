"""An image with its mask: how often it is read, and whose fault it is where it cannot be."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_ray.cache import images, masks, reading
from sdxl_ray.cache.images import UnreadableImage
from sdxl_ray.cache.reading import load_image
from sdxl_ray.errors import StorageError
from sdxl_ray.records import ImageRecord

TIMED_OUT = StorageError("s3://bucket/cat.png: timed out while reading.")


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    made = []
    monkeypatch.setattr(reading.time, "sleep", made.append)
    return made


class Reads:
    """What was read, in order; `errors` are raised first, one for each read."""

    def __init__(self):
        self.names, self.errors = [], []
        self.read_bytes = images.read_bytes

    def __call__(self, address):
        self.names.append(address.rpartition("/")[2])
        if self.errors:
            raise self.errors.pop(0)
        return self.read_bytes(address)


@pytest.fixture
def reads(monkeypatch):
    made = Reads()
    monkeypatch.setattr(images, "read_bytes", made)
    monkeypatch.setattr(masks, "read_bytes", made)
    return made


@pytest.fixture
def record_of(tmp_path):
    """The record of a 64x64 image whose right half is transparent, with a mask file whose lower half is black."""

    def make(mask, **fields):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
        image.paste((0, 0, 0, 0), (32, 0, 64, 64))
        image.save(tmp_path / "cat.png")
        cells = Image.new("L", (64, 64), 255)
        cells.paste(0, (0, 32, 64, 64))
        cells.save(tmp_path / "mask.png")
        digest = hashlib.sha256((tmp_path / "cat.png").read_bytes()).hexdigest()
        address = str(tmp_path / "mask.png") if mask == "file" else mask
        hw = (64, 64)
        return ImageRecord(str(tmp_path / "cat.png"), digest, hw, hw, hw, (0, 0), mask=address, **fields)

    return make


@pytest.mark.parametrize(
    ("mask", "files", "columns"),
    [
        ("", ["cat.png"], None),
        ("alpha", ["cat.png"], ([255] * 4 + [0] * 4, [255] * 8)),
        ("file", ["cat.png", "mask.png"], ([255] * 8, [255] * 4 + [0] * 4)),
    ],
)
def test_each_file_is_read_once(record_of, reads, monkeypatch, mask, files, columns):
    opened, real = [], images.open_image
    monkeypatch.setattr(images, "open_image", lambda content: opened.append(1) or real(content))
    pixels, cells = load_image(record_of(mask))
    # White below what is transparent, unless that is the mask.
    assert pixels[0, :, 0].tolist() == [0] * 64 if mask == "alpha" else [0] * 32 + [255] * 32
    assert (reads.names, len(opened)) == (files, len(files))
    assert (cells is None) == (columns is None)
    if columns:
        assert (cells[0].tolist(), cells[:, 0].tolist()) == columns


@pytest.mark.parametrize("mask", ["", "alpha"])
@pytest.mark.parametrize("verify", [True, False])
def test_what_cannot_be_read_is_tried_once_more(record_of, reads, pauses, mask, verify):
    record = record_of(mask, verify=verify)
    expected = load_image(record)
    for errors in ([TIMED_OUT], [OSError(5, "Input/output error")], [PermissionError(13, "Permission denied")]):
        reads.errors[:] = errors
        found = load_image(record)
        assert np.array_equal(found[0], expected[0])
        assert not mask or np.array_equal(found[1], expected[1])
    assert pauses == [3.0] * 3
    reads.errors[:] = [TIMED_OUT, TIMED_OUT]
    with pytest.raises(StorageError, match="timed out"):
        load_image(record)


def test_a_mask_is_tried_once_more_without_its_image(record_of, reads):
    record = record_of("file")
    expected = load_image(record)
    real = reading.load_pixels(record)
    del reads.names[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "load_pixels", lambda record: real)
        reads.errors[:] = [TIMED_OUT]
        assert np.array_equal(load_image(record)[1], expected[1])
    assert reads.names == ["mask.png"] * 2


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (FileNotFoundError(2, "No such file or directory", "/cat.png"), True),
        (FileNotFoundError(2, "HTTP 404 Not Found", "https://example.org/cat.png"), True),
        (PermissionError(13, "HTTP 403 Forbidden", "https://example.org/cat.png"), True),
        (OSError(22, "it is not a regular file, but a pipe, socket or device", "/cat.png"), True),
        (PermissionError(13, "Permission denied", "/cat.png"), False),
        (OSError(5, "HTTP 503 not found anywhere, 4 attempts", "https://example.org/cat.png"), False),
        (StorageError("s3://bucket/not found/HTTP 404/cat.png: access denied while reading."), False),
    ],
)
@pytest.mark.parametrize("mask", ["", "alpha"])
def test_what_is_gone_is_a_reason_to_skip_where_only_its_listing_was_known(
    record_of, reads, pauses, error, is_gone, mask
):
    reads.errors[:] = [error, error]
    if not is_gone:
        with pytest.raises(type(error)) as raised:
            load_image(record_of(mask, verify=False))
        assert raised.value is error
        return
    with pytest.raises(UnreadableImage) as skipped:
        load_image(record_of(mask, verify=False))
    assert (str(skipped.value), skipped.value.kind) == (f"cannot be read: {error.strerror}", "unreadable")
    assert pauses == []
    reads.errors[:] = [error, error]
    with pytest.raises(type(error)):  # somebody has opened it before
        load_image(record_of(mask))


def test_a_mask_that_this_machine_does_not_see_is_no_fault_of_an_image_whose_listing_was_trusted(record_of, pauses):
    """The scan has opened it, whatever identifies the image."""
    record = dataclasses.replace(record_of("file"), verify=False)
    Path(record.mask).unlink()
    with pytest.raises(FileNotFoundError):
        load_image(record)
    assert len(pauses) == 1
