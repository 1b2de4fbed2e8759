"""Caption files and tar headers in cloud storage are read once. .venv/bin/pytest tests/unit/cache/test_text_memo.py"""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from sdxl_ray import storage
from sdxl_ray.cache import caption_files, tables, text_memo
from sdxl_ray.cache.captions import CaptionRules, read_captions
from sdxl_ray.cache.sources import webdataset
from sdxl_ray.cache.text_memo import TextMemo
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.records import Listed
from sdxl_ray.storage import FileEntry, open_folder
from tests.unit.cache.sources.made import tar_bytes


@pytest.fixture
def bucket(monkeypatch):
    """address -> content, and which addresses were read."""
    contents, read = {}, []
    monkeypatch.setattr(
        caption_files, "read_start", lambda address, length: read.append(address) or contents[address][:length]
    )
    return contents, read


def images_in(contents, count, stamp="1"):
    found = []
    for number in range(count):
        address = f"s3://bucket/{number}.txt"
        contents[address] = f"caption {number}".encode()
        found.append(Listed(f"s3://bucket/{number}.jpg", "1", text_file=address, text_stamp=stamp))
    return found


def run(folder, images):
    memo = TextMemo(open_folder(str(folder)))
    captions = read_captions(images, CaptionRules(), memo)
    assert not any(found.problem for found in captions)
    memo.write()
    return [found.texts for found in captions]


def test_a_second_run_reads_what_has_changed_and_what_is_new(tmp_path, bucket):
    contents, read = bucket
    images = images_in(contents, 40)
    first = run(tmp_path, images[:30])
    assert first == [(f"caption {number}",) for number in range(30)]
    assert len(read) == 30
    read.clear()
    contents["s3://bucket/7.txt"] = b"another one"
    images[7] = dataclasses.replace(images[7], text_stamp="2")
    assert run(tmp_path, images[::-1])[::-1] == [
        ("another one",) if number == 7 else (f"caption {number}",) for number in range(40)
    ]
    assert sorted(read) == sorted(f"s3://bucket/{number}.txt" for number in [7, *range(30, 40)])
    read.clear()
    assert run(tmp_path, images)[7] == ("another one",)
    assert read == []


def test_files_of_this_machine_and_long_ones_are_read_each_time(tmp_path, bucket):
    contents, read = bucket
    (tmp_path / "cat.txt").write_text("a cat")
    local = Listed("cat.jpg", "1", text_file=str(tmp_path / "cat.txt"))
    (long,) = images_in(contents, 1)
    contents["s3://bucket/0.txt"] = b"x" * 20_000
    for _ in range(2):
        assert run(tmp_path / "cache", [local, long]) == [("a cat",), ("x" * 20_000,)]
    assert len(read) == 2
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_read_is_tried_again(tmp_path, bucket):
    contents, _ = bucket
    (image,) = images_in(contents, 1)
    contents["s3://bucket/0.txt"] = b"\xe9"
    memo = TextMemo(open_folder(str(tmp_path)))
    assert "is not UTF-8" in read_captions([image], CaptionRules(), memo)[0].problem
    memo.write()
    contents["s3://bucket/0.txt"] = b"mended, with the same date"
    assert run(tmp_path, [image]) == [("mended, with the same date",)]


def test_a_damaged_memo_is_as_good_as_none(tmp_path, bucket):
    contents, read = bucket
    images = images_in(contents, 3)
    run(tmp_path, images)
    (tmp_path / text_memo.FILE_NAME).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"texts\.parquet: .*; what is in cloud storage is read again"):
        assert run(tmp_path, images)[2] == ("caption 2",)
    assert len(read) == 6
    run(tmp_path, images)
    assert len(read) == 6


def test_a_large_memo_is_found_in_pieces(tmp_path, bucket, monkeypatch):
    """Beyond some size it lies in a file, in pieces that are not in order."""
    contents, read = bucket
    monkeypatch.setattr(text_memo, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(tables, "ROWS_IN_MEMORY", 10)
    images = images_in(contents, 50)
    run(tmp_path, images)
    read.clear()
    assert run(tmp_path, images[::3]) == [(f"caption {number}",) for number in range(0, 50, 3)]
    assert read == []


def test_every_one_of_many_is_found_and_those_of_changed_files_go(tmp_path):
    """Digests that end in zeros are among them."""
    folder = open_folder(str(tmp_path))
    files = [(f"s3://bucket/{number}.txt", "1") for number in range(3000)]
    texts = [f"caption {number}" for number in range(3000)]
    memo = TextMemo(folder)
    memo.add(files, texts)
    assert memo.find(files[:2]) == dict(
        zip([file[0] for file in files[:2]], texts, strict=False)
    )  # before it is written
    memo.write()
    assert list(TextMemo(folder).find(files).values()) == texts
    again = TextMemo(folder)
    again.add([(address, "2") for address, _ in files[:1000]], ["changed"] * 1000)
    again.write()
    assert len(pq.read_table(tmp_path / text_memo.FILE_NAME)) == 3000
    assert list(TextMemo(folder).find(files).values()) == texts[1000:]


def test_many_texts_are_written_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text_memo, "_NEW_BYTES", 10_000)
    memo = TextMemo(open_folder(str(tmp_path)))
    files = [(f"s3://bucket/{number}.txt", "1") for number in range(500)]
    memo.add(files, ["text"] * 500)
    assert (tmp_path / text_memo.FILE_NAME).exists()
    assert len(memo.find(files)) == 500


def test_of_another_version_nothing_is_used(tmp_path, monkeypatch):
    memo = TextMemo(open_folder(str(tmp_path)))
    memo.add([("s3://bucket/0.txt", "1")], ["text"])
    memo.write()
    monkeypatch.setattr(text_memo, "_VERSION", {b"sdxl_ray.texts": b"2"})
    assert TextMemo(open_folder(str(tmp_path))).find([("s3://bucket/0.txt", "1")]) == {}


def test_of_tar_files_only_the_headers_of_new_ones_are_read(tmp_path, monkeypatch):
    for number in range(3):
        members = [("a.jpg", b"a"), ("a.txt", b"text"), ("a.json", json.dumps({"caption": f"note {number}"}).encode())]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    opened = []

    def open_buffered(path):
        opened.append(path)
        return (tmp_path / path.rpartition("/")[2]).open("rb")

    monkeypatch.setattr(storage, "open_buffered", open_buffered)
    monkeypatch.setattr(webdataset, "tar_address", lambda path, offset, size: f"{path}:{offset}+{size}")

    def listing(*stamps):
        memo = TextMemo(open_folder(str(tmp_path / "cache")))
        files = [
            (
                f"s3://bucket/{number}.tar",
                FileEntry(f"{number}.tar", (tmp_path / f"{number}.tar").stat().st_size, stamp),
            )
            for number, stamp in enumerate(stamps)
        ]
        found = list(webdataset.list_tars(DatasetSection(), files, memo))
        memo.write()
        return found

    first = listing(1, 1)
    assert [image.texts for image in first] == [("note 0",), ("note 1",)]
    assert opened == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert listing(1, 1) == first
    assert len(opened) == 2
    assert len(listing(1, 2, 1)) == 3
    assert sorted(opened[2:]) == ["s3://bucket/1.tar", "s3://bucket/2.tar"]
