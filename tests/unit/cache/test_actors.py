"""What runs on the nodes, called here without Ray."""

import json
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.cache import actors, encode
from sdxl_ray.cache.actors import (
    ScanChunk,
    WriteLatentShard,
    WriteTextShard,
    decode_shard,
    error_text,
    raise_error,
    scanned_files,
    torch_device,
)
from sdxl_ray.cache.buckets import assign_bucket
from sdxl_ray.cache.planning import LatentShard, TextShard
from sdxl_ray.cache.scan import list_images, scan_images
from sdxl_ray.cache.shards import ShardStore
from sdxl_ray.errors import CacheError, ClusterError, DatasetError, ModelError, StorageError
from sdxl_ray.records import ImageRecord


@pytest.fixture
def images(tmp_path):
    """Three images; the folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def shard_row(folder):
    """The work item of one shard that holds all images of the folder."""
    files = scan_images(list_images(folder), memo={}, max_pixels=10**6)
    records = [ImageRecord(file.path, file.image_hash, (file.height, file.width)) for file in files]
    shard = LatentShard(
        "latents/64x64/x.safetensors",
        tuple(Path(file.path).stem for file in files),
        tuple(assign_bucket(record, [(64, 64)], "center") for record in records),
    )
    return {"shard": json.dumps(asdict(shard))}


def text_batch():
    return {"shard": [json.dumps(asdict(TextShard("text/x.safetensors", ("a",), ("a cat",))))]}


def settings(cache, model, **changes):
    arguments = {"cache": str(cache), "fingerprint": "f", "model": model, "dtype": "fp32", "batch_size": 2}
    return {**arguments, "revision": "", "variant": "", **changes}


def encoded(decoded, cache, model):
    return WriteLatentShard(**settings(cache, model))({name: [value] for name, value in decoded.items()})


def raised(row):
    """The error of a row, as the driver raises it."""
    with pytest.raises(Exception) as error:
        raise_error(str(row["error"][0]))
    return error.value


# ---- errors in rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CacheError, StorageError, ModelError, DatasetError, ClusterError])
def test_an_error_comes_back_as_what_it_was(kind):
    with pytest.raises(kind, match=r"^it went wrong$") as error:
        raise_error(error_text(kind("it went wrong")))
    assert type(error.value) is kind


def test_an_error_of_another_machine_names_it(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "node-7")
        text = error_text(ModelError("no token"))
    with pytest.raises(ModelError, match=r"^on node node-7: no token$"):
        raise_error(text)


def test_no_error():
    assert raise_error("") is None


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_a_model_that_a_node_cannot_load_is_a_row_not_a_crash(actor, tmp_path, images):
    made = actor(**settings(tmp_path / "cache", "/nowhere"))
    decoded = decode_shard(shard_row(images))
    row = made(text_batch() if actor is WriteTextShard else {name: [value] for name, value in decoded.items()})
    assert row["num"].tolist() == [0]
    error = raised(row)
    assert type(error) is ModelError
    assert "/nowhere" in str(error)


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_a_device_without_room_for_the_model_is_a_row_too(actor, tmp_path, images, monkeypatch):
    def load(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encode, "load_vae", load)
    monkeypatch.setattr(encode, "load_text_encoders", load)
    made = actor(**settings(tmp_path / "cache", "model"))
    decoded = decode_shard(shard_row(images))
    row = made(text_batch() if actor is WriteTextShard else {name: [value] for name, value in decoded.items()})
    assert "too little free memory while loading the" in str(raised(row))


def test_the_encoder_is_loaded_once(tmp_path, tiny_model, monkeypatch):
    loads = []
    monkeypatch.setattr(encode, "load_text_encoders", lambda *_, _load=encode.load_text_encoders, **kw: (
        loads.append(1) or _load(tiny_model, **kw)
    ))  # fmt: skip
    write = WriteTextShard(**settings(tmp_path, tiny_model))
    assert loads == []
    write(text_batch())
    write(text_batch())
    assert loads == [1]


# ---- images that a node cannot read ----------------------------------------------------------------------------------


def test_an_image_that_this_node_cannot_read_is_an_error_not_a_skip(images, tmp_path, tiny_model):
    row = shard_row(images)
    (images / "1.png").unlink()
    error = raised(encoded(decode_shard(row), tmp_path / "cache", tiny_model))
    assert type(error) is CacheError
    assert str(error).startswith(
        f"node {socket.gethostname()} cannot read {images / '1.png'}: No such file or directory. "
        "Is dataset.path the same folder on all machines"
    )
    assert ShardStore(tmp_path / "cache").locations == {}


def test_any_failure_to_read_is_an_error(images, tmp_path, tiny_model, monkeypatch):
    row = shard_row(images)

    def fail(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "0.png: Input/output error." in str(raised(encoded(decode_shard(row), tmp_path, tiny_model)))


def test_an_image_that_is_damaged_or_changed_is_a_skip(images, tmp_path, tiny_model):
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content[: len(content) // 2] + bytes(len(content)))
    row = shard_row(images)
    Image.new("RGB", (64, 64), "red").save(images / "2.png")
    result = encoded(decode_shard(row), tmp_path / "cache", tiny_model)
    assert result["error"].tolist() == [""]
    assert result["num"].tolist() == [1]
    reasons = {Path(each["path"]).name: each["reason"] for each in json.loads(result["skipped"][0])}
    assert reasons["1.png"].startswith("cannot be decoded")
    assert reasons["2.png"].startswith("changed while it was being cached")
    assert ShardStore(tmp_path / "cache").locations.keys() == {"0"}


def scanned_on_a_node(files):
    return ScanChunk(10**6)({"files": json.dumps(files)})


def test_a_scan_on_the_nodes_finds_what_a_scan_here_finds(images):
    (images / "bad.png").write_bytes(b"bad")
    (images / "dangling.png").symlink_to(images / "gone.png")
    files = list_images(images)
    found = scanned_files(scanned_on_a_node(files), 10**6)
    assert found == scan_images(files, memo={}, max_pixels=10**6)
    assert [Path(file.path).name for file in found if file.problem] == ["bad.png", "dangling.png"]


def test_what_only_the_node_cannot_read_stops_the_scan(images):
    files = list_images(images)
    there = scanned_on_a_node([("/elsewhere/0.png", *files[0][1:])])
    row = {"scanned": there["scanned"].replace("/elsewhere", str(images)), "node": "node-7"}
    with pytest.raises(CacheError) as error:
        scanned_files(row, 10**6)
    assert str(error.value).startswith(f"node node-7 cannot read {images / '0.png'}: No such file or directory. Is ")


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_the_cpu_is_taken_at_its_word_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert torch_device("cpu") == torch_device("mps") == torch.device("cpu")
    assert torch_device("cuda") == torch.device("cuda", 3)


def test_apples_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert torch_device("mps") == torch.device("mps")
    assert torch_device("cpu") == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CacheError, match=r"has a GPU for Ray, but torch .* cannot use it.*cluster\.accelerator"):
        torch_device("cuda")


def test_a_row_is_what_ray_data_expects():
    row = actors._row(3, skipped=[{"path": "x", "reason": "y"}])
    assert all(isinstance(column, np.ndarray) and len(column) == 1 for column in row.values())
