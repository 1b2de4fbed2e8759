import json
import threading

import pytest

from sdxl_ray.cache.manifest import write_manifest
from sdxl_ray.cache.shards import Location
from sdxl_ray.errors import StorageError


def locate(prompt):
    """Everything is encoded, except what is gone."""
    return None if prompt == "gone" else Location(f"text/{prompt}.safetensors", len(prompt))


def prompts(path):
    return json.loads(path.read_text(encoding="utf-8"))["prompts"]


def test_runs_with_other_prompts_add_theirs(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, {"num_samples": 1}, ["", "a cat"], locate)
    write_manifest(path, {"num_samples": 2}, ["", "猫"], locate)
    assert prompts(path) == {
        text: {"shard": f"text/{text}.safetensors", "row": len(text)} for text in ("", "a cat", "猫")
    }
    assert json.loads(path.read_text(encoding="utf-8"))["num_samples"] == 2


def test_prompts_that_are_no_longer_encoded_are_left_out_and_moved_ones_found(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"prompts": {"gone": {"shard": "x", "row": 0}, "moved": {"shard": "x", "row": 0}}}))
    write_manifest(path, {}, ["a cat"], locate)
    assert prompts(path).keys() == {"moved", "a cat"}
    assert prompts(path)["moved"] == {"shard": "text/moved.safetensors", "row": 5}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"prompts": 3}'])
def test_a_damaged_manifest_is_replaced(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    write_manifest(path, {}, ["a cat"], locate)
    assert prompts(path).keys() == {"a cat"}


def test_runs_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "manifest.json"
    missing = []

    def run(number):
        for turn in range(10):
            wanted = f"{number} {turn}"
            write_manifest(path, {}, [wanted], locate)
            missing.extend({wanted} - prompts(path).keys())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
    assert len(prompts(path)) == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "manifest.json"]


def test_a_full_disk_leaves_the_old_manifest(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_manifest(path, {}, ["a cat"], locate)

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(StorageError, match="no space left on the device while writing the manifest"):
        write_manifest(path, {}, ["a dog"], locate)
    assert prompts(path).keys() == {"a cat"}
    assert not list(tmp_path.glob(".tmp-*"))
