"""What is left out, and how much of it stops a run."""

import csv
import dataclasses
import hashlib
import io
import math
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

from sdxl_ray.cache import skipped
from sdxl_ray.cache.planning import drop_undecodable, find_missing
from sdxl_ray.cache.skipped import (
    Skipped,
    SkippedImages,
    UnreadableLimit,
    check_readable,
    is_listed,
    unreadable_of,
    write_skipped,
)
from sdxl_ray.errors import DatasetError
from tests.unit.cache.planned import (
    add_image,
    add_images,
    by_name,
    changed,
    config_of,
    name_of,
    plan_of,
    samples_of,
)

# ---- unreadable images -----------------------------------------------------------------------------------------------


def spoil(images, num):
    for number in range(num):
        (images / f"{number:02d}.png").write_bytes(b"no image")


def test_a_few_unreadable_images_are_skipped_with_their_reason(config, images):
    spoil(images, 3)
    plan = plan_of(config)
    assert len(samples_of(plan)) == 17
    reason = "not an image that Pillow can read"
    assert plan.skipped == [
        Skipped(str(images / f"{number:02d}.png"), reason, "images", kind="damaged") for number in range(3)
    ]
    write_skipped(plan)
    with Path(plan.skipped_path).open(encoding="utf-8", newline="") as file:
        rows = [[item.dataset, item.path, item.reason] for item in plan.skipped]
        assert list(csv.reader(file)) == [["dataset", "path", "reason"], *rows]
    assert [file.name for file in Path(plan.folder.path).iterdir()] == ["skipped.csv"]


def test_unreadable_captions_count_like_unreadable_images(config, images):
    (images / "05.txt").write_bytes(b"\xe9")
    plan = plan_of(config)
    assert [name_of(item) for item in plan.skipped] == ["05.png"]
    assert "is not UTF-8" in plan.skipped[0].reason


def test_too_many_unreadable_images_stop_the_run_and_are_listed(config, images):
    spoil(images, 5)
    with pytest.raises(DatasetError) as error:
        plan_of(config)
    lines = str(error.value).splitlines()
    allowed = "more than dataset.max_unreadable = 0.2 allows:"
    assert lines[0] == f"{images}: 5 of 20 images cannot be used, {allowed}"
    assert lines[1:6] == [f"  {images / f'{number:02d}.png'}: not an image that Pillow can read" for number in range(5)]
    assert lines[6].startswith("The whole list: ")
    assert lines[7] == "Repair or remove them, or raise dataset.max_unreadable."
    written = Path(lines[6].removeprefix("The whole list: ")).read_text(encoding="utf-8").splitlines()
    assert len(written) == 6


def test_the_limit_is_one_of_each_dataset(config, images, tmp_path, tiny_model):
    """A hundred good images elsewhere do not excuse a dataset that cannot be read."""
    other = add_images(tmp_path / "other", 4, colour=700)
    spoil(other, 1)
    with pytest.raises(DatasetError, match=rf"^{other}: 1 of 4 images cannot be used"):
        plan_of(config_of(tmp_path, tiny_model, images, other))
    plan = plan_of(config_of(tmp_path, tiny_model, images, other, max_unreadable=0.25))
    assert plan.num_samples == 23


def test_as_many_as_allowed_are_allowed(config, images):
    spoil(images, 4)
    plan = plan_of(config)
    assert plan.num_samples == 16
    plan.collection.num_images["images"] = 100
    plan.collection.skipped = SkippedImages(Skipped(str(number), "y", "images") for number in range(29))
    check_readable(plan, changed(config, dataset__max_unreadable=0.29).datasets)  # 0.29 * 100 is 28.999999999999996
    with pytest.raises(DatasetError, match=r"29 of 100 images .* more than dataset\.max_unreadable = 0\.28 allows"):
        check_readable(plan, changed(config, dataset__max_unreadable=0.28).datasets)


def test_what_was_left_out_by_choice_does_not_count(config, images):
    for number in range(18):
        add_image(images, f"small {number}.png", size=(20, 20), colour=700 + number)
    plan = plan_of(config, dataset__min_size=30)
    assert (plan.num_samples, plan.num_images, len(plan.skipped)) == (20, 38, 18)
    spoil(images, 8)
    with pytest.raises(DatasetError, match=r"8 of 38 images cannot be used, more than .* = 0\.2 allows"):
        plan_of(config, dataset__min_size=30)


@pytest.mark.parametrize(("num_damaged", "cure"), [(0, ""), (1, " Repair what is damaged or missing.")])
def test_images_that_are_too_large_are_not_to_be_repaired(config, images, num_damaged, cure):
    spoil(images, num_damaged)
    with pytest.raises(DatasetError) as error:
        plan_of(config, dataset__max_pixels=9)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{images}: 20 of 20 images cannot be used, which leaves none:"
    assert lines[20].endswith(" is more than dataset.max_pixels = 9")
    assert lines[-1] == f"Raise dataset.max_pixels, or shrink what is larger.{cure}"


def test_where_settings_and_damage_together_leave_nothing_both_are_named(config, images):
    spoil(images, 1)
    with pytest.raises(DatasetError) as error:
        plan_of(config, dataset__min_size=10_000)
    first, *shown, last = [line for line in str(error.value).splitlines() if not line.startswith("The whole list")]
    assert first == f"{images}: 20 of 20 images cannot be used, which leaves none:"
    assert any("dataset.min_size" in line for line in shown)
    assert any("dataset.min_size" not in line and ".png: " in line for line in shown)
    assert last == "Repair what is damaged or missing. Change the settings named here, or add images."


def test_images_of_another_size_than_listed_are_not_to_be_repaired(config):
    """Tables often hold the stored size of photographs that EXIF turns; the images are sound."""
    plan = plan_of(config)
    turned = [
        Skipped(f"{number}.jpg", "is 300x200 pixels", config.datasets[0].name, kind="other_size")
        for number in range(10)
    ]
    sizes = (
        "The sizes in the table are not those of the images, as they are shown after any rotation in their EXIF: "
        "correct them, or set dataset.size_columns = [], so that the images are read."
    )
    with pytest.raises(DatasetError) as error:
        check_readable(plan, config.datasets, also=turned)
    assert str(error.value).splitlines()[-1] == sizes
    damaged = dataclasses.replace(turned[0], path="cut.jpg", kind="damaged")
    with pytest.raises(DatasetError) as error:
        check_readable(plan, config.datasets, also=[*turned, damaged])
    assert str(error.value).splitlines()[-1] == (f"{sizes} Repair or remove them, or raise dataset.max_unreadable.")


def test_some_images_that_are_too_large(config, images):
    for number in range(10):
        add_image(images, f"large {number}.png", size=(200, 200), colour=700 + number)
    with pytest.raises(DatasetError, match=r"10 of 30 images cannot be used, more than") as error:
        plan_of(config, dataset__max_pixels=39_999)
    assert str(error.value).endswith("\nRaise dataset.max_pixels, or shrink what is larger.")


def test_settings_that_leave_nothing_are_named(config, images):
    with pytest.raises(DatasetError) as error:
        plan_of(config, dataset__min_size=500)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{images}: 20 of 20 images cannot be used, which leaves none:"
    assert "min_size" in lines[1]
    assert lines[-1] == "Change the settings named here, or add images."


def test_no_readable_image_at_all_is_an_error_whatever_is_allowed(config, images):
    spoil(images, 20)
    with pytest.raises(DatasetError, match=r": 20 of 20 images cannot be used, which leaves none:"):
        plan_of(config, dataset__max_unreadable=1.0)


def test_an_image_in_several_sizes_is_reported_once(config):
    plan = plan_of(config, dataset__resolution=[64, 128], dataset__flip=True)
    bad = [sample for sample in samples_of(plan) if name_of(sample) == "07.png"]
    assert len(bad) == 4
    drop_undecodable(plan, {each.latent_keys[0]: Skipped(each.path, "cannot be decoded: cut") for each in bad})
    assert [name_of(item) for item in plan.skipped] == ["07.png"]
    assert plan.num_samples == 76
    find_missing(plan)
    assert "07.png" not in by_name(plan)


def test_what_cannot_be_decoded_is_not_compared_with_everything_that_was_skipped(config):
    """Of a million images, thousands may be skipped and thousands damaged."""
    compared = []

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    plan = plan_of(config)
    plan.collection.skipped = SkippedImages(
        Skipped(Counted(number), "cannot be decoded: cut", "images") for number in range(1000)
    )
    bad = samples_of(plan)
    drop_undecodable(plan, {each.latent_keys[0]: Skipped(each.path, "cannot be decoded: cut") for each in bad})
    assert len(plan.skipped) == 1020
    assert len(compared) < 100


def test_too_many_that_cannot_be_decoded_stop_the_run(config):
    plan = plan_of(config)
    bad = samples_of(plan)[:5]
    drop_undecodable(plan, {each.latent_keys[0]: Skipped(each.path, "cannot be decoded: cut") for each in bad})
    find_missing(plan)
    with pytest.raises(DatasetError, match="5 of 20 images cannot be used, more than"):
        check_readable(plan, config.datasets)


# ---- many of them ----------------------------------------------------------------------------------------------------


def some(num):
    """Of three datasets, every fifth unreadable."""
    return [
        Skipped(f"/images/猫 {number}\n.png", f"{number % 7} is wrong", "abc"[number % 3])
        if number % 5 == 0
        else Skipped(f"/images/{number}.png", f"it has {number % 500} pixels", "abc"[number % 3], by_choice=True)
        for number in range(num)
    ]


@pytest.mark.parametrize("pack", [1, 7, 100, 10_000])
def test_columns_of_them_are_as_good_as_a_list(monkeypatch, pack):
    monkeypatch.setattr(skipped, "_PACK", pack)
    expected = [*some(99), Skipped("x", "cannot be decoded", "b", kind="damaged")]
    found = SkippedImages(expected[:40])
    found.extend(expected[40:])
    assert len(found) == 100
    assert list(found) == expected
    assert [found[at] for at in (0, 13, 98, 99, -1)] == [expected[at] for at in (0, 13, 98, 99, -1)]
    assert (found[95:], found[:7:3], found[::-9]) == (expected[95:], expected[:7:3], expected[::-9])
    assert found == expected
    assert found != expected[:-1]
    assert found != [*expected[:-1], expected[0]]
    with pytest.raises(IndexError):
        found[100]
    for name in "abc":
        here = [item for item in expected if item.dataset == name]
        assert (found.num(name), list(found.of(name))) == (len(here), here)
        assert list(found.unreadable(name)) == [item for item in here if not item.by_choice]
    assert found.counts["b", False, "damaged"] == 1
    assert not SkippedImages()


def test_an_image_that_is_left_out_takes_little_more_than_its_path():
    """Ten million of them, and the driver has 4 GiB."""
    num = 50_000
    paths = [f"s3://my-bucket/laion/part-{number // 10_000:05d}/{number:09d}.jpg" for number in range(num)]
    reasons = [f"its shorter edge has {number % 500} pixels, dataset.min_size is 512" for number in range(num)]
    tracemalloc.start()
    found = SkippedImages(Skipped(*item, "laion", by_choice=True) for item in zip(paths, reasons, strict=True))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(found) == num
    assert taken / num < len(paths[0])


def test_the_list_of_them_is_never_whole_in_memory(config, monkeypatch):
    plan = plan_of(config)
    plan.collection.skipped = SkippedImages(some(30_000))
    tracemalloc.start()
    write_skipped(plan)
    assert is_listed(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    content = Path(plan.skipped_path).read_bytes()
    assert len(list(csv.reader(io.StringIO(content.decode(), newline="")))) == 30_001
    assert peak < 10_000 * 1000
    plan.collection.skipped = SkippedImages(reversed(list(some(30_000))))  # what was found late is at the end
    assert is_listed(plan)
    plan.collection.skipped.append(Skipped("one more.png", "too small", "a", by_choice=True))
    assert not is_listed(plan)
    Path(plan.skipped_path).write_bytes(content.replace(b"1.png", b"2.png"))
    plan.collection.skipped = SkippedImages(some(30_000))
    assert not is_listed(plan)
    Path(plan.skipped_path).write_bytes(content + b"a,b,c\r\n")
    assert not is_listed(plan)
    Path(plan.skipped_path).unlink()
    with pytest.raises(FileNotFoundError):
        is_listed(plan)


# ---- damaged images that are still rows ------------------------------------------------------------------------------


def damaged(plan, *names, reason="cannot be decoded: cut"):
    return {
        key: Skipped(sample.path, reason, kind="damaged")
        for sample in samples_of(plan)
        if name_of(sample) in names
        for key in sample.latent_keys
    }


def test_an_image_is_one_of_its_dataset_however_often_it_is_encoded(config, images):
    shutil.copy(images / "07.png", images / "copy.png")
    shutil.copy(images / "07.txt", images / "copy.txt")
    plan = plan_of(config, dataset__resolution=[64, 128], dataset__flip=True)
    undecodable = damaged(plan, "07.png", "08.png")
    assert len(undecodable) == 8
    expected = [
        Skipped(str(images / name), "cannot be decoded: cut", "images", kind="damaged")
        for name in ("07.png", "08.png", "copy.png")
    ]
    assert unreadable_of(plan, undecodable) == expected
    assert unreadable_of(plan, {}) == []


def test_damaged_images_count_with_those_that_the_scan_has_skipped(config, images):
    spoil(images, 2)
    plan = plan_of(config, dataset__resolution=[64, 128], dataset__flip=True)
    check_readable(plan, config.datasets, also=unreadable_of(plan, damaged(plan, "07.png", "08.png")))
    also = unreadable_of(plan, damaged(plan, "07.png", "08.png", "09.png"))
    with pytest.raises(DatasetError) as error:
        check_readable(plan, config.datasets, also=also)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{images}: 5 of 20 images cannot be used, more than dataset.max_unreadable = 0.2 allows:"
    assert [Path(line.strip().partition(": ")[0]).name for line in lines[1:6]] == [
        f"{number:02d}.png" for number in (0, 1, 7, 8, 9)
    ]
    assert len(Path(plan.skipped_path).read_text(encoding="utf-8").splitlines()) == 6


def test_where_everything_turned_out_damaged_nothing_is_left_whatever_is_allowed(config):
    plan = plan_of(config, dataset__flip=True)
    also = unreadable_of(plan, damaged(plan, *(f"{number:02d}.png" for number in range(20))))
    with pytest.raises(DatasetError, match=r": 20 of 20 images cannot be used, which leaves none:"):
        check_readable(plan, changed(config, dataset__max_unreadable=1.0).datasets, also=also)


def test_a_long_list_is_cut_and_its_rest_counted(config, images):
    add_images(images, 30)
    spoil(images, 25)
    with pytest.raises(DatasetError) as error:
        plan_of(config)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{images}: 25 of 30 images cannot be used")
    assert (len(lines), lines[21]) == (1 + 20 + 1 + 2, "  and 5 more")


# ---- a worker that decodes while it trains ---------------------------------------------------------------------------


def image_hash(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def num_tried(limit, problems):
    """How many images were tried before it stopped; None: it did not."""
    for number, problem in enumerate(problems):
        try:
            limit.note(image_hash(number), f"{number}.png", problem)
        except DatasetError:
            return number + 1
    return None


def test_more_unreadable_images_than_a_dataset_may_have_stop_at_once():
    limit = UnreadableLimit("/data/cats", 0.2, 10)
    for _ in range(2):  # in every epoch, and in each of its sizes
        limit.note(image_hash(0), "0.png", "cannot be decoded: cut")
        limit.note(image_hash(1), "1.png", "cannot be decoded: cut")
        limit.note(image_hash(2), "2.png", "")
    with pytest.raises(DatasetError) as error:
        limit.note(image_hash(3), "3.png", "cannot be decoded: truncated")
    assert str(error.value) == (
        "/data/cats: 3 of 10 images cannot be used, more than dataset.max_unreadable = 0.2 allows:\n"
        "  0.png: cannot be decoded: cut\n  1.png: cannot be decoded: cut\n  3.png: cannot be decoded: truncated\n"
        "Repair or remove them, or raise dataset.max_unreadable."
    )


def test_of_a_large_dataset_the_share_of_those_tried_decides():
    problems = ["bad"] * 8 + [""] * 2
    limit = UnreadableLimit("/data/cats", 0.1, 1_000_000)
    assert num_tried(limit, problems * 10) == 20
    again = UnreadableLimit("/data/cats", 0.1, 1_000_000)
    with pytest.raises(DatasetError, match=r"^/data/cats: 16 of the first 20 images cannot be used, more than"):
        for number, problem in enumerate(problems * 2):
            again.note(image_hash(number), f"{number}.png", problem)
    assert num_tried(UnreadableLimit("/data/cats", 0.0, 1_000_000), [""] * 50 + ["bad"]) == 51


def test_a_random_part_that_has_a_few_too_many_by_accident_is_no_reason_to_stop():
    """Of 20 images of a dataset in which 15 in 100 are bad, more than 4 are bad once in six times."""
    draw = random.Random(0)
    for _ in range(50):
        problems = ["bad" if draw.random() < 0.15 else "" for _ in range(300)]
        assert num_tried(UnreadableLimit("/data/cats", 0.2, 1_000_000), problems) is None
    assert num_tried(UnreadableLimit("/data/cats", 0.2, 1_000_000), (["bad"] * 3 + [""] * 7) * 100) == 640


def test_a_dataset_with_as_many_as_allowed_is_never_stopped_before_its_end():
    """Whatever part of it a worker sees, and however often it asks."""
    for seed in range(40):
        problems = ["bad"] * 100 + [""] * 1900
        random.Random(seed).shuffle(problems)
        assert num_tried(UnreadableLimit("/data/cats", 0.05, 2000), problems) is None
    assert num_tried(UnreadableLimit("/data/cats", 0.0101, 10_000), ["bad"] * 5 + [""] * 995) is None


def test_the_probability_of_so_many_unreadable_images():
    def exact(num, tried, share):
        return sum(math.comb(tried, at) * share**at * (1 - share) ** (tried - at) for at in range(num, tried + 1))

    for num, tried, share in ((3, 20, 0.05), (12, 20, 0.1), (20, 20, 0.3), (40, 160, 0.1), (1, 40, 0.001)):
        assert skipped._at_least(num, tried, share) == pytest.approx(exact(num, tried, share))
    assert skipped._at_least(1, 20, 0.0) == 0.0
    assert (skipped._at_least(20, 20, 1.0), skipped._at_least(0, 20, 0.0)) == (1.0, 1.0)
    assert skipped._at_least(9000, 81_920, 0.1) == pytest.approx(8.4e-21, rel=0.1)
    assert [tried for tried in range(1, 400) if skipped._is_time_to_ask(tried)] == [20, 40, 80, 160, 320]


@pytest.mark.parametrize("max_unreadable", [0.2, 1.0])
def test_a_worker_that_has_found_no_readable_image_stops_whatever_is_allowed(max_unreadable):
    limit = UnreadableLimit("/data/cats", max_unreadable, 1)
    with pytest.raises(DatasetError) as error:
        limit.note(image_hash(0), "0.png", "cannot be decoded: cut")
    assert str(error.value) == (
        "/data/cats: 1 of 1 images cannot be used, which leaves none:\n  0.png: cannot be decoded: cut\nRepair them."
    )
    assert num_tried(UnreadableLimit("/data/cats", 1.0, 30), ["bad"] * 30) == 30
    assert num_tried(UnreadableLimit("/data/cats", 1.0, 30), ["bad"] * 29 + [""]) is None


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(skipped, "_TRIED_AT_MOST", 30)
    limit = UnreadableLimit("/data/cats", 0.9, 1_000_000)
    assert num_tried(limit, ["bad"] * 10 + [""] * 100) is None
    assert len(limit._tried) == 30


def test_an_image_of_two_datasets_counts_in_both(images, tmp_path, tiny_model):
    plan = plan_of(config_of(tmp_path, tiny_model, images, images))
    first, second = dict.fromkeys(sample.dataset for sample in samples_of(plan))
    (key,) = samples_of(plan)[3].latent_keys
    found = unreadable_of(plan, {key: Skipped("", "cannot be decoded: cut")})
    assert [(item.dataset, item.path) for item in found] == [
        (first, str(images / "03.png")),
        (second, str(images / "03.png")),
    ]
