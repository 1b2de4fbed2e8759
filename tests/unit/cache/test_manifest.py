import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_ray.cache.manifest import mark_unfinished, write_manifest
from sdxl_ray.errors import StorageError
from sdxl_ray.storage import open_folder
from tests.remote import RemoteFolder


def place(prompt):
    return {"shard": f"text/{prompt}.safetensors", "key": prompt * 2}


def locate(prompt):
    """Everything is encoded, except what is gone."""
    return None if prompt == "gone" else place(prompt)


def write(folder, made_with, prompts):
    write_manifest(open_folder(folder), made_with, prompts, locate)


def read(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def prompts(folder):
    return read(folder)["prompts"]


def test_runs_with_other_prompts_add_theirs(tmp_path):
    folder = tmp_path / "datasets" / "cats=1"
    write(folder, {"num_samples": 1}, ["", "a cat"])
    write(folder, {"num_samples": 2}, ["", "猫\n😺"])
    assert prompts(folder) == {text: place(text) for text in ("", "a cat", "猫\n😺")}
    assert read(folder)["num_samples"] == 2


def test_prompts_that_are_no_longer_encoded_are_left_out_and_moved_ones_found(tmp_path):
    earlier = {"prompts": {"gone": {"shard": "x", "key": "y"}, "moved": {"shard": "x", "key": "y"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(earlier))
    write(tmp_path, {}, ["a cat"])
    assert prompts(tmp_path) == {"moved": place("moved"), "a cat": place("a cat")}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"prompts": 3}', '{"prompts": null}', "\udcff"])
def test_a_damaged_manifest_is_replaced(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    write(tmp_path, {}, ["a cat"])
    assert prompts(tmp_path).keys() == {"a cat"}


def test_runs_that_write_at_once_lose_nothing(tmp_path):
    def run(number):
        missing = set()
        for turn in range(10):
            wanted = f"{number} {turn}"
            write(tmp_path, {}, [wanted])
            missing |= {wanted} - prompts(tmp_path).keys()
        return missing

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [set()] * 4
    assert len(prompts(tmp_path)) == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "manifest.json"]


def test_where_there_are_no_locks_it_is_written_without(tmp_path):
    folder = RemoteFolder(tmp_path / "bucket")
    for prompt in ("a cat", "a dog"):
        write_manifest(folder, {}, [prompt], locate)
    assert prompts(tmp_path / "bucket").keys() == {"a cat", "a dog"}
    assert [file.name for file in (tmp_path / "bucket").iterdir()] == ["manifest.json"]


def test_a_full_disk_leaves_the_old_manifest(tmp_path, monkeypatch):
    write(tmp_path, {}, ["a cat"])

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(StorageError, match=r"manifest\.json: no space left on the device while writing"):
        write(tmp_path, {}, ["a dog"])
    assert prompts(tmp_path).keys() == {"a cat"}
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_manifest_that_is_taken_back_has_no_prompts_and_its_successor_has_them_again(tmp_path):
    folder = open_folder(tmp_path)
    mark_unfinished(folder)  # there is none
    assert not (tmp_path / "manifest.json").exists()
    write(tmp_path, {}, ["a cat"])
    for _ in range(2):
        mark_unfinished(folder)
        assert "prompts" not in read(tmp_path)
    write(tmp_path, {}, ["a dog"])
    assert prompts(tmp_path).keys() == {"a cat", "a dog"}


def test_where_nobody_can_write_it_is_told_in_our_words(tmp_path, monkeypatch):
    def refuse(path, *args):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        StorageError, match=r"\.lock: the file system is read-only while locking the manifest\. Make it"
    ):
        write_manifest(open_folder(tmp_path), {}, [], lambda prompt: None)
