import dataclasses
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdxl_ray.cache.shards import (
    Location,
    ShardReader,
    ShardStore,
    latent_key,
    read_header,
    read_index,
    shard_name,
    text_key,
    write_index,
    write_shard,
)
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.records import EncodedSample

BUCKET = "64x128"


def tensors(num_rows=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_rows, 4, 8, 16, generator=draws).bfloat16() for name in ("mean", "std")}


def write(cache, keys=("a", "b", "c"), seed=0, **extra):
    """A shard of latents; its path."""
    name = shard_name("latents", keys, BUCKET)
    write_shard(cache, name, keys, tensors(len(keys), seed), extra)
    return cache / name


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    write(tmp_path)
    store, reader = ShardStore(tmp_path), ShardReader(tmp_path)
    for row, key in enumerate("abc"):
        found = reader.read(store.locations[key])
        assert found.keys() == {"mean", "std"}
        for name, tensor in tensors().items():
            assert found[name].dtype == torch.bfloat16
            assert torch.equal(found[name].view(torch.int16), tensor[row].view(torch.int16))


def test_tensors_need_not_be_contiguous(tmp_path):
    transposed = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).transpose(1, 2)
    write_shard(tmp_path, "text/x.safetensors", ["a", "b"], {"prompt_embeds": transposed}, {})
    assert torch.equal(ShardReader(tmp_path).read(Location("text/x.safetensors", 1))["prompt_embeds"], transposed[1])


def test_two_writers_of_one_shard_leave_one_whole_file(tmp_path):
    threads = [threading.Thread(target=write, args=(tmp_path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = write(tmp_path)
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(ShardReader(tmp_path).read(ShardStore(tmp_path).locations["b"])["std"], tensors()["std"][1])


def test_a_shard_may_be_read_by_others_as_any_file(tmp_path):
    """Caches are shared between users; `save_file` of safetensors would give 0600."""
    (tmp_path / "plain").touch()
    assert write(tmp_path).stat().st_mode == (tmp_path / "plain").stat().st_mode


def flip_a_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_when_its_row_is_read(tmp_path):
    path = write(tmp_path)
    name = path.relative_to(tmp_path).as_posix()
    flip_a_bit(path, -1)  # the last row of "std"
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.read(Location(name, 0))["mean"], tensors()["mean"][0])
    with pytest.raises(CacheError) as error:
        reader.read(Location(name, 2))
    assert str(error.value).startswith(f"{path}: row 2 is damaged (checksum ")
    assert str(error.value).endswith("Delete this file and run `sdxl-ray cache`: only it is encoded again.")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0{}"])
def test_a_shard_that_cannot_be_opened(tmp_path, content):
    path = tmp_path / "text" / "x.safetensors"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CacheError) as error:
        ShardReader(tmp_path).read(Location("text/x.safetensors", 0))
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert str(error.value).endswith("Run `sdxl-ray cache`: only what is missing is encoded.")


def test_threads_share_a_reader(tmp_path):
    keys = [f"key {number}" for number in range(16)]
    write(tmp_path, keys)
    store, reader, found = ShardStore(tmp_path), ShardReader(tmp_path), {}

    def read(offset):
        for number in range(offset, 16, 4):
            found[number] = reader.read(store.locations[keys[number]])

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(16):
        assert torch.equal(found[number]["mean"], tensors(16)["mean"][number])


def test_no_more_shards_stay_open_than_allowed(tmp_path):
    keys = "abcd"
    for key in keys:
        write(tmp_path, (key,))
    store, reader = ShardStore(tmp_path), ShardReader(tmp_path, max_open=2)
    shards = [store.locations[key].shard for key in keys]
    for key in "abacd":
        assert torch.equal(reader.read(store.locations[key])["mean"], tensors(1)["mean"][0])
        assert len(reader._open) <= 2
        if key == "c":
            assert list(reader._open) == [shards[0], shards[2]]  # of a and b, b was read longer ago


def test_threads_share_a_reader_that_closes_shards(tmp_path):
    keys = [f"key {number}" for number in range(16)]
    for number, key in enumerate(keys):
        write(tmp_path, (key,), seed=number)
    store, reader = ShardStore(tmp_path), ShardReader(tmp_path, max_open=1)
    expected = [tensors(1, seed)["mean"][0] for seed in range(16)]

    def read(offset):
        return all(
            torch.equal(reader.read(store.locations[keys[number % 16]])["mean"], expected[number % 16])
            for number in range(offset, offset + 64)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(0, 16, 4)))


# ---- the store -------------------------------------------------------------------------------------------------------


def test_the_store_is_rebuilt_from_headers_alone(tmp_path, monkeypatch):
    first = write(tmp_path, ("a", "b"))
    second = write(tmp_path, ("c",), num_tokens="[99]")
    write_shard(
        tmp_path, shard_name("text", ["t"]), ["t"], {"prompt_embeds": torch.zeros(1, 2)}, {"num_tokens": "[12]"}
    )
    monkeypatch.setattr("safetensors.safe_open", lambda *_: pytest.fail("opened"))
    store = ShardStore(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in (first, second)]
    assert store.locations == {
        "a": Location(names[0], 0),
        "b": Location(names[0], 1),
        "c": Location(names[1], 0),
        "t": Location(shard_name("text", ["t"]), 0),
    }
    assert store.num_tokens == {"c": 99, "t": 12}
    assert store.damaged == []


def test_no_cache_is_an_empty_one(tmp_path):
    assert ShardStore(tmp_path / "nothing").locations == {}


def cut(content):
    return content[:-1]


def longer(content):
    return content + b"\0"


def header_with(change):
    """The shard with another header."""

    def rewrite(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]

    return rewrite


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        longer,
        lambda content: b"",
        lambda content: content[:20],
        lambda content: b"\xff" * len(content),
        header_with(lambda header: header.pop("__metadata__") and None),
        header_with(lambda header: header["__metadata__"].pop("sdxl_ray.keys") and None),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.keys": '["a"]'})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.crc32": "nonsense"})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.version": "0"})),
        header_with(lambda header: header["mean"].pop("data_offsets") and None),
        header_with(lambda header: [1, 2]),
        header_with(lambda header: {"__metadata__": header["__metadata__"]}),
    ],
)
def test_a_damaged_shard_counts_as_missing_and_is_listed(tmp_path, damage):
    sound, path = write(tmp_path, ("d", "e")), write(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert read_header(path) is None
    store = ShardStore(tmp_path)
    assert store.damaged == [path]
    assert store.locations.keys() == {"d", "e"}
    write(tmp_path)
    store.refresh()
    assert store.damaged == []
    assert store.locations.keys() == {"a", "b", "c", "d", "e"}
    assert read_header(sound) is not None


def test_only_old_temporaries_are_removed(tmp_path):
    path = write(tmp_path)
    old, young, index = path.parent / ".tmp-old", path.parent / ".tmp-young", tmp_path / "datasets" / "x" / ".tmp-old"
    index.parent.mkdir(parents=True)
    for file in (old, young, index):
        file.touch()
    two_days_ago = time.time() - 48 * 3600
    for file in (old, index, path):
        os.utime(file, (two_days_ago, two_days_ago))
    assert ShardStore(tmp_path).remove_stale_temporaries() == 2
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted([path, young])


def test_temporaries_are_looked_for_where_shards_are_written_and_nowhere_else(tmp_path):
    """A cache folder may lie in a large shared one, or have been put where somebody else keeps such names."""
    ours = [tmp_path / folder / ".tmp-x" for folder in (".", f"latents/{BUCKET}", "text", "datasets/cats-1")]
    theirs = [tmp_path / folder / ".tmp-x" for folder in ("other", f"latents/{BUCKET}/deep", "datasets", "text/deep")]
    for file in (*ours, *theirs):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1, 1))
    assert ShardStore(tmp_path).remove_stale_temporaries() == 4
    assert [file.exists() for file in (*ours, *theirs)] == [False] * 4 + [True] * 4


# ---- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (28, "no space left on the device"),
        (122, "the disk quota is used up"),
        (30, "the file system is read-only"),
        (13, "permission denied"),
    ],
)
def test_a_disk_that_refuses_is_named_and_no_temporary_stays(tmp_path, monkeypatch, number, reason):
    kept = write(tmp_path, ("x",))
    write_bytes = Path.write_bytes

    def refuse(path, content):
        write_bytes(path, content[:100])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    path = tmp_path / shard_name("latents", ("a", "b", "c"), BUCKET)
    with pytest.raises(StorageError) as error:
        write(tmp_path)
    assert str(error.value) == (
        f"{path}: {reason} while writing encoded tensors. Free some space and run again: finished shards are kept."
    )
    assert list(path.parent.iterdir()) == [kept]


def test_a_failed_write_leaves_the_shard_that_was_there(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StorageError, match="no space left on the device"):
        write(tmp_path, seed=1)
    assert path.read_bytes() == before


# ---- keys ------------------------------------------------------------------------------------------------------------

LATENT = {
    "image_hash": "ab" * 32,
    "bucket_hw": (64, 128),
    "resized_hw": (64, 130),
    "crop_top_left": (0, 1),
    "vae_fingerprint": "cd" * 8,
}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("image_hash", "ac" * 32),
        ("bucket_hw", (128, 64)),
        ("resized_hw", (65, 130)),
        ("crop_top_left", (0, 2)),
        ("vae_fingerprint", "ce" * 8),
    ],
)
def test_a_latent_key_depends_on_all_that_the_latent_depends_on(part, other):
    assert latent_key(**LATENT) == latent_key(**dict(LATENT))
    assert latent_key(**LATENT | {part: other}) != latent_key(**LATENT)


def test_a_text_key_depends_on_caption_and_encoders():
    keys = {
        text_key("a cat", "1"),
        text_key("a dog", "1"),
        text_key("a cat", "2"),
        text_key("", "1"),
        text_key("a cat ", "1"),
    }
    assert len(keys) == 5
    assert text_key("猫", "1") == text_key("猫", "1")


def test_a_shard_is_named_by_its_keys_in_order():
    names = {shard_name("latents", keys, BUCKET) for keys in (["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"])}
    assert len(names) == 5
    assert all(name.startswith(f"latents/{BUCKET}/") and name.endswith(".safetensors") for name in names)
    assert shard_name("text", ["a"]).startswith("text/")


# ---- the index -------------------------------------------------------------------------------------------------------


def sample(number, **changes):
    made = EncodedSample(
        sample_id=f"id-{number}",
        path=f"/images/猫 {number}.jpg",
        image_hash="ab" * 32,
        original_hw=(100 + number, 200),
        crop_top_left=(0, number),
        target_hw=(64, 128),
        captions=("a cat", "two\nlines"),
        latent_key=f"latent-{number}",
        text_keys=("text-0", f"text-{number}"),
        repeats=3,
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "samples", [[sample(1), sample(0), sample(2)], [sample(0, captions=("a cat",), text_keys=("text-0",))]]
)
def test_the_index_gives_back_samples_and_locations(tmp_path, samples):
    keys = {sample.latent_key for sample in samples} | {key for sample in samples for key in sample.text_keys}
    locations = {key: Location(f"shards/{key}", row) for row, key in enumerate(sorted(keys))}
    path = tmp_path / "datasets" / "cats=1" / "index.parquet"
    write_index(path, samples, locations | {"unused": Location("x", 9)})
    assert read_index(path) == (samples, locations)
    assert list(path.parent.iterdir()) == [path]


def test_the_index_is_a_plain_table(tmp_path):
    import pyarrow.parquet as pq

    locations = {key: Location("x", 1) for key in ("latent-0", "text-0")}
    write_index(tmp_path / "index.parquet", [sample(0)], locations)
    (row,) = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert (row["bucket"], row["original_height"], row["latent_row"]) == ("64x128", 100, 1)
    assert row["captions"] == ["a cat", "two\nlines"]


def test_no_index_and_a_damaged_one(tmp_path):
    path = tmp_path / "index.parquet"
    with pytest.raises(CacheError) as error:
        read_index(path)
    assert str(error.value) == f"{path}: no index. Run `sdxl-ray cache` with this config first."
    path.write_bytes(b"PAR1 and so on")
    with pytest.raises(CacheError) as error:
        read_index(path)
    assert str(error.value).startswith(f"{path}: is damaged (")
    assert str(error.value).endswith("Run `sdxl-ray cache`: the index is written anew.")
