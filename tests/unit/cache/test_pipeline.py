"""Stage 1 from the plan to the index, with the Ray Data jobs played by a few lines; with Ray: tests/integration."""

import csv
import errno
import hashlib
import inspect
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sdxl_ray import connection
from sdxl_ray.cache import pipeline
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.jobs import ray_jobs
from sdxl_ray.cache.jobs.lost_shards import Undecodable
from sdxl_ray.cache.jobs.ray_jobs import scan_on_ray
from sdxl_ray.cache.pipeline import Background, build_cache
from sdxl_ray.cache.scan import scan_images
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.errors import CacheError, DatasetError, StorageError
from sdxl_ray.records import Listed
from sdxl_ray.storage import open_folder
from sdxl_ray.train.data import load_data
from sdxl_ray.train.folder import keep_index
from tests.unit.cache.planned import add_image, add_images, changed, config_of, fill, plan_of


@pytest.fixture
def images(tmp_path):
    return add_images(tmp_path / "images", 9)


@pytest.fixture
def config(tmp_path, images, tiny_model):
    return changed(config_of(tmp_path, tiny_model, images), validation__prompts=["a red house"])


class Jobs:
    """Stands in for the two encoding jobs. `bad`: name of an image that cannot be used -> reason; all of one `kind`."""

    def __init__(self):
        self.bad, self.kind = {}, "damaged"
        self.connected = 0
        self.encoded = []
        self.text_error = None
        self.writes = True
        self.go_on = threading.Event()
        self.go_on.set()

    def connect(self):
        self.connected += 1

    def text(self, config, plan, progress, clock, reserved=None):
        if self.text_error:
            raise self.text_error
        for shard in plan.text_shards():
            self.write(plan, shard, "prompt_embeds")
            clock.counts["long"] += sum("0" in caption for caption in shard.captions)
            progress("text", len(shard.keys), plan.num_missing_text)
        return plan.num_missing_text

    def latents(self, config, plan, progress, clock, undecodable, reserved=None):
        for shard in plan.latent_shards():
            assert self.go_on.wait(10)
            good = []
            for key, record in zip(shard.keys, shard.records, strict=True):
                reason = self.bad.get(Path(record.path).name)
                if reason:
                    skipped = Skipped(record.path, reason, kind=self.kind)
                    undecodable.append(Undecodable(key, record.image_hash, skipped))
                else:
                    good.append(key)
            self.write(plan, shard, "mean", good)
            progress("images", len(good), plan.num_missing_latents)
        return plan.num_missing_latents - len(undecodable)

    def write(self, plan, shard, tensor, keys=None):
        import torch

        keys = shard.keys if keys is None else keys
        self.encoded += keys
        if self.writes:
            write_shard(plan.store.folder, shard.name, keys, {tensor: torch.zeros(len(keys), 4)}, {})


@pytest.fixture
def jobs(monkeypatch):
    made = Jobs()
    monkeypatch.setattr(pipeline, "encode_text", made.text)
    monkeypatch.setattr(pipeline, "encode_latents", made.latents)
    return made


def build(config, jobs, **settings):
    return build_cache(config, connect=jobs.connect, **settings)


def index_of(result):
    index = Index.read(result.index_path)
    return [index[row] for row in range(len(index))]


def manifest_of(result):
    return json.loads(Path(result.index_path).with_name("manifest.json").read_text(encoding="utf-8"))


# ---- everything before training --------------------------------------------------------------------------------------


def test_what_is_missing_is_encoded_and_the_index_written(config, jobs):
    seen = []
    result = build(config, jobs, progress=lambda *each: seen.append(each))
    assert (result.num_samples, result.num_latents_encoded, result.num_captions_encoded) == (9, 9, 9 + 2)
    assert jobs.connected == 1
    assert result.background is None
    assert sum(result.buckets.values()) == 9
    assert result.skipped == ()
    assert result.stage_seconds.keys() == {"scan", "text", "images"}
    assert {stage for stage, _, _ in seen} == {"text", "images"}
    reader = ShardReader(config.cache.path)
    for sample in index_of(result):
        reader.read(sample.latent_shards[0], sample.latent_keys[0])
        reader.read(sample.text_shards[0], sample.text_keys[0])
    manifest = manifest_of(result)
    assert manifest["prompts"].keys() == {"", "a red house"}
    for place in manifest["prompts"].values():
        reader.read(place["shard"], place["key"])
    assert (manifest["num_samples"], manifest["caption_chunks"]) == (9, 1)
    assert [dataset["name"] for dataset in manifest["datasets"]] == ["images"]


def test_a_second_run_encodes_nothing_and_needs_no_ray(config, jobs):
    first = build(config, jobs)
    second = build_cache(config, connect=lambda: pytest.fail("a complete cache needs no Ray"))
    assert (second.num_latents_encoded, second.num_captions_encoded) == (0, 0)
    assert index_of(second) == index_of(first)
    assert len(jobs.encoded) == len(set(jobs.encoded)) == 20


def test_a_run_with_other_prompts_encodes_theirs_and_leaves_those_of_others_alone(config, jobs):
    first = build(config, jobs)
    result = build(changed(config, validation__prompts=["trees"], validation__negative_prompt="blurry"), jobs)
    assert (result.num_latents_encoded, result.num_captions_encoded) == (0, 2)
    assert manifest_of(result)["prompts"].keys() == {"", "trees", "blurry"}
    assert manifest_of(first)["prompts"].keys() == {"", "a red house"}


def test_images_that_cannot_be_decoded_leave_the_index_and_are_remembered(config, jobs):
    jobs.bad = {"03.png": "cannot be decoded: truncated"}
    result = build(config, jobs)
    assert (result.num_samples, result.num_latents_encoded) == (8, 8)
    assert [(Path(item.path).name, item.dataset) for item in result.skipped] == [("03.png", "images")]
    with Path(result.skipped_path).open(encoding="utf-8", newline="") as file:
        assert [row[2] for row in csv.reader(file)] == ["reason", "cannot be decoded: truncated"]
    assert "03.png" not in {Path(sample.path).name for sample in index_of(result)}
    jobs.bad = {}
    again = build_cache(config, connect=lambda: pytest.fail("nothing is left to do"))
    assert index_of(again) == index_of(result)
    assert [(item.path, item.reason) for item in again.skipped] == [(item.path, item.reason) for item in result.skipped]


def test_an_image_that_changed_meanwhile_is_tried_again(config, jobs):
    jobs.bad, jobs.kind = {"03.png": "changed while it was being cached: run again"}, "changed"
    assert build(config, jobs).num_samples == 8
    jobs.bad = {}
    result = build(config, jobs)
    assert (result.num_samples, result.num_latents_encoded) == (9, 1)


def test_what_was_wrong_with_a_mask_is_not_remembered_of_its_image(config, jobs, images):
    for name in ("03-mask.png", "04-mask.png"):
        add_image(images, name, colour=1)
    masked = changed(config, dataset__mask="file")
    jobs.bad, jobs.kind = {"03.png": f"its mask {images / '03-mask.png'} cannot be decoded: truncated"}, "mask"
    assert build(masked, jobs).num_samples == 8
    (images / "03-mask.png").unlink()
    jobs.bad = {}
    assert build(masked, jobs).num_samples == 9


def test_too_many_that_cannot_be_decoded_stop_the_run_but_keep_what_is_encoded(config, jobs):
    jobs.bad = {f"{number:02d}.png": "cannot be decoded: truncated" for number in range(4)}
    too_many = r": 4 of 9 images cannot be used, more than dataset\.max_unreadable"
    with pytest.raises(DatasetError, match=too_many) as error:
        build(config, jobs)
    assert_unfinished(config)
    (listed,) = Path(config.cache.path).glob("datasets/*/skipped.csv")
    assert str(listed) in str(error.value)
    assert listed.read_text(encoding="utf-8").count("truncated") == 4
    before = len(jobs.encoded)
    result = build(changed(config, dataset__max_unreadable=0.5), jobs)
    assert (result.num_samples, len(jobs.encoded)) == (5, before)


def test_where_so_many_fail_that_a_machine_may_be_at_fault_none_is_remembered(config, jobs):
    jobs.bad = {f"{number:02d}.png": "cannot be decoded: no memory" for number in range(4)}
    with pytest.raises(DatasetError):
        build(config, jobs)
    jobs.bad = {}
    assert build(config, jobs).num_samples == 9


def test_a_cache_that_the_machines_do_not_share_is_found_out(config, jobs, monkeypatch):
    monkeypatch.setattr(pipeline, "LATE_S", 0)
    monkeypatch.setattr(pipeline, "_LOOK_EVERY_S", 0)
    jobs.writes = False
    with pytest.raises(CacheError) as error:
        build(config, jobs)
    assert str(error.value) == (
        f"9 latents and 11 captions are still missing after encoding. Is {config.cache.path} the same folder on all "
        "machines? Run `sdxl-ray doctor`. If something deletes from it, run again: only what is missing is encoded."
    )


def test_what_a_network_drive_shows_late_is_waited_for(config, jobs, monkeypatch):
    monkeypatch.setattr(pipeline, "_LOOK_EVERY_S", 0.05)
    folder = type(open_folder("/"))
    listed = folder.list

    def late(self, *args, **kwargs):
        return [each for each in listed(self, *args, **kwargs) if time.time_ns() - each.mtime_ns > 3e8]

    monkeypatch.setattr(folder, "list", late)
    with pytest.warns(UserWarning, match=r"^\d+ of the entries that were just encoded are not to be seen yet"):
        assert build(config, jobs).num_samples == 9


def assert_unfinished(config):
    """There is one index that nobody can train with."""
    indexes = Path(config.cache.path).glob("datasets/*/index.parquet")
    (path,) = (path for path in indexes if not path.with_name("manifest.json").exists())
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be read .*Run `sdxl-ray cache`"):
        load_data(config, path)
    return Index.read(path)


def test_an_error_while_encoding_is_raised_and_the_index_stays_unfinished(config, jobs):
    jobs.text_error = StorageError("no space")
    with pytest.raises(StorageError, match="no space"):
        build(config, jobs)
    assert_unfinished(config)
    jobs.text_error = None
    assert len(load_data(config, build(config, jobs).index_path).train.rows) > 0


def test_the_index_names_what_a_job_counts_on_before_it_encodes(config, jobs, images):
    """So that `--prune` of another process leaves it alone. That of an earlier state stays as it is."""
    first = build(config, jobs)
    before = {name: Path(first.index_path).with_name(name).read_bytes() for name in ("index.parquet", "manifest.json")}
    known = {key for sample in index_of(first) for key in sample.latent_keys}
    add_image(images, "new.png", colour=500)
    seen = []

    def look(stage, done, total):
        if not seen:
            index = assert_unfinished(config)
            seen.extend(key for row in range(len(index)) for key in index[row].latent_keys)

    result = build(config, jobs, progress=look)
    assert len(set(seen)) == result.num_samples == 10
    assert known < set(seen)
    assert {name: Path(first.index_path).with_name(name).read_bytes() for name in before} == before
    assert result.index_path != first.index_path


def test_a_run_trains_with_its_own_index_whatever_others_cache_meanwhile(config, jobs, images, tmp_path):
    """Between caching and the copy of the index, a run connects to Ray, which may take minutes."""
    result = build(config, jobs)
    add_image(images, "new.png", colour=500)
    seen = []

    def look(*_):
        seen.append(len(load_data(config, keep_index(tmp_path / "run", result.index_path)).train.whole))

    build(config, jobs, progress=look)
    look()
    assert set(seen) == {9}


def test_two_runs_that_differ_in_their_order_each_have_the_shards_that_they_make(config, jobs, tmp_path):
    ours = on_demand(config, jobs)
    theirs = on_demand(config, jobs, ranks=np.arange(9)[::-1].copy())
    for result in (ours, theirs):
        made = {shard.name for shard in result.background.plan.latent_shards()}
        copy = Index.read(keep_index(tmp_path / "run", result.index_path))
        assert {copy[row].latent_shards[0] for row in range(9)} == made


def test_nothing_stays_of_an_index_whose_images_turned_out_damaged(config, jobs):
    jobs.bad = {"03.png": "cannot be decoded: truncated"}
    result = build(config, jobs)
    assert [str(path) for path in Path(config.cache.path).glob("datasets/*")] == [str(Path(result.index_path).parent)]


def test_what_disappears_while_encoding_is_encoded_in_a_second_pass(config, jobs, images, monkeypatch):
    first = build(config, jobs)
    kept = {sample.latent_shards[0] for sample in index_of(first)}
    add_image(images, "new.png", colour=500)
    encode_text = jobs.text

    def prune(config, plan, *rest):
        for shard in kept:
            (Path(config.cache.path) / shard).unlink(missing_ok=True)
        return encode_text(config, plan, *rest)

    monkeypatch.setattr(pipeline, "encode_text", prune)
    result = build(config, jobs)
    assert (result.num_latents_encoded, result.num_captions_encoded) == (10, 1)
    reader = ShardReader(config.cache.path)
    for sample in index_of(result):
        reader.read(sample.latent_shards[0], sample.latent_keys[0])


def test_a_shard_that_is_damaged_while_others_are_encoded_is_encoded_again_at_once(config, jobs, monkeypatch):
    monkeypatch.setattr(pipeline, "_LOOK_EVERY_S", 1000)
    encode_latents, num = jobs.latents, []

    def damage(config, plan, *rest):
        num.append(encode_latents(config, plan, *rest))
        if len(num) == 1:
            shard = next(Path(config.cache.path).glob("latents/**/*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1])
        return num[-1]

    monkeypatch.setattr(pipeline, "encode_latents", damage)
    result = build(config, jobs)
    assert num[0] == 9 and 0 < num[1] <= 9
    reader = ShardReader(config.cache.path)
    for sample in index_of(result):
        reader.read(sample.latent_shards[0], sample.latent_keys[0])


def test_what_is_encoded_and_is_not_there_is_an_error(config, jobs, images, monkeypatch):
    monkeypatch.setattr(pipeline, "LATE_S", 0)
    monkeypatch.setattr(pipeline, "_LOOK_EVERY_S", 0)
    build(config, jobs)
    add_image(images, "new.png", colour=500)
    encode_latents, tries = jobs.latents, []

    def prune(config, plan, *rest):
        num = encode_latents(config, plan, *rest)
        tries.append(num)
        for shard in Path(config.cache.path).glob("latents/**/*.safetensors"):
            shard.unlink()
        return num

    monkeypatch.setattr(pipeline, "encode_latents", prune)
    with pytest.raises(CacheError, match=r"10 latents and 0 captions are still missing after encoding"):
        build(config, jobs)
    assert tries == [1]  # what has just been encoded is not there: no second pass finds it


def test_how_much_was_tried_is_told_also_where_nothing_came_of_it(config, jobs):
    first = build(config, jobs)
    assert first.num_tried == 20
    assert build(config, jobs).num_tried == 0
    for shard in Path(config.cache.path).glob("latents/**/*.safetensors"):
        shard.unlink()
    jobs.bad, jobs.kind = {"03.png": "is not there any more"}, "unreadable"
    result = build(config, jobs)
    assert (result.num_tried, result.num_latents_encoded) == (9, 8)
    again = build(config, jobs)
    assert (again.num_tried, again.num_latents_encoded, len(again.skipped)) == (1, 0, 1)


@pytest.mark.parametrize("kind", ["changed", "other_size"])
def test_an_image_that_changed_without_a_new_date_is_read_again_by_the_next_run(config, jobs, images, kind):
    """As `cp -p`, `rsync -t` and tools that write into an image leave it."""
    image = images / "03.png"
    (sample,) = [sample for sample in index_of(build(config, jobs)) if sample.path == str(image)]
    status, content = image.stat(), image.read_bytes()
    (Path(config.cache.path) / sample.latent_shards[0]).unlink()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    jobs.bad, jobs.kind = {"03.png": "is not what was listed"}, kind
    assert build(config, jobs).num_samples == 8
    jobs.bad = {}
    (sample,) = [sample for sample in index_of(build(config, jobs)) if sample.path == str(image)]
    assert sample.image_hash == hashlib.sha256(image.read_bytes()).hexdigest()


def test_a_mask_that_changed_without_a_new_date_is_read_again_by_the_next_run(config, jobs, images):
    mask = add_image(images, "03-mask.png", colour=1)
    masked = changed(config, dataset__mask="file")
    (sample,) = [sample for sample in index_of(build(masked, jobs)) if sample.path == str(images / "03.png")]
    status, content = mask.stat(), mask.read_bytes()
    (Path(config.cache.path) / sample.latent_shards[0]).unlink()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(mask, ns=(status.st_atime_ns, status.st_mtime_ns))
    jobs.bad, jobs.kind = {"03.png": "its mask changed while it was being cached: run again"}, "changed"
    assert build(masked, jobs).num_samples == 8
    jobs.bad = {}
    (sample,) = [sample for sample in index_of(build(masked, jobs)) if sample.path == str(images / "03.png")]
    assert sample.mask_hash == hashlib.sha256(mask.read_bytes()).hexdigest()


def test_what_the_datasets_have_to_say_is_handed_on(config, jobs, images):
    add_image(images, "03-mask.png", colour=1)
    assert build(config, jobs).notes == ()
    (note,) = build(changed(config, dataset__mask="file"), jobs).notes
    assert note == 'dataset "images": 1 of 9 images have a mask; the others count whole'


# ---- where nobody can write ------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch):
    """A function: from then on, writing below this folder fails."""

    def make(folder):
        write, replace, unlink, open_file = Path.write_bytes, Path.replace, Path.unlink, Path.open

        def refuse(function, path, *args, **kwargs):
            if path.is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return function(path, *args, **kwargs)

        def refuse_writing(path, mode="r", *args, **kwargs):
            return refuse(open_file, path, mode, *args, **kwargs) if mode[0] in "wax" else open_file(path, mode)

        monkeypatch.setattr(Path, "write_bytes", lambda path, *args: refuse(write, path, *args))
        monkeypatch.setattr(Path, "replace", lambda path, *args: refuse(replace, path, *args))
        monkeypatch.setattr(Path, "unlink", lambda path, **how: refuse(unlink, path, **how))
        monkeypatch.setattr(Path, "open", refuse_writing)

    return make


def test_a_complete_cache_may_lie_where_nobody_can_write(config, jobs, images, read_only):
    (images / "bad.png").write_bytes(b"no image")  # and so is the list of what is skipped
    first = build(config, jobs)
    left_behind = Path(first.index_path).with_name(".tmp-old")
    left_behind.touch()
    os.utime(left_behind, (0, 0))
    read_only(config.cache.path)
    result = build_cache(config, connect=lambda: pytest.fail("nothing is missing"))
    assert index_of(result) == index_of(first)
    assert load_data(config, result.index_path)
    assert first.notes == ()
    (note,) = result.notes
    assert note.startswith(f"{Path(first.index_path).parent} cannot be marked as in use here (read-only): a --prune")


@pytest.mark.parametrize("change", ["a caption", "another prompt", "a skipped image", "a missing shard"])
def test_what_would_have_to_be_written_there_is_an_error(config, jobs, images, read_only, change):
    first = build(changed(config, validation__prompts=["trees", "a red house"]), jobs)
    (images / "08.txt").write_text("caption of 07.png" if change == "a caption" else "caption of 08.png")
    if change == "another prompt":
        manifest = Path(first.index_path).with_name("manifest.json")
        manifest.write_text(manifest.read_text(encoding="utf-8").replace("a red house", "a house"))
    if change == "a skipped image":
        with Path(first.skipped_path).open("a") as file:
            file.write("another one\n")
    if change == "a missing shard":
        (Path(config.cache.path) / index_of(first)[0].latent_shards[0]).unlink()
    read_only(config.cache.path)
    with pytest.raises(StorageError, match="the file system is read-only"):
        build(config, jobs)


def test_modes_that_encode_while_training_leave_that_out(config, jobs):
    off = build(changed(config, cache__mode="off"), jobs)
    assert (off.num_latents_encoded, off.num_captions_encoded) == (0, 11)
    assert {sample.latent_shards for sample in index_of(off)} == {("",)}
    online = build(changed(config, cache__mode="off", cache__text="online"), jobs)
    assert (online.num_latents_encoded, online.num_captions_encoded) == (0, 0)  # the prompts are there
    assert {sample.text_shards for sample in index_of(online)} == {()}
    assert manifest_of(online)["prompts"].keys() == {"", "a red house"}


def test_ray_is_reached_as_every_command_reaches_it():
    assert inspect.signature(build_cache).parameters["connect"].default is connection.connect


# ---- beside training -------------------------------------------------------------------------------------------------


def on_demand(config, jobs, ranks=None):
    order = np.arange(9) if ranks is None else ranks
    return build(changed(config, cache__mode="ondemand"), jobs, order_of=lambda index: order[: len(index)])


def start(result):
    result.background.reserve(cpus=1, gpus=0)
    result.background.start()
    for thread in result.background._threads:
        thread.join(10)
    assert not result.background.running


def test_on_demand_the_index_is_there_before_anything_is_encoded(config, jobs):
    result = on_demand(config, jobs)
    assert jobs.encoded == []
    assert jobs.connected == 0
    samples = index_of(result)
    assert all(sample.latent_shards[0] and sample.text_shards[0] for sample in samples)
    start(result)
    assert result.background.error is None
    reader = ShardReader(config.cache.path, wait=lambda shard: pytest.fail(f"{shard} did not come"))
    for sample in samples:
        reader.read(sample.latent_shards[0], sample.latent_keys[0])
        reader.read(sample.text_shards[0], sample.text_keys[0])
    place = manifest_of(result)["prompts"]["a red house"]
    reader.read(place["shard"], place["key"])


def test_on_demand_in_the_order_that_training_asks_for(config, jobs):
    asked = []

    def order_of(index):
        asked.append([index[row].captions for row in range(len(index))])
        return np.arange(9)[::-1].copy()

    result = build(changed(config, cache__mode="ondemand"), jobs, order_of=order_of)
    assert asked == [[(f"caption of {number:02d}.png",) for number in range(9)]]
    start(result)
    by_key = {sample.latent_keys[0]: sample.captions[0] for sample in index_of(result)}
    first = next(key for key in jobs.encoded if key in by_key)
    assert by_key[first] == "caption of 08.png"


def test_on_demand_with_a_full_cache_there_is_nothing_beside_training(config, jobs):
    build(config, jobs)
    result = on_demand(config, jobs)
    assert result.background is None
    usual = build(changed(config, cache__mode="ondemand"), jobs)  # `sdxl-ray cache` fills it as usual
    assert usual.background is None
    assert len(jobs.encoded) == 20


def test_the_command_that_fills_a_cache_fills_it_in_every_mode(config, jobs):
    result = build(changed(config, cache__mode="ondemand"), jobs)
    assert (result.background, result.num_latents_encoded) == (None, 9)


def test_on_demand_what_is_damaged_is_told_and_stays_a_row_so_that_the_run_can_be_resumed(config, jobs):
    jobs.bad = {"03.png": "cannot be decoded: truncated"}
    result = on_demand(config, jobs)
    before = [sample.sample_id for sample in index_of(result)]
    start(result)
    assert [Path(item.path).name for item in result.background.skipped] == ["03.png"]
    assert result.background.error is None
    assert [sample.sample_id for sample in index_of(on_demand(config, jobs))] == before


def test_on_demand_too_many_damaged_images_end_the_run(config, jobs, images):
    jobs.bad = {f"0{number}.png": "cannot be decoded: truncated" for number in range(3)}
    result = on_demand(config, jobs)
    start(result)
    assert type(result.background.error) is DatasetError
    assert str(result.background.error).splitlines()[0] == (
        f"{images}: 2 of 9 images cannot be used, more than dataset.max_unreadable = 0.2 allows:"
    )


SEVERAL_OF_EACH = {"dataset__resolution": [64, 128], "dataset__flip": True}


def test_on_demand_a_damaged_image_is_one_image_in_all_its_sizes(config, jobs, images):
    """4 of 36 latents are those of 1 image in 9; with another, skipped by the scan, it is 2 in 10."""
    add_image(images, "10.png").write_bytes(b"no image")
    jobs.bad = {"03.png": "cannot be decoded: truncated"}
    varied = changed(config, **SEVERAL_OF_EACH)
    result = on_demand(varied, jobs, ranks=np.arange(36))
    start(result)
    assert result.background.error is None
    assert result.background.skipped == [
        Skipped(str(images / "03.png"), "cannot be decoded: truncated", "images", kind="damaged")
    ]
    Path(images / "11.png").write_bytes(b"no image")
    with_less = changed(varied, dataset__max_unreadable=0.28)  # 2 and 1 of 11
    result = on_demand(with_less, jobs, ranks=np.arange(36))
    start(result)
    assert result.background.error is None
    stricter = on_demand(changed(with_less, dataset__max_unreadable=0.27), jobs, ranks=np.arange(36))
    start(stricter)
    assert ": 3 of 11 images cannot be used" in str(stricter.background.error)


def test_on_demand_the_limit_is_one_of_each_dataset(config, jobs, images, tmp_path):
    """A hundred good images elsewhere do not excuse a dataset that cannot be read, nor does another's limit."""
    other = add_images(tmp_path / "other", 12, colour=700)
    both = config_of(tmp_path, config.model.path, images, other)
    jobs.bad = {"10.png": "cannot be decoded: cut", "11.png": "cannot be decoded: cut"}  # of the other one
    start(result := on_demand(changed(both, dataset__other__max_unreadable=0.1), jobs, ranks=np.arange(21)))
    assert str(result.background.error).startswith(f"{other}: 2 of 12 images cannot be used")
    start(result := on_demand(changed(both, dataset__images__max_unreadable=0.0), jobs, ranks=np.arange(21)))
    assert result.background.error is None


def test_on_demand_damaged_images_are_counted_now_and_then(config, jobs, monkeypatch):
    """Each time is a look at every key of the plan; of ten million it takes a tenth of a second."""
    judged = []
    background = Background(config, plan_of(config))
    monkeypatch.setattr(pipeline, "check_readable", lambda plan, datasets, also: judged.append(len(also)))
    monkeypatch.setattr(pipeline, "unreadable_of", lambda plan, undecodable: list(undecodable))
    for number in range(1000):
        background._undecodable.append(Undecodable(str(number), "", Skipped(str(number), "bad")))
        background._progress("text", 1, 2)
        background._progress("images", number, 1000)
    assert judged[:10] == list(range(1, 11))
    assert len(judged) < 70
    assert judged[-1] > 900


def test_on_demand_captions_that_are_cut_are_counted_when_they_are_encoded(config, jobs):
    result = on_demand(config, jobs)
    assert result.num_long_captions == 0
    assert result.background.num_long_captions == 0
    start(result)
    assert result.background.num_long_captions == 9  # caption of 0?.png


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StorageError("no space"), StorageError, "no space"),
        (KeyError("num"), CacheError, "encoding on demand failed: KeyError: 'num'"),
        (AssertionError(), CacheError, "encoding on demand failed: AssertionError: "),
    ],
)
def test_on_demand_whatever_goes_wrong_is_told_to_those_who_wait(config, jobs, error, kind, text):
    jobs.text_error = error
    result = on_demand(config, jobs)
    start(result)
    assert type(result.background.error) is kind
    assert str(result.background.error) == text


def test_on_demand_it_stops_after_the_shards_at_hand(config, jobs):
    result = on_demand(config, jobs)
    jobs.go_on.clear()
    background = result.background
    background.reserve(cpus=1, gpus=0)
    background.start()
    assert background.running
    stopping = threading.Thread(target=background.stop)
    stopping.start()
    assert background._stop.wait(10)
    jobs.go_on.set()
    stopping.join(10)
    assert not background.running
    assert background.error is None
    num_latents = sum(shard.stem in {Path(each.latent_shards[0]).stem for each in index_of(result)}
                      for shard in Path(config.cache.path).glob("latents/*/*.safetensors"))  # fmt: skip
    assert num_latents == 1
    again = on_demand(config, jobs)  # goes on with the rest
    start(again)
    assert on_demand(config, jobs).background is None


def test_a_background_can_be_stopped_before_it_begins(config):
    background, said = Background(config, plan_of(config)), []
    background.stop(said.append)
    assert not background.running
    assert said == []


def test_stopping_waits_for_both_threads_together_and_says_so(config, jobs, monkeypatch):
    monkeypatch.setattr(pipeline, "_STOP_WITHIN_S", 1.4)
    blocked, said = threading.Event(), []
    monkeypatch.setattr(pipeline, "encode_text", lambda *args, **kwargs: blocked.wait(10))
    monkeypatch.setattr(pipeline, "encode_latents", lambda *args, **kwargs: blocked.wait(10))
    background = on_demand(config, jobs).background
    background.start()
    started = time.monotonic()
    background.stop(said.append)
    assert time.monotonic() - started < 2.5  # not 1.4 s for each
    assert said == ["waiting for the shards that are being encoded, 1 s at most"]
    blocked.set()


# ---- the scan --------------------------------------------------------------------------------------------------------


def test_few_files_are_scanned_here(images):
    files = [Listed(str(images / f"{number:02d}.png"), "1-1") for number in range(9)]
    found = scan_on_ray(
        lambda: pytest.fail("connected"), files, max_pixels=10**6, by_listing=[False] * 9, progress=lambda *_: None
    )
    assert list(found) == scan_images(files, max_pixels=10**6)


def test_the_plan_of_a_cache_is_what_check_sees(config, jobs):
    """`sdxl-ray check` counts the same things that `sdxl-ray cache` then does."""
    plan = plan_of(config)
    fill(plan)
    assert build(config, jobs).num_latents_encoded == 0
    assert ray_jobs.SCAN_ON_RAY_FROM == 5_000


def test_only_on_demand_is_anything_left_for_later(config, jobs):
    """Training asks for its order in every mode."""
    for mode, num_latents in (("off", 0), ("disk", 9)):
        result = build(changed(config, cache__mode=mode), jobs, order_of=lambda index: np.arange(9))
        assert (result.background, result.num_latents_encoded) == (None, num_latents)
    assert len(jobs.encoded) == 9 + 11


def test_on_demand_what_is_damaged_at_the_very_end_is_told_too(config, jobs, images, monkeypatch):
    def latents(config, plan, progress, clock, undecodable, reserved=None):
        progress("images", 8, 9)
        shard = next(plan.latent_shards())
        skipped = Skipped(shard.records[0].path, "cannot be decoded: cut", kind="damaged")
        undecodable.append(Undecodable(shard.keys[0], shard.records[0].image_hash, skipped))

    monkeypatch.setattr(pipeline, "encode_latents", latents)
    start(result := on_demand(config, jobs))
    assert [item.reason for item in result.background.skipped] == ["cannot be decoded: cut"]
