"""What is used and what is left out, one image at a time: no files."""

import dataclasses

import pytest

from sdxl_ray.cache.captions import Captions
from sdxl_ray.cache.judge import DatasetRules, Mask, Tally, Uncaptioned, Used, judge
from sdxl_ray.cache.scan import ScannedFile
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed

FILE = Listed("/images/cat.png", "1-1")
IMAGE = ScannedFile("ab" * 32, 60, 80)
DAMAGED = ScannedFile("", 0, 0, "damaged header: cut", "damaged")
NONE = Captions(())
UNREADABLE = Captions((), problem="x")
MASK = Mask("/images/cat-mask.png", "cd" * 32)


def rules_of(**settings):
    section = DatasetSection(**{"name": "cats", "path": "/images", "resolution": 64, "bucket_step": 8, **settings})
    return DatasetRules.of(section)


def verdict_of(*, file=FILE, image=IMAGE, captions=Captions(("a cat",), "textfile"), mask=MASK, **settings):
    return judge(file, image, captions, mask, rules_of(**settings))


def test_an_image_that_is_used_has_a_place_for_each_resolution():
    found = verdict_of(resolution=[64, 128])
    assert isinstance(found, Used)
    assert (found.file, found.image, found.mask, found.captions.texts) == (FILE, IMAGE, MASK, ("a cat",))
    assert [round((height * width) ** 0.5 / 64) for height, width in (each.bucket_hw for each in found.placements)] == [
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("changes", "reason", "kind"),
    [
        ({"image": DAMAGED}, "damaged header: cut", "damaged"),
        (
            {"captions": Captions((), problem="caption file cat.txt is not UTF-8")},
            "caption file cat.txt is not UTF-8",
            "",
        ),
        (
            {"mask": MASK._replace(problem="its mask /images/cat-mask.png: cut")},
            "its mask /images/cat-mask.png: cut",
            "",
        ),
        (
            {"image": DAMAGED, "captions": UNREADABLE, "mask": MASK._replace(problem="y")},
            "damaged header: cut",
            "damaged",
        ),
        ({"captions": UNREADABLE, "min_size": 500}, "x", ""),  # before the sizes: somebody should know
    ],
)
def test_what_cannot_be_read_is_skipped_and_nobodys_choice(changes, reason, kind):
    assert verdict_of(**changes) == Skipped("/images/cat.png", reason, "cats", by_choice=False, kind=kind)


def test_what_does_not_fit_is_left_out_by_choice_and_needs_no_caption():
    for captions in (Captions(("a cat",), "textfile"), NONE):
        found = verdict_of(captions=captions, min_size=500)
        assert (found.path, found.dataset, found.by_choice, found.kind) == ("/images/cat.png", "cats", True, "")
        assert found.reason == "its shorter edge has 60 pixels, dataset.min_size is 500"


def test_without_a_caption_the_settings_decide():
    assert verdict_of(captions=NONE) == Uncaptioned(FILE)
    found = judge(FILE, IMAGE, NONE, Mask(), rules_of(captions=["textfile", "skip"]))
    assert (found.by_choice, found.reason) == (True, 'has no caption, and dataset.captions says "skip"')
    assert verdict_of(captions=Captions(("",), "empty")).captions.texts == ("",)  # an empty one is one


def test_what_is_only_evaluated_is_seen_once():
    settings = {"flip": True, "crop": "random", "crop_variants": 3}
    trained = rules_of(**settings)
    evaluated = DatasetRules.of(trained.section.model_copy(update={"role": "eval"}))
    assert (trained.flips, evaluated.flips) == ((False, True), (False,))
    assert [
        len(judge(FILE, IMAGE, Captions(("x",)), Mask(), rules).placements[0].crops) for rules in (trained, evaluated)
    ] == [
        3,
        1,
    ]


@pytest.mark.parametrize(("by", "sized", "expected"), [
    ("auto", False, False), ("auto", True, True), ("content", True, False), ("listing", False, True),
])  # fmt: skip
def test_what_identifies_an_image(by, sized, expected):
    file = dataclasses.replace(FILE, original_hw=(60, 80) if sized else None)
    assert rules_of(identify_by=by).identifies_by_listing(file) == expected


def test_images_are_counted_by_what_became_of_them():
    tally = Tally(rules_of(mask="file"))
    masked = dataclasses.replace(FILE, mask_file="/images/cat-mask.png")
    for found in (verdict_of(), verdict_of(file=masked), verdict_of(image=DAMAGED)):
        tally.add(found)
    tally.check_captions()
    assert (tally.images, tally.used, tally.masked) == (3, 2, 1)
    assert tally.captions == {"textfile": 2}  # not that of the damaged one
    assert list(tally.notes()) == ['dataset "cats": 1 of 2 images have a mask; the others count whole']


def test_of_many_images_without_a_caption_the_first_are_named():
    tally = Tally(rules_of())
    for number in range(30):
        tally.add(Uncaptioned(dataclasses.replace(FILE, path=f"/images/{number}.png")))
    tally.add(verdict_of())
    with pytest.raises(DatasetError) as error:
        tally.check_captions()
    lines = str(error.value).splitlines()
    assert lines[0] == '30 of 31 images of dataset "cats" have no caption:'
    assert lines[1:7] == [*(f"  /images/{number}.png" for number in range(5)), "  and 25 more"]
    assert len(tally._named) == 10
