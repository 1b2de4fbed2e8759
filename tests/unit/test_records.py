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


def test_an_image_record_has_conditioning_once_it_has_a_bucket():
    record = ImageRecord("cat.png", "ab", (1, 2))
    with pytest.raises(ValueError, match=r"cat\.png has no bucket yet"):
        record.micro_conditioning  # noqa: B018
    record = dataclasses.replace(record, bucket_hw=(5, 6), resized_hw=(7, 8), crop_top_left=(3, 4))
    assert record.micro_conditioning == CONDITIONING


def test_an_encoded_sample_says_the_same_as_its_record():
    sample = EncodedSample("id", "cat.png", "ab", (1, 2), (3, 4), (5, 6), ("a cat",), "latent", ("text",), 1)
    assert sample.micro_conditioning == CONDITIONING
    assert sample.bucket == "5x6"


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONDITIONING.target_hw = (1, 1)


def test_a_batch_moves_as_a_whole():
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "sample_ids"]
    batch = Batch(sample_ids=("a", "b"), **{name: torch.ones(2, index + 1) for index, name in enumerate(names)})
    moved = batch.to("meta")
    assert len(moved) == len(batch) == 2
    assert moved.sample_ids == ("a", "b")
    for name in names:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu"
