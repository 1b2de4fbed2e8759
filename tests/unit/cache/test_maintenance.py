"""A cache over the months: what it holds, whether it is whole, what can go."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdxl_ray.cache import maintenance
from sdxl_ray.cache.generations import finish
from sdxl_ray.cache.maintenance import GIB, prune, stats, verify
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, FORMAT_VERSION, mark_damaged, shard_name, write_shard
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.storage import open_folder
from tests.remote import RemoteFolder
from tests.unit.cache.planned import add_image, add_images, config_of, fill, missing, plan_of, samples_of

DAY_S = 24 * 3600


@pytest.fixture
def images(tmp_path):
    return add_images(tmp_path / "images", 9)


@pytest.fixture
def config(tmp_path, images, tiny_model):
    return config_of(tmp_path, tiny_model, images)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def cached(config, **changes):
    """A finished `sdxl-ray cache`; its plan."""
    plan = plan_of(config, **changes)
    fill(plan)
    plan = plan_of(config, **changes)
    finish(plan)
    return plan


def age(cache, days):
    """Everything in the cache is so much older than it is."""
    for path in cache.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - days * DAY_S
            os.utime(path, (then, then))


def files(cache):
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


def shards(cache):
    return {name for name in files(cache) if name.endswith(".safetensors")}


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_counts_and_sizes(config, cache):
    plan = cached(config)
    found = stats(str(cache))
    buckets = dict(plan.buckets)
    assert found.num_entries == dict(sorted({**buckets, "text": 9 + 2}.items()))
    for kind in buckets:
        size = sum(path.stat().st_size for path in (cache / "latents" / kind).iterdir())
        assert found.gib[kind] == pytest.approx(size / GIB)
    assert found.num_unused == 0  # the prompts' embeddings are in the manifest
    assert found.unusable == []
    ((name, (num_samples, days)),) = found.datasets.items()
    assert name == Path(plan.folder.path).name
    assert num_samples == 9
    assert 0 <= days < 0.1


def test_what_is_in_no_dataset_is_counted(config, cache):
    cached(config)
    fill(plan_of(config, dataset__resolution=128))  # its index was never written
    assert stats(str(cache)).num_unused == 9
    (cache / "text" / "bad.safetensors").write_bytes(b"cut")
    (cache / "datasets" / "odd").mkdir()
    (cache / "datasets" / "odd" / "index.parquet").write_bytes(b"PAR1")
    found = stats(str(cache))
    assert found.unusable == ["text/bad.safetensors", "datasets/odd/index.parquet"]
    assert (found.num_unused, found.num_unused_kept) == (None, None)
    assert "how many entries are in no dataset is not known: an index cannot be read, see below" in found.lines()


def test_what_prune_would_not_delete_is_counted_apart(config, cache, images):
    cached(config)
    for number in (0, 3, 6):  # all of one shape
        (images / f"{number:02d}.png").unlink()
        (images / f"{number:02d}.txt").unlink()
    (images / "01.png").unlink()
    (images / "01.txt").unlink()
    for path in (cache / "datasets").glob("*/index.parquet"):
        path.unlink()
    cached(config)
    age(cache, 2)
    found = stats(str(cache))
    assert (found.num_unused, found.num_unused_kept) == (3, 1 + 4)
    assert found.lines()[-2:] == [
        "3 entries are in no dataset (sdxl-ray cache --prune)",
        "5 more are in no dataset, but in shards that are still in use: they stay",
    ]
    assert len(prune(str(cache), keep_days=30, dry_run=False).shards) == 1
    found = stats(str(cache))
    assert (found.num_unused, found.num_unused_kept) == (0, 5)


def test_entries_of_two_shards_are_counted(config, cache):
    plan = cached(config)
    assert stats(str(cache)).num_twice == 0
    write(cache, tuple(samples_of(plan)[0].latent_keys))
    found = stats(str(cache))
    assert found.num_twice == 1
    assert found.lines()[-1] == "1 entries are in two shards, which only takes room"


def test_the_table_for_a_person(config, cache):
    cached(config)
    (cache / "text" / "bad.safetensors").write_bytes(b"cut")
    age(cache, 3)
    lines = stats(str(cache)).lines()
    assert lines[0].split() == ["bucket", "entries", "GiB"]
    assert [line.split()[0] for line in lines[1:6]] == [*sorted(plan_of(config).buckets), "text", "all"]
    assert lines[5].split()[1] == "20"
    assert lines[6:] == [
        "dataset images: 9 samples, used 3 days ago",
        "0 entries are in no dataset (sdxl-ray cache --prune)",
        "cannot be used: text/bad.safetensors",
    ]


def test_states_of_one_dataset_are_one_line(config, cache, images, tmp_path):
    for number in range(3):
        add_image(images, f"new {number}.png", colour=500 + number)
        cached(config)
        age(cache, 5)
    cached(config_of(tmp_path, config.model.path, add_images(tmp_path / "others", 2)))
    found = stats(str(cache))
    assert [line for line in found.lines() if line.startswith("dataset")] == [
        "dataset images: 12 samples, used 5 days ago; 2 other states of it, the oldest used 15 days ago",
        "dataset others: 2 samples, used 0 days ago",
    ]
    pruned = prune(str(cache), keep_days=7, dry_run=True)
    assert pruned.lines(done=False)[0] == "would delete 2 states of dataset images"


def test_no_cache_at_all(tmp_path):
    """A table of zeros would hide a mistake in cache.path."""
    path = tmp_path / "nothing"
    for look in (stats, lambda path: prune(path, keep_days=30, dry_run=False)):
        with pytest.raises(CacheError) as error:
            look(str(path))
        assert str(error.value) == f"{path}: there is no cache. Is cache.path right? `sdxl-ray cache` fills it."
    assert verify(str(path)) == {}
    assert not path.exists()


def test_a_folder_that_cannot_be_listed_may_hold_what_is_in_use(config, cache, monkeypatch):
    """Another user's, or a network drive that has gone: nothing that it may name is taken away."""
    plan = cached(config)
    age(cache, 50)
    before = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    hidden, scandir = plan.folder.path, os.scandir

    def refuse(path):
        if str(path) == hidden:
            raise PermissionError(13, "Permission denied", hidden)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (stats, lambda path: prune(path, keep_days=0, dry_run=False)):
        with pytest.raises(StorageError) as error:
            look(str(cache))
        assert str(error.value).startswith(f"{hidden}: cannot be listed: Permission denied. Make it readable for")
    assert {path: path.read_bytes() for path in cache.rglob("*.safetensors")} == before


# ---- is it whole -----------------------------------------------------------------------------------------------------

KEYS = tuple(f"{number:032x}" for number in range(3))


def write(cache, keys=KEYS):
    """A shard with three tensors; its name."""
    name = shard_name("latents", keys, "64x64")
    draws = torch.Generator().manual_seed(0)
    tensors = {kind: torch.randn(len(keys), 4, 8, 8, generator=draws).bfloat16() for kind in ("mean", "std")}
    tensors["mask"] = torch.full((len(keys), 8, 8), 7, dtype=torch.uint8)
    write_shard(open_folder(cache), name, keys, tensors, {})
    return name


def flip_a_bit(path, tensor, row):
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])[tensor]
    start, end = place["data_offsets"]
    content[8 + length + start + (end - start) // place["shape"][0] * row] ^= 128
    path.write_bytes(content)


def test_a_sound_cache(config, cache):
    cached(config)
    before, seen = files(cache), []
    assert verify(str(cache), lambda done, total: seen.append((done, total))) == {}
    total = len(shards(cache))
    assert seen == [(number, total) for number in range(1, total + 1)]
    assert files(cache) == before


@pytest.mark.parametrize("tensor", ["mean", "std", "mask"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_flipped_bit_is_found_in_every_tensor_of_every_row(cache, tensor, row):
    name, other = write(cache), write(cache, ("ff" * 16,))
    flip_a_bit(cache / name, tensor, row)
    assert verify(str(cache)) == {name: [KEYS[row]]}
    assert (cache / f"{name}{DAMAGED_SUFFIX}").read_text() == f"{KEYS[row]}\n"
    assert not (cache / f"{other}{DAMAGED_SUFFIX}").exists()
    assert verify(str(cache)) == {}  # no dataset needs it
    write(cache)
    assert verify(str(cache)) == {}
    flip_a_bit(cache / name, tensor, row)
    assert verify(str(cache)) == {name: [KEYS[row]]}


def test_what_is_found_is_what_the_next_run_encodes_and_nothing_else(config, cache):
    plan = cached(config)
    shard = samples_of(plan)[0].latent_shards[0]
    flip_a_bit(cache / shard, "mean", 1)
    ((name, (key,)),) = verify(str(cache)).items()
    assert name == shard
    assert verify(str(cache)) == {shard: [key]}  # until it is encoded again
    again = plan_of(config)
    assert missing(again) == (1, 0)
    assert next(again.latent_shards()).keys == (key,)
    fill(again)
    assert missing(plan_of(config)) == (0, 0)
    assert (cache / f"{shard}{DAMAGED_SUFFIX}").exists()  # what is damaged lies there still
    assert verify(str(cache)) == {}
    flip_a_bit(cache / shard, "mean", 0)
    assert [len(keys) for keys in verify(str(cache)).values()] == [1]  # what is new is told
    sample = next(each for each in samples_of(plan_of(config)) if key in each.latent_keys)
    assert ShardReader(cache).read(sample.latent_shards[0], key).keys() == {"mean"}


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_file_that_was_cut_short_is_listed(cache, content):
    name = write(cache)
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(whole[:-1] if content is None else content)
    assert verify(str(cache)) == {name: []}
    assert verify(str(cache)) == {}  # it counts as missing, and has been told
    write(cache)
    assert verify(str(cache)) == {}
    (cache / name).write_bytes(b"cut again")
    assert verify(str(cache)) == {name: []}


def test_a_shard_that_another_job_has_just_replaced_is_not_marked(cache, monkeypatch):
    """It was no whole shard when the headers were read, and is one now."""
    name = write(cache)
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(whole[:-1])

    class Earlier(maintenance.ShardStore):
        def refresh(self):
            super().refresh()
            (cache / name).write_bytes(whole)

    monkeypatch.setattr(maintenance, "ShardStore", Earlier)
    assert verify(str(cache)) == {}
    assert files(cache) == {name}


def test_where_an_index_cannot_be_read_what_is_damaged_is_told_again(config, cache):
    """Nobody knows whether it is needed."""
    plan = cached(config)
    shard = samples_of(plan)[0].latent_shards[0]
    flip_a_bit(cache / shard, "mean", 0)
    found = verify(str(cache))
    for path in (cache / "datasets").glob("*/index.parquet"):
        path.write_bytes(b"PAR1")
    assert verify(str(cache)) == found != {}
    for path in (cache / "datasets").glob("*/index.parquet"):
        path.unlink()
    assert verify(str(cache)) == {}


def test_a_shard_of_another_version_is_told_apart_and_kept(config, cache):
    """Another version of this program, of which the same cache may be full, uses it."""
    cached(config)
    names = []
    for number in range(4):
        names.append(write(cache, (f"{number:032x}",)))
        path = cache / names[-1]
        ours = f'"sdxl_ray.version":"{FORMAT_VERSION}"'.encode()
        path.write_bytes(path.read_bytes().replace(ours, b'"sdxl_ray.version":"1"'))
    age(cache, 90)
    finish(plan_of(config))
    before = files(cache)
    found = stats(str(cache))
    assert (found.unusable, sorted(found.other_versions)) == ([], sorted(names))
    assert (
        f"4 shards are of another version of sdxl-ray, and stay: {', '.join(sorted(names)[:3])}, ..." in found.lines()
    )
    assert verify(str(cache)) == {}
    assert prune(str(cache), keep_days=30, dry_run=False).shards == []
    assert files(cache) == before


def test_a_shard_that_the_disk_does_not_give_is_damaged_in_all_its_entries(cache, monkeypatch):
    """The header is read, and then a bad sector."""
    name, other = write(cache), write(cache, ("ff" * 16,))
    folder = type(open_folder(cache))
    read = folder.read

    def bad_sector(self, each):
        if each == name:
            raise OSError(5, "Input/output error")
        return read(self, each)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "read", bad_sector)
        assert verify(str(cache)) == {name: list(KEYS)}
    assert stats(str(cache)).num_entries == {"64x64": 1}
    assert verify(str(cache)) == {}
    assert (cache / other).exists()


# ---- what can go -----------------------------------------------------------------------------------------------------


def test_what_is_in_use_stays(config, cache):
    cached(config)
    age(cache, 2)
    before = files(cache)
    found = prune(str(cache), keep_days=30, dry_run=False)
    assert (found.shards, found.datasets, found.gib) == ([], [], 0)
    assert found.lines(done=True) == ["nothing to prune: every entry is in use, or younger than a day"]
    assert files(cache) == before


def test_what_nobody_needs_is_shown_first_and_then_deleted(config, cache, images):
    """Three images are gone, and captions of three others have changed."""
    cached(config)
    alone = {"latents": set(), "text": set()}
    for number in range(3):  # of a dataset with other images, whose index is gone
        add_image(images, f"9{number}.png", size=(100, 30), colour=900 + number)
        plan = plan_of(config)
        alone["latents"] |= {shard.name for shard in plan.latent_shards()}
        alone["text"] |= {shard.name for shard in plan.text_shards()}
        fill(plan)
    for number in range(3):
        (images / f"9{number}.png").unlink()
        (images / f"9{number}.txt").unlink()
    gone = sorted(alone["latents"] | alone["text"])
    assert len(gone) == 6
    mark_damaged(str(cache), gone[0], "00" * 16)
    age(cache, 2)
    before = files(cache)
    size = sum((cache / name).stat().st_size for name in gone)
    shown = prune(str(cache), keep_days=30, dry_run=True)
    assert (shown.shards, shown.datasets) == (gone, [])
    assert shown.gib == pytest.approx(size / GIB)
    assert shown.lines(done=False) == ["would delete 6 shards, 0.00 GiB", "Nothing was deleted: add --yes."]
    assert files(cache) == before
    done = prune(str(cache), keep_days=30, dry_run=False)
    assert done == shown
    assert done.lines(done=True) == ["deleted 6 shards, 0.00 GiB"]
    assert files(cache) == before - {*gone, gone[0] + DAMAGED_SUFFIX}
    assert missing(plan_of(config)) == (0, 0)


def test_a_shard_with_one_entry_in_use_stays_whole(config, cache, images):
    cached(config)
    for number in range(1, 9):
        (images / f"{number:02d}.png").unlink()
        (images / f"{number:02d}.txt").unlink()
    for path in (cache / "datasets").glob("*/index.parquet"):
        path.unlink()
    plan = plan_of(config)
    assert missing(plan) == (0, 0)
    finish(plan)
    kept = {*samples_of(plan)[0].latent_shards, *samples_of(plan)[0].text_shards}
    age(cache, 2)
    prune(str(cache), keep_days=30, dry_run=False)
    assert shards(cache) == kept
    assert missing(plan_of(config)) == (0, 0)


def test_young_files_stay_since_their_job_may_still_be_running(config, cache):
    fill(plan_of(config))  # no index yet
    (cache / "text" / "bad.safetensors").write_bytes(b"cut")
    assert prune(str(cache), keep_days=0, dry_run=False).shards == []
    age(cache, 0.9)
    assert prune(str(cache), keep_days=0, dry_run=False).shards == []
    before = shards(cache)
    age(cache, 0.2)
    assert set(prune(str(cache), keep_days=0, dry_run=False).shards) == before
    assert shards(cache) == set()


def test_an_index_younger_than_a_day_stays_however_few_days_are_kept(config, cache):
    cached(config)
    before = files(cache)
    assert prune(str(cache), keep_days=0, dry_run=False).lines(done=True) == [
        "nothing to prune: every entry is in use, or younger than a day"
    ]
    age(cache, 0.9)
    assert prune(str(cache), keep_days=0.5, dry_run=False).datasets == []
    assert files(cache) == before
    age(cache, 0.2)
    assert len(prune(str(cache), keep_days=0, dry_run=False).datasets) == 1
    assert shards(cache) == set()


def test_datasets_that_no_run_has_used_for_long_go_with_what_only_they_need(config, cache):
    cached(config)
    old = cached(config, dataset__resolution=128)
    age(cache, 31)
    finish(plan_of(config))  # as every run does
    name = Path(old.folder.path).name
    assert prune(str(cache), keep_days=40, dry_run=True).datasets == []
    found = prune(str(cache), keep_days=30, dry_run=False)
    assert found.datasets == [name]
    assert set(found.shards) == {shard for sample in samples_of(old) for shard in sample.latent_shards}
    assert found.lines(done=True)[0] == f"deleted dataset {name}"
    assert not (cache / "datasets" / name).exists()  # nor the lock in it
    assert missing(plan_of(config)) == (0, 0)
    assert missing(plan_of(config, dataset__resolution=128)) == (9, 0)


def test_what_a_run_has_begun_to_use_meanwhile_stays(config, cache, monkeypatch):
    cached(config)
    age(cache, 31)
    before, look = files(cache), maintenance._unused

    def slowly(*args):
        found = look(*args)
        monkeypatch.setattr(maintenance, "_unused", look)
        finish(plan_of(config))
        return found

    monkeypatch.setattr(maintenance, "_unused", slowly)
    found = prune(str(cache), keep_days=30, dry_run=False)
    assert (found.shards, found.datasets) == ([], [])
    assert before <= files(cache)


def test_a_shard_without_entries_stays_since_a_run_may_wait_for_it(config, cache):
    cached(config)
    name = "latents/64x64/empty.safetensors"
    write_shard(open_folder(str(cache)), name, (), {"mean": torch.zeros(0, 4)}, {})
    age(cache, 29)
    assert prune(str(cache), keep_days=30, dry_run=False).shards == []
    finish(plan_of(config))
    age(cache, 2)
    assert prune(str(cache), keep_days=30, dry_run=False).shards == [name]


def test_what_a_running_run_needs_stays_although_its_dataset_has_changed_since(config, cache, images):
    """Its copy of the index is in its own folder, which `--prune` does not know."""
    began = cached(config)
    for number in range(9):
        add_image(images, f"{number:02d}.png", colour=300 + number)
    cached(config)
    age(cache, 2)
    assert prune(str(cache), keep_days=30, dry_run=False).shards == []
    needed = {shard for sample in samples_of(began) for shard in (*sample.latent_shards, *sample.text_shards)}
    assert needed <= shards(cache)
    age(cache, 30)
    cached(config)
    assert len(prune(str(cache), keep_days=30, dry_run=False).datasets) == 1


def test_hidden_folders_of_earlier_versions_count(config, cache):
    plan = cached(config)
    folder = Path(plan.folder.path)
    folder.rename(folder.with_name(".images-0123456789"))
    age(cache, 2)
    found = stats(str(cache))
    assert list(found.datasets) == [".images-0123456789"]
    assert found.num_unused == 0
    before = files(cache)
    assert prune(str(cache), keep_days=30, dry_run=False).shards == []
    assert files(cache) == before
    age(cache, 30)
    assert prune(str(cache), keep_days=30, dry_run=False).datasets == [".images-0123456789"]
    assert files(cache) == {"scan.parquet"}


def test_the_list_of_a_run_that_was_refused_goes_in_time(config, cache):
    cached(config)
    for name in ("refused-0123456789abcdef", "not ours"):
        (cache / "datasets" / name).mkdir()
        (cache / "datasets" / name / "skipped.csv").touch()
    (cache / "datasets" / "not ours" / "notes.txt").touch()
    assert prune(str(cache), keep_days=30, dry_run=False).datasets == []
    age(cache, 31)
    cached(config)
    assert prune(str(cache), keep_days=30, dry_run=False).datasets == ["refused-0123456789abcdef"]
    assert (cache / "datasets" / "not ours" / "skipped.csv").exists()


def test_no_empty_folders_of_datasets_stay(config, cache):
    """What an earlier version has left, and what a run that is beginning has made."""
    cached(config)
    for name, days in (("left", 2), ("beginning", 0), ("not ours", 2)):
        folder = cache / "datasets" / name
        folder.mkdir()
        (folder / ".lock").touch()
        if name == "not ours":
            (folder / "notes.txt").touch()
        os.utime(folder, (time.time() - days * DAY_S,) * 2)
    prune(str(cache), keep_days=30, dry_run=True)
    assert (cache / "datasets" / "left").exists()
    prune(str(cache), keep_days=30, dry_run=False)
    names = {path.name for path in (cache / "datasets").iterdir()}
    assert len(names) == 3 and {"beginning", "not ours"} < names


def test_the_embeddings_of_prompts_are_kept(config, cache):
    """Only the manifest knows of them."""
    plan = plan_of(config, cache__text="online")
    fill(plan)
    finish(plan_of(config, cache__text="online"))
    age(cache, 2)
    assert prune(str(cache), keep_days=30, dry_run=False).shards == []
    (manifest,) = (cache / "datasets").glob("*/manifest.json")
    places = json.loads(manifest.read_text())["prompts"]
    assert places.keys() == {"", "draw a cat"}
    for place in places.values():
        ShardReader(cache).read(place["shard"], place["key"])
    manifest.write_text("{")
    age(cache, 2)
    assert len(prune(str(cache), keep_days=30, dry_run=True).shards) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", "not hex"])
def test_where_an_index_cannot_be_read_nothing_is_deleted(config, cache, content):
    """What it uses would look as if nobody needed it."""
    cached(config)
    (path,) = (cache / "datasets").glob("*/index.parquet")
    if content == "not hex":
        pq.write_table(pa.table({"latent_keys": [["x"]], "text_keys": [["y"]]}), path)
    else:
        path.write_bytes(content)
    age(cache, 90)
    before = files(cache)
    with pytest.raises(CacheError) as error:
        prune(str(cache), keep_days=30, dry_run=False)
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert str(error.value).endswith(
        "so that nobody knows what it uses. No shard was deleted. Delete its folder, and run `sdxl-ray cache` for its "
        "dataset."
    )
    assert files(cache) == before


def test_keys_are_read_from_a_large_index_without_an_object_for_each():
    keys = [f"{number:032x}" for number in range(1000)]
    array = pa.array(keys)
    assert [key.ljust(16, b"\0").hex() for key in maintenance._from_hex(array).tolist()] == keys
    assert [key.ljust(16, b"\0").hex() for key in maintenance._from_hex(array.slice(100, 7)).tolist()] == keys[100:107]
    assert len(maintenance._from_hex(pa.array([], pa.string()))) == 0


# ---- in a bucket -----------------------------------------------------------------------------------------------------


def test_a_cache_in_a_bucket(config, cache, monkeypatch):
    cached(config)
    flip_a_bit(cache / sorted(shards(cache))[0], "mean", 0)
    (cache / "text" / "unused.safetensors").write_bytes(b"cut")
    age(cache, 2)
    remote = RemoteFolder(cache)
    monkeypatch.setattr("sdxl_ray.cache.store.open_folder", lambda path: remote)
    monkeypatch.setattr("sdxl_ray.cache.shards.open_folder", lambda path: remote)
    started = time.perf_counter()
    assert stats("s3://bucket/cache").num_entries["text"] == 11
    found = verify("s3://bucket/cache")
    assert sorted(map(len, found.values())) == [0, 1]
    assert prune("s3://bucket/cache", keep_days=30, dry_run=False).shards == ["text/unused.safetensors"]
    assert "text/unused.safetensors" not in files(cache)
    assert time.perf_counter() - started < 5
