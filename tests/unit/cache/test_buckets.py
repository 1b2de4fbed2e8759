import hashlib
import math
import pickle
import random

import pytest

from sdxl_ray.cache.buckets import (
    MAX_ASPECT,
    SDXL_BUCKETS,
    Geometry,
    Placement,
    Unfit,
    cover,
    make_buckets,
    make_shorter_side_buckets,
    nearest_bucket,
    place,
    place_all,
)
from sdxl_ray.config.schema import DatasetSection

TABLES = [(1024, 64), (1024, 32), (512, 64), (768, 64), (640, 8), (64, 64), (128, 64)]
ODD_SIZES = [(1, 1), (10, 30000), (30000, 10), (1, 5000), (1023, 1025), (2048, 512), (333, 777)]
HASH = "ab" * 32


NO_LIMITS = {"max_upscale": 0, "max_cut": 1}


def geometry(**settings):
    (only,) = Geometry.of(DatasetSection(**NO_LIMITS | settings))
    return only


# ---- the buckets -----------------------------------------------------------------------------------------------------


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


def test_the_default_is_sdxls_table():
    assert geometry().buckets == SDXL_BUCKETS


def test_one_megapixel_is_an_edge_of_1024():
    assert geometry(resolution=1.0, resolution_unit="megapixels").buckets == SDXL_BUCKETS
    assert geometry(resolution=0.25, resolution_unit="megapixels") == geometry(resolution=512)


def test_half_a_megapixel_has_room_for_its_exact_half():
    """724.077...² in floating point is a hair below 524288 = 512 x 1024."""
    assert (512, 1024) in geometry(resolution=0.5, resolution_unit="megapixels").buckets


def test_a_shorter_side_is_exactly_that_in_every_bucket():
    buckets = geometry(resolution=512, resolution_unit="shorter_side").buckets
    assert buckets == make_shorter_side_buckets(512, 64)
    assert {min(bucket) for bucket in buckets} == {512}
    assert {max(bucket) for bucket in buckets} == set(range(512, 2048 + 1, 64))
    assert {bucket[::-1] for bucket in buckets} == set(buckets)
    assert len(set(buckets)) == len(buckets)


def test_a_shorter_side_need_not_be_a_multiple_of_the_step():
    buckets = geometry(resolution=720, resolution_unit="shorter_side").buckets
    assert {min(bucket) for bucket in buckets} == {720}
    assert (720, 720) in buckets
    assert (720, 784) in buckets


def test_own_buckets():
    assert geometry(buckets=["1024x1024", "832x1216"]).buckets == ((1024, 1024), (832, 1216))


@pytest.mark.parametrize(
    ("settings", "edge"),
    [
        ({}, 1024),
        ({"resolution": 1000}, 960),
        ({"resolution": 0.5, "resolution_unit": "megapixels"}, 704),
        ({"resolution": 720, "resolution_unit": "shorter_side"}, 720),
    ],
)
def test_only_the_square_one(settings, edge):
    assert geometry(buckets=["square"], **settings).buckets == ((edge, edge),)


def test_own_buckets_are_the_same_at_every_resolution():
    assert len(Geometry.of(DatasetSection(resolution=[512, 1024], buckets=["512x768"]))) == 1
    assert [g.buckets for g in Geometry.of(DatasetSection(resolution=[512, 1024], buckets=["square"]))] == [
        ((512, 512),),
        ((1024, 1024),),
    ]


def test_a_bucket_that_is_there_twice_counts_once():
    assert geometry(buckets=["1024x832", "512x512", "1024x832"]).buckets == ((1024, 832), (512, 512))


def test_own_buckets_need_no_room_for_automatic_ones():
    section = DatasetSection(resolution=0.06, resolution_unit="megapixels", bucket_step=256, buckets=["256x256"])
    assert [geometry.buckets for geometry in Geometry.of(section)] == [((256, 256),)]


@pytest.mark.parametrize(
    ("original_hw", "reason"),
    [
        ((1, 1), "it would be enlarged 1024 times, dataset.max_upscale is 8"),
        ((127, 127), "it would be enlarged 8.063 times, dataset.max_upscale is 8"),
        ((128, 128), ""),
        ((1000, 30000), "512x2048 would leave 13.3% of it, dataset.max_cut is 0.8 (20% are left)"),
        ((1000, 20000), ""),
        ((20000, 1000), ""),
        ((20100, 1000), "2048x512 would leave 19.9% of it, dataset.max_cut is 0.8 (20% are left)"),
    ],
)
def test_what_would_be_enlarged_or_cut_beyond_recognition_is_left_out(original_hw, reason):
    (found,) = (place(original_hw, "00", geometry) for geometry in Geometry.of(DatasetSection()))
    assert isinstance(found, Unfit) == bool(reason)
    assert not reason or found.reason == reason


def test_the_limits_can_be_lifted():
    (without,) = Geometry.of(DatasetSection(**NO_LIMITS))
    assert place((1, 1), "00", without).resized_hw == (1024, 1024)
    assert place((10, 30000), "00", without).bucket_hw == (512, 2048)


# ---- the nearest -----------------------------------------------------------------------------------------------------


def test_an_image_of_a_buckets_size_gets_that_bucket():
    for bucket in SDXL_BUCKETS:
        assert nearest_bucket(bucket, SDXL_BUCKETS) == bucket


@pytest.mark.parametrize("hw", [(2000, 1000), (1700, 1000), (1234, 999), (1001, 1000), *ODD_SIZES])
def test_tall_and_wide_are_treated_alike(hw):
    tall, wide = nearest_bucket(hw, SDXL_BUCKETS), nearest_bucket(hw[::-1], SDXL_BUCKETS)
    assert math.isclose(math.log(tall[0] / tall[1]), -math.log(wide[0] / wide[1]), abs_tol=1e-9)


def test_the_nearest_bucket_is_nearest_in_log_aspect():
    """Against a plain search through the whole table, ties to the larger area."""
    draw = random.Random(0)
    sizes = [(draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(500)] + ODD_SIZES
    for buckets in (SDXL_BUCKETS, make_buckets(640, 8), ((64, 64),), ((64, 64), (128, 128), (64, 128), (128, 64))):
        for hw in sizes:
            aspect = math.log(hw[0] / hw[1])
            expected = min(
                buckets, key=lambda hw: (round(abs(math.log(hw[0] / hw[1]) - aspect), 9), -hw[0] * hw[1], hw)
            )
            assert nearest_bucket(hw, buckets) == expected


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


def test_a_place_is_the_nearest_bucket_covered():
    assert place((3000, 2000), HASH, geometry()) == Placement((1216, 832), (1248, 832), ((16, 0),))


def test_sizes_met_before_are_not_computed_again(monkeypatch):
    first = place((1001, 777), HASH, geometry())
    monkeypatch.setattr("math.log", lambda _: pytest.fail("computed again"))
    assert place((1001, 777), "another image", geometry()) == first


def test_a_geometry_that_has_travelled_is_the_same():
    there = geometry(crop="random", upscale=False)
    place((1001, 777), HASH, there)
    back = pickle.loads(pickle.dumps(there))
    assert (back, hash(back)) == (there, hash(there))
    assert back != geometry(crop="center", upscale=False)


# ---- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "hw", "reason"),
    [
        ({"min_size": 512}, (511, 2000), "its shorter edge has 511 pixels, dataset.min_size is 512"),
        ({"max_size": 4096}, (500, 4097), "its longer edge has 4097 pixels, dataset.max_size is 4096"),
        ({"min_aspect": 0.5}, (1000, 333), "its width / height is 0.333, dataset.min_aspect is 0.5"),
        ({"max_aspect": 1.5}, (1000, 1501), "its width / height is 1.5, dataset.max_aspect is 1.5"),
    ],
)
def test_limits(settings, hw, reason):
    assert place(hw, HASH, geometry(**settings)) == Unfit(reason)


@pytest.mark.parametrize(
    ("settings", "hw"),
    [
        ({"min_size": 512}, (512, 512)),
        ({"max_size": 4096}, (4096, 4096)),
        ({"min_aspect": 0.5, "max_aspect": 1.5}, (1000, 500)),
        ({"min_aspect": 0.5, "max_aspect": 1.5}, (1000, 1500)),
    ],
)
def test_a_limit_itself_is_allowed(settings, hw):
    assert isinstance(place(hw, HASH, geometry(**settings)), Placement)


# ---- without enlarging -----------------------------------------------------------------------------------------------


def test_a_large_image_is_placed_as_ever_without_upscale():
    for hw in ((1024, 1024), (1216, 832), (4000, 3000), (832, 1300)):
        assert place(hw, HASH, geometry(upscale=False)) == place(hw, HASH, geometry())


@pytest.mark.parametrize(
    ("hw", "bucket", "resized"),
    [
        ((700, 900), (640, 896), (697, 896)),
        ((900, 700), (896, 640), (896, 697)),
        ((1023, 1023), (960, 960), (960, 960)),
        ((319, 256), (256, 256), (319, 256)),
        ((500, 4000), (448, 1792), (448, 3584)),  # at most four times as long as wide
    ],
)
def test_a_small_image_keeps_its_size_rounded_down(hw, bucket, resized):
    found = place(hw, HASH, geometry(upscale=False))
    assert (found.bucket_hw, found.resized_hw) == (bucket, resized)


def test_without_upscale_nothing_is_enlarged_or_larger_than_the_resolution():
    draw = random.Random(0)
    for settings in (
        {},
        {"resolution": 1000, "bucket_step": 8},
        {"resolution": 512, "resolution_unit": "shorter_side"},
    ):
        table = geometry(upscale=False, **settings)
        area = max(height * width for height, width in table.buckets)
        for _ in range(2000):
            hw = tuple(int(64 * 2 ** draw.uniform(0, 6)) for _ in range(2))
            found = place(hw, HASH, table)
            if isinstance(found, Unfit):
                assert min(hw) < 256 + table.step
                continue
            (height, width) = found.bucket_hw
            assert height % table.step == width % table.step == 0
            assert all(new <= old for new, old in zip(found.resized_hw, hw, strict=True))
            assert min(height, width) >= 256
            assert height * width <= area
            assert max(height, width) <= MAX_ASPECT * min(height, width)


def test_an_image_too_small_for_any_bucket_is_left_out():
    assert place((255, 2000), HASH, geometry(upscale=False)) == Unfit(
        "it is only 255x2000 pixels (height x width), and dataset.upscale is false: "
        "the edges of a bucket are at least 256"
    )
    half = geometry(upscale=False, resolution=256, bucket_step=8)
    assert place((130, 140), HASH, half).bucket_hw == (128, 136)
    assert place((127, 140), HASH, half).reason.endswith("the edges of a bucket are at least 128")


def test_of_own_buckets_only_those_that_are_covered():
    own = geometry(upscale=False, buckets=["1024x1024", "512x512", "512x768"])
    assert place((1024, 1500), HASH, own).bucket_hw == (512, 768)
    assert place((1024, 1100), HASH, own).bucket_hw == (1024, 1024)
    assert place((1023, 1100), HASH, own).bucket_hw == (512, 512)
    assert place((511, 3000), HASH, own) == Unfit(
        "it is only 511x3000 pixels (height x width), and dataset.upscale is false: it covers none of dataset.buckets"
    )


# ---- several resolutions ---------------------------------------------------------------------------------------------


def test_each_resolution_has_its_own_place():
    geometries = Geometry.of(DatasetSection(resolution=[512, 1024]))
    assert [found.bucket_hw for found in place_all((3000, 3000), HASH, geometries)] == [(512, 512), (1024, 1024)]


def test_a_small_image_is_not_trained_twice_at_its_own_size():
    geometries = Geometry.of(DatasetSection(resolution=[768, 1024], upscale=False))
    assert [found.bucket_hw for found in place_all((700, 600), HASH, geometries)] == [(640, 576)]
    assert [found.bucket_hw for found in place_all((900, 900), HASH, geometries)] == [(768, 768), (896, 896)]


def test_an_image_that_fits_one_resolution_is_not_left_out():
    geometries = Geometry.of(DatasetSection(resolution=[256, 1024], upscale=False, bucket_step=8))
    assert [found.bucket_hw for found in place_all((200, 210), HASH, geometries)] == [(200, 208)]
    assert place_all((100, 100), HASH, geometries).reason.count(";") == 1


def test_one_reason_is_given_once():
    geometries = Geometry.of(DatasetSection(resolution=[512, 1024], min_size=300))
    assert place_all((200, 300), HASH, geometries) == Unfit("its shorter edge has 200 pixels, dataset.min_size is 300")


# ---- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random", "top_left", "top_right", "bottom_left", "bottom_right", "focus"])
@pytest.mark.parametrize("hw", [(400, 600), (3000, 2000), *ODD_SIZES])
def test_the_crop_lies_inside(hw, crop):
    found = place(hw, HASH, geometry(crop=crop, crop_variants=5), (0.9, 0.1))
    for offsets in found.crops:
        for offset, size, whole in zip(offsets, found.bucket_hw, found.resized_hw, strict=True):
            assert 0 <= offset <= whole - size


@pytest.mark.parametrize(
    ("crop", "wide", "tall"),
    [
        ("center", (0, 256), (256, 0)),
        ("top_left", (0, 0), (0, 0)),
        ("top_right", (0, 512), (0, 0)),
        ("bottom_left", (0, 0), (512, 0)),
        ("bottom_right", (0, 512), (512, 0)),
    ],
)
def test_where_a_crop_lies(crop, wide, tall):
    square = geometry(buckets=["1024x1024"], crop=crop)
    assert place((1024, 1536), HASH, square).crops == (wide,)
    assert place((1536, 1024), HASH, square).crops == (tall,)


def test_a_centre_crop_leaves_the_same_on_both_sides():
    assert place((1031, 1024), HASH, geometry(buckets=["1024x1024"])).crops == ((3, 0),)


@pytest.mark.parametrize(
    ("focus_yx", "left"),
    [
        ((0.5, 0.5), 256),
        ((0.0, 0.6), 410),  # 0.6 x 1536 - 512
        ((0.5, 0.0), 0),
        ((0.5, 1.0), 512),
        ((0.5, 7.0), 512),
        (None, 256),
        ((0.5, math.nan), 256),
    ],
)
def test_the_focus_is_in_the_middle_as_far_as_the_image_goes(focus_yx, left):
    square = geometry(buckets=["1024x1024"], crop="focus")
    assert place((1024, 1536), HASH, square, focus_yx).crops == ((0, left),)


def test_the_focus_matters_to_that_crop_only():
    assert place((1024, 1536), HASH, geometry(buckets=["square"]), (0.0, 0.0)).crops == ((0, 256),)


def test_a_random_crop_depends_on_the_content_alone():
    square = geometry(buckets=["1024x1024"], crop="random")
    crops = [place((1024, 1536), f"hash-{number}", square).crops for number in range(200)]
    assert crops == [place((1024, 1536), f"hash-{number}", square).crops for number in range(200)]
    assert {len(each) for each in crops} == {1}
    lefts = [left for ((_, left),) in crops]
    assert len(set(lefts)) > 100
    assert min(lefts) < 30
    assert max(lefts) > 482
    assert {top for ((top, _),) in crops} == {0}


def test_the_first_random_crop_is_that_of_earlier_versions():
    """Caches of earlier versions hold these."""
    draws = hashlib.sha256(f"crop/{HASH}".encode()).digest()
    left = int(int.from_bytes(draws[8:16], "big") / 2**64 * 513)
    for variants in (1, 4):
        found = place((1024, 1536), HASH, geometry(buckets=["1024x1024"], crop="random", crop_variants=variants))
        assert found.crops[0] == (0, left)


def test_a_random_crop_reaches_both_ends():
    square = geometry(buckets=["1024x1024"], crop="random")
    assert {place((1024, 1026), str(number), square).crops[0][1] for number in range(100)} == {0, 1, 2}


def test_more_variants_leave_the_first_ones_alone():
    few, many = (
        place((1024, 1536), HASH, geometry(buckets=["1024x1024"], crop="random", crop_variants=count)).crops
        for count in (3, 9)
    )
    assert many[:3] == few
    assert len(set(many)) == 9


@pytest.mark.parametrize("count", [2, 4, 10, 50])
def test_variants_are_spread_over_the_image(count):
    """The largest gap between neighbours, around the end, is at most three times the mean gap."""
    square = geometry(buckets=["1024x1024"], crop="random", crop_variants=count)
    for number in range(50):
        for hw in ((1024, 2024), (2024, 1024)):
            offsets = sorted(max(crop) for crop in place(hw, str(number), square).crops)
            gaps = [after - before for before, after in zip(offsets, [*offsets[1:], offsets[0] + 1001], strict=True)]
            assert max(gaps) <= 3 * 1001 / count


@pytest.mark.parametrize("spare", [0, 1, 4])
def test_there_are_no_more_variants_than_places(spare):
    square = geometry(buckets=["1024x1024"], crop="random", crop_variants=100)
    for number in range(20):
        assert sorted(place((1024, 1024 + spare), str(number), square).crops) == [(0, at) for at in range(spare + 1)]


def test_crop_variants_are_for_random_crops_only():
    assert geometry(crop="center", crop_variants=5) == geometry(crop="center")


def test_without_upscale_a_long_image_is_not_larger_than_the_largest_bucket():
    """Its own size rounded down would be: 320x960 has more pixels than any bucket of 512²."""
    for hw, resolution, bucket in (((324, 1010), 512, (320, 768)), ((891, 513), 640, (768, 512))):
        assert place(hw, HASH, geometry(upscale=False, resolution=resolution)).bucket_hw == bucket
