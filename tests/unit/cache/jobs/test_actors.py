"""What runs on the nodes, called here without Ray."""

import json
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.cache import encode, reading
from sdxl_ray.cache.images import load_pixels
from sdxl_ray.cache.jobs import actors
from sdxl_ray.cache.jobs.actors import (
    WriteLatentShard,
    WriteTextShard,
    decode_shard,
    limit_threads,
    torch_device,
)
from sdxl_ray.cache.jobs.reports import ShardReport, packed, raise_error, unpacked
from sdxl_ray.cache.masks import load_mask_file
from sdxl_ray.cache.planning import TextShard
from sdxl_ray.cache.shard_reader import MissingEntry, ShardReader
from sdxl_ray.cache.shards import mark_damaged
from sdxl_ray.cache.store import ShardStore
from sdxl_ray.errors import CacheError, ModelError, StorageError
from tests.unit.cache.planned import config_of, plan_of


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(reading, "PAUSE_S", 0.0)


def work_item(images, model, **dataset):
    """(the one shard of these images, its work item)"""
    config = config_of(images.parent / "planned", model, images, max_unreadable=0.9, **dataset)
    (shard,) = plan_of(config).latent_shards()
    return shard, {"shard": packed(asdict(shard))}


def text_batch():
    return {"shard": [packed(asdict(TextShard("text/x.safetensors", ("0a" * 16,), ("a cat",))))]}


def settings(cache, model, actor=WriteLatentShard, **changes):
    arguments = {
        "cache": str(cache),
        "fingerprint": "f",
        "model": model,
        "batch_size": 2,
        "revision": "",
        "variant": "",
    }
    return {**arguments, **({"dtype": "fp32"} if actor is WriteLatentShard else {}), **changes}


def encoded(decoded, cache, model, **changes):
    write = WriteLatentShard(**settings(cache, model, **changes))
    return ShardReport.from_row(write({name: [value] for name, value in decoded.items()}))


def raised(row):
    """The error of a row, as the driver raises it."""
    with pytest.raises(Exception) as error:
        raise_error(ShardReport.from_row(row).error)
    return error.value


# ---- a shard ---------------------------------------------------------------------------------------------------------


def test_a_shard_of_images_is_decoded_encoded_and_written(images, tmp_path, tiny_model):
    shard, row = work_item(images, tiny_model)
    decoded = decode_shard(row)
    assert decoded["pixels"].shape == (3, 64, 64, 3)
    assert decoded["masks"].shape == (3, 0, 0)
    for pixels, record in zip(decoded["pixels"], shard.records, strict=True):
        assert np.array_equal(pixels, load_pixels(record))
    result = encoded(decoded, tmp_path / "cache", tiny_model)
    assert (result.num, result.num_there, result.error, result.skipped) == (3, 0, "", ())
    assert (result.name, result.node) == (shard.name, socket.gethostname())
    encoder = encode.LatentEncoder(
        tiny_model, dtype="fp32", device=torch.device("cpu"), batch_size=2, revision="", variant=""
    )
    expected = encoder.encode(list(decoded["pixels"]), ["0", "1", "2"])
    reader = ShardReader(tmp_path / "cache")
    for number, key in enumerate(shard.keys):
        found = reader.read(shard.name, key)
        assert found.keys() == {"mean", "std"}
        assert all(torch.equal(found[name], expected[name][number]) for name in found)


def test_a_shard_of_captions_is_encoded_and_written(tmp_path, tiny_model):
    write = WriteTextShard(**settings(tmp_path, tiny_model, WriteTextShard))
    report = ShardReport.from_row(write(text_batch()))
    assert (report.name, report.num, report.num_there) == ("text/x.safetensors", 1, 0)
    found = ShardReader(tmp_path).read("text/x.safetensors", "0a" * 16)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "prompt_embeds": torch.bfloat16,
        "pooled_prompt_embeds": torch.bfloat16,
    }
    store = ShardStore(tmp_path)
    assert store.num_tokens(store.keys).tolist() == [4]  # two words between two markers


@pytest.mark.parametrize(("num_chunks", "num_long"), [(1, 2), (2, 1)])
def test_captions_of_which_a_part_is_not_seen_are_counted(tmp_path, tiny_model, num_chunks, num_long):
    write = WriteTextShard(**settings(tmp_path, tiny_model, WriteTextShard), num_chunks=num_chunks)
    captions = ["cat " * number for number in (75, 76, 151)]  # and two markers: 77, 78, 153
    shard = TextShard("text/x.safetensors", tuple(f"{number:032x}" for number in range(3)), tuple(captions))
    batch = {"shard": [packed(asdict(shard))]}
    report = ShardReport.from_row(write(batch))
    assert (report.num, report.num_there, report.long) == (3, 0, num_long)
    again = ShardReport.from_row(write(batch))
    assert (again.num, again.num_there, again.long) == (0, 3, num_long)


def test_masks_are_written_beside_their_latents(images, tmp_path, tiny_model):
    for number in range(3):
        Image.new("L", (64, 64), 40 * number).save(images / f"{number}-mask.png")
    shard, row = work_item(images, tiny_model, mask="file")
    decoded = decode_shard(row)
    assert decoded["masks"].shape == (3, 8, 8)
    encoded(decoded, tmp_path / "cache", tiny_model)
    reader = ShardReader(tmp_path / "cache")
    for number, (key, record) in enumerate(zip(shard.keys, shard.records, strict=True)):
        found = reader.read(shard.name, key)["mask"]
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), load_mask_file(record))
        assert found.unique().tolist() == [40 * number]


def test_what_is_skipped_takes_its_mask_and_its_key_with_it(images, tmp_path, tiny_model):
    """The rows that stay keep their own."""
    for number in range(3):
        Image.new("L", (64, 64), 40 * number).save(images / f"{number}-mask.png")
    shard, row = work_item(images, tiny_model, mask="file")
    Image.new("RGB", (64, 64), "red").save(images / "0.png")  # changed meanwhile
    Image.new("L", (99, 64), 40).save(images / "1-mask.png")  # of another aspect
    decoded = decode_shard(row)
    assert (decoded["pixels"].shape[0], decoded["masks"].shape[0]) == (1, 1)
    assert np.array_equal(decoded["pixels"][0], load_pixels(shard.records[2]))
    result = encoded(decoded, tmp_path / "cache", tiny_model)
    skipped = {Path(each["path"]).name: each for each in result.skipped}
    assert skipped.keys() == {"0.png", "1.png"}
    assert [skipped[name]["kind"] for name in ("0.png", "1.png")] == ["changed", "changed"]
    assert skipped["1.png"]["key"] == shard.keys[1]
    assert skipped["1.png"]["image_hash"] == shard.records[1].image_hash
    reader = ShardReader(tmp_path / "cache")
    assert reader.read(shard.name, shard.keys[2])["mask"].unique().tolist() == [80]
    for key in shard.keys[:2]:
        with pytest.raises(MissingEntry):
            reader.read(shard.name, key)


@pytest.mark.parametrize("mask", ["none", "alpha"])
def test_a_shard_without_any_image_is_written_where_somebody_waits_for_it(images, tmp_path, tiny_model, mask):
    shard, row = work_item(images, tiny_model, mask=mask)
    for number in range(3):
        Image.new("RGB", (64, 64), "red").save(images / f"{number}.png")
    decoded = decode_shard(row)
    assert decoded["pixels"].shape == (0, 64, 64, 3)
    result = encoded(decoded, tmp_path / "cache", tiny_model)
    assert (result.num, len(result.skipped)) == (0, 3)
    assert not (tmp_path / "cache").exists()
    assert encoded(decoded, tmp_path / "cache", tiny_model, write_empty=True).error == ""
    with pytest.raises(MissingEntry):
        ShardReader(tmp_path / "cache").read(shard.name, shard.keys[0])
    assert ShardStore(tmp_path / "cache").damaged == []


# ---- errors in reports -----------------------------------------------------------------------------------------------


def batch_of(actor, images, model):
    if actor is WriteTextShard:
        return text_batch()
    return {name: [value] for name, value in decode_shard(work_item(images, model)[1]).items()}


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_a_model_that_a_node_cannot_load_is_a_row_not_a_crash(actor, tmp_path, images, tiny_model):
    row = actor(**settings(tmp_path / "cache", "/nowhere", actor))(batch_of(actor, images, tiny_model))
    assert ShardReport.from_row(row).num == 0
    error = raised(row)
    assert type(error) is ModelError
    assert "/nowhere" in str(error)


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_a_device_without_room_for_the_model_is_a_row_too(actor, tmp_path, images, tiny_model, monkeypatch):
    def load(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encode, "load_vae", load)
    monkeypatch.setattr(encode, "load_text_encoders", load)
    row = actor(**settings(tmp_path / "cache", "model", actor))(batch_of(actor, images, tiny_model))
    assert "too little free memory while loading the" in str(raised(row))


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_a_full_disk_is_a_row_too(actor, tmp_path, images, tiny_model, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    write, batch = actor(**settings(tmp_path / "cache", tiny_model, actor)), batch_of(actor, images, tiny_model)
    write.loading.result()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        error = raised(write(batch))
    assert type(error) is StorageError
    assert "no space left on the device while writing encoded tensors" in str(error)
    assert ShardReport.from_row(write(batch)).error == ""  # when there is space again


def test_the_encoder_is_loaded_once(tmp_path, tiny_model, monkeypatch):
    loads = []
    monkeypatch.setattr(encode, "load_text_encoders", lambda *_, _load=encode.load_text_encoders, **kw: (
        loads.append(1) or _load(tiny_model, **kw)
    ))  # fmt: skip
    write = WriteTextShard(**settings(tmp_path, tiny_model, WriteTextShard))
    write.loading.result()
    assert loads == [1]  # while the first shard is on its way
    write(text_batch())
    (tmp_path / "text" / "x.safetensors").unlink()
    write(text_batch())
    assert loads == [1]
    assert (tmp_path / "text" / "x.safetensors").exists()


# ---- shards that another job has written meanwhile ------------------------------------------------------------------


def test_a_shard_of_images_that_is_there_by_now_is_not_decoded(images, tmp_path, tiny_model, monkeypatch):
    shard, row = work_item(images, tiny_model)
    cache = tmp_path / "cache"
    assert encoded(decode_shard(row, str(cache)), cache, tiny_model).num == 3
    written = (cache / shard.name).stat().st_mtime_ns
    monkeypatch.setattr(actors, "load_image", lambda record: pytest.fail("decoded"))
    result = encoded(decode_shard(row, str(cache)), cache, tiny_model, write_empty=True)
    assert (result.name, result.num, result.num_there, result.error) == (shard.name, 0, 3, "")
    assert (cache / shard.name).stat().st_mtime_ns == written


def test_without_any_image_left_an_empty_shard_replaces_no_whole_one(images, tmp_path, tiny_model):
    shard, row = work_item(images, tiny_model)
    cache = tmp_path / "cache"
    encoded(decode_shard(row, str(cache)), cache, tiny_model)
    row = {"shard": packed({**asdict(shard), "without": list(shard.keys)})}
    assert encoded(decode_shard(row, str(cache)), cache, tiny_model, write_empty=True).num_there == 0
    assert len(ShardStore(cache)) == 3


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


def of_two_images(path, cache, decoded, model):
    two = {**decoded, "pixels": decoded["pixels"][:2], "masks": decoded["masks"][:2]}
    header = json.loads(decoded["header"])
    path.unlink()
    encoded({**two, "header": json.dumps({**header, "keys": header["keys"][:2]})}, cache, model)


@pytest.mark.parametrize("spoil", ["marked", "marked as no shard", "cut short", "fewer entries", "other version"])
def test_what_is_there_but_not_whole_is_encoded_again(images, tmp_path, tiny_model, monkeypatch, spoil):
    shard, row = work_item(images, tiny_model)
    cache = tmp_path / "cache"
    decoded = decode_shard(row)
    encoded(decoded, cache, tiny_model)
    path = cache / shard.name
    if spoil == "marked":
        mark_damaged(str(cache), shard.name, shard.keys[1])
    elif spoil == "marked as no shard":
        mark_damaged(str(cache), shard.name)
    elif spoil == "cut short":
        cut_short(path)
    elif spoil == "fewer entries":
        of_two_images(path, cache, decoded, tiny_model)
        assert len(ShardStore(cache)) == 2
    else:
        path.write_bytes(path.read_bytes().replace(b'"sdxl_ray.version":"3"', b'"sdxl_ray.version":"2"'))
    result = encoded(decode_shard(row, str(cache)), cache, tiny_model)
    assert (result.num, result.num_there, result.error) == (3, 0, "")
    store = ShardStore(cache)
    assert (len(store), store.damaged, store.marked, store.other_versions) == (3, [], {}, [])


def test_captions_that_are_there_by_now_need_no_encoder(tmp_path, tiny_model):
    WriteTextShard(**settings(tmp_path, tiny_model, WriteTextShard))(text_batch())
    write = WriteTextShard(**settings(tmp_path, "/nowhere", WriteTextShard))
    report = ShardReport.from_row(write(text_batch()))
    assert (report.num, report.num_there, report.error) == (0, 1, "")
    mark_damaged(str(tmp_path), "text/x.safetensors", "0a" * 16)
    assert "/nowhere" in str(raised(write(text_batch())))


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_an_actor_says_at_once_that_it_has_a_place(actor, tmp_path):
    said = []
    actor(**settings(tmp_path, "/nowhere", actor), began=lambda: said.append(1) or 1)
    assert said == [1]


@pytest.mark.parametrize("actor", [WriteTextShard, WriteLatentShard])
def test_an_encoder_that_has_died_too_often_says_so_instead_of_dying_again(actor, tmp_path, images, tiny_model):
    batch = batch_of(actor, images, tiny_model)
    arguments = settings(tmp_path / "cache", tiny_model, actor, max_starts=10)
    error = raised(actor(**arguments, began=lambda: 11)(batch))
    assert type(error) is CacheError
    assert str(error) == (
        f"encoding failed: the process that encodes on {socket.gethostname()} has died 10 times. Killed for want of "
        "memory, or its machines taken away? `dmesg` there tells; for fewer at once, lower cache.num_encoders or "
        "cache.batch_size. Finished shards are kept; run again to go on. With --traceback, the whole error is shown."
    )
    assert ShardReport.from_row(actor(**arguments, began=lambda: 10)(batch)).error == ""


# ---- images that a node cannot read ----------------------------------------------------------------------------------


def told(row, cache, model):
    """Of the image that a node could not read; nothing of its shard is written then."""
    result = encoded(decode_shard(row), cache, model)
    assert (result.error, result.skipped, result.num) == ("", (), 0)
    assert result.name == unpacked(row["shard"])["name"]
    assert len(ShardStore(cache)) == 0
    found = result.unreadable
    assert found["node"] == socket.gethostname()
    return found["key"], found["reason"]


def test_an_image_that_this_node_cannot_read_is_for_the_driver_to_look_at(images, tmp_path, tiny_model):
    shard, row = work_item(images, tiny_model)
    (images / "1.png").unlink()
    assert told(row, tmp_path / "cache", tiny_model) == (shard.keys[1], "No such file or directory")


def test_images_that_the_work_item_is_to_be_done_without_are_not_looked_at(images, tmp_path, tiny_model):
    shard, row = work_item(images, tiny_model)
    (images / "1.png").unlink()
    row = {"shard": packed({**unpacked(row["shard"]), "without": [shard.keys[1]]})}
    result = encoded(decode_shard(row), tmp_path / "cache", tiny_model)
    assert (result.num, result.skipped, result.unreadable) == (2, (), None)
    store = ShardStore(tmp_path / "cache")
    assert [store.shard_of(key) for key in shard.keys] == [shard.name, None, shard.name]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (StorageError("s3://bucket/0.png: access denied while reading."), "s3://bucket/0.png: access denied"),
    ],
)
def test_any_failure_to_read_is_told_the_driver(images, tmp_path, tiny_model, monkeypatch, problem, text):
    def fail(record):
        raise problem

    for name, mask in (("load_pixels", "none"), ("load_pixels_and_alpha", "alpha"), ("load_mask_file", "file")):
        for number in range(3 if mask == "file" else 0):
            Image.new("L", (64, 64)).save(images / f"{number}-mask.png")
        _, row = work_item(images, tiny_model, mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(reading, name, fail)
            assert told(row, tmp_path / "cache", tiny_model)[1].startswith(text)


def trusted_item(images, model, **dataset):
    """As `work_item`, of images that only their listing identifies."""
    return work_item(images, model, identify_by="listing", **dataset)


@pytest.mark.parametrize(
    "problem",
    [
        FileNotFoundError(2, "No such file or directory", "/1.png"),
        OSError(2, "HTTP 404 Not Found", "https://example.org/1.png"),
        OSError(13, "HTTP 403 Forbidden", "https://example.org/1.png"),
        OSError(13, "HTTP 400 Bad Request", "https://example.org/1.png"),
        OSError(5, "no answer: Name or service not known, 4 attempts", "https://example.org/1.png"),
        FileNotFoundError(2, "No such file or directory", "hf://datasets/a/b/1.png"),
    ],
)
def test_an_image_that_nobody_has_opened_before_is_skipped_where_it_is_gone(
    images, tmp_path, tiny_model, monkeypatch, problem
):
    """A list of a million addresses always has dead ones."""
    shard, row = trusted_item(images, tiny_model)
    load = reading.load_pixels

    def fail(record):
        if record.path.endswith("1.png"):
            raise problem
        return load(record)

    monkeypatch.setattr(reading, "load_pixels", fail)
    result = encoded(decode_shard(row), tmp_path / "cache", tiny_model)
    assert (result.error, result.num) == ("", 2)
    (skipped,) = result.skipped
    reason = getattr(problem, "strerror", None) or str(problem)
    assert (skipped["key"], skipped["path"]) == (shard.keys[1], str(images / "1.png"))
    assert (skipped["reason"], skipped["kind"]) == (f"cannot be read: {reason}", "unreadable")


def test_a_file_that_is_gone_since_it_was_listed_is_skipped(images, tmp_path, tiny_model):
    _, row = trusted_item(images, tiny_model)
    (images / "1.png").unlink()
    result = encoded(decode_shard(row), tmp_path / "cache", tiny_model)
    assert result.skipped[0]["reason"] == "cannot be read: No such file or directory"


@pytest.mark.parametrize(
    "problem",
    [
        PermissionError(13, "Permission denied", "/0.png"),
        OSError(5, "Input/output error", "/0.png"),
        StorageError("s3://bucket/not found/HTTP 404/0.png: access denied while reading."),
    ],
)
def test_other_failures_are_told_the_driver_also_where_the_listing_was_trusted(
    images, tmp_path, tiny_model, monkeypatch, problem
):
    _, row = trusted_item(images, tiny_model)

    def fail(record):
        raise problem

    monkeypatch.setattr(reading, "load_pixels", fail)
    assert told(row, tmp_path / "cache", tiny_model)


def test_a_mask_file_has_always_been_read_before(images, tmp_path, tiny_model):
    for number in range(3):
        Image.new("L", (64, 64), 9).save(images / f"{number}-mask.png")
    _, row = trusted_item(images, tiny_model, mask="file")
    (images / "1-mask.png").unlink()
    assert told(row, tmp_path / "cache", tiny_model)[1] == "No such file or directory"


def test_an_image_that_is_damaged_or_changed_is_a_skip(images, tmp_path, tiny_model):
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content[: len(content) // 2] + bytes(len(content)))
    shard, row = work_item(images, tiny_model)
    Image.new("RGB", (64, 64), "red").save(images / "2.png")
    result = encoded(decode_shard(row), tmp_path / "cache", tiny_model)
    assert (result.error, result.num) == ("", 1)
    skipped = {Path(each["path"]).name: each for each in result.skipped}
    assert skipped["1.png"]["reason"].startswith("cannot be decoded")
    assert skipped["2.png"]["reason"].startswith("changed while it was being cached")
    assert [skipped[name]["kind"] for name in ("1.png", "2.png")] == ["damaged", "changed"]
    store = ShardStore(tmp_path / "cache")
    assert [store.shard_of(key) is not None for key in shard.keys] == [True, False, False]


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_the_cpu_is_taken_at_its_word_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert torch_device("cpu") == torch_device("mps") == torch.device("cpu")
    assert torch_device("cuda") == torch.device("cuda", 3)


def test_an_encoder_on_a_cpu_gets_its_threads(monkeypatch):
    """Ray would allow it one for each core that it reserves, which is a fraction."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    limit_threads("cpu", 3)
    limit_threads("cpu", 0)
    limit_threads("mps", 3)
    assert asked == [3]


def test_apples_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert torch_device("mps") == torch.device("mps")
    assert torch_device("cpu") == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CacheError, match=r"has a GPU for Ray, but torch .* cannot use it.*cluster\.accelerator"):
        torch_device("cuda")


def test_a_web_server_that_gave_an_image_to_the_driver_and_not_to_this_node_is_no_fault_of_the_image(
    images, tiny_model, monkeypatch
):
    shard, row = work_item(images, tiny_model)

    def fail(record):
        raise OSError(5, "no answer: Connection refused, 4 attempts", "https://example.org/1.png")

    monkeypatch.setattr(reading, "PAUSE_S", 0.0)
    monkeypatch.setattr(reading, "load_pixels", fail)
    header = json.loads(decode_shard(row)["header"])
    assert header["skipped"] == []
    assert header["unreadable"]["key"] == shard.keys[0]
    assert header["unreadable"]["reason"] == "no answer: Connection refused, 4 attempts"
