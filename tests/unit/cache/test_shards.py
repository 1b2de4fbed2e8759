import errno
import hashlib
import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdxl_ray.cache import shard_reader, shards
from sdxl_ray.cache.shard_reader import DamagedEntry, MissingEntry, ShardReader, UnreadableShard
from sdxl_ray.cache.shards import (
    DAMAGED_SUFFIX,
    OtherVersion,
    check_shard,
    latent_key,
    mark_damaged,
    read_header,
    read_marker,
    shard_name,
    text_key,
    write_shard,
)
from sdxl_ray.errors import CacheError, ConfigError, StorageError
from sdxl_ray.storage import open_folder
from tests.remote import RemoteFolder

BUCKET = "64x128"


def tensors(num_rows=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_rows, 4, 8, 16, generator=draws).bfloat16() for name in ("mean", "std")}


def write(cache, keys=("a", "b", "c"), seed=0, **extra):
    """A shard of latents; its name."""
    name = shard_name("latents", keys, BUCKET)
    write_shard(open_folder(cache), name, keys, tensors(len(keys), seed), extra)
    return name


def same_bits(found, expected):
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    name, reader = write(tmp_path), ShardReader(tmp_path)
    for row, key in enumerate("abc"):
        found = reader.read(name, key)
        assert found.keys() == {"mean", "std"}
        assert all(same_bits(found[kind], tensor[row]) for kind, tensor in tensors().items())


def test_masks_travel_with_their_latents(tmp_path):
    masks = torch.arange(2 * 8 * 16, dtype=torch.int32).reshape(2, 8, 16).to(torch.uint8)
    write_shard(open_folder(tmp_path), "latents/64x128/x.safetensors", "ab", {**tensors(2), "mask": masks}, {})
    found = ShardReader(tmp_path).read("latents/64x128/x.safetensors", "b")
    assert found.keys() == {"mean", "std", "mask"}
    assert same_bits(found["mask"], masks[1])


def test_tensors_need_not_be_contiguous(tmp_path):
    transposed = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).transpose(1, 2)
    write_shard(open_folder(tmp_path), "text/x.safetensors", ["a", "b"], {"prompt_embeds": transposed}, {})
    assert torch.equal(ShardReader(tmp_path).read("text/x.safetensors", "b")["prompt_embeds"], transposed[1])


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_an_entry_is_found_by_its_key_wherever_its_row_is(tmp_path, order):
    """A shard that was written anew, with its images in another order, never gives another image's latent."""
    rows = torch.tensor([["abc".index(key)] for key in order])
    write_shard(open_folder(tmp_path), "text/x.safetensors", order, {"prompt_embeds": rows}, {})
    reader = ShardReader(tmp_path)
    assert [reader.read("text/x.safetensors", key)["prompt_embeds"].item() for key in "abc"] == [0, 1, 2]


def test_a_shard_without_entries_can_be_written_and_read(tmp_path):
    """With cache.mode = "ondemand" somebody waits for it, though none of its images can be decoded."""
    write_shard(open_folder(tmp_path), "text/x.safetensors", [], {"prompt_embeds": torch.zeros(0, 4)}, {})
    size = (tmp_path / "text" / "x.safetensors").stat().st_size
    assert read_header(open_folder(tmp_path), "text/x.safetensors", size) is not None
    assert check_shard(open_folder(tmp_path), "text/x.safetensors") == []
    with pytest.raises(MissingEntry) as error:
        ShardReader(tmp_path).read("text/x.safetensors", "a")
    assert str(error.value) == f"{tmp_path}/text/x.safetensors: has no entry a. Run `sdxl-ray cache`."


def test_two_writers_of_one_shard_leave_one_whole_file(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        (name,) = set(threads.map(lambda _: write(tmp_path), range(8)))
    assert list((tmp_path / name).parent.iterdir()) == [tmp_path / name]
    assert same_bits(ShardReader(tmp_path).read(name, "b")["std"], tensors()["std"][1])


def test_a_shard_may_be_read_by_others_as_any_file(tmp_path):
    """Caches are shared between users; `save_file` of safetensors would give 0600."""
    (tmp_path / "plain").touch()
    assert (tmp_path / write(tmp_path)).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0{}"])
def test_a_shard_that_cannot_be_opened(tmp_path, content):
    path = tmp_path / "text" / "x.safetensors"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CacheError) as error:
        ShardReader(tmp_path).read("text/x.safetensors", "a")
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert str(error.value).endswith("Run `sdxl-ray cache`: only what is missing is encoded.")
    assert type(error.value) is UnreadableShard


def test_a_cache_that_this_machine_does_not_see_is_another_matter_than_a_shard_that_is_gone(tmp_path):
    with pytest.raises(CacheError) as error:
        ShardReader(tmp_path / "cache").read("text/x.safetensors", "a")
    assert str(error.value) == (
        f"{tmp_path}/cache/text: is not there. Is cache.path = {tmp_path}/cache the same folder on all machines? "
        "If it was deleted, run `sdxl-ray cache`."
    )
    assert type(error.value) is CacheError


def test_threads_share_a_reader(tmp_path):
    keys = [f"key {number}" for number in range(16)]
    name, reader = write(tmp_path, keys), ShardReader(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda key: reader.read(name, key)["mean"], keys))
    assert all(same_bits(each, tensors(16)["mean"][number]) for number, each in enumerate(found))


def test_no_more_shards_stay_open_than_allowed(tmp_path):
    assert ShardReader(tmp_path).max_open == 4096
    names = {key: write(tmp_path, (key,)) for key in "abcd"}
    reader = ShardReader(tmp_path, max_open=2)
    for key in "abacd":
        assert same_bits(reader.read(names[key], key)["mean"], tensors(1)["mean"][0])
        assert len(reader._open) <= 2
        if key == "c":
            assert list(reader._open) == [names["a"], names["c"]]  # of a and b, b was read longer ago


def test_threads_share_a_reader_that_closes_shards(tmp_path):
    keys = [f"key {number}" for number in range(16)]
    names = [write(tmp_path, (key,), seed=number) for number, key in enumerate(keys)]
    expected = [tensors(1, seed)["mean"][0] for seed in range(16)]
    reader = ShardReader(tmp_path, max_open=1)

    def read(offset):
        return all(
            same_bits(reader.read(names[number % 16], keys[number % 16])["mean"], expected[number % 16])
            for number in range(offset, offset + 64)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(0, 16, 4)))


# ---- shards that are still to come -----------------------------------------------------------------------------------


def test_a_reader_waits_for_a_shard_that_is_being_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "_POLL_S", 0.001)
    asked = []

    def wait(shard):
        asked.append(shard)
        if len(asked) == 3:
            write(tmp_path)

    name = shard_name("latents", ("a", "b", "c"), BUCKET)
    assert same_bits(ShardReader(tmp_path, wait=wait).read(name, "c")["mean"], tensors()["mean"][2])
    assert asked == [name] * 3


def test_waiting_ends_where_nothing_comes_any_more(tmp_path):
    def wait(shard):
        raise CacheError(f"{shard} will not come")

    with pytest.raises(CacheError, match=r"^text/x will not come$"):
        ShardReader(tmp_path, wait=wait).read("text/x", "a")


def test_a_store_that_fails_while_a_reader_waits_is_a_shard_that_cannot_be_read(tmp_path, monkeypatch):
    reader = ShardReader(tmp_path, wait=lambda shard: pytest.fail("not missing"))

    def fail(name):
        raise StorageError("s3://bucket: timed out while looking for it.")

    (tmp_path / "text").mkdir()
    monkeypatch.setattr(reader.folder, "exists", fail)
    with pytest.raises(UnreadableShard, match="timed out while looking for it"):
        reader.read("text/x.safetensors", "a")


def test_one_thread_that_waits_does_not_hold_up_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "_POLL_S", 0.001)
    here, waiting, read = write(tmp_path), threading.Event(), threading.Event()

    def wait(shard):
        waiting.set()
        if read.wait(10):
            write(tmp_path, ("d",))

    reader = ShardReader(tmp_path, wait=wait)
    to_come = shard_name("latents", ("d",), BUCKET)
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(reader.read, to_come, "d")
        assert waiting.wait(10)
        assert same_bits(reader.read(here, "a")["mean"], tensors()["mean"][0])
        read.set()
        assert same_bits(late.result(10)["mean"], tensors(1)["mean"][0])


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(path, tensor, row=-1):
    """In the last byte of one row of one tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])[tensor]
    start, end = place["data_offsets"]
    row %= place["shape"][0]
    content[8 + length + start + (end - start) // place["shape"][0] * (row + 1) - 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tensor", ["mean", "std"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_flipped_bit_is_found_when_its_row_is_read(tmp_path, tensor, row):
    name = write(tmp_path)
    flip_a_bit(tmp_path / name, tensor, row)
    reader = ShardReader(tmp_path)
    for number, key in enumerate("abc"):
        if number != row:
            assert same_bits(reader.read(name, key)["mean"], tensors()["mean"][number])
            continue
        with pytest.raises(DamagedEntry) as error:
            reader.read(name, key)
        assert str(error.value).startswith(f"{tmp_path}/{name}: entry {key} is damaged (checksum ")
        assert str(error.value).endswith("`sdxl-ray cache --verify` finds all of them and encodes them again.")
    assert check_shard(open_folder(tmp_path), name) == ["abc"[row]]


def test_a_sound_shard_one_that_is_gone_and_one_that_cannot_be_read(tmp_path):
    name = write(tmp_path)
    assert check_shard(open_folder(tmp_path), name) == []
    assert check_shard(open_folder(tmp_path), "text/gone.safetensors") == []
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert check_shard(open_folder(tmp_path), name) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_a_shard_that_this_process_may_not_read_is_not_damaged(tmp_path, monkeypatch, number):
    name, folder = write(tmp_path), open_folder(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder, "read", fail)
    with pytest.raises(StorageError, match=f"{name}: cannot be read"):
        check_shard(folder, name)


def test_what_is_marked_as_damaged_is_kept_once_until_the_shard_is_written_again(tmp_path):
    name, folder = write(tmp_path), open_folder(tmp_path)
    assert not folder.exists(name + DAMAGED_SUFFIX)
    mark_damaged(str(tmp_path), name)
    assert folder.exists(name + DAMAGED_SUFFIX) and read_marker(folder, name + DAMAGED_SUFFIX) == []
    for keys in ("c", "a", "ca", ""):
        mark_damaged(str(tmp_path), name, *keys)
    assert read_marker(folder, name + DAMAGED_SUFFIX) == ["c", "a"]
    write(tmp_path, ("x",))
    assert read_marker(folder, name + DAMAGED_SUFFIX) == ["c", "a"]
    write(tmp_path)
    assert not folder.exists(name + DAMAGED_SUFFIX)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n\n"])
def test_what_else_is_in_a_marker_marks_nothing_of_the_shard(tmp_path, content):
    name = write(tmp_path)
    (tmp_path / f"{name}{DAMAGED_SUFFIX}").write_bytes(content)
    assert not set(read_marker(open_folder(tmp_path), name + DAMAGED_SUFFIX)) & set("abc")
    mark_damaged(str(tmp_path), name, "b")
    assert set(read_marker(open_folder(tmp_path), name + DAMAGED_SUFFIX)) & set("abc") == (
        {"b"} if content != b"{" else set()
    )


def test_workers_that_mark_one_shard_at_the_same_moment_lose_nothing(tmp_path):
    name, keys = write(tmp_path), [f"{number:032x}" for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: mark_damaged(str(tmp_path), name, key), keys))
    assert sorted(read_marker(open_folder(tmp_path), name + DAMAGED_SUFFIX)) == keys


# ---- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_may_be_long(tmp_path):
    """64 captions' counts and keys fit into the first read; thousands do not."""
    keys = [f"{number:032x}" for number in range(3000)]
    write_shard(open_folder(tmp_path), "text/x.safetensors", keys, {"prompt_embeds": torch.zeros(3000, 1)}, {})
    remote = RemoteFolder(tmp_path)
    header = read_header(remote, "text/x.safetensors", (tmp_path / "text/x.safetensors").stat().st_size)
    assert json.loads(header["__metadata__"]["sdxl_ray.keys"]) == keys
    assert remote.calls == {"read_range": 2}


def test_a_usual_header_is_one_request(tmp_path):
    name, remote = write(tmp_path, num_tokens="[1, 2, 3]"), RemoteFolder(tmp_path)
    header = read_header(remote, name, (tmp_path / name).stat().st_size)
    assert header["__metadata__"]["sdxl_ray.num_tokens"] == "[1, 2, 3]"
    assert remote.calls == {"read_range": 1}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EMFILE, "Too many open files). Allow more open files: `ulimit -n 65536`."),
        (errno.EACCES, "Permission denied). Allow the user that runs this to read it."),
        (errno.EIO, "Input/output error). Check the disk; if this file is lost, delete it: it is encoded again."),
    ],
)
def test_a_header_that_cannot_be_read_is_not_a_damaged_one(tmp_path, monkeypatch, number, text):
    """Else a process with many open files would encode the whole cache again."""
    name, folder = write(tmp_path), open_folder(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder, "read_range", fail)
    with pytest.raises(StorageError) as error:
        read_header(folder, name, (tmp_path / name).stat().st_size)
    assert str(error.value) == f"{tmp_path}/{name}: cannot be read ({text}"


@pytest.mark.parametrize("old", [b'"a', b'"mean"', b"bfloat16", b"1"], ids=["key", "name", "extra", "number"])
def test_a_flipped_bit_in_a_header_is_a_damaged_shard(tmp_path, old):
    """In a key it would make another entry of it: with cache.mode = "ondemand", its image would count as damaged."""
    name, folder = write(tmp_path, keys=("a1" * 16, "b2" * 16, "c3" * 16), dtype="bfloat16"), open_folder(tmp_path)
    content = (tmp_path / name).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    place = 8 + header.rindex(old) + len(old) - 1
    flipped = content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :]
    (tmp_path / name).write_bytes(flipped)
    assert read_header(folder, name, len(flipped)) is None
    assert check_shard(folder, name) is None
    for key in ("a1" * 16, "b2" * 16):
        with pytest.raises(UnreadableShard, match="header"):
            ShardReader(tmp_path).read(name, key)


def test_a_header_of_another_version_and_of_a_file_that_is_gone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "FORMAT_VERSION", "99")
        name = write(tmp_path)
    size = (tmp_path / name).stat().st_size
    with pytest.raises(OtherVersion, match=f"{name}: is of version 99 of the format"):
        read_header(open_folder(tmp_path), name, size)
    with pytest.raises(FileNotFoundError):
        read_header(open_folder(tmp_path), "text/gone.safetensors", size)


# ---- shards of a bucket ----------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A cache in a bucket."""
    folder = RemoteFolder(tmp_path / "bucket")
    monkeypatch.setattr(shard_reader, "open_folder", lambda path: folder)
    return folder


def test_few_copies_stay_open(remote, tmp_path):
    """One that is deleted to make room takes its room until it is closed."""
    assert read_remote(remote, tmp_path).max_open == 64
    names = [write(tmp_path / "bucket", (f"key {number}",)) for number in range(70)]
    reader = read_remote(remote, tmp_path)
    for number, name in enumerate(names):
        reader.read(name, f"key {number}")
    assert len(reader._open) == 64


def read_remote(remote, tmp_path, **settings):
    return ShardReader(remote.path, local_path=str(tmp_path / "copies"), **settings)


def test_a_shard_of_a_bucket_is_fetched_once_for_all_readers_of_a_machine(remote, tmp_path):
    name = write(tmp_path / "bucket")
    for _ in range(2):
        reader = read_remote(remote, tmp_path)
        assert [same_bits(reader.read(name, key)["mean"], tensors()["mean"][row]) for row, key in enumerate("abc")] == [
            True
        ] * 3
    assert remote.reads == [name]


def test_a_shard_of_a_bucket_that_is_gone(remote, tmp_path):
    with pytest.raises(CacheError) as error:
        read_remote(remote, tmp_path).read("text/x.safetensors", "a")
    assert str(error.value).startswith(f"{remote.path}/text/x.safetensors: cannot be read (")


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_copy_that_was_damaged_on_this_disk_is_fetched_again(remote, tmp_path, damage):
    """Else a sound entry would be marked as damaged, in the bucket, for everybody."""
    name = write(tmp_path / "bucket")
    read_remote(remote, tmp_path).read(name, "a")
    (copy,) = (tmp_path / "copies").rglob("*.safetensors")
    if damage == "bit":
        flip_a_bit(copy, "std")
    else:
        copy.write_bytes(copy.read_bytes()[:-4])
    reader = read_remote(remote, tmp_path)
    assert same_bits(reader.read(name, "c")["std"], tensors()["std"][2])
    assert same_bits(reader.read(name, "a")["std"], tensors()["std"][0])
    assert remote.reads == [name] * 2


def test_a_copy_that_cannot_be_opened_now_is_kept(remote, tmp_path, monkeypatch):
    name = write(tmp_path / "bucket")
    read_remote(remote, tmp_path).read(name, "a")
    reader = read_remote(remote, tmp_path)

    def refuse(path, mode):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="Too many open files"):
        patch.setattr(Path, "open", refuse)
        reader.read(name, "a")
    assert same_bits(reader.read(name, "a")["std"], tensors()["std"][0])
    assert remote.reads == [name]


def test_a_shard_that_is_damaged_in_the_bucket_is_fetched_again_only_once(remote, tmp_path):
    name = write(tmp_path / "bucket")
    flip_a_bit(tmp_path / "bucket" / name, "std")
    reader = read_remote(remote, tmp_path)
    for _ in range(3):
        with pytest.raises(DamagedEntry):
            reader.read(name, "c")
    assert len(remote.reads) == 2
    write(tmp_path / "bucket")  # what `sdxl-ray cache --verify` does
    assert same_bits(read_remote(remote, tmp_path).read(name, "c")["std"], tensors()["std"][2])


def test_where_the_disk_takes_no_copies_shards_are_read_without_them(remote, tmp_path, monkeypatch):
    names, said = [write(tmp_path / "bucket", (key,), seed=seed) for seed, key in enumerate("abc")], []
    reader = read_remote(remote, tmp_path, report=said.append, max_open=1)
    assert same_bits(reader.read(names[0], "a")["mean"], tensors(1, 0)["mean"][0])

    def refuse(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flip_a_bit(tmp_path / "bucket" / write(tmp_path / "bucket", ("d",)), "mean")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    for _ in range(2):
        for seed, key in enumerate("abc"):
            found = reader.read(names[seed], key)
            assert all(same_bits(found[kind], tensor[0]) for kind, tensor in tensors(1, seed).items())
    assert remote.reads == [names[0], *names[1:], *names[1:]]  # of the first there is a copy
    (line,) = said
    assert line.startswith(f"cache.local_path = {tmp_path}/copies on ")
    assert line.endswith(
        f": takes no more copies (No space left on device). Shards of {remote.path} are read without them, whole ones "
        "each time, which is slow: free some space, or lower cache.local_gib."
    )
    with pytest.raises(DamagedEntry):
        reader.read(shard_name("latents", ("d",), BUCKET), "d")


def test_a_folder_for_copies_that_cannot_be_used_is_an_error_at_once(remote, tmp_path):
    """Else every read would fetch a whole shard, or, worse, be taken for a shard that is damaged."""
    name = write(tmp_path / "bucket")
    (tmp_path / "copies").write_text("a file")
    with pytest.raises(ConfigError) as error:
        read_remote(remote, tmp_path).read(name, "a")
    assert f"cache.local_path = {tmp_path}/copies on " in str(error.value)
    assert ": cannot be written (" in str(error.value)
    assert str(error.value).endswith("or set it to a folder on a local disk of every machine.")


# ---- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (28, "no space left on the device while writing encoded tensors. Free some space"),
        (122, "the disk quota is used up while writing encoded tensors. Free some space"),
        (30, "the file system is read-only while writing encoded tensors. Make it writable"),
        (13, "permission denied while writing encoded tensors. Make it writable"),
    ],
)
def test_a_disk_that_refuses_is_named_and_no_temporary_stays(tmp_path, monkeypatch, number, reason):
    kept = tmp_path / write(tmp_path, ("x",))
    write_bytes = Path.write_bytes

    def refuse(path, content):
        write_bytes(path, content[:100])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    path = tmp_path / shard_name("latents", ("a", "b", "c"), BUCKET)
    with pytest.raises(StorageError) as error:
        write(tmp_path)
    assert str(error.value) == (f"{path}: {reason} and run again: finished shards are kept.")
    assert list(path.parent.iterdir()) == [kept]


def test_a_failed_write_leaves_the_shard_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / write(tmp_path)
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
    "flip": False,
    "mask_hash": "",
}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("image_hash", "ac" * 32),
        ("bucket_hw", (128, 64)),
        ("resized_hw", (65, 130)),
        ("crop_top_left", (0, 2)),
        ("vae_fingerprint", "ce" * 8),
        ("flip", True),
        ("mask_hash", "alpha"),
        ("scaled_jpeg", True),
    ],
)
def test_a_latent_key_depends_on_all_that_the_latent_depends_on(part, other):
    assert latent_key(**LATENT) == latent_key(**dict(LATENT))
    assert latent_key(**LATENT | {part: other}) != latent_key(**LATENT)


def test_what_was_encoded_with_its_transparency_on_white_is_not_taken_for_what_was_not():
    """By the key of the first versions, which hashed the word "alpha" itself."""
    transform = ((64, 128), (64, 130), (0, 1), False, "lanczos")
    parts = ("latent", shards.FORMAT_VERSION, LATENT["image_hash"], transform, "alpha", LATENT["vae_fingerprint"])
    on_white = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    assert latent_key(**LATENT | {"mask_hash": "alpha"}) != on_white
    plain = (*parts[:4], "", parts[5])
    assert latent_key(**LATENT, scaled_jpeg=False) == hashlib.sha256(repr(plain).encode()).hexdigest()[:32]


def test_a_text_key_depends_on_caption_encoders_and_length():
    keys = {
        text_key("a cat", "1"),
        text_key("a dog", "1"),
        text_key("a cat", "2"),
        text_key("", "1"),
        text_key("a cat ", "1"),
        text_key("a cat", "1", 2),
        text_key("a cat", "1", 3),
    }
    assert len(keys) == 7
    assert text_key("猫", "1") == text_key("猫", "1", 1)


def test_keys_are_of_the_length_that_the_store_keeps(monkeypatch):
    before = latent_key(**LATENT), text_key("a cat", "1")
    assert [len(bytes.fromhex(key)) for key in before] == [shards.KEY_BYTES] * 2
    monkeypatch.setattr(shards, "FORMAT_VERSION", "4")
    assert not {latent_key(**LATENT), text_key("a cat", "1")} & set(before)


def test_a_shard_is_named_by_its_keys_in_order():
    names = {shard_name("latents", keys, BUCKET) for keys in (["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"])}
    assert len(names) == 5
    assert all(name.startswith(f"latents/{BUCKET}/") and name.endswith(".safetensors") for name in names)
    assert shard_name("text", ["a"]).startswith("text/")


def test_what_is_marked_in_a_bucket_adds_to_what_was(tmp_path, monkeypatch):
    """An object cannot be appended to."""
    name, folder = write(tmp_path), RemoteFolder(tmp_path)
    monkeypatch.setattr(shards, "open_folder", lambda path: folder)
    for keys in ("c", "a", "ca", ""):
        mark_damaged(folder.path, name, *keys)
    assert read_marker(folder, name + DAMAGED_SUFFIX) == ["c", "a"]
    assert folder.calls["write"] == 2


def test_of_two_threads_that_find_a_copy_damaged_the_later_one_reads_the_new_copy(remote, tmp_path):
    """Else it would call a sound entry damaged."""
    name = write(tmp_path / "bucket")
    read_remote(remote, tmp_path).read(name, "a")
    (copy,) = (tmp_path / "copies").rglob("*.safetensors")
    flip_a_bit(copy, "std")
    reader = read_remote(remote, tmp_path)
    opened = reader._file(name)
    assert same_bits(reader.read(name, "c")["std"], tensors()["std"][2])
    assert reader._drop_copy(name, opened)  # the other thread had opened the damaged one
    assert not reader._drop_copy(name, reader._file(name))
    assert remote.reads == [name] * 2


def test_what_is_known_to_be_damaged_is_not_noted_again(tmp_path):
    """Else a marker would grow with each epoch."""
    name = write(tmp_path)
    for keys in ("ab", "ba", "bc"):
        mark_damaged(str(tmp_path), name, *keys)
    assert (tmp_path / (name + DAMAGED_SUFFIX)).read_text().split() == ["a", "b", "c"]
