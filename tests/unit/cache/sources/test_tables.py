import json
import os
import threading
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_ray.cache.sources import as_shares, list_dataset, read_bytes, read_start, rows, shown_address, table_rows
from sdxl_ray.errors import DatasetError
from tests.unit.cache.sources.made import contents, listed, section, write


def write_table(path, columns, **options):
    """As its name says: Parquet, Arrow (with a footer: .feather), CSV, TSV or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    elif path.suffix in (".arrow", ".feather"):
        make = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=options.get("row_group_size"))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(table.column_names)
            writer.writerows(row.values() for row in table.to_pylist())


BINARY = ["0.parquet", "0.arrow", "0.feather"]
TEXT = ["0.csv", "0.tsv", "0.jsonl"]


# ---- images in the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("large", [False, True])
def test_bytes(tmp_path, name, large):
    images = pa.array([f"image {number}".encode() for number in range(10)], pa.large_binary() if large else pa.binary())
    captions = [f" caption {number} " for number in range(10)]
    write_table(tmp_path / name, {"image": images, "text": captions}, row_group_size=3)
    found = listed(tmp_path)
    assert [image.path for image in found] == [f"{tmp_path}/{name}/{number:08d}" for number in range(10)]
    assert contents(found) == images.to_pylist()
    assert [image.texts for image in found] == [(text.strip(),) for text in captions]
    status = (tmp_path / name).stat()
    assert {image.stamp for image in found} == {f"{status.st_size}-{status.st_mtime_ns}"}
    assert read_start(found[4].address, 3) == b"ima"


@pytest.mark.parametrize("name", BINARY)
def test_the_struct_of_hugging_face(tmp_path, name):
    write(tmp_path, "beside.jpg")
    images = [
        {"bytes": b"0", "path": "cat.jpg"},
        {"bytes": b"1", "path": None},
        {"bytes": None, "path": "beside.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    write_table(tmp_path / name, {"image": images}, row_group_size=2)
    found = listed(tmp_path / name)
    assert [os.path.relpath(image.path, tmp_path / name) for image in found] == [
        *("00000000/cat.jpg", "00000001", "00000002/beside.jpg", "00000003", "00000004")
    ]
    assert contents(found[:3]) == [b"0", b"1", b"beside.jpg"]
    for number in (3, 4):
        with pytest.raises(ValueError, match=rf'"image" is empty in row {number} \(counted from 0\) of .*/{name}$'):
            read_bytes(found[number].address)


@pytest.mark.parametrize("name", BINARY)
def test_a_null_is_listed_and_refused_when_it_is_read(tmp_path, name):
    write_table(tmp_path / name, {"image": pa.array([b"x", None, b""])})
    first, *others = listed(tmp_path)
    assert contents([first]) == [b"x"]
    for image in others:
        with pytest.raises(ValueError, match='the column "image" is empty in row'):
            read_bytes(image.address)


@pytest.mark.parametrize("name", BINARY)
def test_a_column_may_be_called_anything(tmp_path, name):
    column = "my: 50% image\n😺"
    write_table(tmp_path / name, {column: [b"x"], "a.b": ["caption"]})
    (image,) = listed(tmp_path, image_column=column, caption_columns=["a.b"])
    assert (contents([image]), image.texts) == ([b"x"], ("caption",))


def test_the_bytes_are_not_read_while_listing(tmp_path):
    images = [{"bytes": os.urandom(10**6), "path": f"{number}.jpg"} for number in range(20)]
    write_table(tmp_path / "0.parquet", {"image": images, "text": ["x"] * 20}, row_group_size=5, compression="none")
    before = pa.total_allocated_bytes()
    images = list_dataset(section(tmp_path))
    assert next(images).texts == ("x",)
    assert pa.total_allocated_bytes() - before < 2 * 10**6
    assert len(list(images)) == 19


def test_neighbouring_rows_cost_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_cache", rows._Cache())
    monkeypatch.setattr(rows, "MAX_BYTES", 2500)
    write_table(tmp_path / "0.parquet", {"image": [bytes([number]) * 100 for number in range(50)]}, row_group_size=10)
    found = listed(tmp_path)
    taken = []
    piece = rows._ParquetTable.piece
    monkeypatch.setattr(
        rows._ParquetTable, "piece", lambda self, *args: taken.append(args) or piece(self, *args), raising=True
    )
    assert contents(found) == [bytes([number]) * 100 for number in range(50)]
    assert taken == [(number, "image") for number in range(5)]
    contents(found[-20:])  # the last two groups are still there
    assert len(taken) == 5
    contents(found[:1])
    assert len(taken) == 6


@pytest.mark.filterwarnings("ignore:.*smaller row groups")
def test_a_row_group_larger_than_the_memory_for_them_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_cache", rows._Cache())
    monkeypatch.setattr(rows, "MAX_BYTES", 10)
    write_table(tmp_path / "0.parquet", {"image": [b"x" * 100] * 5})
    taken = []
    piece = rows._ParquetTable.piece
    monkeypatch.setattr(rows._ParquetTable, "piece", lambda self, *args: taken.append(args) or piece(self, *args))
    assert contents(listed(tmp_path)) == [b"x" * 100] * 5
    assert len(taken) == 1


def test_two_large_row_groups_are_never_in_memory_together(tmp_path, monkeypatch):
    """Not even while the second one is read."""
    monkeypatch.setattr(rows, "_cache", rows._Cache())
    for number in range(2):
        images = [os.urandom(1000) for _ in range(40)]
        write_table(tmp_path / f"{number}.parquet", {"image": images}, row_group_size=20)
    found = listed(tmp_path)
    monkeypatch.setattr(rows, "MAX_BYTES", 10_000)
    held = []
    piece = rows._ParquetTable.piece
    monkeypatch.setattr(
        rows._ParquetTable, "piece", lambda self, *args: held.append(rows._cache._bytes) or piece(self, *args)
    )
    for image in found[::20]:
        read_bytes(image.address)
        assert len(rows._cache._pieces) == 1
    assert held == [0] * 4


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})])
def test_large_row_groups_are_named_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rows, "MAX_BYTES", 3 * 2**20)
    cell = os.urandom(2**20)
    images = pa.array([cell if pa.types.is_binary(kind) else {"bytes": cell, "path": None}] * 8, kind)
    path = tmp_path / "0.parquet"
    write_table(path, {"image": images, "other": [cell] * 8}, row_group_size=4, use_dictionary=False)
    with pytest.warns(UserWarning) as warned:
        assert len(listed(path)) == 8
    assert [str(warning.message) for warning in warned] == [
        f'{path}: up to 4 MiB of its column "image" are read for one image, which is slow where images come in random '
        "order. Rewrite it with smaller row groups: pyarrow.parquet.write_table(..., row_group_size=256)"
    ]
    write_table(path, {"image": images, "other": [cell] * 8}, row_group_size=2, use_dictionary=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(listed(path)) == 8


@pytest.mark.filterwarnings("ignore:.*smaller row groups")
@pytest.mark.parametrize("name", BINARY)
def test_threads_read_side_by_side(tmp_path, name, monkeypatch):
    monkeypatch.setattr(rows, "_cache", rows._Cache())
    monkeypatch.setattr(rows, "MAX_BYTES", 300)
    write_table(tmp_path / name, {"image": [bytes([number]) * 50 for number in range(40)]}, row_group_size=4)
    found = listed(tmp_path)
    wrong = []

    def work(seed):
        for step in range(100):
            number = (step * 7 + seed * 13) % 40
            if read_bytes(found[number].address) != bytes([number]) * 50:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_table_that_was_replaced_is_opened_anew(tmp_path):
    for content in (b"old", b"new, and longer"):
        write_table(tmp_path / "0.parquet", {"image": [content]})
        assert contents(listed(tmp_path)) == [content]


# ---- images beside the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARY + TEXT)
def test_paths(tmp_path, name):
    write(tmp_path, "tables/near.jpg", "tables/deep/er.jpg", "images/far.jpg")
    paths = ["near.jpg", "./deep/er.jpg", "../images/far.jpg", f"{tmp_path}/images/far.jpg", "gone.jpg", ""]
    paths += [f"file://{tmp_path}/images/far.jpg", "https://example.org/a.jpg"]
    write_table(tmp_path / "tables" / name, {"image": paths, "caption": [f"caption, {path}" for path in paths]})
    found = listed(tmp_path / "tables" / name)
    assert [read_bytes(image.path).decode() for image in found[:4]] == [
        *("tables/near.jpg", "tables/deep/er.jpg", "images/far.jpg", "images/far.jpg")
    ]
    assert [image.texts for image in found] == [(f"caption, {path}".strip(),) for path in paths]
    status = (tmp_path / "tables" / "near.jpg").stat()
    of_table = (tmp_path / "tables" / name).stat()
    assert found[0].stamp == f"{status.st_size}-{status.st_mtime_ns}"
    assert found[4].stamp == "missing"
    assert found[6].path == f"{tmp_path}/images/far.jpg"
    assert found[7].path == "https://example.org/a.jpg"
    assert found[5].stamp == f"{of_table.st_size}-{of_table.st_mtime_ns}"
    with pytest.raises(ValueError, match=r'the column "image" is empty in row 5 \(counted from 0\)'):
        read_bytes(found[5].address)
    with pytest.raises(FileNotFoundError):
        read_bytes(found[4].path)


@pytest.mark.parametrize("name", BINARY + TEXT)
def test_a_row_that_is_appended_leaves_the_other_images_as_they_were(tmp_path, name):
    write(tmp_path, "a.jpg")
    paths = ["https://example.org/a.jpg", "a.jpg"]
    stamps = []
    for number in range(2):
        write_table(
            tmp_path / name,
            {"image": paths + ["https://example.org/b.jpg"] * number, "mask": paths[:2] + [None] * number},
        )
        stamps.append([(image.stamp, image.mask_stamp) for image in listed(tmp_path / name, mask="file")[:2]])
    assert stamps[0] == stamps[1]
    assert stamps[0][0] == ("-", "-")  # the address alone tells


@pytest.mark.parametrize("name", BINARY + TEXT)
@pytest.mark.parametrize(
    "path",
    [
        "../../secret.jpg",
        "./../../secret.jpg",
        "{outside}",
        "file://{outside}",
        "ftp://h/a.jpg",
        "s3://AK:HIDDEN@b/a.jpg",
        "s3://b/a.jpg?secret_key=HIDDEN",
    ],
)
def test_a_table_in_a_folder_names_nothing_outside_of_it(tmp_path, name, path):
    write(tmp_path, "secret.jpg", "mine/a.jpg")
    path = path.format(outside=tmp_path / "secret.jpg")
    inside = f"{tmp_path}/mine/a.jpg"
    write_table(tmp_path / "mine" / "tables" / name, {"image": ["../a.jpg", inside, path], "mask": [None, path, None]})
    *found, refused = listed(tmp_path / "mine", format="table", mask="file")
    assert contents(found) == [b"mine/a.jpg"] * 2
    assert refused.path == f"{tmp_path}/mine/tables/{name}/00000002"
    for address in (refused.address, found[1].mask_file):
        with pytest.raises(ValueError, match=rf"^the table {tmp_path}/mine/tables/{name} names ") as error:
            read_bytes(address)
        assert "HIDDEN" not in str(error.value)
    if "secret.jpg" in path:
        assert str(error.value).endswith(
            f"which is outside of {tmp_path}/mine. If you trust it, set dataset.path to the table itself"
        )
        for named in (tmp_path / "mine" / "tables" / name, tmp_path / "mine" / "tables" / "0.*"):
            assert contents(listed(named)) == [b"mine/a.jpg", b"mine/a.jpg", b"secret.jpg"]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("depth", ["", "a/", "a/b/"])
def test_neither_does_the_path_in_a_cell_of_hugging_face(tmp_path, name, depth):
    write(tmp_path, "secret.jpg", "mine/a.jpg")
    paths = [f"{tmp_path}/mine/a.jpg", f"{tmp_path}/secret.jpg", "../" * (depth.count("/") + 1) + "secret.jpg"]
    write_table(tmp_path / "mine" / depth / name, {"image": [{"bytes": None, "path": path} for path in paths]})
    first, *others = listed(tmp_path / "mine", format="table")
    assert contents([first]) == [b"mine/a.jpg"]
    for image in others:
        with pytest.raises(ValueError, match=rf"which is outside of {tmp_path}/mine\. If you trust it, "):
            read_bytes(image.address)
    assert contents(listed(tmp_path / "mine" / depth / name)) == [b"mine/a.jpg", b"secret.jpg", b"secret.jpg"]


def test_links_count_by_their_names_as_in_the_cache_of_the_hub(tmp_path):
    write(tmp_path, "blobs/a.jpg")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.jpg").symlink_to("../blobs/a.jpg")
    write_table(tmp_path / "snapshot" / "metadata.csv", {"file_name": ["a.jpg"]})
    assert contents(listed(tmp_path / "snapshot")) == [b"blobs/a.jpg"]


@pytest.mark.parametrize("path", ["/etc/hostname", "file:///etc/hostname", "../../../../etc/hostname", "a/../../../x"])
@pytest.mark.parametrize(
    "table", ["s3://bucket/t/0.csv", "s3://bucket?region=eu/t/0.csv", "hf://datasets/org/name@v1/t/0.csv"]
)
def test_a_table_in_a_store_names_no_files_of_this_machine(table, path):
    with pytest.raises(
        ValueError, match=r"^the table .*/t/0\.csv names .*(may not name files of a machine|is outside of)"
    ):
        rows.beside(table, path)


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        ("s3://b/t/list.csv?region=eu", "a.jpg", "s3://b?region=eu/t/a.jpg"),
        ("s3://b?region=eu/t/list.csv", "../x/./a.jpg", "s3://b?region=eu/x/a.jpg"),
        ("s3://b?region=eu/list.csv", "a.jpg", "s3://b?region=eu/a.jpg"),
        ("hf://datasets/org/name@v1/list.csv", "a.jpg", "hf://datasets/org/name@v1/a.jpg"),
        ("/data/list.csv", "s3://b/a.jpg?region=eu", "s3://b?region=eu/a.jpg"),
        ("/data/list.csv", "HTTPS://Host/A.jpg?Sig=x", "https://Host/A.jpg?Sig=x"),
        ("file:///data/a%20b/list.csv", "c.jpg", "/data/a b/c.jpg"),
    ],
)
def test_what_lies_beside_a_table(table, name, expected):
    assert rows.beside(table, name) == expected


def test_a_dictionary_of_paths_is_read(tmp_path):
    write(tmp_path, "a.jpg")
    write_table(tmp_path / "0.parquet", {"image": pa.array(["a.jpg", "a.jpg"]).dictionary_encode()})
    assert contents(listed(tmp_path / "0.parquet")) == [b"a.jpg"] * 2


# ---- the other columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.parquet", "0.arrow", "0.jsonl"])
def test_the_first_column_with_captions_counts(tmp_path, name):
    columns = {
        "image": ["a.jpg"] * 5,
        "caption": [["one", " two ", ""], [], None, [" "], ["x"]],
        "text": ["other"] * 3 + [None, "other"],
        "number": [7] * 5,
    }
    write_table(tmp_path / name, columns)
    found = listed(tmp_path)
    assert [image.texts for image in found] == [("one", "two"), ("other",), ("other",), (), ("x",)]
    assert [image.texts for image in listed(tmp_path, caption_columns=["caption", "number"])][1:4] == [("7",)] * 3
    assert {image.columns for image in found} == {("image", "caption", "text", "number")}
    tags = listed(tmp_path, caption_lists="tags", tag_separator=" |")
    assert [image.texts for image in tags] == [("one | two",), ("other",), ("other",), (), ("x",)]


@pytest.mark.parametrize("name", BINARY + TEXT)
def test_sizes_and_points_of_interest(tmp_path, name):
    cells = [  # height, width, focus_y, focus_x -> original_hw, focus_yx
        ((200, 100, 0.5, 0.25), (200, 100), (0.5, 0.25)),
        ((200, 100, 50.0, 25.0), (200, 100), (0.25, 0.25)),
        ((200, 100, 50.0, 0.5), (200, 100), (0.25, 0.005)),
        ((200, 100, 201.0, 5.0), (200, 100), None),
        ((200, 100, -0.1, 0.5), (200, 100), None),
        ((200, None, 0.5, None), None, None),
        ((None, None, 50.0, 25.0), None, (50.0, 25.0)),  # pixels of an image whose size is still to be read
        ((None, None, -0.1, 0.5), None, None),
        ((None, None, 0.5, 0.25), None, (0.5, 0.25)),
        ((0, 100, 1.0, 0.0), None, (1.0, 0.0)),
    ]
    names = ("height", "width", "focus_y", "focus_x")
    columns = {name: [row[0][number] for row in cells] for number, name in enumerate(names)}
    write_table(tmp_path / name, {"image": ["a.jpg"] * len(cells)} | columns)
    assert [(image.original_hw, image.focus_yx) for image in listed(tmp_path)] == [row[1:] for row in cells]


@pytest.mark.parametrize(
    ("focus_yx", "expected"),
    [
        (None, None),
        ((0.5, 0.25), (0.5, 0.25)),
        ((50.0, 25.0), (0.25, 0.25)),
        ((50.0, 0.5), (0.25, 0.005)),
        ((201.0, 5.0), None),
        ((1.0, 0.0), (1.0, 0.0)),
    ],
)
def test_a_point_in_pixels_becomes_shares_when_the_size_is_known(focus_yx, expected):
    assert as_shares(focus_yx, (200, 100)) == expected


def test_sizes_that_are_no_numbers(tmp_path):
    (tmp_path / "0.csv").write_text("image,height,width\na.jpg,tall,100\na.jpg,nan,10\na.jpg,20.0,10\na.jpg,inf,10\n")
    assert [image.original_hw for image in listed(tmp_path)] == [None, None, (20, 10), None]


@pytest.mark.parametrize("name", BINARY)
def test_masks(tmp_path, name):
    write(tmp_path, "mask.png")
    write_table(tmp_path / name, {"image": [b"i"] * 2, "mask": [{"bytes": b"m", "path": None}, None]})
    first, second = listed(tmp_path / name, mask="file")
    assert (read_bytes(first.mask_file), second.mask_file) == (b"m", "")
    assert listed(tmp_path / name)[0].mask_file == ""
    write_table(tmp_path / name, {"image": [b"i"] * 2, "m": ["mask.png", None]})
    assert [image.mask_file for image in listed(tmp_path / name, mask="file", mask_column="m")] == [
        f"{tmp_path}/mask.png",
        "",
    ]
    write_table(tmp_path / name, {"image": [b"i"], "m": [b"mask"]})
    assert read_bytes(listed(tmp_path / name, mask="file", mask_column="m")[0].mask_file) == b"mask"


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("is_struct", [False, True])
def test_a_mask_that_is_a_null_is_none(tmp_path, name, is_struct):
    """In row groups that have all, some and none of them."""
    masks = [b"m", b"", b"m", None, None, None, b"m"]
    if is_struct:
        cells = [{"bytes": mask, "path": None} for mask in masks]
        masks += [b"beside.png", None]
        cells += [{"bytes": None, "path": "beside.png"}, None]
        write(tmp_path, "beside.png")
    else:
        cells = pa.array(masks)
    write_table(tmp_path / name, {"image": [b"i"] * len(masks), "mask": cells}, row_group_size=2)
    found = listed(tmp_path / name, mask="file")
    assert [bool(image.mask_file) for image in found] == [mask is not None for mask in masks]
    assert [read_bytes(image.mask_file) for image in found if image.mask_file and image is not found[1]] == [
        mask for mask in masks if mask
    ]
    with pytest.raises(ValueError, match='the column "mask" is empty in row 1 '):  # of a file it would be an error too
        read_bytes(found[1].mask_file)


@pytest.mark.parametrize("mask", [b"m", None])
def test_no_masks_are_read_where_statistics_tell(tmp_path, monkeypatch, mask):
    write_table(tmp_path / "0.parquet", {"image": [b"i"] * 3, "mask": pa.array([mask] * 3, pa.binary())})
    read = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **options: read.append(options) or batches(self, **options)
    )
    assert [image.mask_file != "" for image in listed(tmp_path, mask="file")] == [mask is not None] * 3
    assert [options["columns"] for options in read] == [[]]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("row:1:mask:/data/0.parquet", "/data/0.parquet/00000001"),
        ("row:17:a%3Ab+2:s3://b/0.parquet", "s3://b/0.parquet/00000017"),
        ("tar:512+10:/data/0.tar", "at byte 512 of /data/0.tar"),
        ("refused:the table names what it may not", "of the table"),
        ("/data/cat-mask.png", "/data/cat-mask.png"),
    ],
)
def test_addresses_for_people(address, expected):
    assert shown_address(address) == expected


@pytest.mark.parametrize("name", BINARY)
def test_a_mask_that_is_rewritten_has_another_stamp(tmp_path, name):
    """The image's own file stays as it is."""
    write(tmp_path, "a.jpg", "mask.png")
    paths = {"image": ["a.jpg", "a.jpg"], "beside": ["mask.png", "mask.png"]}
    write_table(tmp_path / name, paths | {"mask": [{"bytes": b"m", "path": None}] * 2})

    def stamps(column):
        return {image.mask_stamp for image in listed(tmp_path / name, mask="file", mask_column=column)}

    before = stamps("beside"), stamps("mask")
    images = {image.stamp for image in listed(tmp_path / name)}
    assert before[0] == {f"{(tmp_path / 'mask.png').stat().st_size}-{(tmp_path / 'mask.png').stat().st_mtime_ns}"}
    (tmp_path / "mask.png").write_bytes(b"another")
    write_table(tmp_path / name, paths | {"mask": [{"bytes": b"rewritten", "path": None}] * 2})
    after = stamps("beside"), stamps("mask")
    assert all(len(old) == len(new) == 1 and old != new for old, new in zip(before, after, strict=True))
    assert {image.stamp for image in listed(tmp_path / name)} == images


def test_a_column_that_comes_first_late_in_a_file_counts(tmp_path):
    write(tmp_path, "mask.png")
    with (tmp_path / "0.jsonl").open("w") as file:
        for number in range(9000):
            late = {"mask": "mask.png", "caption": "late", "height": 9, "width": 9} if number >= 8990 else {}
            file.write(json.dumps({"image": "https://example.org/a.jpg", **late}) + "\n")
    found = listed(tmp_path / "0.jsonl", mask="file")
    assert [image.mask_file for image in found] == [""] * 8990 + [f"{tmp_path}/mask.png"] * 10
    assert (found[-1].texts, found[-1].original_hw) == (("late",), (9, 9))


# ---- which tables ----------------------------------------------------------------------------------------------------


def test_a_folder_of_tables_and_a_pattern(tmp_path):
    for name in ("b/1.parquet", "a.parquet", "b/0.parquet"):
        write_table(tmp_path / name, {"image": [name.encode()]})
    (tmp_path / "notes.md").touch()
    assert contents(listed(tmp_path)) == [b"a.parquet", b"b/0.parquet", b"b/1.parquet"]
    assert contents(listed(tmp_path / "b" / "*.parquet")) == [b"b/0.parquet", b"b/1.parquet"]
    assert contents(listed(tmp_path / "**" / "?.parquet")) == [b"a.parquet", b"b/0.parquet", b"b/1.parquet"]


def test_the_chosen_rows_do_not_depend_on_where_the_tables_lie(tmp_path):
    for place in ("here", "over/there"):
        for number in range(3):
            write_table(
                tmp_path / place / f"{number}.parquet", {"image": [b"%d-%d" % (number, row) for row in range(9)]}
            )
    first = contents(listed(tmp_path / "here", max_samples=5))
    assert contents(listed(tmp_path / "over" / "there" / "*.parquet", max_samples=5)) == first == sorted(first)
    assert len(first) == 5


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    write_table(tmp_path / "[2024] {a,b}?" / "0.parquet", {"image": [b"x"]})
    assert contents(listed(tmp_path / "[2024] {a,b}?")) == [b"x"]


def test_a_table_streams(tmp_path):
    with (tmp_path / "0.jsonl").open("w") as file:
        for number in range(30_000):
            file.write(f'{{"image": "https://example.org/{number}.jpg"}}\n')
        file.write("broken\n")
    images = list_dataset(section(tmp_path))
    assert next(images).path == "https://example.org/0.jpg"
    with pytest.raises(DatasetError, match="line 30001 is no JSON"):
        list(images)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARY + TEXT)
def test_without_a_column_for_the_image(tmp_path, name):
    write_table(tmp_path / name, {"img": ["a.jpg"], "text": ["x"]})
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value) == (
        f'{tmp_path}/{name} has no column "image" for the image. It has img, text. '
        "Set dataset.image_column to one of these."
    )
    assert len(listed(tmp_path, image_column="img")) == 1


@pytest.mark.parametrize("name", BINARY + TEXT)
def test_columns_that_are_set_and_nowhere(tmp_path, name):
    columns = {"image": ["a.jpg"], "mat": ["a.png"], "fy": [0.5], "caption": ["a"], "high": [9]}
    write_table(tmp_path / name, columns)
    there_are = f"\n{tmp_path}/{name}: has image, mat, fy, caption, high."
    for settings, text in [
        (
            {"mask": "file", "mask_column": "matte", "name": "cats"},
            'dataset.mask_column of cats: there is no column "matte" for dataset.mask = "file". Did you mean "mat"?',
        ),
        ({"mask": "file"}, 'dataset.mask_column: there is no column "mask" for dataset.mask = "file".'),
        (
            {"crop": "focus", "focus_columns": ["fy", "fx"]},
            'dataset.focus_columns: there is no column "fx" for dataset.crop = "focus".',
        ),
        ({"size_columns": ["high", "wide"]}, 'dataset.size_columns: there is no column "wide".'),
        (
            {"caption_columns": ["long", "caption", "text"]},
            'dataset.caption_columns: there is no column "long".',
        ),
    ]:
        with pytest.raises(DatasetError) as error:
            listed(tmp_path, **settings)
        assert str(error.value).startswith(text)
        assert str(error.value).endswith(there_are)
    with pytest.raises(DatasetError, match=r'"focus_y" .*\n.*"focus_x"'):
        listed(tmp_path, crop="focus")
    for settings in ({}, {"mask": "file", "mask_column": "mat"}, {"caption_columns": ["x"], "captions": ["filename"]}):
        assert len(listed(tmp_path, **settings)) == 1


def test_a_column_may_be_in_one_of_the_tables_and_in_some_rows(tmp_path):
    write_table(tmp_path / "0.csv", {"image": ["a.jpg"]})
    with (tmp_path / "1.jsonl").open("w") as file:
        file.write('{"image": "b.jpg"}\n{"image": "c.jpg", "words": "c", "mask": null}\n')
    assert len(listed(tmp_path, caption_columns=["words"], mask="file")) == 3
    with pytest.raises(DatasetError, match=r"0\.csv and 1 more files: has image, words, mask\."):
        listed(tmp_path, caption_columns=["word"])


def test_a_misspelt_column_is_found_before_a_long_listing(tmp_path):
    write_table(tmp_path / "0.csv", {"image": ["a.jpg"]})
    with pytest.raises(DatasetError, match='no column "x"'):
        next(list_dataset(section(tmp_path, size_columns=["x", "y"])))


def test_a_column_that_is_no_image(tmp_path):
    write_table(tmp_path / "0.parquet", {"image": [[1.0, 2.0]]})
    with pytest.raises(DatasetError, match=r'the column "image" is list<.*>, expected bytes, a path or URL, or '):
        listed(tmp_path)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("content", [b"", b"garbage " * 100, None])
def test_a_damaged_table(tmp_path, name, content):
    if content is None:
        write_table(tmp_path / name, {"image": [b"x" * 100] * 100}, row_group_size=10)
        content = (tmp_path / name).read_bytes()[:-1000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    kind = name.partition(".")[2].capitalize()
    assert str(error.value).startswith(f"{tmp_path}/{name} is no whole {kind} file: ")
    assert str(error.value).endswith("Copy or download it again, or take it out.")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_bytes(f"row:0:image:{tmp_path}/{name}")


def test_a_note_of_git_lfs(tmp_path):
    (tmp_path / "0.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DatasetError, match="It is only a note of Git LFS; fetch the files with `git lfs pull`"):
        listed(tmp_path)


def test_a_row_that_is_not_there(tmp_path):
    write_table(tmp_path / "0.parquet", {"image": [b"x"]})
    for row, column in [(1, "image"), (0, "mask")]:
        with pytest.raises(ValueError, match=f'there is no column "{column}" in row {row}'):
            read_bytes(f"row:{row}:{column}:{tmp_path}/0.parquet")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"row:0:image:{tmp_path}/1.parquet")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("0.jsonl", b'{"image": "a.jpg"}\n\n{"image": \n', "line 3 is no JSON: Expecting value"),
        pytest.param("0.jsonl", b"[" * 100_000, "line 1 is no JSON: maximum recursion depth exceeded", id="deep"),
        ("0.jsonl", b'{"image": "a.jpg"}\n[1]\n', "line 2 is no JSON object, expected"),
        ("0.jsonl", b'{"image": "caf\xe9.jpg"}\n', "near line 1: not UTF-8, byte 0xe9. Save it as UTF-8."),
        ("0.csv", b"image,text\na.jpg,one\na.jpg,a, b\n", "line 3 has 3 columns, the first line 2. Put texts with"),
        ("0.csv", b"image;text\na.jpg;x\n", 'its columns seem to be separated by ";". Save it with commas.'),
        ("0.csv", b"image\ttext\na.jpg\tx\n", "its columns seem to be separated by tabs. Save it with commas."),
        ("0.tsv", b"image,text\na.jpg,x\n", 'its columns seem to be separated by ",". Save it with tabs.'),
        (
            "0.csv",
            b"image,text, text\na.jpg,x,y\n",
            'its first line has "text" more than once. Give each column a name',
        ),
        ("0.csv", b'image,text\na.jpg,"open\n', "line 2: unexpected end of data. Correct it, or take it out."),
        ("0.csv", b"image,text\na.jpg,caf\xe9\n", "not UTF-8, byte 0xe9. Save it as UTF-8."),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{name}: ")
    assert text in str(error.value)


def test_half_a_character_is_no_end_of_the_world(tmp_path):
    """JSON can write one; no file's name and no caption can hold it."""
    lines = [r'{"image": "a.jpg", "text": "a cat \ud83d"}', r'{"image": "b\ud83d.jpg", "text": "\ud83d\ude3a"}']
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    found = listed(tmp_path / "0.jsonl")
    assert [image.texts for image in found] == [("a cat \N{REPLACEMENT CHARACTER}",), ("😺",)]
    assert found[1].path.endswith("/b\N{REPLACEMENT CHARACTER}.jpg")


def test_a_size_beyond_all_numbers_is_none(tmp_path):
    (tmp_path / "0.jsonl").write_text(f'{{"image": "a.jpg", "width": 1{"0" * 400}, "height": 5}}')
    (image,) = listed(tmp_path / "0.jsonl")
    assert image.original_hw is None


def test_csv_as_spreadsheets_write_it(tmp_path):
    text = '\ufeffimage,text\r\n"a, b.jpg","two\r\nlines, ""quoted"""\r\n\r\nc.jpg,007\r\n'
    (tmp_path / "0.csv").write_bytes(text.encode())
    first, second = listed(tmp_path)
    assert (Path(first.path).name, first.texts) == ("a, b.jpg", ('two\r\nlines, "quoted"',))
    assert second.texts == ("007",)


def test_spaces_after_the_commas(tmp_path):
    (tmp_path / "0.csv").write_text('caption , image,,\n"a, b", "c d.jpg",,\n  x ,  e.jpg,,\n')
    first, second = listed(tmp_path)
    assert (Path(first.path).name, first.texts) == ("c d.jpg", ("a, b",))
    assert (Path(second.path).name, second.texts) == ("e.jpg", ("x",))


@pytest.mark.parametrize("name", TEXT)
def test_a_table_without_rows(tmp_path, name):
    (tmp_path / name).write_text("" if name.endswith("jsonl") else "image\n")
    with pytest.raises(DatasetError) as error:
        listed(tmp_path)
    assert str(error.value) == f"dataset.path: no rows in {tmp_path}/{name}."


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet", "list.arrow"])
def test_a_pipe_called_like_a_table_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DatasetError, match="it is not a regular file, but a pipe, socket or device"):
        listed(tmp_path / name)


@pytest.mark.parametrize("name", ["0.parquet", "0.arrow"])
def test_a_table_that_was_replaced_by_one_of_the_same_length_is_opened_anew(tmp_path, name):
    path = tmp_path / name
    for number, content in enumerate((b"old", b"new")):
        write_table(path, {"image": [content]})
        os.utime(path, (1e9 + number, 1e9 + number))
        assert contents(listed(tmp_path)) == [content]


def test_rows_of_a_text_table_are_counted_across_pieces(tmp_path, monkeypatch):
    """A row without an image is known by its number."""
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"image": None, "text": str(at)}) + "\n" for at in range(5)))
    monkeypatch.setattr(table_rows, "_ROWS", 2)
    assert [image.path for image in listed(tmp_path)] == [f"{tmp_path}/0.jsonl/{number:08d}" for number in range(5)]
