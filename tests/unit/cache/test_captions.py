import os
from pathlib import Path

import pytest

from sdxl_ray.cache.captions import CaptionRules, attach_captions, caption_file, find_captions
from sdxl_ray.errors import DatasetError


@pytest.fixture
def image(tmp_path):
    """Makes an image (its pixels do not matter here) with the caption files beside it; its path."""

    def image(name="cat.jpg", **files):
        (tmp_path / name).touch()
        for suffix, content in files.items():
            beside = tmp_path / (f"{name}.txt" if suffix == "full" else f"{Path(name).stem}.txt")
            beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return image


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat", ("a cat",)),
        ("a cat\n", ("a cat",)),
        ("a cat\n\n  a sleeping cat \n", ("a cat", "a sleeping cat")),
        (b"\xef\xbb\xbfa cat", ("a cat",)),
        (b"a cat\r\nanother cat\r\n", ("a cat", "another cat")),
        ("une chat à l'été, 猫", ("une chat à l'été, 猫",)),
        ("", ()),
        (" \n\t\n", ()),
        (b"\xef\xbb\xbf", ()),
    ],
)
def test_each_line_of_the_text_file_is_a_caption(image, content, expected):
    assert find_captions(image(stem=content), CaptionRules()) == expected


def test_the_file_with_the_whole_name_comes_first(image):
    path = image(stem="short", full="whole")
    assert caption_file(path) == f"{path}.txt"
    assert find_captions(path, CaptionRules()) == ("whole",)


def test_without_a_text_file_there_is_none(image):
    assert caption_file(image()) is None
    assert find_captions(image(), CaptionRules()) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a_red-cat.jpg", "a red cat"), ("cat.v2.png", "cat.v2"), ("__cat__.jpg", "cat"), ("猫.webp", "猫")],
)
def test_captions_from_file_names(image, name, expected):
    assert find_captions(image(name), CaptionRules(sources=("filename",))) == (expected,)


def test_one_prompt_for_all(image):
    rules = CaptionRules(sources=("instance_prompt",), instance_prompt="a photo of ohwx cat")
    assert find_captions(image(stem="ignored"), rules) == ("a photo of ohwx cat",)


@pytest.mark.parametrize(
    ("files", "expected"),
    [({"stem": "from the file"}, "from the file"), ({"stem": "\n"}, "red cat"), ({}, "red cat")],
)
def test_the_first_source_that_has_a_caption_is_used(image, files, expected):
    rules = CaptionRules(sources=("textfile", "filename", "instance_prompt"), instance_prompt="never")
    assert find_captions(image("red_cat.jpg", **files), rules) == (expected,)


def test_a_name_without_letters_is_no_caption(image):
    rules = CaptionRules(sources=("filename", "instance_prompt"), instance_prompt="a cat")
    assert find_captions(image("___.jpg"), rules) == ("a cat",)


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
def test_the_trigger_word_is_put_before_captions_that_lack_it(image, caption, trigger, expected):
    assert find_captions(image(stem=caption), CaptionRules(trigger_word=trigger)) == (expected,)


def test_every_line_gets_the_trigger_word(image):
    rules = CaptionRules(trigger_word="ohwx")
    assert find_captions(image(stem="a cat\nohwx asleep"), rules) == ("ohwx, a cat", "ohwx asleep")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_caption_in_latin_1_is_skipped_with_the_command_that_repairs_it(image):
    good, bad = image("dog.jpg", stem="a dog"), image("cat.jpg", stem="un château".encode("latin-1"))
    captions, skipped = attach_captions([good, bad], CaptionRules())
    assert captions == {good: ("a dog",)}
    assert skipped == {
        bad: "caption file cat.txt is not UTF-8: byte 0xe2 at offset 5. "
        "If it is Latin-1: iconv -f latin1 -t utf-8 cat.txt"
    }


def test_a_folder_called_like_a_caption_is_skipped(image, tmp_path):
    path = image("cat.jpg")
    (tmp_path / "cat.txt").mkdir()
    assert attach_captions([path], CaptionRules()) == (
        {},
        {path: "caption file cat.txt cannot be read: Is a directory"},
    )


def test_one_text_file_never_serves_two_images(image, tmp_path):
    paths = [image("cat.jpg", stem="a cat"), image("cat.png"), image("dog.jpg", stem="a dog")]
    with pytest.raises(DatasetError) as error:
        attach_captions(paths, CaptionRules())
    assert str(error.value) == (
        "1 caption files could belong to several images:\n"
        f"  {tmp_path / 'cat.txt'} could belong to cat.jpg or cat.png\n"
        'Name each after its whole image file ("cat.jpg.txt"), or remove the second image.'
    )


def test_two_images_with_one_stem_and_their_own_files_are_fine(image):
    paths = [image("cat.jpg", full="a jpeg"), image("cat.png", full="a png")]
    captions, _ = attach_captions(paths, CaptionRules())
    assert captions == {paths[0]: ("a jpeg",), paths[1]: ("a png",)}


def test_two_images_with_one_stem_are_fine_where_text_files_are_not_used(image):
    paths = [image("cat.jpg", stem="a cat"), image("cat.png")]
    captions, _ = attach_captions(paths, CaptionRules(sources=("filename",)))
    assert captions == dict.fromkeys(paths, ("cat",))


def test_images_without_captions_are_all_counted_and_five_named(image):
    paths = [image(f"cat{number}.jpg") for number in range(7)] + [image("dog.jpg", stem="a dog")]
    with pytest.raises(DatasetError) as error:
        attach_captions(paths, CaptionRules())
    lines = str(error.value).splitlines()
    assert lines[0] == "7 of 8 images have no caption:"
    assert lines[1:6] == [f"  {path}" for path in paths[:5]]
    assert lines[6] == "  and 2 more"
    assert lines[7] == (
        "Expected cat0.txt or cat0.jpg.txt beside cat0.jpg with at least one line "
        "(dataset.captions = ['textfile']). Write them, or add another source: "
        'dataset.captions = ["textfile", "filename"], or "instance_prompt" with dataset.instance_prompt.'
    )


def test_an_empty_caption_file_is_no_caption(image):
    with pytest.raises(DatasetError, match="1 of 1 images have no caption"):
        attach_captions([image(stem="")], CaptionRules())


# ---- many images -----------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_once_and_no_name_is_asked_for(image, monkeypatch):
    paths = [image(f"{number}.jpg", stem=f"caption {number}") for number in range(300)]
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(os.path, "exists", lambda path: pytest.fail(f"asked for {path}"))
    captions, _ = attach_captions(paths, CaptionRules())
    assert captions == {path: (f"caption {number}",) for number, path in enumerate(paths)}
    assert list(captions) == paths
    assert listed == [str(Path(paths[0]).parent)]


def test_a_link_to_a_caption_counts_if_it_leads_somewhere(image, tmp_path):
    linked, dangling = image("linked.jpg"), image("dangling.jpg")
    (tmp_path / "words").write_text("a cat")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "words")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    captions, _ = attach_captions([linked, dangling], CaptionRules(sources=("textfile", "filename")))
    assert captions == {linked: ("a cat",), dangling: ("dangling",)}


@pytest.mark.parametrize("folder", ["", ".", "deep", "deep//er", "./deep/../deep"])
def test_captions_are_found_however_the_folder_is_written(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = os.path.join(folder, "cat.jpg")  # noqa: PTH118  (Path would tidy it up)
    Path(folder, "cat.txt").write_text("a cat")
    assert (
        attach_captions([path], CaptionRules())[0] == {path: ("a cat",)} == {path: find_captions(path, CaptionRules())}
    )
