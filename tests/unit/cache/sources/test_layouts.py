import contextlib
import json
import os

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from sdxl_ray import storage
from sdxl_ray.cache.sources import files
from sdxl_ray.cache.sources.files import _as_expression, expand_braces, names_below
from sdxl_ray.cache.sources.layouts import hub_address
from sdxl_ray.cache.sources.splits import split_of
from sdxl_ray.errors import DatasetError, StorageError
from sdxl_ray.storage import clouds
from tests.unit.cache.sources.made import contents, listed, note_of, tar_bytes, write
from tests.unit.cache.sources.test_tables import write_table

CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# Cats\n"  # what the Hub needs to know, on top


def write_saved(folder, images, files=1):
    """As `Dataset.save_to_disk` writes it."""
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    each = len(images) // files
    for number, name in enumerate(names):
        write_table(folder / name, {"image": [{"bytes": b, "path": None} for b in images[number * each :][:each]]})
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


# ---- local -----------------------------------------------------------------------------------------------------------


def test_a_copy_saved_to_disk(tmp_path):
    write_saved(tmp_path, [b"0", b"1", b"2", b"3"], files=2)
    assert contents(listed(tmp_path)) == [b"0", b"1", b"2", b"3"]
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        DatasetError, match=r"data-00001-of-00002\.arrow does not exist, and state.json beside it names"
    ):
        listed(tmp_path)


def test_a_copy_with_splits_saved_to_disk(tmp_path):
    write_saved(tmp_path / "train", [b"train"])
    write_saved(tmp_path / "test", [b"test"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert contents(listed(tmp_path)) == [b"train"]
    assert contents(listed(tmp_path, split="test")) == [b"test"]
    assert contents(listed(tmp_path, split="")) == [b"test", b"train"]
    assert contents(listed(tmp_path / "test")) == [b"test"]
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, split="validation")
    assert str(error.value) == (
        f'dataset.path: {tmp_path} has no split "validation". It has train, test. Set dataset.split.'
    )
    (tmp_path / "train" / "state.json").write_text("{")
    with pytest.raises(DatasetError, match=r"train/state\.json is no JSON: .* Copy the folder again\."):
        listed(tmp_path)


@pytest.mark.parametrize("folder", ["", "train", "data/train"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_of_captions_beside_images(tmp_path, folder, kind):
    write(tmp_path / folder, "cats/a.jpg", "b.jpg", "not-in-the-table.jpg")
    columns = {"file_name": ["cats/a.jpg", "b.jpg"], "text": ["a cat", "b"]}
    write_table(tmp_path / folder / f"metadata.{kind}", columns)
    with pytest.warns(UserWarning, match="not in") as warned:
        found = listed(tmp_path)
    table = tmp_path / folder / f"metadata.{kind}"
    assert [str(warning.message) for warning in warned] == [
        f"1 images in {tmp_path} are not in {table} and are left out"
    ]
    assert contents(found) == [b"cats/a.jpg", b"b.jpg"]
    assert [image.texts for image in found] == [("a cat",), ("b",)]
    assert len(listed(tmp_path, format="folder")) == 3


@pytest.mark.filterwarnings("error")
def test_no_image_is_left_out_where_the_table_names_all(tmp_path):
    write(tmp_path, "a.jpg", "deep/b.jpg", "deep/mask.png", "list.txt")
    columns = {
        "file_name": ["./a.jpg", "x/../deep/b.jpg", "https://example.org/c.jpg"],
        "mask": [None, "deep/mask.png", None],
    }
    write_table(tmp_path / "metadata.csv", columns)
    assert len(listed(tmp_path, mask="file")) == 3
    assert len(listed(tmp_path)) == 3
    write(tmp_path, "deep/c.png", "d.png")
    for mask in ("none", "alpha", "file"):
        with pytest.raises(UserWarning, match=r"^2 images in "):
            listed(tmp_path, mask=mask)
    (tmp_path / "deep" / "c.png").unlink()
    (tmp_path / "d.png").unlink()
    assert len(listed(tmp_path / "metadata.csv")) == 3  # the user's own choice


@pytest.mark.parametrize("cells", [[1, 2], [b"mask", None], [{"bytes": b"mask", "path": "b.jpg"}, None]])
def test_a_column_called_mask_that_names_no_files_excuses_no_image(tmp_path, cells):
    write(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    write_table(tmp_path / "metadata.parquet", {"file_name": ["a.jpg", "b.jpg"], "mask": cells})
    with pytest.warns(UserWarning, match=r"^1 images in "):
        assert len(listed(tmp_path)) == 2


def test_metadata_of_something_else_is_passed_over(tmp_path):
    write(tmp_path, "a.jpg")
    (tmp_path / "metadata.csv").write_text("camera,lens\nx,y\n")
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    (tmp_path / "metadata.parquet").write_text("no table")
    assert contents(listed(tmp_path)) == [b"a.jpg"]


def test_a_clone_of_a_dataset_with_splits(tmp_path):
    for split in ("train", "test"):
        for number in range(2):
            name = f"data/{split}-{number:05d}-of-00002.parquet"
            write_table(tmp_path / name, {"image": [f"{split} {number}".encode()]})
    (tmp_path / "README.md").write_text(CARD)
    assert contents(listed(tmp_path)) == [b"train 0", b"train 1"]
    assert contents(listed(tmp_path, split="test")) == [b"test 0", b"test 1"]
    with pytest.raises(DatasetError, match=r'has no split "validation"\. It has test, train\. Set dataset\.split\.'):
        listed(tmp_path, split="validation")


@pytest.mark.parametrize("above", ["dev", "test/sets", "training", "my-eval"])
def test_the_folders_above_a_clone_tell_no_split(tmp_path, above):
    root = tmp_path / above / "cats"
    for name in ("train", "test", "part"):
        write_table(root / f"{name}.parquet", {"image": [name.encode()]})
    (root / "README.md").write_text(CARD)
    assert contents(listed(root)) == [b"train"]
    assert contents(listed(root, split="test")) == [b"test"]
    (root / "train.parquet").unlink()
    (root / "test.parquet").unlink()
    assert contents(listed(root)) == [b"part"]


def test_a_clone_with_folders_of_images(tmp_path):
    write(tmp_path, "train/a.jpg", "test/b.jpg")
    (tmp_path / "README.md").write_text(CARD)
    assert contents(listed(tmp_path)) == [b"train/a.jpg"]
    assert contents(listed(tmp_path, split="")) == [b"test/b.jpg", b"train/a.jpg"]
    with pytest.raises(DatasetError, match=r'^dataset\.split is "validation", and nothing in '):
        listed(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("name", "text", "is_clone"),
    [
        ("README.md", "", False),
        ("README.md", "# Cats\n\nconfigs:\n", False),
        ("README.md", "---\nlicense: mit\ntags: [configs]\n---\nconfigs:\n", False),
        ("README.md", "---\nconfigs:\n- config_name: default\n---\n", True),
        ("README.md", "---\r\nlicense: mit\r\ndataset_info:\r\n  features: []\r\n---\r\n# Cats\r\n", True),
        ("dataset_infos.json", "{}", True),
        (".gitattributes", "*.png filter=lfs diff=lfs merge=lfs -text\n", False),
        (".gitattributes", "*.parquet filter=lfs diff=lfs merge=lfs -text\n", True),
    ],
)
def test_a_folder_of_ones_own_is_read_whole(tmp_path, name, text, is_clone):
    write(tmp_path, "train/a.jpg", "extra/b.jpg", "cats/c.jpg")
    (tmp_path / name).write_text(text, newline="")
    assert len(listed(tmp_path)) == (1 if is_clone else 3)


# ---- splits of a folder of one's own ---------------------------------------------------------------------------------


def test_shards_tell_their_split_in_any_folder(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / f"data/{split}-00000-of-00001.parquet", {"image": [split.encode()]})
    left_out = '1 of 2 files are left out, since they are not of dataset.split = "train"; dataset.split = "" takes all'
    for path in (tmp_path, tmp_path / "data", tmp_path / "data/*.parquet"):
        assert note_of(lambda path=path: listed(path)) == f"{path}: {left_out}"
        assert contents(listed(path, split="test")) == [b"test"]
        assert len(listed(path, split="")) == 2
        with pytest.raises(DatasetError) as error:
            listed(path, split="validation")
        assert str(error.value) == (
            f'dataset.path: {path} has no split "validation". It has test, train. Set dataset.split.'
        )
    assert contents(listed(tmp_path / "data/test-*.parquet")) == [b"test"]  # the user's own choice
    assert contents(listed(tmp_path / "data/test-00000-of-00001.parquet")) == [b"test"]


@pytest.mark.filterwarnings("error")
def test_numbers_in_the_names_of_ones_own_files_are_no_splits(tmp_path):
    for number in range(2):
        write_table(tmp_path / f"images-{number:05d}-of-00002.parquet", {"image": [b"%d" % number]})
    assert len(listed(tmp_path)) == 2
    assert len(listed(tmp_path, split="images")) == 2


@pytest.mark.parametrize("parent", ["", "data/"])
def test_folders_called_like_splits_and_nothing_beside_them(tmp_path, parent):
    write(tmp_path, f"{parent}train/a.jpg", f"{parent}train/a.txt", f"{parent}val/deep/b.jpg", "notes/x.txt")
    train, val = f"{parent}train/a.jpg".encode(), f"{parent}val/deep/b.jpg".encode()
    assert note_of(lambda: listed(tmp_path)) == (
        f'{tmp_path}: the files in val/ are left out, since they are not of dataset.split = "train"; '
        'dataset.split = "" takes all'
    )
    with pytest.warns(UserWarning, match="left out"):
        assert contents(listed(tmp_path)) == [train]
    for split in ("validation", "val", "dev"):
        assert contents(listed(tmp_path, split=split)) == [val]
        assert contents(listed(tmp_path, split=split, format="folder")) == [val]
    assert len(listed(tmp_path, split="")) == len(listed(tmp_path, format="folder")) == 2
    with pytest.raises(DatasetError, match=r'has no split "test"\. It has train, validation\. Set dataset\.split'):
        listed(tmp_path, split="test")
    write(tmp_path, f"{parent}extra/c.jpg")
    assert len(listed(tmp_path)) == 3  # "train" is meant only where it is plain
    assert contents(listed(tmp_path, split="validation")) == [val]


@pytest.mark.parametrize("beside", ["extra/c.jpg", "c.jpg", "0.tar"])
def test_folders_of_splits_below_data_with_something_beside_it(tmp_path, beside):
    """The word is chosen where it is plain, and nothing is left out that no note tells of."""
    write(tmp_path, "data/train/a.jpg", "data/val/b.jpg", beside)
    assert len(listed(tmp_path)) == (2 if beside.endswith(".tar") else 3)
    assert contents(listed(tmp_path, split="validation")) == [b"data/val/b.jpg"]


@pytest.mark.parametrize("first", [True, False])
def test_a_link_to_itself_hides_nothing(tmp_path, first, monkeypatch):
    write(tmp_path, "train/a.jpg", "val/b.jpg", "extra/c.jpg")
    (tmp_path / "extra" / "loop").symlink_to("loop")
    scandir = os.scandir

    @contextlib.contextmanager
    def in_order(path):
        with scandir(path) as entries:
            yield iter(sorted(entries, key=lambda entry: (entry.name == "loop") != first))

    monkeypatch.setattr(files.os, "scandir", in_order)
    assert list(names_below(str(tmp_path / "extra"))) == (["loop", "c.jpg"] if first else ["c.jpg", "loop"])
    monkeypatch.undo()
    assert len(listed(tmp_path)) == 3


def test_folders_of_splits_with_their_own_tables(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, f"{split}/{split}.jpg")
        write_table(tmp_path / split / "metadata.jsonl", {"file_name": [f"{split}.jpg"], "text": [split]})
    with pytest.warns(UserWarning, match="the files in test/ are left out"):
        assert [image.texts for image in listed(tmp_path)] == [("train",)]
    assert [image.texts for image in listed(tmp_path, split="test")] == [("test",)]


@pytest.mark.parametrize("name", ["a.jpg", "train/a.jpg", "0.tar", "data/0.parquet", "metadata.csv", "*.tar"])
def test_a_split_that_chooses_nothing(tmp_path, name):
    if name.endswith(".tar"):
        (tmp_path / "0.tar").write_bytes(tar_bytes([("a.jpg", b"a")]))
    elif name.endswith(".jpg"):
        write(tmp_path, name)
    else:
        write(tmp_path, "a.jpg") if name == "metadata.csv" else None
        write_table(tmp_path / name, {"file_name": ["a.jpg"]})
    path = tmp_path / name if "*" in name else tmp_path
    assert len(listed(path)) == 1
    with pytest.raises(DatasetError) as error:
        listed(path, split="validation", name="cats")
    if name == "train/a.jpg":
        assert str(error.value).endswith('has no split "validation". It has train. Set dataset.split.')
        return
    assert str(error.value) == (
        f'dataset.split of cats is "validation", and nothing in {path} tells which images that is: no folder '
        "validation/ and no file such as validation-00000-of-00002.parquet. Give the path of these images, or take "
        "dataset.split out."
    )


def test_a_split_of_a_copy_saved_without_splits(tmp_path):
    write_saved(tmp_path, [b"0"])
    with pytest.raises(DatasetError, match=r'^dataset\.split is "validation", and nothing in '):
        listed(tmp_path, split="validation")
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"_split": "validation"}))
    assert len(listed(tmp_path, split="validation")) == len(listed(tmp_path)) == 1


def test_a_path_that_is_not_there_is_not_called_a_wrong_split(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere does not exist\."):
        listed(tmp_path / "nowhere", split="test")


# ---- tables in subfolders, and beside other things -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* are left out")
def test_a_table_in_a_subfolder_is_not_taken_for_all_there_is(tmp_path):
    write(tmp_path, "train/a.jpg", "train/deep/b.jpg")
    write_table(tmp_path / "train/metadata.csv", {"file_name": ["a.jpg"], "text": ["a cat"]})
    assert [image.texts for image in listed(tmp_path)] == [("a cat",)]
    write(tmp_path, "extra/c.jpg")
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value) == (
        f"dataset.path: {tmp_path} has a table in train/, and images outside of it, such as extra/c.jpg. Set "
        f'dataset.path to {tmp_path}/train, or dataset.format = "folder" for all images without the table.'
    )
    assert len(listed(tmp_path, format="folder")) == 3
    assert len(listed(tmp_path / "train")) == len(listed(tmp_path, format="table")) == 1
    (tmp_path / "README.md").write_text(CARD)
    assert [image.texts for image in listed(tmp_path)] == [("a cat",)]


def test_images_win_over_tables_and_tar_files_among_them(tmp_path):
    write(tmp_path, "deep/a.jpg", "deep/a.txt")
    write_table(tmp_path / "list.csv", {"image": ["deep/a.jpg"]})
    assert note_of(lambda: listed(tmp_path)) == (
        f"{tmp_path} holds images and a table, {tmp_path}/list.csv, which is not read. For its captions, set "
        "dataset.path to it"
    )
    with pytest.warns(UserWarning, match="which is not read"):
        assert listed(tmp_path)[0].text_file.endswith("a.txt")
    assert listed(tmp_path, format="table")[0].path.endswith("deep/a.jpg")


def test_tables_and_tar_files_side_by_side(tmp_path):
    write_table(tmp_path / "0.parquet", {"image": [b"from the table"]})
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.jpg", b"from the tar")]))
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value) == (
        f"dataset.path: {tmp_path} holds tar files and tables. Set dataset.format, or give a pattern such as "
        f"{tmp_path}/*.tar."
    )
    assert contents(listed(tmp_path, format="webdataset")) == [b"from the tar"]
    assert contents(listed(tmp_path, format="table")) == [b"from the table"]
    with pytest.raises(DatasetError, match=r"fits files such as .*, expected only \.tar files, or only tables"):
        listed(tmp_path / "0.*")


def test_a_format_that_is_not_there(tmp_path):
    write(tmp_path, "a.jpg")
    with pytest.raises(DatasetError, match=r'holds no files for dataset\.format = "webdataset"\.$'):
        listed(tmp_path, format="webdataset")
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.jpg", b"a")]))
    with pytest.raises(DatasetError) as error:
        listed(tmp_path / "0.tar", format="table")
    assert str(error.value) == (
        f'dataset.path: {tmp_path}/0.tar is a webdataset, and dataset.format = "table". '
        'Set it to "auto", or correct the path.'
    )
    with pytest.raises(DatasetError, match=r"a\.jpg is one image, expected a folder of images\."):
        listed(tmp_path / "a.jpg")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage, "status", refuse)
    with pytest.raises(DatasetError) as error:
        listed(tmp_path, name="cats")
    assert str(error.value) == f"dataset.path of cats: {tmp_path} cannot be read: Permission denied."


# ---- the Hub ---------------------------------------------------------------------------------------------------------


class Hub(DirFileSystem):
    """A folder in place of the Hub: datasets/org/name@revision/..., with content hashes and without dates."""

    def _noted(self, info):
        return {key: info[key] for key in ("name", "size", "type")} | {"blob_id": f"{info['size']:040x}"}

    def info(self, path, **options):
        return self._noted(super().info(path, **options))

    def find(self, path, *args, **options):
        return {name: self._noted(info) for name, info in super().find(path, *args, **options).items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of the repository org/cats, at its main revision."""
    monkeypatch.setattr(clouds, "_hub_filesystem", lambda: Hub(str(tmp_path), fsspec.filesystem("file")))
    clouds._connect.cache_clear()
    yield tmp_path / "datasets" / "org" / "cats"
    clouds._connect.cache_clear()


@pytest.mark.parametrize(
    ("path", "revision", "expected"),
    [
        ("hf://org/cats", "", ("hf://datasets/org/cats", "")),
        ("hf://datasets/org/cats/", "v1", ("hf://datasets/org/cats@v1", "")),
        ("hf://org/cats@v2", "v1", ("hf://datasets/org/cats@v2", "")),
        ("hf://org/cats", "refs/pr/1", ("hf://datasets/org/cats@refs%2Fpr%2F1", "")),
        ("hf://org/cats/data/small", "", ("hf://datasets/org/cats/data/small", "")),
        ("hf://org/cats/data/*.tar", "v1", ("hf://datasets/org/cats@v1", "data/*.tar")),
        ("hf://org/cats/list.csv", "", ("hf://datasets/org/cats", "list.csv")),
    ],
)
def test_addresses_of_the_hub(path, revision, expected):
    assert hub_address(path, revision) == expected


def test_an_address_that_names_no_dataset():
    with pytest.raises(
        DatasetError, match=r"dataset\.path: hf://cats names no dataset of the Hub, expected hf://org/name"
    ):
        listed("hf://cats")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"),
        ("data/validation-00000-of-00005-abc.parquet", "validation"),
        ("data/my_split-00000-of-00005.tar", "my_split"),
        ("data/train/cats/1.jpg", "train"),
        ("dev/1.jpg", "validation"),
        ("cats_eval.csv", "test"),
        ("Training 1.csv", "train"),
        ("trainer.csv", ""),
        ("data/0.parquet", ""),
    ],
)
def test_the_split_that_a_name_tells(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("pattern", ["{cats,dogs}", "*"])
def test_a_pattern_of_folders_is_told_what_it_stands_for(tmp_path, pattern):
    write(tmp_path, "cats/a.jpg", "dogs/b.jpg")
    with pytest.raises(DatasetError) as error:
        listed(tmp_path / pattern)
    folder = f"{tmp_path}/cats"
    if pattern == "*":
        assert str(error.value).split(" is a folder", 1)[0].removeprefix("dataset.path: ") in (
            folder,
            f"{tmp_path}/dogs",
        )
    else:
        assert str(error.value) == (
            f"dataset.path: {folder} is a folder, and {tmp_path}/{pattern} stands for files. Give each folder a "
            f"[[dataset]] of its own, or write {tmp_path}/{pattern}/*.jpg."
        )


def test_parquet_of_the_hub(hub):
    for split in ("train", "test"):
        for number in range(2):
            write_table(hub / f"data/{split}-{number:05d}-of-00002.parquet", {"image": [f"{split} {number}".encode()]})
    write(hub, "README.md", ".gitattributes", "logo.png")
    found = listed("hf://org/cats")
    assert contents(found) == [b"train 0", b"train 1"]
    name = "hf://datasets/org/cats/data/train-00000-of-00002.parquet"
    assert (found[0].path, found[0].address) == (f"{name}/00000000", f"row:0:image:{name}")
    assert contents(listed("hf://org/cats", split="test")) == [b"test 0", b"test 1"]
    assert len(listed("hf://org/cats", split="")) == 4
    assert contents(listed("hf://org/cats/data/test*.parquet", split="")) == [b"test 0", b"test 1"]
    with pytest.raises(
        DatasetError, match=r'hf://org/cats has no split "dev"\. It has test, train\. Set dataset\.split'
    ):
        listed("hf://org/cats", split="dev")


@pytest.mark.parametrize("name", ["cats-train", "my-test-set"])
def test_a_repositorys_name_tells_no_split(hub, name):
    root = hub.parent / name
    for split in ("train", "test"):
        write_table(root / f"{split}.parquet", {"image": [split.encode()]})
    for path in (f"hf://org/{name}", f"hf://org/{name}/*.parquet"):
        assert contents(listed(path)) == [b"train"]
        assert contents(listed(path, split="test")) == [b"test"]


def test_the_stamp_changes_with_the_content(hub):
    write(hub, "train/a.jpg", "train/b.jpg")
    before = [image.stamp for image in listed("hf://org/cats")]
    (hub / "train" / "a.jpg").write_bytes(b"other content")
    after = [image.stamp for image in listed("hf://org/cats")]
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)


def test_a_revision_of_the_hub(hub, tmp_path):
    write(tmp_path / "datasets" / "org" / "cats@v1", "a.jpg")
    (image,) = listed("hf://org/cats", revision="v1")
    assert image.path == "hf://datasets/org/cats@v1/a.jpg"
    assert contents([image]) == [b"a.jpg"]


def test_images_of_the_hub_with_captions_beside_them(hub):
    write(hub, "train/a.jpg", "train/a.txt", "train/deep/b.png", "test/c.jpg", "README.md")
    found = listed("hf://org/cats")
    assert contents(found) == [b"train/a.jpg", b"train/deep/b.png"]
    assert [image.text_file for image in found] == ["hf://datasets/org/cats/train/a.txt", ""]
    write(hub, "train/a.png")
    with pytest.raises(DatasetError, match=r"hf://datasets/org/cats/train/a.txt could belong to a.jpg or a.png"):
        listed("hf://org/cats")


def test_folders_of_splits_on_the_hub_beside_a_card_that_names_its_columns(hub):
    write(hub, "train/a.jpg", "data/test/b.jpg")
    (hub / "README.md").write_text("---\ndataset_info:\n  features: []\n---\n")
    assert contents(listed("hf://org/cats")) == [b"train/a.jpg"]
    assert contents(listed("hf://org/cats", split="test")) == [b"data/test/b.jpg"]


def test_a_folder_of_images_with_metadata_on_the_hub(hub):
    write(hub, "train/a.jpg", "test/b.jpg")
    write_table(hub / "train/metadata.csv", {"file_name": ["a.jpg"], "text": ["a cat"]})
    write_table(hub / "test/metadata.jsonl", {"file_name": ["b.jpg"], "text": ["a dog"]})
    (image,) = listed("hf://org/cats")
    assert (contents([image]), image.texts) == ([b"train/a.jpg"], ("a cat",))
    (image,) = listed("hf://org/cats", split="test")
    assert (contents([image]), image.texts) == ([b"test/b.jpg"], ("a dog",))


def test_tar_files_of_the_hub(hub):
    hub.mkdir(parents=True)
    for name in ("000.tar", "001.tar"):
        (hub / name).write_bytes(tar_bytes([("a.jpg", name.encode()), ("a.txt", b"x")]))
    found = listed("hf://org/cats")
    assert contents(found) == [b"000.tar", b"001.tar"]
    assert contents(listed("hf://org/cats/{000..000}.tar")) == [b"000.tar"]
    assert storage.read_bytes("hf://datasets/org/cats/000.tar", 0, 5) == b"a.jpg"


def test_nothing_on_the_hub(hub):
    with pytest.raises(DatasetError) as error:
        listed("hf://org/cats", name="cats")
    assert str(error.value) == (
        "dataset.path of cats: hf://datasets/org/cats holds no files. Check its name and dataset.revision; of a "
        "dataset that is not public, set HF_TOKEN on every machine."
    )
    write(hub, "README.md")
    with pytest.raises(DatasetError, match="hf://datasets/org/cats holds no images, tar files or tables"):
        listed("hf://org/cats")


def test_the_hub_without_a_network(hub, monkeypatch):
    class ConnectError(OSError):
        pass

    def refuse(self, *args, **options):
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(Hub, "find", refuse)
    with pytest.raises(StorageError) as error:
        listed("hf://org/cats")
    assert str(error.value) == (
        "hf://datasets/org/cats: cannot be reached while listing. Check the address, the endpoint (HF_ENDPOINT), "
        "whether HF_HUB_OFFLINE is set, and the network, then run again: what is done is kept."
    )


def test_a_split_that_nothing_on_the_hub_tells(hub):
    write(hub, "cats/a.jpg")
    assert len(listed("hf://org/cats")) == 1
    with pytest.raises(DatasetError, match=r'^dataset\.split is "validation", and nothing in hf://org/cats tells'):
        listed("hf://org/cats", split="validation")


def test_without_a_token_for_what_is_not_public(hub, monkeypatch):
    class GatedRepoError(OSError):
        pass

    def refuse(self, *args, **options):
        raise GatedRepoError("401 Client Error. Access to dataset org/cats is restricted.")

    monkeypatch.setattr(Hub, "find", refuse)
    with pytest.raises(StorageError) as error:
        listed("hf://org/cats")
    assert str(error.value) == (
        "hf://datasets/org/cats: access denied while listing. Check the key and what it is allowed: HF_TOKEN, on every "
        "machine."
    )


def test_arrow_tables_are_what_hugging_face_would_write(tmp_path):
    """`datasets` writes Arrow streams; this is what its reader does with ours."""
    write_saved(tmp_path, [b"0", b"1"])
    with pa.memory_map(os.fspath(tmp_path / "data-00000-of-00001.arrow")) as source:
        assert pa.ipc.open_stream(source).read_all().num_rows == 2


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("*.tar", ["0.tar", ".tar"], ["a/0.tar", "0.tar.gz"]),
        ("train/*.tar", ["train/0.tar"], ["train/old/0.tar"]),
        ("**/*.tar", ["0.tar", "a/0.tar", "a/b/0.tar"], ["a/0.txt"]),
        ("a?[!0]", ["ab1"], ["a/1", "ab0"]),
    ],
)
def test_a_star_stays_within_its_folder_in_a_bucket_too(pattern, fits, fits_not):
    expression = _as_expression(pattern)
    assert [name for name in fits + fits_not if expression.fullmatch(name)] == fits


def test_ranges_are_those_of_the_shell():
    assert expand_braces("{10..8}.tar") == ["10.tar", "9.tar", "8.tar"]
    assert expand_braces("{098..101}") == ["098", "099", "100", "101"]


def test_outside_the_hub_files_whose_names_tell_no_split_belong_to_each(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "extra"):
        write_table(tmp_path / f"{name}.parquet", {"image": [name.encode()]})
    for split in ("train", "test"):
        found = contents(listed(tmp_path / "*.parquet", split=split))
        assert sorted(found) == [b"extra", f"{split}-00000-of-00001".encode()]
