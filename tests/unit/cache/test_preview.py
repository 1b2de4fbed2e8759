import base64
import dataclasses
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.preview import SAMPLES_PER_BUCKET, SKIPPED_SHOWN, write_contact_sheet
from sdxl_ray.errors import StorageError
from sdxl_ray.records import EncodedSample
from tests.unit.cache.test_images import encode

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would find: nesting, attributes, text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]

    def pictures(self):
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition("base64,")[2])))).astype(int)
            for attrs in self.all("img")
        ]


def sample(path, image, **fields):
    """An image whose 256x256 crop begins at a quarter of its 512 pixels of width."""
    content = encode(image, "PNG")
    path.write_bytes(content)
    made = EncodedSample(
        sample_id="1",
        dataset="cats",
        path=str(path),
        address="",
        image_hash=hashlib.sha256(content).hexdigest(),
        verify=True,
        original_hw=(256, 512),
        target_hw=(256, 256),
        resized_hw=(256, 512),
        crops=((0, 128),),
        flip=False,
        mask="",
        captions=("a cat",),
        scaled_jpeg=False,
        caption_bases=(0,),
        latent_keys=("k",),
        latent_shards=("",),
        text_keys=("t",),
        text_shards=("",),
    )
    if "captions" in fields:
        fields.setdefault("caption_bases", tuple(range(len(fields["captions"]))))
    return dataclasses.replace(made, **fields)


def stripes():
    """Four stripes of 128 pixels: red, green, blue, white."""
    image = Image.new("RGB", (512, 256))
    for number, colour in enumerate(((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 200))):
        image.paste(colour, (128 * number, 0, 128 * number + 128, 256))
    return image


def sheet(tmp_path, samples, *, count=None, skipped=(), num_skipped=None, title="Cats", decorations=None):
    path = tmp_path / "sheets" / "contact.html"
    counts = {"256x256": len(samples) if count is None else count}
    num_skipped = len(skipped) if num_skipped is None else num_skipped
    write_contact_sheet(
        path,
        title=title,
        counts=counts,
        shown={"256x256": samples},
        skipped=skipped,
        num_skipped=num_skipped,
        decorations=decorations or {},
    )
    return Page(path.read_text(encoding="utf-8"))


def colours(picture, shares):
    """The colours in the middle of the height, at shares of the width."""
    height, width, _ = picture.shape
    return [picture[height // 2, int(share * width)].tolist() for share in shares]


def near(found, expected):
    return np.abs(np.array(found) - np.array(expected)).max() <= 12  # JPEG


def test_a_sample_is_shown_as_the_model_sees_it_and_whole(tmp_path):
    crop, whole = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes())]).pictures()
    assert (crop.shape, whole.shape) == ((224, 224, 3), (158, 317, 3))
    assert near(colours(crop, (0.25, 0.75)), [(0, 200, 0), (0, 0, 200)])
    assert near(colours(whole, (0.1, 0.35, 0.65, 0.9)), [(60, 0, 0), (0, 200, 0), (0, 0, 200), (60, 60, 60)])


def test_a_mirrored_sample_is_shown_mirrored(tmp_path):
    """SDXL is told that 256 of the mirrored image's pixels lie left of the crop: blue and white are gone, now left."""
    mirrored = sample(tmp_path / "cat.png", stripes(), flip=True, crops=((0, 256),))
    page = sheet(tmp_path, [mirrored])
    crop, whole = page.pictures()
    assert near(colours(crop, (0.25, 0.75)), [(0, 200, 0), (200, 0, 0)])
    assert near(colours(whole, (0.1, 0.35, 0.65, 0.9)), [(60, 60, 60), (0, 0, 60), (0, 200, 0), (200, 0, 0)])
    assert "mirrored" in page.text


def test_a_mask_is_shown(tmp_path):
    image = stripes().convert("RGBA")
    image.paste((0, 0, 0, 0), (128, 0, 256, 256))
    _, _, mask = sheet(tmp_path, [sample(tmp_path / "cat.png", image, mask="alpha")]).pictures()
    assert mask.shape == (224, 224)
    assert mask[100, 50] < 12
    assert mask[100, 180] > 243


def test_what_is_said_of_a_sample(tmp_path):
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes(), crops=((0, 128), (0, 7)))], count=1234)
    for text in (
        "256 x 256 1,234 samples, 1 of them shown",
        "1,234 samples in 1 bucket, 0 images skipped",
        "a cat",
        "Sizes are height x width.",
        "256 x 512, resized to 256 x 512",
        "0 from the top, 128 from the left; the first of 2, the others are outlined",
        "cats",
        str(tmp_path / "cat.png"),
    ):
        assert text in page.text
    assert "Skipped" not in page.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes())], skipped=[("a", "b")])
    assert {tag for tag, _ in page.tags} & {"script", "link", "a", "iframe"} == set()
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in page.all("img"))
    source = (tmp_path / "sheets" / "contact.html").read_text(encoding="utf-8")
    assert "://" not in re.sub(r"base64,[^\"]*", "", source)
    assert "url(" not in source


def test_every_picture_says_what_it_is(tmp_path):
    page = sheet(tmp_path, [sample(tmp_path / 'a "cat".png', stripes())])
    assert [attrs["alt"] for attrs in page.all("img")] == [
        'a "cat".png, as the model sees it',
        'a "cat".png, whole, crop bright',
    ]
    assert [attrs["lang"] for attrs in page.all("html")] == ["en"]


def test_captions_and_paths_are_text_not_html(tmp_path):
    evil = '<script>alert("1")</script> & <b'
    page = sheet(
        tmp_path,
        [sample(tmp_path / "<b>.png", stripes(), captions=(evil, ""), dataset="<i>")],
        skipped=[("<u>.png", "is </table>")],
        title="<h1>",
    )
    for text in (evil, "(empty)", "<b>.png", "<i>", "<u>.png", "is </table>", "<h1>"):
        assert text in page.text
    assert {tag for tag, _ in page.tags} & {"script", "b", "i", "u"} == set()


def test_the_caption_that_is_only_evaluated_with_is_not_shown(tmp_path):
    shuffled = sample(tmp_path / "cat.png", stripes(), captions=("left, right", "right, left"), caption_bases=(-1, 0))
    page = sheet(tmp_path, [shuffled])
    assert "right, left" in page.text
    assert "left, right" not in page.text


def test_of_many_captions_the_first(tmp_path):
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes(), captions=tuple(f"caption-{n}." for n in range(9)))])
    assert "caption-4." in page.text
    assert "caption-5." not in page.text
    assert "and 4 more" in page.text


def test_of_a_long_caption_the_start(tmp_path):
    long = "a cat, " * 1000
    short = "b" * 400
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes(), captions=(long, short))])
    assert f"{long[:400].rstrip()}… (7,000 characters in all)" in page.text
    assert page.text.count("a cat") == 57
    assert short in page.text
    assert "400 characters" not in page.text


def test_captions_are_shown_as_training_reads_them(tmp_path):
    """With cache.text = "online" the samples have what the files say."""
    cat = sample(tmp_path / "cat.png", stripes())
    dog = sample(tmp_path / "dog.png", stripes(), dataset="dogs", captions=("a dog",))
    rules = CaptionRules(trigger_word="ohwx", prefix="photo of ", suffix=", outdoors")
    page = sheet(tmp_path, [cat, dog], decorations={"cats": rules})
    assert "photo of ohwx, a cat, outdoors" in page.text
    assert ">a dog<" in (tmp_path / "sheets" / "contact.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("flip", [False, True])
def test_other_crops_are_outlined(tmp_path, flip):
    """Crops are told as they lie in the mirrored image, and so they are drawn."""
    crops = ((0, 0), (0, 128), (0, 256))
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes(), crops=crops, flip=flip)])
    _, whole = page.pictures()
    ends = np.array(colours(whole, (0.7485, 0.9975)))  # of the second and the third crop
    assert np.abs(ends - (255, 160, 0)).max() < 60
    darkened = [(0, 60, 0), (60, 0, 0)] if flip else [(0, 0, 60), (60, 60, 60)]
    assert near(colours(whole, (0.65, 0.9)), darkened)
    assert page.all("img")[1]["title"] == "whole, crop bright, other crops outlined"


def test_an_unreadable_image_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_ray.cache.reading.PAUSE_S", 0.0)
    damaged = sample(tmp_path / "cat.png", stripes())
    (tmp_path / "cat.png").write_bytes(b"")
    missing = sample(tmp_path / "dog.png", stripes())
    (tmp_path / "dog.png").unlink()
    page = sheet(tmp_path, [damaged, missing])
    assert page.all("img") == []
    assert "changed while it was being cached" in page.text
    assert "cannot be read: No such file or directory" in page.text
    assert "Errno" not in page.text
    assert page.text.count("a cat") == 2


def test_an_image_that_its_store_does_not_give_is_said_in_words(tmp_path, monkeypatch):
    def fail(record):
        raise StorageError("s3://bucket/cat.png: access denied while reading.")

    monkeypatch.setattr("sdxl_ray.cache.preview.load_image", fail)
    page = sheet(tmp_path, [sample(tmp_path / "cat.png", stripes())])
    assert "cannot be read: s3://bucket/cat.png: access denied while reading." in page.text


def test_no_more_samples_than_fit_a_page(tmp_path):
    many = [sample(tmp_path / "cat.png", stripes())] * (SAMPLES_PER_BUCKET + 5)
    page = sheet(tmp_path, many)
    assert len(page.all("figure")) == SAMPLES_PER_BUCKET
    assert f"{SAMPLES_PER_BUCKET + 5} samples, {SAMPLES_PER_BUCKET} of them shown" in page.text


def test_skipped_images_are_listed_and_the_rest_counted(tmp_path):
    skipped = [(f"{number}.png", f"reason {number}") for number in range(SKIPPED_SHOWN + 3)]
    page = sheet(tmp_path, [], skipped=skipped, num_skipped=12345)
    assert len(page.all("td")) == 2 * SKIPPED_SHOWN
    assert "reason 499" in page.text
    assert "reason 500" not in page.text
    assert "12,345 images" in page.text
    assert "The first 500 are listed." in page.text


def test_buckets_come_in_the_order_given(tmp_path):
    path = tmp_path / "contact.html"
    counts = {"512x768": 1, "256x256": 1, "768x512": 2}
    write_contact_sheet(path, title="t", counts=counts, shown={}, skipped=[], num_skipped=0, decorations={})
    found = Page(path.read_text(encoding="utf-8"))
    labels = [attrs["aria-label"] for attrs in found.all("section")]
    assert labels == ["Bucket 512 x 768", "Bucket 256 x 256", "Bucket 768 x 512"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(
        StorageError, match=r"contact\.html: no space left on the device while writing the contact sheet"
    ):
        sheet(tmp_path, [])
