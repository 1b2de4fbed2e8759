import math

import pytest

from sdxl_ray.cache.buckets import (
    MAX_ASPECT,
    SDXL_BUCKETS,
    assign_bucket,
    cover,
    crop_offset,
    make_buckets,
    nearest_bucket,
)
from sdxl_ray.records import ImageRecord

TABLES = [(1024, 64), (1024, 32), (512, 64), (768, 64), (640, 8), (64, 64), (128, 64)]
ODD_SIZES = [(1, 1), (10, 30000), (30000, 10), (1, 5000), (1023, 1025), (2048, 512), (333, 777)]


def test_the_table_at_1024_is_the_one_sdxl_was_trained_with():
    """Appendix I of arXiv:2307.01952: 40 sizes from 512x2048 to 2048x512, each at 1024² pixels as far as 64 allows."""
    assert make_buckets(1024, 64) == SDXL_BUCKETS
    assert len(set(SDXL_BUCKETS)) == 40
    aspects = [height / width for height, width in SDXL_BUCKETS]
    assert aspects == sorted(aspects)
    assert (aspects[0], aspects[-1]) == (0.25, 4.0)
    for height, width in SDXL_BUCKETS:
        assert 0.88 * 1024**2 < height * width <= 1024**2


@pytest.mark.parametrize(("resolution", "step"), TABLES)
def test_a_table_is_symmetric_on_the_grid_and_within_the_area(resolution, step):
    buckets = make_buckets(resolution, step)
    lopsided = {(704, 1344)} if (resolution, step) == (1024, 64) else set()  # as in the paper
    assert {hw for hw in buckets if hw[::-1] not in buckets} == lopsided
    assert len(set(buckets)) == len(buckets)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert max(height, width) <= MAX_ASPECT * min(height, width)


@pytest.mark.parametrize(("resolution", "step"), [table for table in TABLES if table != (1024, 64)])
def test_no_generated_bucket_could_be_larger(resolution, step):
    for height, width in make_buckets(resolution, step):
        assert (height + step) * width > resolution**2
        assert height * (width + step) > resolution**2


def test_an_image_of_a_buckets_size_gets_that_bucket():
    for bucket in SDXL_BUCKETS:
        assert nearest_bucket(bucket, SDXL_BUCKETS) == bucket


@pytest.mark.parametrize("hw", [(2000, 1000), (1700, 1000), (1234, 999), (1001, 1000), *ODD_SIZES])
def test_tall_and_wide_are_treated_alike(hw):
    tall, wide = nearest_bucket(hw, SDXL_BUCKETS), nearest_bucket(hw[::-1], SDXL_BUCKETS)
    assert math.isclose(math.log(tall[0] / tall[1]), -math.log(wide[0] / wide[1]), abs_tol=1e-9)


@pytest.mark.parametrize("hw", [(2000, 1000), (777, 1000), *ODD_SIZES])
def test_the_nearest_bucket_is_nearest_in_log_aspect(hw):
    def distance(bucket):
        return abs(math.log(bucket[0] / bucket[1]) - math.log(hw[0] / hw[1]))

    assert distance(nearest_bucket(hw, SDXL_BUCKETS)) <= min(map(distance, SDXL_BUCKETS)) + 1e-9


def test_of_two_buckets_of_one_aspect_the_larger_is_taken():
    assert nearest_bucket((300, 300), [(64, 64), (128, 128), (64, 128)]) == (128, 128)


@pytest.mark.parametrize("bucket", [(1024, 1024), (512, 2048), (832, 1216)])
@pytest.mark.parametrize("hw", [(1024, 1024), (400, 600), (3000, 2000), (4032, 3024), *ODD_SIZES])
def test_cover_covers_just_and_keeps_the_aspect_to_a_pixel(hw, bucket):
    resized = cover(hw, bucket)
    assert resized[0] >= bucket[0]
    assert resized[1] >= bucket[1]
    assert resized[0] == bucket[0] or resized[1] == bucket[1]
    scale = max(bucket[0] / hw[0], bucket[1] / hw[1])
    assert abs(resized[0] - hw[0] * scale) <= 0.5 + 1e-6
    assert abs(resized[1] - hw[1] * scale) <= 0.5 + 1e-6


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("hw", [(400, 600), (3000, 2000), *ODD_SIZES])
def test_the_crop_lies_inside(hw, crop):
    record = assign_bucket(ImageRecord("cat.png", "ab" * 32, hw), SDXL_BUCKETS, crop)
    for offset, size, whole in zip(record.crop_top_left, record.bucket_hw, record.resized_hw, strict=True):
        assert 0 <= offset <= whole - size


def test_a_centre_crop_leaves_the_same_on_both_sides():
    assert crop_offset((1024, 1536), (1024, 1024), "center", "hash") == (0, 256)
    assert crop_offset((1031, 1024), (1024, 1024), "center", "hash") == (3, 0)


def test_a_random_crop_depends_on_the_content_alone():
    offsets = [crop_offset((1024, 1536), (1024, 1024), "random", f"hash-{number}") for number in range(200)]
    assert offsets == [crop_offset((1024, 1536), (1024, 1024), "random", f"hash-{number}") for number in range(200)]
    lefts = [left for _, left in offsets]
    assert len(set(lefts)) > 100
    assert min(lefts) < 30
    assert max(lefts) > 482
    assert {top for top, _ in offsets} == {0}


def test_a_random_crop_reaches_both_ends():
    offsets = {crop_offset((12, 11), (10, 10), "random", str(number)) for number in range(100)}
    assert offsets == {(top, left) for top in (0, 1, 2) for left in (0, 1)}


def test_assign_bucket_keeps_what_was_there():
    record = assign_bucket(ImageRecord("cat.png", "ab" * 32, (100, 200), ("a cat",)), SDXL_BUCKETS, "center")
    assert (record.path, record.captions) == ("cat.png", ("a cat",))
    assert record.micro_conditioning.original_hw == (100, 200)
    assert record.micro_conditioning.target_hw == record.bucket_hw


def test_sizes_met_before_are_not_computed_again(monkeypatch):
    first = nearest_bucket((1001, 777), SDXL_BUCKETS)
    monkeypatch.setattr("math.log", lambda _: pytest.fail("computed again"))
    assert nearest_bucket((1001, 777), list(SDXL_BUCKETS)) == first
