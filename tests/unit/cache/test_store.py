import json
import os
import time

import numpy as np
import pytest
import torch

from sdxl_ray.cache import store as store_module
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, KEY_BYTES, mark_damaged, read_header, shard_name, write_shard
from sdxl_ray.cache.store import ShardStore, keys_from_hex
from sdxl_ray.errors import StorageError
from sdxl_ray.storage import open_folder
from tests.remote import RemoteFolder

BUCKET = "64x128"


def key(letter):
    """Of the length that the store keeps; some end or begin with zeros, which NumPy would like to cut."""
    return {"a": "00" * KEY_BYTES, "b": "01" + "00" * (KEY_BYTES - 1)}.get(letter, f"{ord(letter):02x}" * KEY_BYTES)


def keys(letters):
    return tuple(map(key, letters))


def write(cache, letters="abc", **extra):
    """A shard of latents; its name."""
    name = shard_name("latents", keys(letters), BUCKET)
    tensors = {kind: torch.zeros(len(letters), 4, 8, 16).bfloat16() for kind in ("mean", "std")}
    write_shard(open_folder(cache), name, keys(letters), tensors, extra)
    return name


def places(store, letters="abcdet"):
    """The shard of each letter that is there."""
    return {letter: shard for letter in letters if (shard := store.shard_of(key(letter))) is not None}


def test_the_store_is_rebuilt_from_headers_alone(tmp_path, monkeypatch):
    first, second = write(tmp_path, "ba"), write(tmp_path, "c", num_tokens="[99]")
    text = shard_name("text", keys("td"))
    write_shard(
        open_folder(tmp_path), text, keys("td"), {"prompt_embeds": torch.zeros(2, 2)}, {"num_tokens": "[12, 40000]"}
    )
    monkeypatch.setattr("safetensors.safe_open", lambda *_: pytest.fail("opened"))
    store = ShardStore(tmp_path)
    assert places(store) == {"a": first, "b": first, "c": second, "t": text, "d": text}
    assert len(store) == 5
    assert store.num_tokens(keys_from_hex(keys("abctde"))).tolist() == [0, 0, 99, 12, 32767, 0]
    assert store.damaged == []
    assert dict(zip(store.names, store.sizes, strict=True)) == {
        name: (tmp_path / name).stat().st_size for name in (first, second, text)
    }


def test_no_cache_is_an_empty_one(tmp_path):
    store = ShardStore(tmp_path / "nothing")
    assert len(store) == 0
    assert places(store) == {}
    assert store.find(keys_from_hex(keys("ab"))).tolist() == [-1, -1]
    assert not (tmp_path / "nothing").exists()


def test_an_empty_shard_holds_nothing_and_is_not_damaged(tmp_path):
    write_shard(open_folder(tmp_path), "text/x.safetensors", [], {"prompt_embeds": torch.zeros(0, 2)}, {})
    store = ShardStore(tmp_path)
    assert (len(store), store.damaged, store.names) == (0, [], ["text/x.safetensors"])


def test_many_keys_are_found_at_once(tmp_path):
    rng = np.random.default_rng(0)
    there = [rng.bytes(KEY_BYTES).hex() for _ in range(500)]
    names = []
    for start in range(0, 500, 50):
        part = there[start : start + 50]
        names.append(shard_name("text", part))
        write_shard(open_folder(tmp_path), names[-1], part, {"prompt_embeds": torch.zeros(50, 1)}, {})
    store = ShardStore(tmp_path)
    wanted = [*reversed(there), *(rng.bytes(KEY_BYTES).hex() for _ in range(500))]
    found = store.find(keys_from_hex(wanted)).tolist()
    assert [store.names[number] for number in found[:500]] == [names[at // 50] for at in reversed(range(500))]
    assert found[500:] == [-1] * 500
    assert store.find(keys_from_hex([])).tolist() == []
    # `keys` and `shard_numbers` belong together
    assert [store.names[number] for number in store.shard_numbers] == [
        store.shard_of(each.ljust(KEY_BYTES, b"\0").hex()) for each in store.keys.tolist()
    ]


def test_a_key_in_two_shards_is_found_in_one_of_them(tmp_path):
    names = {write(tmp_path, "ab"), write(tmp_path, "bc")}
    assert places(ShardStore(tmp_path))["b"] in names
    for name in sorted(names):  # whichever is deleted, the other has it
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        assert places(ShardStore(tmp_path))["b"] in names - {name}
        (tmp_path / name).write_bytes(content)


# ---- damage ----------------------------------------------------------------------------------------------------------


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
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"",
        lambda content: content[:20],
        lambda content: b"\xff" * len(content),
        header_with(lambda header: header.pop("__metadata__") and None),
        header_with(lambda header: header["__metadata__"].pop("sdxl_ray.keys") and None),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.keys": json.dumps([key("a")])})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.crc32": "nonsense"})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.crc32": "3"})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.keys": '["not", "hex", "keys"]'})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.keys": '["00", "00", "00"]'})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.num_tokens": "[1]"})),
        header_with(lambda header: header["__metadata__"].update({"sdxl_ray.num_tokens": "{]"})),
        header_with(lambda header: header["mean"].pop("data_offsets") and None),
        header_with(lambda header: [1, 2]),
        header_with(lambda header: {"__metadata__": header["__metadata__"]}),
    ],
)
def test_a_damaged_shard_counts_as_missing_and_is_listed(tmp_path, damage):
    sound, name = write(tmp_path, "de"), write(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    store = ShardStore(tmp_path)
    assert store.damaged == [name]
    assert places(store).keys() == {"d", "e"}
    write(tmp_path)
    store.refresh()
    assert store.damaged == []
    assert places(store).keys() == {"a", "b", "c", "d", "e"}
    assert read_header(open_folder(tmp_path), sound, (tmp_path / sound).stat().st_size) is not None


def test_a_shard_of_another_version_is_not_damaged_and_not_used(tmp_path):
    """Nobody may delete it: another version of this program uses it."""
    sound, name = write(tmp_path, "de"), write(tmp_path)
    change = header_with(lambda header: header["__metadata__"].update({"sdxl_ray.version": "1"}))
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    store = ShardStore(tmp_path)
    assert (store.names, store.damaged, store.other_versions) == ([sound], [], [name])
    assert places(store).keys() == {"d", "e"}
    write(tmp_path)
    store.refresh()
    assert store.other_versions == []


def test_a_disk_that_does_not_give_a_header_stops_the_work(tmp_path, monkeypatch):
    """Else everything would look as if it had to be encoded again, and as if `--prune` could delete it."""
    name = write(tmp_path)
    folder = open_folder(tmp_path)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "read_range", fail)
    monkeypatch.setattr(store_module, "open_folder", lambda path: folder)
    with pytest.raises(StorageError, match=rf"{name}: cannot be read \(Permission denied\)"):
        ShardStore(tmp_path)


@pytest.mark.parametrize("where", ["latents", "the marker"])
def test_what_cannot_be_looked_at_is_not_taken_for_nothing(tmp_path, monkeypatch, where):
    name = write(tmp_path)
    mark_damaged(str(tmp_path), name, "a")
    folder, scandir = open_folder(tmp_path), os.scandir

    def refuse(path, *_):
        if str(path).endswith("latents") or str(path).endswith(DAMAGED_SUFFIX):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    if where == "latents":
        monkeypatch.setattr(os, "scandir", refuse)
    else:
        monkeypatch.setattr(folder, "read", refuse)
        monkeypatch.setattr(store_module, "open_folder", lambda path: folder)
    text = (
        r"latents: cannot be listed: Permission denied"
        if where == "latents"
        else r"cannot be read \(Permission denied\)"
    )
    with pytest.raises(StorageError, match=text):
        ShardStore(tmp_path)


def test_a_shard_that_is_deleted_while_the_store_looks_is_not_there(tmp_path, monkeypatch):
    sound, name = write(tmp_path, "de"), write(tmp_path)
    folder = open_folder(tmp_path)
    entries = folder.list("latents")
    (tmp_path / name).unlink()
    monkeypatch.setattr(folder, "list", lambda prefix: entries if prefix == "latents" else [])
    monkeypatch.setattr(store_module, "open_folder", lambda path: folder)
    store = ShardStore(tmp_path)
    assert (store.names, store.damaged, store.other_versions) == ([sound], [], [])


def test_entries_marked_as_damaged_are_missing_and_no_others(tmp_path):
    name, other = write(tmp_path, num_tokens="[1, 2, 3]"), write(tmp_path, "de")
    mark_damaged(str(tmp_path), name, key("b"))
    store = ShardStore(tmp_path)
    assert places(store) == {"a": name, "c": name, "d": other, "e": other}
    assert store.num_tokens(keys_from_hex(keys("abc"))).tolist() == [1, 0, 3]
    assert store.damaged == []
    again = write(tmp_path, "b")  # a shard of what is missing
    store.refresh()
    assert places(store)["b"] == again
    write(tmp_path)
    store.refresh()
    assert places(store).keys() == set("abcde")


def test_all_entries_of_a_shard_may_be_marked(tmp_path):
    name = write(tmp_path)
    for letter in "abc":
        mark_damaged(str(tmp_path), name, key(letter))
    assert places(ShardStore(tmp_path)) == {}


def test_a_marker_without_its_shard_does_no_harm(tmp_path):
    name = write(tmp_path)
    mark_damaged(str(tmp_path), name, key("b"))
    (tmp_path / name).unlink()
    assert places(ShardStore(tmp_path)) == {}
    assert (tmp_path / f"{name}{DAMAGED_SUFFIX}").exists()


# ---- a bucket --------------------------------------------------------------------------------------------------------


def test_of_a_bucket_only_headers_are_read(tmp_path, monkeypatch):
    names = {letter: write(tmp_path, letter) for letter in "abcde"}
    mark_damaged(str(tmp_path), names["c"], key("c"))
    remote = RemoteFolder(tmp_path)
    monkeypatch.setattr(store_module, "open_folder", lambda path: remote)
    store = ShardStore("s3://bucket/cache")
    assert places(store) == {letter: name for letter, name in names.items() if letter != "c"}
    assert remote.calls == {"list": 2, "read_range": 5, "read": 1}
    assert remote.reads == [names["c"] + DAMAGED_SUFFIX]
    assert store.remove_stale_temporaries() == 0


# ---- what killed jobs leave behind -----------------------------------------------------------------------------------


def test_only_old_temporaries_are_removed(tmp_path):
    path = tmp_path / write(tmp_path)
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


# ---- size ------------------------------------------------------------------------------------------------------------


def test_an_entry_takes_22_bytes(tmp_path):
    """Ten million of them have to fit beside everything else on the driver."""
    write(tmp_path, "abcdefgh")
    store = ShardStore(tmp_path)
    arrays = (store.keys, store.shard_numbers, store._tokens)
    assert sum(array.nbytes for array in arrays) == 22 * 8


def test_keys_of_another_length_are_no_keys(tmp_path):
    """Read one after another they would be those of other images: here 8 and 24 bytes, which make two of 16."""
    sound, odd = write(tmp_path, "ab"), "text/x.safetensors"
    found = [key("c")[:16], key("d") + key("d")[:16]]
    write_shard(open_folder(tmp_path), odd, found, {"prompt_embeds": torch.zeros(2, 2)}, {})
    store = ShardStore(tmp_path)
    assert (store.names, store.damaged, len(store)) == ([sound], [odd], 2)


def test_a_shard_with_more_rows_than_keys_is_damaged(tmp_path):
    """Whose row would be whose?"""
    write_shard(open_folder(tmp_path), "text/x.safetensors", keys("ab"), {"prompt_embeds": torch.zeros(3, 2)}, {})
    store = ShardStore(tmp_path)
    assert (store.names, store.damaged) == ([], ["text/x.safetensors"])
