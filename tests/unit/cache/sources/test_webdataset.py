import io
import json
import os
import tarfile

import pytest

from sdxl_ray.cache.sources import list_dataset, read_bytes, read_start
from sdxl_ray.errors import DatasetError
from tests.unit.cache.sources.made import contents, listed, note_of, section, tar_bytes


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, format))


def test_members_of_one_name_belong_together(tmp_path):
    notes = {"caption": " from json ", "height": 30, "width": 20, "focus_y": 3, "focus_x": 15}
    write_tar(
        tmp_path / "0.tar",
        [
            ("b.jpg", b"image b"),
            ("b.txt", b"caption b"),
            ("a/b.png", b"image a/b"),
            ("a/b.json", json.dumps(notes).encode()),
            ("a/b.mask.png", b"mask a/b"),
            ("c.txt", b"no image"),
            (".hidden.jpg", b"x"),
            ("README", b"x"),
        ],
    )
    first, second = listed(tmp_path, mask="file")
    assert (first.path, second.path) == (f"{tmp_path}/0.tar/a/b.png", f"{tmp_path}/0.tar/b.jpg")
    assert contents([first, second]) == [b"image a/b", b"image b"]
    assert (first.texts, first.original_hw, first.text_file) == (("from json",), (30, 20), "")
    assert first.focus_yx == (0.1, 0.75)
    assert read_bytes(first.mask_file) == b"mask a/b"
    assert (second.texts, second.original_hw, second.mask_file, second.focus_yx) == ((), None, "", None)
    assert read_bytes(second.text_file) == b"caption b"
    size, _, offset = second.stamp.split("-")
    assert (int(size), (tmp_path / "0.tar").read_bytes()[int(offset) :][:7]) == (7, b"image b")
    assert read_start(second.address, 3) == b"ima"
    assert read_start(second.address, 99) == b"image b"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_may_be_written_in_any_order_and_format(tmp_path, format):
    members = [(f"{number}.{kind}", f"{number}{kind}".encode()) for kind in ("txt", "jpg") for number in range(30)]
    write_tar(tmp_path / "0.tar", members, format)
    found = listed(tmp_path / "0.tar")
    assert sorted(contents(found)) == sorted(content for name, content in members if name.endswith("jpg"))
    assert {read_bytes(image.text_file)[:-3] for image in found} == {str(number).encode() for number in range(30)}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names(tmp_path, format):
    names = [f"{'deep/' * 60}{'x' * 200}.jpg", "猫 😺.jpg", "line\nbreak.jpg", "tar:1+2:x.jpg"]
    write_tar(tmp_path / "a:b.tar", [(name, name.encode()) for name in names], format)
    found = listed(tmp_path / "a:b.tar")
    assert sorted(content.decode() for content in contents(found)) == sorted(names)
    assert sorted(image.path for image in found) == sorted(f"{tmp_path}/a:b.tar/{name}" for name in names)


def test_a_name_that_is_not_utf_8_can_be_read(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("caf\udce9.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    (image,) = listed(tmp_path)
    assert image.path == rf"{tmp_path}/0.tar/caf\xe9.jpg"
    assert contents([image]) == [b"x"]


def test_a_name_with_more_dots_keeps_its_own_caption(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [("photo.v1.jpg", b"1"), ("photo.v2.jpg", b"2"), ("photo.v1.txt", b"one"), ("photo.v2.txt", b"two")],
    )
    found = listed(tmp_path)
    assert [(read_bytes(image.address), read_bytes(image.text_file)) for image in found] == [
        (b"1", b"one"),
        (b"2", b"two"),
    ]


def test_endings_may_be_in_capitals(tmp_path):
    write_tar(tmp_path / "0.tar", [("A.JPG", b"a"), ("A.TXT", b"text"), ("A.JSON", b'{"caption": "from json"}')])
    (image,) = listed(tmp_path)
    assert (read_bytes(image.text_file), image.texts) == (b"text", ("from json",))


def test_other_members_are_told_where_there_is_no_caption(tmp_path):
    members = ["a.jpg", "a.caption", "deep/b.jpg", "deep/b.tags", "deep/b.txt", "c.jpg"]
    write_tar(tmp_path / "0.tar", [(name, b"x") for name in members])
    assert [image.beside for image in listed(tmp_path)] == [("a.caption",), (), ()]


def test_a_list_is_alternatives_or_the_tags_of_one_caption(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.json", b'{"caption": ["1girl", " red hair", ""]}')])
    assert listed(tmp_path)[0].texts == ("1girl", "red hair")
    assert listed(tmp_path, caption_lists="tags")[0].texts == ("1girl, red hair",)


def test_where_not_one_image_has_a_mask(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.matte.png", b"x")])
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, mask="file")
    assert str(error.value).startswith(
        f'dataset.mask is "file", and not one image in {tmp_path}/0.tar has a mask: of cat.jpg it would be cat.mask.png'
    )
    assert listed(tmp_path, mask="file", mask_suffix=".matte.png")[0].mask_file


def test_names_that_are_in_no_json(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("a.jpg", b"x"), ("a.json", b'{"captions": "a", "focus_x": 1}')])
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, caption_columns=["caption", "captoins"], crop="focus")
    assert str(error.value).split("\n") == [
        'dataset.caption_columns: there is no column "captoins". Did you mean "captions"?',
        'dataset.focus_columns: there is no column "focus_y" for dataset.crop = "focus". Did you mean "focus_x"?',
        f"{tmp_path}/0.tar and 1 more files: has captions, focus_x.",
    ]
    assert len(listed(tmp_path, caption_columns=["captions"])) == 2


def test_only_what_is_an_image_on_its_own_is_one_and_the_others_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"a"), ("a.depth.png", b"depth"), ("a.mask.png", b"mask")])
    write_tar(tmp_path / "1.tar", [("0.jpg", b"0"), ("0.jpeg", b"0e"), ("0.1.jpg", b"01"), ("0.png.jpg", b"0p")])
    assert note_of(lambda: listed(tmp_path)) == (
        f"{tmp_path}/0.tar and 1 more tar files: 4 images are left out, such as a.depth.png beside a.jpg: members "
        "whose names are the same up to the first dot are one sample, and what has a word more is no picture of its own"
    )
    with pytest.warns(UserWarning, match="4 images are left out"):
        assert contents(listed(tmp_path)) == [b"a", b"0e", b"0"]
    assert "such as 0.1.jpg beside 0.jpg" in note_of(lambda: listed(tmp_path / "1.tar"))
    with pytest.warns(UserWarning, match="3 images are left out"):
        listed(tmp_path, mask="file")
    write_tar(tmp_path / "0.tar", [("a.b.jpg", b"a"), ("a.b.mask.png", b"mask")])
    (image,) = listed(tmp_path / "0.tar", mask="file")
    assert (read_bytes(image.address), read_bytes(image.mask_file)) == (b"a", b"mask")


@pytest.mark.filterwarnings("ignore:.*1 images are left out, such as b.mask.png")
@pytest.mark.parametrize("mask", ["none", "file"])
def test_masks_called_as_in_a_folder_are_no_images(tmp_path, mask):
    members = ["a.jpg", "a-mask.png", "b.jpg", "b-MASK.PNG", "b.mask.png", "c-mask.png", "d-mask.png", "d.txt"]
    write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in members])
    with pytest.warns(UserWarning, match=r"0\.tar: 2 images such as a-mask\.png are masks of others by their names"):
        found = listed(tmp_path, mask=mask)
    assert contents(found) == [b"a.jpg", b"b.jpg", b"c-mask.png", b"d-mask.png"]


def test_the_names_in_the_json_are_told_where_there_is_no_caption(tmp_path):
    notes = [b'{"tags": ["x"], "url": "y"}', b'{"caption": "x", "url": "y"}']
    members = [(f"{number}.{kind}", notes[number]) for number in range(2) for kind in ("jpg", "json")]
    write_tar(tmp_path / "0.tar", members)
    assert [image.columns for image in listed(tmp_path)] == [("tags", "url"), ()]


@pytest.mark.filterwarnings("ignore:.*images are left out")
def test_a_mask_that_is_rewritten_has_another_stamp(tmp_path):
    stamps = []
    for number, content in enumerate((b"mask", b"ksam")):  # of the same size, in the same place
        write_tar(tmp_path / "0.tar", [("a.jpg", b"a"), ("a.mask.png", content)])
        os.utime(tmp_path / "0.tar", ns=(0, number))
        (image,) = listed(tmp_path, mask="file")
        stamps.append(image.mask_stamp)
    size, _, offset = stamps[0].split("-")
    assert (tmp_path / "0.tar").read_bytes()[int(offset) :][: int(size)] == b"ksam"
    assert stamps[0] != stamps[1]
    assert listed(tmp_path)[0].mask_stamp == ""


@pytest.mark.parametrize("pattern", ["data/*.tar", "data/{000..002}.tar", "data/00{0,1,2}.tar", "**/00?.tar", "data"])
def test_which_tar_files(tmp_path, pattern):
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number:03d}.tar", [(f"{number}.jpg", b"%d" % number)])
    (tmp_path / "data" / "notes.md").touch()
    assert contents(listed(tmp_path / pattern)) == [b"0", b"1", b"2"]


def test_a_tar_file_of_a_range_that_is_missing(tmp_path):
    write_tar(tmp_path / "000.tar", [("a.jpg", b"a")])
    with pytest.raises(DatasetError) as error:
        listed(tmp_path / "{000..001}.tar")
    assert str(error.value) == f"dataset.path: {tmp_path}/001.tar does not exist. Check its name."
    with pytest.raises(DatasetError) as error:
        listed(tmp_path / "x*.tar", name="cats")
    assert str(error.value) == (
        f"dataset.path of cats: no file fits {tmp_path}/x*.tar. Check the folder and the pattern."
    )


def test_images_are_not_read_while_listing(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [("a.jpg", bytes(10**6)), ("b.jpg", bytes(10**6))])
    taken = []

    class Counting(io.BytesIO):
        def read(self, size=-1):
            content = super().read(size)
            taken.append(len(content))
            return content

    monkeypatch.setattr("sdxl_ray.storage.open_buffered", lambda path: Counting((tmp_path / "0.tar").read_bytes()))
    assert len(listed(tmp_path / "0.tar")) == 2
    assert sum(taken) < 10_000


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [100, 700, 1300, 1536, 2100, 2600])
def test_a_tar_file_that_is_cut_short(tmp_path, keep):
    content = tar_bytes([("a.jpg", bytes(1000)), ("b.jpg", bytes(1000))], tarfile.USTAR_FORMAT)
    (tmp_path / "0.tar").write_bytes(content[:keep])
    if keep == 1536:  # after a whole member: without the two empty blocks at the end, but nothing is missing
        assert len(listed(tmp_path)) == 1
        return
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/0.tar: ")
    assert str(error.value).endswith("Copy or download it again, or take it out of dataset.path.")
    assert "cut short" in str(error.value) or "truncated" in str(error.value)


def test_a_tar_file_that_is_damaged_in_the_middle(tmp_path):
    content = bytearray(tar_bytes([("a.jpg", bytes(1000)), ("b.jpg", bytes(1000))], tarfile.USTAR_FORMAT))
    content[1536:1600] = b"garbage!" * 8
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DatasetError, match=r"0\.tar: is damaged: no tar header at byte 1536\. Copy or download"):
        listed(tmp_path)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DatasetError, match=r"0\.tar: .*Copy or download it again, or take it out of dataset.path\.$"):
        listed(tmp_path)


def test_a_tar_file_that_shrank_after_it_was_listed(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", bytes(1000))])
    (image,) = listed(tmp_path)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"0\.tar ends at byte 700, in the middle of this image"):
        read_bytes(image.address)


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz"])
def test_a_packed_tar_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match="is compressed, so that no image in it can be read without all before it"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{broken", r"0\.tar: a\.json is no JSON: "),
        pytest.param(b"[" * 100_000, r"0\.tar: a\.json is no JSON: maximum recursion depth", id="deep"),
        (b"\xff\xfe\xff", r"0\.tar: a\.json is no JSON: "),
        (b" " * (2**20 + 1), r"0\.tar: a\.json has 1048577 bytes, and captions at most 1048576"),
    ],
)
def test_a_json_that_is_none(tmp_path, content, text):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"a"), ("a.json", content)])
    with pytest.raises(DatasetError, match=text):
        listed(tmp_path)


def test_no_image_in_any_tar_file(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("a.txt", b"a")])
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value).startswith(
        f"dataset.path: no images in {tmp_path}/0.tar and 2 more tar files. Looked for members that end in .avif"
    )


def test_tar_files_stream(tmp_path):
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", [("a.jpg", b"a")])
    images = list_dataset(section(tmp_path))
    next(images)
    (tmp_path / "39.tar").write_bytes(b"broken later")
    with pytest.raises(DatasetError, match=r"39\.tar"):
        list(images)


def test_of_images_of_one_name_each_has_the_caption_with_all_of_its_own(tmp_path):
    """What has the shared name alone is for those without one of their own."""
    endings = ("txt", "v2.txt", "v2.jpg", "v2.small.jpg", "v2.small.txt", "v3.jpg")
    write_tar(tmp_path / "0.tar", [(f"cat.{ending}", ending.encode()) for ending in endings])
    found = {image.path.rpartition("/cat.")[2]: read_bytes(image.text_file) for image in listed(tmp_path)}
    assert found == {"v2.jpg": b"v2.txt", "v2.small.jpg": b"v2.small.txt", "v3.jpg": b"txt"}
