"""Datasets in a bucket, on a real S3 server of this machine."""

import io
import json
import threading
import time
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_ray import storage
from sdxl_ray.cache.sources import list_dataset, read_bytes, stamps, table_rows
from sdxl_ray.errors import DatasetError, StorageError
from sdxl_ray.storage import clouds, open_folder
from sdxl_ray.storage.outages import LongWaits
from tests import s3
from tests.unit.cache.sources.made import contents, listed, section, tar_bytes, write


@pytest.fixture(scope="module")
def server():
    with s3.moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(server, monkeypatch):
    """An empty one, called "pictures"."""
    s3.use(monkeypatch, server)
    system = s3.filesystem(server)
    system.delete_dir_contents(s3.BUCKET)  # with the marks of empty folders
    return open_folder(f"s3://{s3.BUCKET}")


def put(folder, *names):
    for name in names:
        folder.write(name, name.encode())


def test_images_with_captions_and_masks(bucket):
    put(
        bucket,
        "cats/b.jpg",
        "cats/a 100%?.jpg",
        "cats/猫 😺/c.PNG",
        "cats/.hidden/d.jpg",
        "cats/notes.md",
        "catsup.jpg",
    )
    put(bucket, "cats/b.txt", "cats/b.jpg.txt", "cats/猫 😺/c.txt", "cats/b-mask.png", f"cats/deep/{'x' * 251}.jpg")
    found = listed("s3://pictures/cats", mask="file")
    base = "s3://pictures/cats"
    assert [image.path for image in found] == [
        *(f"{base}/a 100%?.jpg", f"{base}/b.jpg", f"{base}/deep/{'x' * 251}.jpg", f"{base}/猫 😺/c.PNG")
    ]
    assert [f"s3://pictures/{content.decode()}" for content in contents(found)] == [image.path for image in found]
    assert [image.text_file for image in found] == ["", f"{base}/b.jpg.txt", "", f"{base}/猫 😺/c.txt"]
    size, mtime_ns = found[1].text_stamp.split("-")
    assert (int(size), int(mtime_ns) > 10**18) == (len("cats/b.jpg.txt"), True)
    assert [image.mask_file for image in found] == ["", f"{base}/b-mask.png", "", ""]
    size, mtime_ns = found[1].stamp.split("-")
    assert (int(size), int(mtime_ns) > 10**18) == (len("cats/b.jpg"), True)


def test_the_same_images_in_the_same_order_as_on_disk(bucket, tmp_path):
    names = [f"{number % 5}/{'deep/' * (number % 3)}{number}.jpg" for number in range(60)]
    put(bucket, *(f"cats/{name}" for name in names))
    write(tmp_path, *names)
    for max_samples in (0, 7):
        local = [image.path.removeprefix(f"{tmp_path}/") for image in listed(tmp_path, max_samples=max_samples)]
        cloud = [
            image.path.removeprefix("s3://pictures/cats/")
            for image in listed("s3://pictures/cats/", max_samples=max_samples)
        ]
        assert cloud == local


def test_a_folder_is_listed_once(server, bucket, monkeypatch):
    put(
        bucket,
        *(f"cats/{number}/{image}.{kind}" for number in range(5) for image in range(4) for kind in ("jpg", "txt")),
    )
    calls = []
    select = clouds.listing
    monkeypatch.setattr(
        "sdxl_ray.storage.listing", lambda path, **options: calls.append(path) or select(path, **options)
    )
    found = listed("s3://pictures/cats", format="folder")
    assert len(found) == 20
    assert all(image.text_file for image in found)
    assert sorted(calls) == ["s3://pictures/cats", *(f"s3://pictures/cats/{number}" for number in range(5))]


def test_captions_that_could_belong_to_two_images(bucket):
    put(bucket, "cats/a.jpg", "cats/a.png", "cats/a.txt")
    with pytest.raises(DatasetError, match=r"  s3://pictures/cats/a\.txt could belong to a\.jpg or a\.png"):
        listed("s3://pictures/cats")


def test_tar_files(bucket):
    for number in range(3):
        notes = json.dumps({"caption": f"note {number}"}).encode()
        members = [("a.jpg", b"image %d" % number), ("a.json", notes), ("a.txt", b"text"), ("big.bin", bytes(600_000))]
        bucket.write(f"tars/{number:03d}.tar", tar_bytes([*members, ("z.jpg", b"z")]))
    for path in ("s3://pictures/tars", "s3://pictures/tars/*.tar", "s3://pictures/tars/{000..002}.tar"):
        found = listed(path)
        assert contents(found) == [b"image 0", b"z", b"image 1", b"z", b"image 2", b"z"]
    assert found[2].texts == ("note 1",)
    assert read_bytes(found[2].text_file) == b"text"
    assert all(found[at].text_stamp for at in (0, 2, 4))
    assert found[2].path == "s3://pictures/tars/001.tar/a.jpg"
    with pytest.raises(DatasetError, match=r"dataset\.path: s3://pictures/tars/003\.tar does not exist\."):
        listed("s3://pictures/tars/{002..003}.tar")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_with_bytes(bucket, kind):
    table = pa.table({"image": [{"bytes": bytes([n]) * 9, "path": None} for n in range(9)], "text": ["x"] * 9})
    content = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, content, row_group_size=4)
    else:
        with pa.ipc.new_stream(content, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    bucket.write(f"tables/0.{kind}", content.getvalue())
    found = listed("s3://pictures/tables")
    assert contents(found) == [bytes([number]) * 9 for number in range(9)]
    assert {image.texts for image in found} == {("x",)}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_time_between_reads_of_a_table_is_not_the_stores_silence(bucket, monkeypatch, kind):
    """It is the scan of 8192 images."""
    table = pa.table({"image": [b"image"] * 4})
    buffer = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer)
    else:
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    bucket.write(f"0.{kind}", buffer.getvalue())
    monkeypatch.setattr(table_rows, "_ROWS", 2)
    monkeypatch.setattr(clouds, "_long_waits", LongWaits(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list_dataset(section("s3://pictures"))
        next(found)
        time.sleep(1.2)
        assert len(list(found)) == 3
    assert clouds._long_waits._told == set()


def test_tables_with_paths(bucket):
    put(bucket, "images/a.jpg", "tables/b.jpg")
    paths = ["../images/a.jpg", "b.jpg", "s3://pictures/images/a.jpg", "./b.jpg"]
    bucket.write("tables/0.csv", ("image\n" + "\n".join(paths) + "\n").encode())
    bucket.write("tables/0.jsonl", "".join(json.dumps({"image": path}) + "\n" for path in paths).encode())
    for name in ("0.csv", "0.jsonl"):
        assert contents(listed(f"s3://pictures/tables/{name}")) == [
            *(b"images/a.jpg", b"tables/b.jpg", b"images/a.jpg", b"tables/b.jpg")
        ]
    put(bucket, "folder/a.jpg")
    bucket.write("folder/metadata.csv", b"file_name,text\na.jpg,a cat\n")
    (image,) = listed("s3://pictures/folder")
    assert (contents([image]), image.texts) == ([b"folder/a.jpg"], ("a cat",))


def test_a_damaged_table(bucket):
    bucket.write("tables/0.parquet", b"garbage" * 100)
    with pytest.raises(DatasetError, match=r"^s3://pictures/tables/0\.parquet is no whole Parquet file: "):
        listed("s3://pictures/tables/0.parquet")


def test_options_of_the_address_reach_the_images(server, bucket, monkeypatch):
    put(bucket, "cats/a.jpg", "cats/a.txt")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    host = server.removeprefix("http://")
    (image,) = listed(f"s3://pictures/cats?scheme=http&endpoint_override={host}")
    assert contents([image]) == [b"cats/a.jpg"]
    assert read_bytes(image.text_file) == b"cats/a.txt"


def test_options_of_a_file_or_a_pattern_reach_the_images(server, bucket, monkeypatch):
    put(bucket, "t/a.jpg", "t/mask.png")
    bucket.write("t/list.csv", b"image,mask\na.jpg,mask.png\n")
    bucket.write("t/0.tar", tar_bytes([("b.jpg", b"in a tar")]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = f"?scheme=http&endpoint_override={server.removeprefix('http://')}"
    for path in (f"s3://pictures/t/list.csv{options}", f"s3://pictures{options}/t/*.csv"):
        (image,) = listed(path, mask="file")
        assert (contents([image]), read_bytes(image.mask_file)) == ([b"t/a.jpg"], b"t/mask.png")
    for path in (
        f"s3://pictures/t/*.tar{options}",
        f"s3://pictures{options}/t/{{0..0}}.tar",
        f"s3://pictures/**/0.tar{options}",
    ):
        assert contents(listed(path)) == [b"in a tar"]
    assert [image.path for image in listed(f"s3://pictures/t/*.tar{options}", max_samples=1)] == [
        f"s3://pictures{options}/t/0.tar/b.jpg"
    ]


def test_a_local_table_of_images_in_a_bucket(bucket, tmp_path, monkeypatch):
    """Their stamps are their own, from one listing of each folder, and stay when rows come and go."""
    put(bucket, "x/a.jpg", "x/a.png", "y/b.jpg", "y/b.png")
    names = ["x/a", "y/b", "x/gone"]
    table = "image,mask\n" + "".join(f"s3://pictures/{name}.jpg,s3://pictures/{name}.png\n" for name in names)
    (tmp_path / "0.csv").write_text(table)
    calls = []
    select = clouds.listing
    monkeypatch.setattr(
        "sdxl_ray.storage.listing", lambda path, **options: calls.append(path) or select(path, **options)
    )
    monkeypatch.setattr("sdxl_ray.storage.file_status", lambda path: pytest.fail(f"asked for {path} alone"))

    def stamps():
        return [stamp for image in listed(tmp_path / "0.csv", mask="file") for stamp in (image.stamp, image.mask_stamp)]

    before = stamps()
    assert calls == ["s3://pictures/x", "s3://pictures/y"]
    assert before[4:] == ["missing", "missing"]
    assert [int(stamp.partition("-")[0]) for stamp in before[:4]] == [7] * 4
    bucket.write("x/a.png", b"rewritten")
    (tmp_path / "0.csv").write_text(table + "https://example.org/a.jpg,\n")
    after = stamps()
    assert [old != new for old, new in zip(before, after, strict=False)] == [False, True, False, False, False, False]


def test_images_of_a_bucket_that_may_not_be_listed(monkeypatch, tmp_path):
    (tmp_path / "0.csv").write_text("image\ns3://b/x/a.jpg\ns3://b/x/b.jpg\n")
    with s3.answering(lambda *_: s3.s3_error(403, "AccessDenied", "")) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        assert [image.stamp for image in listed(tmp_path / "0.csv")] == ["-", "-"]
    assert len(requests) == 1


def test_a_store_that_does_not_answer_changes_no_stamps(monkeypatch, tmp_path):
    """Known by its address alone, each image would be another one: all of them encoded again, and no run resumed."""
    (tmp_path / "0.csv").write_text("image\ns3://b/x/a.jpg\n")
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 1)
    with s3.answering(lambda *_: s3.s3_error(503, "SlowDown", "")) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(StorageError, match=r"^s3://b/x: the store asks for fewer requests while listing"):
            listed(tmp_path / "0.csv")


def test_a_bucket_that_is_not_there_spoils_only_its_own_rows(bucket, tmp_path):
    (tmp_path / "0.csv").write_text("image\ns3://of-nobody/x/a.jpg\ns3://pictures/none.jpg\n")
    assert [image.stamp for image in listed(tmp_path / "0.csv")] == ["-", "missing"]


def test_the_tar_files_of_a_bucket_are_looked_at_side_by_side(bucket, monkeypatch):
    """A request for each, and a store takes its time."""
    for number in range(8):
        bucket.write(f"{number}.tar", tar_bytes([(f"{number}.jpg", b"x")]))
    together, status = threading.Barrier(8), storage.status

    def wait(path):
        if path.endswith(".tar"):
            together.wait(10)
        return status(path)

    monkeypatch.setattr(storage, "status", wait)
    assert [image.path for image in listed("s3://pictures")] == [
        f"s3://pictures/{number}.tar/{number}.jpg" for number in range(8)
    ]


def test_listed_folders_do_not_pile_up(bucket, tmp_path, monkeypatch):
    put(bucket, *(f"{folder}/{number}.jpg" for folder in "abc" for number in range(4)))
    monkeypatch.setattr(stamps, "MAX_NAMES", 9)
    known = stamps.Stamps()
    for folder in "abcab":
        found = known.of([f"s3://pictures/{folder}/{number}.jpg" for number in range(4)])
        assert len(found) == 4 and "missing" not in found.values()
        assert known._num_names <= 9
    assert list(known._folders) == ["s3://pictures/a", "s3://pictures/b"]


def test_nothing_there(bucket):
    with pytest.raises(DatasetError, match=r"no images in s3://pictures/none or its subfolders\. Looked for "):
        listed("s3://pictures/none")
    with pytest.raises(StorageError, match=r"^s3://of-nobody/x: no such bucket while listing"):
        listed("s3://of-nobody/x")
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://pictures/none.jpg")


def test_a_store_that_refuses_in_the_middle(monkeypatch):
    """A server that shows a folder, but not what is below it."""
    page = (
        b'<?xml version="1.0"?><ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>'
        b"<Contents><Key>cats/a.jpg</Key><Size>1</Size><LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
        b"<CommonPrefixes><Prefix>cats/secret/</Prefix></CommonPrefixes></ListBucketResult>"
    )

    def answer(number, method, path):
        if "secret" in path:
            return s3.s3_error(403, "AccessDenied", "Access Denied")
        return (200, {"Content-Type": "application/xml"}, page) if method == "GET" else (404, {}, b"")

    with s3.answering(answer) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        images = list_dataset(section("s3://b/cats", format="folder"))
        assert next(images).path == "s3://b/cats/a.jpg"
        with pytest.raises(StorageError, match=r"^s3://b/cats/secret: access denied while listing"):
            list(images)
