import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoFile

from sdxl_ray.sdxl import digests, hub
from sdxl_ray.sdxl.digests import file_sha256
from sdxl_ray.sdxl.fingerprint import fingerprint, text_fingerprint

CONTENT = b"weights" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own, where files of any size are remembered."""
    monkeypatch.setenv("SDXL_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_REMEMBER_FROM", 1)
    new_process()
    return tmp_path / "home"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    os.utime(path, (1, 1))
    return path


def new_process():
    digests._file_sha256.cache_clear()


@pytest.fixture
def reads(monkeypatch):
    """How many files were hashed."""
    count = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: count.append(1) or file_digest(*args))
    return count


# ---- the memo --------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_per_machine(home, weights, reads):
    for _ in range(3):
        new_process()
        assert file_sha256(weights) == SHA256
    assert len(reads) == 1
    assert [path.name for path in home.iterdir()] == ["fingerprints.json"]


@pytest.mark.parametrize("changed", [b"other weights", CONTENT.upper()])
def test_a_changed_file_is_read_again(home, weights, reads, changed):
    file_sha256(weights)
    weights.write_bytes(changed)
    os.utime(weights, (2, 2))
    new_process()
    assert file_sha256(weights) == hashlib.sha256(changed).hexdigest()


def test_a_file_that_has_only_just_changed_is_not_remembered(home, weights):
    """It could change again within one tick of the clock."""
    weights.write_bytes(CONTENT)
    assert file_sha256(weights) == SHA256
    assert not home.exists()


def test_small_files_are_not_remembered(home, weights, monkeypatch):
    monkeypatch.setattr(digests, "_REMEMBER_FROM", len(CONTENT) + 1)
    assert file_sha256(weights) == SHA256
    assert not home.exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "WEIGHTS: 3", "WEIGHTS: [1, 2, 3]", "WEIGHTS: null"])
def test_a_damaged_memo_is_as_good_as_none(home, weights, content):
    home.mkdir()
    content = content.replace("WEIGHTS", json.dumps(str(weights)))
    (home / "fingerprints.json").write_text("{" + content + "}" if ":" in content else content)
    assert file_sha256(weights) == SHA256
    assert json.loads((home / "fingerprints.json").read_text())[str(weights)][2] == SHA256


def test_files_that_are_gone_are_forgotten(home, weights, tmp_path):
    other = tmp_path / "other.safetensors"
    shutil.copy2(weights, other)
    file_sha256(other)
    other.unlink()
    file_sha256(weights)
    assert json.loads((home / "fingerprints.json").read_text()).keys() == {str(weights)}


def test_a_home_that_cannot_be_written_to_does_no_harm(weights, home):
    home.write_text("a file, no folder")
    assert file_sha256(weights) == SHA256


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def hub_cache(tiny_model, folder, *, without=()):
    """The tiny model as huggingface_hub keeps it: links to blobs, large files called by their sha256."""
    snapshot = folder / "snapshots" / ("c" * 40)
    (folder / "blobs").mkdir(parents=True)
    for path in Path(tiny_model).rglob("*"):
        if path.is_dir() or path.name in without:
            continue
        content = path.read_bytes()
        name = (hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1)(content).hexdigest()
        (folder / "blobs" / name).write_bytes(content)
        link = snapshot / path.relative_to(tiny_model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / "blobs" / name, link.parent))
    return snapshot


def test_a_blob_of_the_local_cache_is_known_by_its_name(tiny_model, tmp_path, reads):
    snapshot = hub_cache(tiny_model, tmp_path)
    for path in Path(tiny_model).rglob("*.safetensors"):
        there = snapshot / path.relative_to(tiny_model)
        assert file_sha256(there) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reads == []
    config = snapshot / "vae" / "config.json"  # called by its git hash
    assert file_sha256(config) == hashlib.sha256(config.read_bytes()).hexdigest()


def test_other_links_are_not_taken_for_blobs(tmp_path, weights):
    (tmp_path / "blobs").mkdir()
    wrong = tmp_path / "blobs" / ("0" * 63)
    shutil.copy(weights, wrong)
    (tmp_path / "link").symlink_to(wrong)
    assert hub.cached_sha256(tmp_path / "link") is None
    assert hub.cached_sha256(weights) is None
    assert file_sha256(tmp_path / "link") == SHA256


WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@pytest.fixture
def fetched(monkeypatch, tiny_model, tmp_path):
    """Stands in for fetching; the folders of a model of which only configs are here, and of the whole one."""
    snapshots = {
        True: hub_cache(tiny_model, tmp_path / "a", without=WEIGHTS),
        False: hub_cache(tiny_model, tmp_path / "b"),
    }
    asked = []

    def fetch(model, part, revision, variant, config_only):
        asked.append((part, config_only))
        return snapshots[config_only or part.startswith("tokenizer")]

    monkeypatch.setattr(hub, "_fetch", fetch)
    return SimpleNamespace(asked=asked, configs=snapshots[True])


def hub_that_tells(tiny_model):
    def get_paths_info(self, model, paths, *, revision):
        assert (model, revision) == ("owner/model", "v1")
        return [
            RepoFile(
                path=path, size=1, oid="0" * 40,
                lfs={"size": 1, "oid": hashlib.sha256((Path(tiny_model) / path).read_bytes()).hexdigest(),
                     "pointerSize": 1},
            )
            for path in paths
        ]  # fmt: skip

    return get_paths_info


def test_no_weights_are_fetched_to_know_a_model_on_the_hub(tiny_model, fetched, monkeypatch, reads):
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", hub_that_tells(tiny_model))
    assert fingerprint("owner/model", "vae", revision="v1") == fingerprint(tiny_model, "vae")
    assert text_fingerprint("owner/model", revision="v1") == text_fingerprint(tiny_model)
    assert {part for part, config_only in fetched.asked if not config_only} == {"tokenizer", "tokenizer_2"}


def test_what_the_hub_does_not_tell_is_fetched(tiny_model, fetched, monkeypatch):
    for told in ([], [RepoFile(path="vae/diffusion_pytorch_model.safetensors", size=1, oid="0" * 40)]):
        monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *_, _told=told, **__: _told)
        fetched.asked.clear()
        assert fingerprint("owner/model", "vae") == fingerprint(tiny_model, "vae")
        assert fetched.asked == [("vae", True), ("vae", False)]


def test_offline_the_local_cache_is_enough(tiny_model, fetched, monkeypatch, reads):
    monkeypatch.setattr(hub, "_fetch", lambda *_: hub_cache(tiny_model, fetched.configs.parent / "whole"))
    monkeypatch.setattr(hub, "remote_sha256", lambda *_: pytest.fail("asked the Hub"))
    before = len(reads)
    there = fingerprint("owner/model", "vae")
    assert len(reads) == before
    assert there == fingerprint(tiny_model, "vae")
