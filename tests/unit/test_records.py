import dataclasses

import pytest
import torch

from sdxl_ray.records import Batch, EncodedSample, ImageRecord, MicroConditioning, bucket_key, parse_bucket_key

CONDITIONING = MicroConditioning(original_hw=(1, 2), crop_top_left=(3, 4), target_hw=(5, 6))


def test_time_ids_are_in_the_order_of_diffusers():
    """`_get_add_time_ids(original_size, crops_coords_top_left, target_size)` concatenates them, height before width."""
    assert CONDITIONING.as_time_ids() == (1, 2, 3, 4, 5, 6)


def test_a_bucket_key_is_height_times_width():
    assert bucket_key((1024, 832)) == "1024x832"
    assert parse_bucket_key(bucket_key((1024, 832))) == (1024, 832)


RECORD = ImageRecord("cat.png", "ab", (1, 2), bucket_hw=(5, 6), resized_hw=(8, 11), crop_top_left=(3, 4))
SAMPLE = EncodedSample(
    sample_id="id",
    dataset="cats",
    path="cat.png",
    address="",
    image_hash="ab",
    verify=True,
    original_hw=(1, 2),
    target_hw=(5, 6),
    resized_hw=(8, 11),
    crops=((3, 4), (0, 5)),
    flip=False,
    mask="",
    captions=("a cat",),
    scaled_jpeg=False,
    caption_bases=(0,),
    latent_keys=("latent", "other"),
    latent_shards=("x", "x"),
    text_keys=("text",),
    text_shards=("y",),
)


def test_of_a_flipped_image_the_crop_is_mirrored():
    """11 pixels wide, 6 kept from the 4th on: 1 is cut away on the right, which is on the left once it is mirrored."""
    assert RECORD.micro_conditioning == CONDITIONING
    assert dataclasses.replace(RECORD, flip=True).micro_conditioning.crop_top_left == (3, 1)


def test_an_encoded_sample_says_the_same_as_its_record():
    assert SAMPLE.micro_conditioning() == CONDITIONING
    assert SAMPLE.micro_conditioning(1).crop_top_left == (0, 5)
    assert SAMPLE.bucket == "5x6"
    assert SAMPLE.image_record() == RECORD
    masked = dataclasses.replace(SAMPLE, mask="cat-mask.png", mask_hash="cd")
    assert masked.image_record() == dataclasses.replace(RECORD, mask="cat-mask.png", mask_hash="cd")
    mirrored = dataclasses.replace(SAMPLE, flip=True, crops=((3, 1),))
    assert mirrored.image_record() == dataclasses.replace(RECORD, flip=True)


def test_a_batch_without_masks_has_none_elsewhere_either():
    ones = {
        field.name: torch.ones(1) for field in dataclasses.fields(Batch) if field.name not in ("sample_ids", "masks")
    }
    assert Batch(sample_ids=("a",), **ones).to("meta").masks is None


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONDITIONING.target_hw = (1, 1)


def test_a_batch_moves_as_a_whole():
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "sample_ids"]
    batch = Batch(sample_ids=("a", "b"), **{name: torch.ones(2, index + 1) for index, name in enumerate(names)})
    moved = batch.to("meta")
    assert len(moved) == len(batch) == 2
    assert moved.sample_ids == ("a", "b")
    for name in names:  # which rows have the parent's prediction is asked on the host
        assert getattr(moved, name).device.type == ("cpu" if name == "from_parent" else "meta")
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu"
