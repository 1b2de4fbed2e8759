import os
import time
from pathlib import Path

import pytest

from sdxl_ray.cache.sources import list_dataset, read_bytes
from sdxl_ray.errors import DatasetError
from tests.unit.cache.sources.made import contents, listed, note_of, section, write


def names(images, folder):
    return [os.path.relpath(image.path, folder) for image in images]


def test_images_are_found_below_the_folder_and_nothing_else(tmp_path):
    wanted = [
        *("B.JPEG", "a.jpg", "c.PNG", "e f.gif", "g.avif", "h.jfif", "i.heic", "j.heif", "k.jxl", "line\nbreak.bmp"),
        *("x" * 251 + ".jpg", "猫 😺.tiff", "a/x.png", "deep/er/d.webp"),
    ]
    write(tmp_path, *wanted, ".hidden.jpg", "._resource.jpg", ".git/a.jpg", "a.txt", "jpg", "a.jpg.txt", "movie.mp4")
    found = listed(tmp_path)
    assert names(found, tmp_path) == wanted  # a folder's own images first, by name
    assert [content.decode() for content in contents(found)] == wanted
    for image in found:
        status = Path(image.path).stat()
        assert image.stamp == f"{status.st_size}-{status.st_mtime_ns}"
        assert (image.address, image.original_hw, image.texts, image.mask_file) == ("", None, (), "")


def test_links_are_followed_and_loops_of_links_end(tmp_path):
    write(tmp_path, "elsewhere/cat.png", "images/x.txt")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "dog.png").symlink_to(tmp_path / "elsewhere" / "cat.png")
    assert names(listed(tmp_path / "images"), tmp_path / "images") == ["dog.png", "linked/cat.png"]


def test_links_that_lead_nowhere_are_listed(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "itself").symlink_to("itself")  # not called like an image: not our business
    found = listed(tmp_path)
    assert [(Path(image.path).name, image.stamp) for image in found] == [("dangling.jpg", "0-0"), ("itself.jpg", "0-0")]
    for image in found:
        with pytest.raises(OSError, match=r"No such file|Too many levels"):
            read_bytes(image.path)


def test_a_folder_called_like_an_image_is_looked_into(tmp_path):
    write(tmp_path, "cat.jpg/dog.png")
    assert names(listed(tmp_path), tmp_path) == ["cat.jpg/dog.png"]


def test_a_name_that_is_not_utf_8_is_escaped(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"x")
    (image,) = listed(tmp_path)
    assert image.path == str(tmp_path / r"caf\xe9.png")
    assert image.text_file == str(tmp_path / r"caf\xe9.txt")
    assert image.stamp.startswith("1-")
    with pytest.raises(FileNotFoundError):
        read_bytes(image.path)


@pytest.mark.parametrize("name", ["", "cats"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, ": {} does not exist. Set it to the folder that holds your images."),
        (
            lambda folder: folder.write_text("x"),
            ": {} is a file of another kind, expected a folder of images, or a file that ends in .tar .parquet .csv ",
        ),
        (lambda folder: folder.mkdir(), ": no images in {} or its subfolders. Looked for .avif .bmp .gif"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "folder"])
def test_a_folder_that_cannot_be_used(tmp_path, make, text, name, format):
    folder = tmp_path / "images"
    make(folder)
    with pytest.raises(DatasetError) as error:
        listed(folder, name=name, format=format)
    assert str(error.value).startswith(("dataset.path of cats" if name else "dataset.path") + text.format(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "ends in .tar .parquet .csv .tsv .jsonl .ndjson .arrow .feather."),
        ("meta.json", ".feather. Write it as .jsonl: one object a line."),
        ("cats.ZIP", ".feather. Unpack it, and give the folder."),
        ("cat.jpg", "cat.jpg is one image, expected a folder of images."),
    ],
)
def test_a_file_that_is_no_dataset(tmp_path, name, text):
    write(tmp_path, name)
    with pytest.raises(DatasetError) as error:
        listed(tmp_path / name)
    assert str(error.value).startswith(f"dataset.path: {tmp_path}/{name} is ")
    assert str(error.value).endswith(text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("path/to/images", "dataset.path is still the example's. Set it to the folder that holds your images."),
        (
            "/somewhere/path/to/images",
            "dataset.path is still the example's. Set it to the folder that holds your images.",
        ),
        ("/$DATA/cats", "dataset.path: /$DATA/cats does not exist. Variables such as $HOME are not filled in: "),
        ("/${DATA}/cats", "dataset.path: no file fits /${DATA}/cats. Variables such as $HOME are not filled in: "),
        ("/none/list.csv", "dataset.path: /none/list.csv does not exist. Check its name."),
    ],
)
def test_a_path_that_is_not_there(path, text):
    with pytest.raises(DatasetError) as error:
        listed(path)
    assert str(error.value).startswith(text)


def test_a_folder_with_a_dollar_in_its_name(tmp_path):
    write(tmp_path, "$DATA/a.jpg")
    assert len(listed(tmp_path / "$DATA")) == 1


def test_a_folder_that_may_not_be_entered_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path, "secret/x", "cat.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value) == (
        f"dataset.path: the folder {tmp_path / 'secret'} cannot be read: Permission denied. "
        "Allow it, or move it out of dataset.path."
    )


# ---- captions and masks ----------------------------------------------------------------------------------------------


def texts(folder, **settings):
    return {
        Path(image.path).name: image.text_file and os.path.relpath(image.text_file, folder)
        for image in listed(folder, **settings)
    }


def test_the_caption_file_with_the_whole_name_comes_first(tmp_path):
    write(tmp_path, "a.jpg", "a.txt", "a.jpg.txt", "b.png", "b.txt", "c.png", "deep/d.png", "deep/d.txt", "d.txt")
    expected = {"a.jpg": "a.jpg.txt", "b.png": "b.txt", "c.png": "", "d.png": "deep/d.txt"}
    assert texts(tmp_path) == expected
    assert set(texts(tmp_path, captions=["filename"]).values()) == {""}


@pytest.mark.parametrize("extension", [".caption", "caption"])
def test_caption_files_may_end_differently(tmp_path, extension):
    write(tmp_path, "a.jpg", "a.txt", "a.caption", "b.jpg", "b.txt")
    assert texts(tmp_path, caption_extension=extension) == {"a.jpg": "a.caption", "b.jpg": ""}


def test_the_extension_may_be_in_capitals(tmp_path):
    write(tmp_path, "A.JPG", "A.TXT", "b.jpg", "B.txt", "c.png", "c.png.Txt", "d.png", "d.TXT", "d.txt", "d.Txt")
    write(tmp_path, "e.png", "e.TXT", "e.Txt", "deep/f.png", "deep/f.TXT")
    assert texts(tmp_path) == {
        "A.JPG": "A.TXT",
        "b.jpg": "",
        "c.png": "c.png.Txt",
        "d.png": "d.txt",
        "e.png": "e.TXT",
        "f.png": "deep/f.TXT",
    }
    write(tmp_path, "two/a.jpg", "two/a.png", "two/a.TXT")
    with pytest.raises(DatasetError, match=r"two/a\.TXT could belong to a\.jpg or a\.png"):
        listed(tmp_path / "two")


def test_other_files_of_the_name_are_told_where_there_is_no_caption(tmp_path):
    write(tmp_path, "a.jpg", "a.caption", "a.tags", "b.jpg", "b.txt", "b.tags", "c.jpg", "d.tags")
    found = {Path(image.path).name: image.beside for image in listed(tmp_path)}
    assert found == {"a.jpg": ("a.caption", "a.tags"), "b.jpg": (), "c.jpg": ()}
    assert {image.beside for image in listed(tmp_path, captions=["filename"])} == {()}


def test_what_is_called_like_an_image_and_more_is_its_own(tmp_path):
    write(tmp_path, "a.jpg", "a.caption.txt", "a.jpg.tags", "a.v2.jpg", "a.v2.tags", "a.v2.json", "b.jpg", "b.c.txt")
    write(tmp_path, "b.c.png")
    found = {Path(image.path).name: image.beside for image in listed(tmp_path)}
    assert found == {
        "a.jpg": ("a.caption.txt", "a.jpg.tags"),
        "a.v2.jpg": ("a.v2.json", "a.v2.tags"),
        "b.jpg": (),
        "b.c.png": (),
    }


# ---- what other programs make of a folder ----------------------------------------------------------------------------


def test_kohyas_repeats_are_not_read_and_that_is_said(tmp_path):
    write(tmp_path, "10_sks dog/a.jpg", "2_cat/deep/b.jpg", "2_cat/c.jpg", "2024_holiday/d.jpg", "5_empty/x.txt")
    assert note_of(lambda: listed(tmp_path)) == (
        f'{tmp_path} has folders "10_sks dog", "2_cat": the number is not read as repeats. For them, give each folder '
        "a [[dataset]] of its own with dataset.repeats = 10 and so on"
    )


@pytest.mark.filterwarnings("error")
def test_repeats_that_are_as_the_folders_say(tmp_path):
    write(tmp_path, "10_sks dog/a.jpg", "2024_holiday/d.jpg")
    assert len(listed(tmp_path, repeats=10)) == 2
    assert len(listed(tmp_path / "10_sks dog")) == 1
    write(tmp_path / "ones", "1_dog/a.jpg")
    assert len(listed(tmp_path / "ones")) == 1


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ({"captions.csv": "file_name,caption\na.jpg,x\n"}, "a table, {}/captions.csv, which is not read. For its "),
        ({"metadata.csv": "image,caption\na.jpg,x\n"}, "captions, set dataset.path to it$"),
        (
            {"list.tsv": "Filename\tPrompt\na.jpg\tx\n"},
            r", and dataset.image_column to the column that names the images \(it has Filename, Prompt\)$",
        ),
        ({"x.jsonl": '{"file_name": "a.jpg"}\n', "y.csv": "image\n"}, "set dataset.path to the one that is meant$"),
        (
            {"cats/metadata.jsonl": '{"file_name": "a.jpg"}', "dogs/metadata.jsonl": '{"file_name": "b.jpg"}'},
            'tables, such as {}/cats/metadata.jsonl, .* dataset.format = "table" reads all of them$',
        ),
    ],
)
def test_a_table_beside_images_that_is_not_read_is_told(tmp_path, tables, text):
    write(tmp_path, "a.jpg", "a.txt", "cats/a.jpg", "dogs/b.jpg")
    for name, content in tables.items():
        (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=text.format(tmp_path)):
        found = listed(tmp_path)
    assert len(found) == 3
    without = [image for image in found if not image.text_file]
    assert set(without[-1].beside) == {f"{tmp_path}/{name}" for name in tables}
    assert found[0].beside == ()


def test_the_tables_that_are_told_can_be_read_as_is_said(tmp_path):
    for sub in ("cats", "dogs"):
        write(tmp_path, f"{sub}/a.jpg")
        (tmp_path / sub / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "text": "{sub}"}}\n')
    assert [image.texts for image in listed(tmp_path, format="table")] == [("cats",), ("dogs",)]
    assert [image.texts for image in listed(tmp_path / "cats/metadata.jsonl")] == [("cats",)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content", [b"step,loss\n1,2\n", b"", b"\xff\xfe\xfa", b'"unclosed\n'])
def test_a_table_of_something_else_is_not_told(tmp_path, content):
    write(tmp_path, "a.jpg", "0.parquet")
    (tmp_path / "log.csv").write_bytes(content)
    assert [image.beside for image in listed(tmp_path)] == [()]
    (tmp_path / "captions.csv").write_text("image,caption\n")
    assert [image.beside for image in listed(tmp_path, format="folder")] == [()]  # "without the table"


def test_a_link_to_a_caption_counts_if_it_leads_somewhere(tmp_path):
    write(tmp_path, "images/a.png", "images/b.png", "elsewhere/a.txt")
    (tmp_path / "images" / "a.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    (tmp_path / "images" / "b.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    assert texts(tmp_path / "images") == {"a.png": "a.txt", "b.png": ""}


def test_a_folder_called_like_a_caption_is_paired_so_that_reading_it_says_so(tmp_path):
    write(tmp_path, "a.png", "a.txt/x")
    assert texts(tmp_path) == {"a.png": "a.txt"}


def test_one_caption_file_never_serves_two_images(tmp_path):
    for number in range(6):
        write(tmp_path, f"{number}.jpg", f"{number}.png", f"{number}.txt", f"{number}.webp")
    for number in range(6):
        write(tmp_path / "deep", f"{number}.jpg", f"{number}.png", f"{number}.txt")
    write(tmp_path, "fine.jpg", "fine.png", "fine.txt", "fine.png.txt")
    seen = []
    with pytest.raises(DatasetError) as error:
        seen += [image.path for image in list_dataset(section(tmp_path))]
    lines = str(error.value).split("\n")
    assert lines[0] == "12 caption files could belong to several images:"
    assert lines[1] == f"  {tmp_path}/0.txt could belong to 0.jpg or 0.png or 0.webp"
    assert lines[7] == f"  {tmp_path}/deep/0.txt could belong to 0.jpg or 0.png"
    assert lines[11:] == [
        "  and 2 more",
        'Name each after its whole image file ("cat.jpg.txt"), or remove the second image.',
    ]
    assert len(listed(tmp_path, captions=["filename"])) == 18 + 12 + 2


def test_nothing_is_listed_any_more_once_captions_are_ambiguous(tmp_path):
    write(tmp_path, "0/ok.jpg", "1/a.jpg", "1/a.png", "1/a.txt", "2/later.jpg")
    seen = []
    with pytest.raises(DatasetError, match="1 caption files"):
        for image in list_dataset(section(tmp_path)):
            seen.append(Path(image.path).name)
    assert seen == ["ok.jpg"]


def test_masks_are_paired_and_are_no_images(tmp_path):
    write(tmp_path, "a.jpg", "a-mask.png", "b.png", "b-MASK.PNG", "c.png", "deep/a-mask.png")
    found = {Path(image.path).name: image.mask_file for image in listed(tmp_path, mask="file")}
    assert found == {"a.jpg": f"{tmp_path}/a-mask.png", "b.png": f"{tmp_path}/b-MASK.PNG", "c.png": ""}  # all counts
    (tmp_path / "a.png").touch()
    found = {Path(image.path).name: image.mask_file for image in listed(tmp_path, mask="file", mask_suffix=".png")}
    assert found == {"a.jpg": f"{tmp_path}/a.png"}


@pytest.mark.parametrize("mask", ["none", "alpha"])
@pytest.mark.parametrize("captions", [["textfile", "empty"], ["filename"]])
def test_masks_are_no_images_where_none_are_asked_for(tmp_path, mask, captions):
    write(tmp_path, "a.jpg", "a-mask.png", "b.png", "b-MASK.PNG", "c-mask.png", "-mask.png", "deep/a-mask.png")
    settings = {"mask": mask, "captions": captions}
    assert note_of(lambda: listed(tmp_path, **settings)) == (
        f"{tmp_path}: 2 images such as {tmp_path}/a-mask.png are masks of others by their names, and are left out. "
        'dataset.mask = "file" uses them; if they are pictures, set another dataset.mask_suffix'
    )
    with pytest.warns(UserWarning, match="left out"):
        found = listed(tmp_path, **settings)
    assert names(found, tmp_path) == ["-mask.png", "a.jpg", "b.png", "c-mask.png", "deep/a-mask.png"]
    assert contents(found) == [name.encode() for name in names(found, tmp_path)]
    assert {image.mask_file for image in found} == {""}
    assert len(listed(tmp_path, mask_suffix="-matte.png", **settings)) == 7


def test_images_in_a_folder_of_masks_are_pictures_and_that_is_said(tmp_path):
    write(tmp_path, "images/a.jpg", "masks/a.png", "masks/b.png")
    note = (
        f"the images in {tmp_path}/masks are trained on as pictures. If they are masks, move the folder out of "
        "dataset.path; a mask lies beside its image, as cat-mask.png beside cat.jpg"
    )
    assert note_of(lambda: listed(tmp_path)) == note
    assert len(listed(tmp_path / "masks")) == 2  # the user's own choice
    with pytest.warns(UserWarning, match="move the folder"), pytest.raises(DatasetError, match="not one image"):
        listed(tmp_path, mask="file")


def test_where_not_one_image_has_a_mask(tmp_path):
    write(tmp_path, "a.jpg", "a_mask.png", "deep/b.jpg", "deep/b_mask.png")
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, mask="file", name="cats")
    assert str(error.value) == (
        f'dataset.mask of cats is "file", and not one image in {tmp_path} or its subfolders has a mask: of cat.jpg it '
        'would be cat-mask.png (dataset.mask_suffix = "-mask.png"). Set dataset.mask_suffix, or dataset.mask = "none".'
    )
    assert len(listed(tmp_path, mask="file", mask_suffix="_mask.png")) == 2


def test_no_table_tells_the_points_of_interest(tmp_path):
    write(tmp_path, "a.jpg")
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, crop="focus")
    assert str(error.value) == (
        f'dataset.crop is "focus", and {tmp_path} or its subfolders has no table that would tell the points '
        '(dataset.focus_columns). Give a table, or set dataset.crop = "center".'
    )


# ---- how many, how fast ----------------------------------------------------------------------------------------------


def test_the_chosen_images_do_not_depend_on_where_the_folder_lies(tmp_path):
    files = [f"{number % 7}/{number}.jpg" for number in range(200)]
    write(tmp_path / "here", *files)
    write(tmp_path / "there" / "deeper", *files)
    first = names(listed(tmp_path / "here", max_samples=20), tmp_path / "here")
    second = names(listed(f"{tmp_path}/there/deeper/", max_samples=20), tmp_path / "there" / "deeper")
    assert len(first) == 20
    assert first == second == sorted(first)
    assert set(names(listed(tmp_path / "here", max_samples=10), tmp_path / "here")) < set(first)
    assert len(listed(tmp_path / "here", max_samples=500)) == 200
    # More images elsewhere push out some of the chosen, and never mix up the others.
    write(tmp_path / "here", *(f"new/{number}.jpg" for number in range(50)))
    third = names(listed(tmp_path / "here", max_samples=20), tmp_path / "here")
    assert {name for name in third if not name.startswith("new/")} <= set(first)


def test_ten_thousand_files_are_listed_in_one_pass(tmp_path, monkeypatch):
    for number in range(5000):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "deep").mkdir()
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: scanned.append(str(folder)) or scandir(folder))
    start = time.monotonic()
    found = listed(tmp_path, format="folder")
    assert time.monotonic() - start < 10  # on a busy machine
    assert len(found) == 5000
    assert all(image.text_file for image in found)
    assert scanned == [str(tmp_path), f"{tmp_path}/deep"]


def test_a_large_folder_streams(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    images = list_dataset(section(tmp_path))
    assert next(images).path == f"{tmp_path}/a/1.jpg"
    (tmp_path / "b" / "3.jpg").touch()  # not looked at yet
    assert [Path(image.path).name for image in images] == ["2.jpg", "3.jpg"]


def test_a_mask_is_that_of_the_image_with_all_of_its_name(tmp_path):
    """Of cat.v2.jpg cat.v2-mask.png, and not that of cat.jpg."""
    write(tmp_path, "cat.jpg", "cat.v2.jpg", "cat.v3.jpg", "cat-mask.png", "cat.v2-mask.png")
    masks = {Path(image.path).name: Path(image.mask_file).name for image in listed(tmp_path, mask="file")}
    assert masks == {"cat.jpg": "cat-mask.png", "cat.v2.jpg": "cat.v2-mask.png", "cat.v3.jpg": ""}
