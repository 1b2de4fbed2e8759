import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sdxl_ray.cache import caption_files
from sdxl_ray.cache.caption_files import CaptionFiles, UnreadableCaption
from sdxl_ray.cache.caption_variants import AS_IT_IS, decorate, draw_variant, expand_variants
from sdxl_ray.cache.captions import CaptionRules, _find, no_captions_error, read_captions, several_captions_note
from sdxl_ray.cache.sources import list_dataset
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.errors import StorageError
from sdxl_ray.records import Listed
from tests.unit.cache.planned import add_image, config_of, plan_of
from tests.unit.cache.sources.made import tar_bytes

HASH = "5" * 64
TAGS = "one, two, three, four, five, six, seven, eight"


def read_all(listed, rules):
    """Captions, problems by position, how many of each source."""
    found = read_captions(listed, rules)
    problems = {at: each.problem for at, each in enumerate(found) if each.problem}
    return [each.texts for each in found], problems, dict(Counter(each.source for each in found for _ in each.texts))


def find_captions(image, rules):
    return _find(image, rules, CaptionFiles([])).texts


def variants_of(captions, rules, image_hash=HASH):
    """Without the one that is there for evaluation."""
    texts, bases = expand_variants(captions, rules, image_hash)
    return tuple(text for text, base in zip(texts, bases, strict=True) if base != AS_IT_IS)


@pytest.fixture
def image(tmp_path):
    """An image as its source lists it (there is no need for the file), with the caption file beside it if given."""

    def image(name="cat.jpg", content=None, **fields):
        file = tmp_path / f"{Path(name).stem}.txt"
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            fields["text_file"] = str(file)
        return Listed(path=str(tmp_path / name), stamp="1", **fields)

    return image


@pytest.fixture
def sources(monkeypatch):
    """What is at addresses that are no plain files."""
    contents = {}
    monkeypatch.setattr(caption_files, "read_start", lambda address, length: contents[address][:length])
    return contents


def test_the_rules_are_the_datasets_settings():
    section = DatasetSection(
        name="cats",
        captions=("filename",),
        caption_columns=("words",),
        caption_extension=".caption",
        caption_lines="whole",
        caption_replace=(("a", "b"),),
        trigger_word="ohwx",
        caption_prefix="p ",
        caption_suffix=" s",
        tag_separator="|",
        shuffle_tags=True,
        keep_tags=2,
        tag_dropout=0.25,
        caption_variants=3,
    )
    assert CaptionRules.of(section) == CaptionRules(
        dataset="cats",
        sources=("filename",),
        columns=("words",),
        extension=".caption",
        lines="whole",
        replace=(("a", "b"),),
        trigger_word="ohwx",
        prefix="p ",
        suffix=" s",
        separator="|",
        shuffle_tags=True,
        keep_tags=2,
        tag_dropout=0.25,
        variants=3,
    )
    assert CaptionRules.of(DatasetSection()) == CaptionRules()


# ---- caption files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat", ("a cat",)),
        ("a cat\n", ("a cat",)),
        ("a cat\n\n  a sleeping cat \n", ("a cat", "a sleeping cat")),
        ("a cat\na dog\na cat\n", ("a cat", "a dog")),
        (b"\xef\xbb\xbfa cat", ("a cat",)),
        (b"a cat\r\nanother cat\r\n", ("a cat", "another cat")),
        (b"a cat\ranother cat", ("a cat", "another cat")),
        ("un chat à l'été, 猫".encode(), ("un chat à l'été, 猫",)),
        ("a cat\nune été, 猫".encode("utf-16"), ("a cat", "une été, 猫")),
        ("\ufeffa cat, 猫".encode("utf-16-be"), ("a cat, 猫",)),
        ("a cat, 猫".encode("utf-32"), ("a cat, 猫",)),
        ("a\tcat\x07 on\u2028a\x85roof\x7f", ("a cat  on a roof",)),  # of the control characters, one space each
        ("", ()),
        (" \n\t\n", ()),
        (b"\xef\xbb\xbf", ()),
    ],
)
def test_each_line_of_the_text_file_is_a_caption(image, content, expected):
    assert find_captions(image(content=content), CaptionRules()) == expected


def test_the_whole_file_can_be_one_caption(image):
    rules = CaptionRules(lines="whole")
    assert find_captions(image(content="a cat,\r\nasleep\n\non a roof\n"), rules) == ("a cat, asleep on a roof",)
    assert find_captions(image(content=" \n \n"), rules) == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "un château".encode("latin-1"),
            "caption file cat.txt is not UTF-8: byte 0xe2 at offset 5. "
            "If it is Latin-1: iconv -f latin1 -t utf-8 cat.txt",
        ),
        (b"\xff\xfea\0b", "caption file cat.txt is not UTF-16: byte 0x62 at offset 4."),
        (
            "un été".encode("utf-16-le"),
            "caption file cat.txt is not UTF-8 text: it has NUL characters. "
            "If it is UTF-16: iconv -f utf-16 -t utf-8 cat.txt",
        ),
        (
            "a cat".encode("utf-16-le"),
            "caption file cat.txt is not UTF-8 text: it has NUL characters. "
            "If it is UTF-16: iconv -f utf-16 -t utf-8 cat.txt",
        ),
        (b"x" * 10_000_000, "caption file cat.txt is too large: 10.0 MB or more, expected at most 1 MB."),
    ],
)
def test_what_is_no_caption_is_skipped_with_its_reason(image, content, reason):
    good = image("dog.jpg", "a dog")
    found = read_all([good, image(content=content)], CaptionRules(sources=("textfile",)))
    assert found == (
        [("a dog",), ()],
        {1: reason},
        {"textfile": 1},
    )


def test_no_more_of_a_large_file_is_read_than_needed(image, tmp_path):
    sparse = tmp_path / "cat.txt"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)  # a tebibyte would not fit in memory
    with pytest.raises(UnreadableCaption, match=r"too large: 1099511\.6 MB or more"):
        find_captions(image(text_file=str(sparse)), CaptionRules())


def test_a_megabyte_is_still_a_caption(image):
    (caption,) = find_captions(image(content=b"x" * 1_000_000), CaptionRules())
    assert len(caption) == 1_000_000


def test_a_caption_file_that_cannot_be_read_is_skipped(image, tmp_path):
    (tmp_path / "dog.txt").mkdir()
    folder, gone = image("dog.jpg", text_file=str(tmp_path / "dog.txt")), image(text_file=str(tmp_path / "cat.txt"))
    assert read_all([folder, gone], CaptionRules())[1] == {
        0: "caption file dog.txt cannot be read: Is a directory",
        1: "caption file cat.txt cannot be read: No such file or directory",
    }


def test_a_named_pipe_is_no_caption_and_is_not_waited_for(image, tmp_path):
    os.mkfifo(tmp_path / "cat.txt")
    _, reasons, _ = read_all([image(text_file=str(tmp_path / "cat.txt"))], CaptionRules())
    assert reasons == {0: "caption file cat.txt cannot be read: it is not a regular file, but a pipe, socket or device"}


def test_captions_in_buckets_and_tar_files(image, sources):
    sources["s3://bucket/cats/cat.txt"] = b"from a bucket\r\n"
    sources["tar:512+10:/data/00.tar"] = "été".encode()
    sources["tar:1024+4:/data/00.tar"] = "été".encode("latin-1")
    sources["s3://bucket/cats/large.txt"] = bytes(2_000_000)
    sources["tar:0+3000000:/data/00.tar"] = bytes(3_000_000)
    captions, reasons, _ = read_all([image(text_file=address) for address in sources], CaptionRules())
    assert captions == [("from a bucket",), ("été",), (), (), ()]
    assert reasons == {
        2: "caption file at byte 1024 of 00.tar is not UTF-8: byte 0xe9 at offset 0.",
        3: "caption file large.txt is too large: 1.0 MB or more, expected at most 1 MB.",
        4: "caption file at byte 0 of 00.tar is too large: 3.0 MB or more, expected at most 1 MB.",
    }


def test_a_tar_file_cut_short_is_a_reason(image, monkeypatch, sources):
    def read_start(address, length):
        raise ValueError("/data/00.tar ends at byte 520, in the middle of this image")

    monkeypatch.setattr(caption_files, "read_start", read_start)
    _, reasons, _ = read_all([image(text_file="tar:512+10:/data/00.tar")], CaptionRules())
    assert reasons == {
        0: "caption file at byte 512 of 00.tar cannot be read: "
        "/data/00.tar ends at byte 520, in the middle of this image"
    }


def test_a_bucket_that_refuses_is_no_matter_of_single_images(image, monkeypatch, sources):
    def read_start(address, length):
        raise StorageError("s3://bucket: access denied")

    monkeypatch.setattr(caption_files, "read_start", read_start)
    with pytest.raises(StorageError):
        read_all([image(text_file="s3://bucket/cat.txt")], CaptionRules())


def test_a_file_name_with_a_colon_is_a_file(image, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_captions(image("12:30.jpg", "half past twelve"), CaptionRules()) == ("half past twelve",)
    assert find_captions(Listed("x.jpg", "1", text_file="12:30.txt"), CaptionRules()) == ("half past twelve",)


# ---- other sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a_red-cat.jpg", "a red cat"), ("cat.v2.png", "cat.v2"), ("__cat__.jpg", "cat"), ("猫.webp", "猫")],
)
def test_captions_from_file_names(image, name, expected):
    assert find_captions(image(name), CaptionRules(sources=("filename",))) == (expected,)


def test_captions_from_a_table_are_alternatives_and_each_is_one_line(image):
    texts = (" a cat\non a roof ", "", "a roof", "a roof", "half \ud83d of a pair")
    assert find_captions(image(texts=texts), CaptionRules()) == ("a cat on a roof", "a roof", "half   of a pair")


def test_an_enormous_text_in_a_table_is_skipped(image):
    _, reasons, _ = read_all([image(texts=("x" * 2_000_000,))], CaptionRules())
    assert reasons == {0: "its caption is too large: 2.0 MB or more, expected at most 1 MB."}


def test_one_prompt_for_all(image):
    rules = CaptionRules(sources=("instance_prompt",), instance_prompt="a photo of ohwx cat")
    assert find_captions(image(content="ignored", texts=("ignored",)), rules) == ("a photo of ohwx cat",)


@pytest.mark.parametrize(
    ("content", "texts", "expected"),
    [
        ("from the file", ("from the table",), "from the file"),
        ("\n", ("from the table",), "from the table"),
        (None, ("from the table",), "from the table"),
        (None, (" ",), "red cat"),
        ("\n", (), "red cat"),
    ],
)
def test_the_first_source_that_has_a_caption_is_used(image, content, texts, expected):
    rules = CaptionRules(sources=("textfile", "column", "filename", "instance_prompt"), instance_prompt="never")
    assert find_captions(image("red_cat.jpg", content, texts=texts), rules) == (expected,)


@pytest.mark.parametrize(("content", "expected"), [("a cat", ("a cat",)), ("\n", ("",)), (None, ("",))])
def test_an_image_may_have_no_words(image, content, expected):
    rules = CaptionRules(sources=("textfile", "column", "empty"), prefix="photo", suffix=", 8k")
    captions, reasons, given = read_all([image(content=content)], rules)
    assert (captions, reasons, sum(given.values())) == ([expected], {}, 1)
    assert given["textfile" if expected[0] else "empty"] == 1
    assert variants_of(("",), rules, HASH) == ("photo, 8k",)
    assert variants_of(("",), CaptionRules(), HASH) == ("",)
    assert variants_of(("",), CaptionRules(shuffle_tags=True, variants=3), HASH) == ("", "", "")


def test_an_image_without_a_caption_may_be_skipped(image):
    rules = CaptionRules(sources=("textfile", "skip"))
    assert rules.skips
    assert not CaptionRules().skips
    found = read_all([image(content="a cat"), image("dog.jpg")], rules)
    assert found == ([("a cat",), ()], {}, {"textfile": 1})


def test_a_caption_file_that_is_no_text_is_not_an_empty_caption(image):
    _, reasons, _ = read_all([image(content=b"\xe9")], CaptionRules(sources=("textfile", "empty")))
    assert "is not UTF-8" in reasons[0]


def test_a_name_without_letters_is_no_caption(image):
    rules = CaptionRules(sources=("filename", "instance_prompt"), instance_prompt="a cat")
    assert find_captions(image("___.jpg"), rules) == ("a cat",)


def test_replacements_in_their_order_and_what_they_empty_is_no_caption(image):
    rules = CaptionRules(
        sources=("textfile", "filename"),
        replace=((r"\bphoto of\b ?", ""), ("cat", "dog"), (r"(\w+), (\w+)$", r"\2, \1"), ("dog", "bird")),
    )
    captions = find_captions(image(content="photo of\nphoto of a cat\nred, cat\na photo of party"), rules)
    assert captions == ("a bird", "bird, red", "a party")
    assert find_captions(image("a_name.jpg", content="photo of"), rules) == ("a name",)


# ---- every image its own ---------------------------------------------------------------------------------------------


def test_every_image_has_its_own_caption_among_failures(image, tmp_path):
    """600 images in a random order, every third of them with some trouble."""
    listed, expected, failing = [], [], set()
    numbers = list(range(600))
    random.Random(0).shuffle(numbers)
    for at, number in enumerate(numbers):
        name = f"{number}.jpg"
        kind = ["good", "table", "latin", "good", "gone", "none"][number % 6]
        if kind == "good":
            listed.append(image(name, f"caption {number}\nalso {number}"))
        elif kind == "table":
            listed.append(image(name, texts=(f"caption {number}", f"also {number}")))
        elif kind == "latin":
            listed.append(image(name, f"été {number}".encode("latin-1")))
        elif kind == "gone":
            listed.append(image(name, text_file=str(tmp_path / f"{number}.txt")))
        else:
            listed.append(image(name))
        expected.append((f"caption {number}", f"also {number}") if kind in ("good", "table") else ())
        failing |= {at} if kind in ("latin", "gone") else set()
    captions, reasons, _ = read_all(listed, CaptionRules())
    assert captions == expected
    assert set(reasons) == failing
    for at, reason in reasons.items():
        assert f"caption file {numbers[at]}.txt " in reason


def test_no_images():
    assert read_all([], CaptionRules()) == ([], {}, {})


# ---- trigger word, prefix, suffix ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "ohwx", "ohwx, a cat"),
        ("a photo of ohwx cat", "ohwx", "a photo of ohwx cat"),
        ("OHWX cat", "ohwx", "OHWX cat"),
        ("(ohwx), cat", "ohwx", "(ohwx), cat"),
        ("a party", "art", "art, a party"),  # only as a word of its own
        ("in the style of <s1>", "<s1>", "in the style of <s1>"),
        ("a cat", "c.t", "c.t, a cat"),  # no pattern
        ("a cat", "", "a cat"),
    ],
)
def test_the_trigger_word_is_put_before_captions_that_lack_it(caption, trigger, expected):
    assert decorate(caption, CaptionRules(trigger_word=trigger)) == expected


def test_prefix_trigger_word_caption_suffix():
    rules = CaptionRules(trigger_word="ohwx", prefix="photo of ", suffix=", 8k")
    assert decorate("a cat", rules) == "photo of ohwx, a cat, 8k"
    assert decorate("ohwx cat", rules) == "photo of ohwx cat, 8k"
    in_prefix = CaptionRules(trigger_word="ohwx", prefix="photo of ohwx, ")
    assert decorate("a cat", in_prefix) == "photo of ohwx, a cat"


def test_what_is_put_on_is_never_moved_or_dropped():
    rules = CaptionRules(
        trigger_word="ohwx", prefix="photo, ", suffix=", 8k", shuffle_tags=True, tag_dropout=0.5, variants=50
    )
    variants = variants_of((TAGS,), rules, HASH)
    assert len(variants) > 40
    for variant in variants:
        assert variant.startswith("photo, ohwx, ")
        assert variant.endswith(", 8k")


# ---- variants --------------------------------------------------------------------------------------------------------


def test_neutral_settings_leave_captions_as_they_are():
    captions = ("a cat,asleep ,on a  roof", "a, dog,", ",")
    rules = CaptionRules(keep_tags=1, variants=5)
    assert variants_of(captions, rules, HASH) == captions
    draw = np.random.default_rng(0)
    assert draw_variant(captions[0], rules, draw) == captions[0]
    assert draw.random() == np.random.default_rng(0).random()  # nothing was drawn


def test_variants_are_shuffled_and_keep_every_tag():
    variants = variants_of((TAGS,), CaptionRules(shuffle_tags=True, variants=20), HASH)
    assert len(set(variants)) == 20
    assert {", ".join(sorted(variant.split(", "))) for variant in variants} == {", ".join(sorted(TAGS.split(", ")))}
    firsts = {variant.split(", ")[0] for variant in variants}
    assert len(firsts) > 4


def test_variants_depend_on_image_caption_and_number_alone():
    rules = CaptionRules(shuffle_tags=True, tag_dropout=0.3, variants=4)
    variants = variants_of((TAGS,), rules, HASH)
    assert variants_of((TAGS,), rules, HASH) == variants
    other = "nine, ten, eleven"
    assert variants_of((other, TAGS), rules, HASH)[-4:] == variants
    more = CaptionRules(shuffle_tags=True, tag_dropout=0.3, variants=9)
    assert variants_of((TAGS,), more, HASH)[:4] == variants
    assert variants_of((TAGS,), rules, "6" * 64) != variants


def test_variants_are_the_same_for_ever():
    """Written down once: other ones would encode every cache anew."""
    rules = CaptionRules(shuffle_tags=True, tag_dropout=0.3, variants=2)
    assert variants_of((TAGS,), rules, HASH) == (
        "four, seven, eight, three, two",
        "one, six, seven, three, four, eight, five",
    )


def test_what_comes_out_twice_counts_twice():
    """Else tags that are seldom dropped would count as often as all others together."""
    texts = variants_of(("a, b",), CaptionRules(tag_dropout=0.1, variants=300), HASH)
    assert len(texts) == 300
    assert abs(texts.count("a, b") / 300 - 0.81) < 0.1


def test_each_variant_knows_its_base_caption_and_the_first_is_there_as_it_is():
    rules = CaptionRules(shuffle_tags=True, tag_dropout=0.9, variants=3, trigger_word="ohwx")
    texts, bases = expand_variants((TAGS, "a dog that runs"), rules, HASH)
    assert texts[0] == f"ohwx, {TAGS}"
    assert bases == (AS_IT_IS, 0, 0, 0, 1, 1, 1)
    assert texts[4:] == ("ohwx, a dog that runs",) * 3
    plain = CaptionRules(trigger_word="ohwx")
    assert expand_variants(("a cat", "ohwx, a cat", "a dog"), plain, HASH) == (("ohwx, a cat", "ohwx, a dog"), (0, 1))


def test_the_first_tags_stay():
    rules = CaptionRules(shuffle_tags=True, tag_dropout=0.9, keep_tags=2, variants=100)
    variants = variants_of((TAGS,), rules, HASH)
    assert {tuple(variant.split(", ")[:2]) for variant in variants} == {("one", "two")}
    assert "one, two" in variants  # nothing else has to be left
    few = CaptionRules(shuffle_tags=True, tag_dropout=0.9, keep_tags=9, variants=3)
    assert variants_of((TAGS,), few, HASH) == (TAGS, TAGS, TAGS)


def test_without_shuffling_the_order_stays():
    order = TAGS.split(", ")
    for variant in variants_of((TAGS,), CaptionRules(tag_dropout=0.5, variants=50), HASH):
        places = [order.index(tag) for tag in variant.split(", ")]
        assert places == sorted(places)


def test_the_share_of_dropped_tags_is_the_dropout():
    rules, draw = CaptionRules(tag_dropout=0.3, keep_tags=1), np.random.default_rng(0)
    left = [len(draw_variant(TAGS, rules, draw).split(", ")) - 1 for _ in range(2000)]
    share = 1 - np.mean(left) / 7
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (2000 * 7))  # four standard deviations


def test_each_order_is_as_likely_as_the_others():
    rules, draw = CaptionRules(shuffle_tags=True), np.random.default_rng(0)
    drawn = [draw_variant("a, b, c", rules, draw) for _ in range(6000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts) < 4 * np.sqrt(1000)


def test_at_least_one_tag_is_left():
    rules, draw = CaptionRules(tag_dropout=0.99), np.random.default_rng(0)
    assert {draw_variant("a, b, c", rules, draw) for _ in range(300)} == {"a", "b", "c"}
    assert draw_variant("a photo of a cat", rules, draw) == "a photo of a cat"


def test_a_variant_is_pure_in_its_draw():
    rules = CaptionRules(shuffle_tags=True, tag_dropout=0.5, trigger_word="ohwx")
    one, two = (draw_variant(TAGS, rules, np.random.default_rng(7)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("caption", "separator", "expected"),
    [
        (" a ,b,, c,", ",", {"a, b, c"}),
        ("a b c", " ", {"a b c"}),
        ("a. b|c", "|", {"a. b| c"}),
        ("a,b", ", ", {"a, b"}),
        ("a | b", " | ", {"a | b"}),
        (", ,", ",", {", ,"}),  # nothing but separators: as it is
    ],
)
def test_tags_are_trimmed_and_joined(caption, separator, expected):
    rules = CaptionRules(tag_dropout=1e-9, separator=separator)
    assert set(variants_of((caption,), rules, HASH)) == expected


# ---- images without captions -----------------------------------------------------------------------------------------


def test_images_without_captions_are_all_counted_and_five_named(image):
    without = [image(f"cat{number}.jpg") for number in range(7)]
    text = str(no_captions_error(without, 12, 20, CaptionRules(dataset="cats")))
    lines = text.splitlines()
    assert lines[0] == '12 of 20 images of dataset "cats" have no caption:'
    assert lines[1:6] == [f"  {file.path}" for file in without[:5]]
    assert lines[6] == "  and 7 more"
    assert lines[7] == (
        "Expected cat0.txt or cat0.jpg.txt beside cat0.jpg with at least one line; or a text in a column (of a "
        'WebDataset: in the .json) called caption or text (dataset.captions = ["textfile", "column"]). Write them, or '
        'add another source to dataset.captions: "filename", or "instance_prompt" with dataset.instance_prompt, '
        'or "empty" (no words), or "skip" (leave these images out).'
    )


def test_rows_of_a_table_without_captions():
    """No caption file is looked for beside what a table names."""
    row = Listed(path="/data/cat.jpg", stamp="1", columns=("image", "prompt"))
    rules = CaptionRules(dataset="a", replace=((".*", ""),))
    assert str(no_captions_error([row], 1, 9, rules)).splitlines()[2] == (
        "Expected a text in a column called caption or text, and there are image, prompt (dataset.caption_columns) "
        '(dataset.captions = ["textfile", "column"]). Or dataset.caption_replace has left nothing of them. Write them, '
        'or add another source to dataset.captions: "filename", or "instance_prompt" with dataset.instance_prompt, '
        'or "empty" (no words), or "skip" (leave these images out).'
    )


def test_rows_of_a_table_where_only_caption_files_are_looked_for():
    row = Listed(path="/data/cat.jpg", stamp="1", columns=("image", "text"))
    text = str(no_captions_error([row], 1, 1, CaptionRules(sources=("textfile",))))
    assert 'Expected a caption (dataset.captions = ["textfile"]). Write them, or add another source to ' in text
    assert 'dataset.captions: "column", or "filename", or ' in text


def test_files_of_the_name_of_an_image_are_named(image):
    without = [image("a.jpg"), image("b.jpg", beside=("b.caption", "b.tags"))]
    assert (
        " Beside b.jpg there is b.caption, b.tags: if that is its caption, set dataset.caption_extension = "
        '".caption" or ".tags". Write them, '
    ) in str(no_captions_error(without, 2, 2, CaptionRules()))
    assert "b.caption" not in str(no_captions_error(without, 2, 2, CaptionRules(sources=("column",))))


@pytest.fixture
def error_of(tmp_path):
    """What is said of a dataset in which an image has no caption, from its `[[dataset]]`."""

    def error_of(**settings):
        section = DatasetSection(path=str(tmp_path), **settings)
        listed, rules = list(list_dataset(section)), CaptionRules.of(section)
        captions, _, _ = read_all(listed, rules)
        without = [image for image, found in zip(listed, captions, strict=True) if not found]
        return str(no_captions_error(without, len(without), len(listed), rules))

    return error_of


@pytest.mark.parametrize(
    ("files", "extensions"),
    [
        (["a.caption", "a.npz"], '".caption"'),
        (["a.caption.txt"], '".caption.txt"'),
        (["a.jpg.tags"], '".tags"'),
        (["a.TAGS", "a.wd14_cap"], '".TAGS" or ".wd14_cap"'),
        (["a.npz", "a.safetensors", "a.xmp"], ""),
        (["a.json"], ""),
    ],
)
def test_only_what_may_be_a_caption_is_advised(tmp_path, error_of, files, extensions):
    for name in ("a.jpg", *files):
        (tmp_path / name).write_text("a cat")
    told = f"if that is its caption, set dataset.caption_extension = {extensions}."
    assert (told in error_of()) == bool(extensions)
    assert ("caption_extension" in error_of()) == bool(extensions)
    assert "npz" not in error_of()
    for extension in extensions.replace('"', "").split(" or ") if extensions else ():
        (image,) = list_dataset(DatasetSection(path=str(tmp_path), caption_extension=extension))
        assert find_captions(image, CaptionRules(extension=extension)) == ("a cat",)


def test_the_advice_for_members_of_a_tar_file_works(tmp_path, error_of):
    members = [("0.jpg", b"x"), ("0.caption.txt", b"a cat"), ("1.jpg", b"x"), ("1.cls", b"3")]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    told = " Beside 0.jpg there is 0.caption.txt: if that is its caption, set dataset.caption_extension = "
    assert f'{told}".caption.txt".' in error_of()
    section = DatasetSection(path=str(tmp_path), caption_extension=".caption.txt")
    assert [bool(image.text_file) for image in list_dataset(section)] == [True, False]


def test_a_folders_json_is_not_read_and_what_is_instead(tmp_path, error_of):
    (tmp_path / "cat.jpg").write_text("x")
    (tmp_path / "cat.json").write_text('{"caption": "a cat"}')
    assert (
        " Of a folder no .json such as cat.json is read: write a metadata.jsonl beside the images, a line for each: "
        '{"file_name": "cat.jpg", "text": "..."}; or pack image and .json into tar files (WebDataset). Write them, '
    ) in error_of()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat.jpg", "text": "a cat"}\n')
    assert [image.texts for image in list_dataset(DatasetSection(path=str(tmp_path)))] == [("a cat",)]


def test_the_names_in_a_tar_files_json_are_told(tmp_path, error_of):
    members = [("0.jpg", b"x"), ("0.json", b'{"tags": ["1girl"], "url": "y"}')]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert (
        "Expected 0.txt or 0.jpg.txt beside 0.jpg with at least one line; or a text in the .json called caption or "
        'text, and there are tags, url (dataset.caption_columns) (dataset.captions = ["textfile", "column"]).'
    ) in error_of()
    assert '"column"' in error_of(captions=["textfile"]).rpartition("add another source")[2]


@pytest.mark.filterwarnings("ignore:.*not read")
def test_a_table_beside_the_images_is_told(tmp_path, error_of):
    (tmp_path / "cat.jpg").write_text("x")
    (tmp_path / "captions.csv").write_text("file_name,caption\ncat.jpg,a cat\n")
    told = f" There is a table, {tmp_path}/captions.csv, which is not read beside images: if the captions are there, "
    assert f"{told}set dataset.path to it. Write them" in error_of()
    assert told in error_of(captions=["column"])
    for sub in ("cats", "dogs"):
        (tmp_path / sub).mkdir()
        (tmp_path / sub / "a.jpg").write_text("x")
        (tmp_path / sub / "metadata.jsonl").write_text('{"file_name": "a.jpg"}')
    assert "which are not read beside images: if the captions are there, set dataset.path to the one" in error_of()
    (tmp_path / "captions.csv").unlink()
    assert 'if the captions are there, set dataset.format = "table".' in error_of()


@pytest.mark.filterwarnings("ignore:.*are masks", "ignore:the images in")
def test_images_that_may_be_masks_are_told(tmp_path, error_of):
    for name in ("a.jpg", "a.txt", "a-masklabel.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    told = 'If a-masklabel.png is a mask and no picture, set dataset.mask_suffix = "-masklabel.png". Write them'
    assert told in error_of()
    assert f" If what is in {tmp_path}/masks are masks and no pictures, move them out of dataset.path." in error_of(
        mask_suffix="-masklabel.png"
    )
    (tmp_path / "a-masklabel.png").rename(tmp_path / "a-mask.png")
    assert "a-mask" not in error_of()


# ---- several captions ------------------------------------------------------------------------------------------------


def test_several_captions_of_an_image_are_told(tmp_path, tiny_model):
    for number in range(3):
        caption = "1girl, red hair,\nblue eyes" if number < 2 else "one line"
        add_image(tmp_path / "images", f"{number}.png", colour=number, caption=caption)
    config = config_of(tmp_path, str(tiny_model), tmp_path / "images", name="girls")
    assert plan_of(config).collection.notes == [
        'dataset "girls": 2 of 3 images have several captions, of which each epoch draws one; if the lines of a '
        'caption file are one caption, set dataset.caption_lines = "whole"'
    ]
    whole = config_of(tmp_path, str(tiny_model), tmp_path / "images", caption_lines="whole")
    assert plan_of(whole).collection.notes == []


def test_several_captions_of_a_list_are_told():
    rules = CaptionRules()
    assert several_captions_note(1, 2, rules, Counter(column=3)) == (
        "1 of 2 images have several captions, of which each epoch draws one; if a list is one caption, set "
        'dataset.caption_lists = "tags"'
    )


def test_only_sources_that_are_not_tried_are_proposed():
    rules = CaptionRules(sources=("filename", "instance_prompt"))
    text = str(no_captions_error([Listed("/data/___.jpg", "1")], 1, 1, rules))
    assert text.endswith(
        "Expected a file name with letters; or dataset.instance_prompt, which is empty "
        '(dataset.captions = ["filename", "instance_prompt"]). Write them, or add another source to dataset.captions: '
        '"empty" (no words), or "skip" (leave these images out).'
    )


def test_what_replacements_leave_is_trimmed_and_spaces_alone_are_no_caption(image):
    rules = CaptionRules(sources=("textfile", "filename"), replace=(("photo", ""),))
    assert find_captions(image(content="photo a cat photo\nphoto photo"), rules) == ("a cat",)
