"""What the Ray Data jobs make of errors that no encoder has told. With Ray: tests/integration/test_cache.py"""

import itertools
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.data import ExecutionOptions

from sdxl_ray.cache import missing
from sdxl_ray.cache.jobs import lost_shards, ray_jobs, waves
from sdxl_ray.cache.jobs.pools import Share
from sdxl_ray.cache.jobs.ray_jobs import Clock, Reserved, encode_latents, encode_text
from sdxl_ray.cache.jobs.ray_rows import InThread, reports_of, rows_of
from sdxl_ray.cache.jobs.reports import ShardReport, error_text, unpacked
from sdxl_ray.errors import CacheError, StorageError
from tests.unit.cache.planned import add_image, add_images, config_of, plan_of

# As Ray 2.60 shows an error of a task of Ray Data.
RAISED = """[36mray::MapWorker(MapBatches(WriteLatentShard)).submit()[39m (pid=20318, ip=192.0.2.2, repr=x)
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58, in run
    result = self.fn(*self.args, **self.kwargs)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
{first}  File "/x/sdxl_ray/cache/actors.py", line 11, in __call__
    tensors = encoder.encode()
              ^^^^^^^^^^^^^^^^
{last}

The above exception was the direct cause of the following exception:

[36mray::MapWorker(MapBatches(WriteLatentShard)).submit()[39m (pid=20318, ip=192.0.2.2, actor_id=237d, repr=x)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`."""
FIRST = """  File "/x/sdxl_ray/cache/encode.py", line 11, in encode
    size = sizes[name]
KeyError: 'name'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
"""
CUDA = """RuntimeError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.

Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


class Dataset:
    """Rows, then an error."""

    def __init__(self, error, *rows):
        self.error, self.rows = error, rows

    def iter_rows(self):
        yield from self.rows
        raise self.error


def error_of(error):
    with pytest.raises(CacheError) as raised:
        list(reports_of(Dataset(error)))
    assert raised.value.__cause__ is error
    return str(raised.value)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("ValueError: too many values", "ValueError: too many values"),
        (CUDA, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("AssertionError", "AssertionError"),
    ],
)
@pytest.mark.parametrize("first", ["", FIRST])
def test_what_a_task_raised_is_told_in_its_own_line(first, last, reason):
    error = ray.exceptions.UserCodeException(RAISED.format(first=first, last=last))
    assert error_of(error) == (
        f"encoding failed: {reason}. Finished shards are kept; run again to go on. With --traceback, the whole error "
        "is shown."
    )


@pytest.mark.parametrize("last", ["MemoryError", "MemoryError: Unable to allocate 4.00 GiB"])
def test_too_little_memory_of_a_task_is_told_with_the_cure(last):
    text = error_of(ray.exceptions.UserCodeException(RAISED.format(first="", last=last)))
    assert text.startswith(
        f"encoding failed: {last}. A node has too little memory. Let fewer tasks run there at once: "
    )
    assert "Finished shards are kept; run again to go on." in text


def test_a_node_that_runs_out_of_memory_is_told_with_the_cure():
    killed = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on ...")
    assert error_of(killed).startswith(
        "encoding failed: Task was killed due to the node running low on memory. A node has too little memory. Let "
    )


def test_what_ray_found_is_told_in_its_first_line():
    full = ray.exceptions.RaySystemError("the disk is full.\nMore about it")
    assert error_of(full).startswith("encoding failed: System error: the disk is full. Finished shards are kept; ")


def test_what_an_encoder_has_told_stays_what_it_is_and_a_bug_of_ours_too():
    told = ShardReport("", error=error_text(StorageError("no space"))).to_row()
    with pytest.raises(StorageError, match="no space"):
        list(reports_of(Dataset(AssertionError(), told)))
    with pytest.raises(ZeroDivisionError):
        list(reports_of(Dataset(ZeroDivisionError(), ShardReport("").to_row())))


def test_a_scan_that_fails_is_no_encoding():
    died = ray.exceptions.WorkerCrashedError()
    with pytest.raises(CacheError, match=r"^scanning failed: .*\. What was found is kept; run again to go on\."):
        list(rows_of(Dataset(died), "scanning failed", "What was found is kept"))


# ---- shards that do not come back ------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Four of one bucket, in one shard."""
    for number in range(4):
        add_image(tmp_path / "images", f"{number}.png", colour=number)
    return tmp_path / "images"


@pytest.fixture
def config(tmp_path, images, tiny_model):
    return config_of(tmp_path, tiny_model, images)


SHARE = Share(device="cpu", num_actors=1, max_actors=1, cpus_per_actor=0.5, cpus_per_decode=0.5, gpus_per_actor=0)


class Work:
    """Stands in for Ray Data: what becomes of each work item, and how many of them may be lost.

    `deadly`: keys of images that end their decoder; `told`: those that a node cannot read -> why; `stumbles`: how often
    a node cannot read a shard of that name although it can read its images. `there`: names of shards that another job
    has written.
    """

    def __init__(self, monkeypatch):
        self.deadly, self.told, self.stumbles, self.there = set(), {}, Counter(), set()
        self.passes = []  # of each job: how many shards, and may be lost
        self.made = []  # of each job: the names of its shards, once it is made
        self.rows = []  # names of the shards of which a row has come
        self.options = {}
        self.share = SHARE
        self.before_row = lambda shard: None
        monkeypatch.setattr(ray_jobs, "_share", lambda *args, **kwargs: self.share)
        for module in (ray_jobs, waves):
            monkeypatch.setattr(module, "dataset_of", self.dataset_of)
        monkeypatch.setattr(lost_shards, "_dying", self.dying)

    def dataset_of(self, wave, reserved):
        self.made.append(list(wave))
        return Job(self, [unpacked(shard) for shard in wave.values()])

    def dying(self, shard, keys, num_cpus, *, max_retries):
        return [key for key in keys if key in self.deadly]


class Job:
    def __init__(self, work, items):
        self.work, self.items = work, items
        self.context = SimpleNamespace(max_errored_blocks=0)

    def map(self, function, **options):
        self.work.options["decode"] = options
        return self

    def map_batches(self, function, **options):
        self.work.options["encode"] = options
        return self

    def iter_rows(self):
        work, may_lose = self.work, self.context.max_errored_blocks
        work.passes.append((len(self.items), may_lose))
        for shard in self.items:
            work.before_row(shard)
            keys = [key for key in shard["keys"] if key not in shard.get("without", ())]
            if work.deadly & set(keys):
                may_lose -= 1
                if may_lose < 0:
                    raise ray.exceptions.WorkerCrashedError
                continue
            report = ShardReport(shard["name"], node="node-7")
            unreadable = [key for key in keys if key in work.told]
            work.stumbles[shard["name"]] -= 1
            if unreadable or work.stumbles[shard["name"]] >= 0:
                key = (unreadable or keys)[0]
                told = {"key": key, "node": "node-7", "reason": work.told.get(key, "Stale file handle")}
                report = replace(report, unreadable=told)
            elif shard["name"] in work.there:
                report = replace(report, num_there=len(keys), node="")
            else:
                report = replace(report, num=len(keys))
            work.rows.append(shard["name"])
            yield report.to_row()


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


def encode(config, plan):
    undecodable = []
    return encode_latents(config, plan, lambda *_: None, Clock(), undecodable), undecodable


def test_what_dies_is_tried_again_a_few_times_and_not_for_ever(config, work):
    assert encode(config, plan_of(config)) == (4, [])
    assert work.passes == [(1, 100)]
    assert work.options["decode"]["max_retries"] == 3
    assert (work.options["encode"]["max_restarts"], work.options["encode"]["max_task_retries"]) == (10, 10)


def test_an_image_that_kills_its_decoder_is_skipped_and_its_neighbours_are_encoded(config, images, work):
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.deadly = {shard.keys[2]}
    num, (found,) = encode(config, plan)
    assert num == 3
    assert work.passes == [(1, 100), (1, 0)]  # the second time, whatever else happens is an error
    assert (found.key, found.image_hash) == (shard.keys[2], shard.records[2].image_hash)
    assert (found.skipped.path, found.skipped.kind) == (str(images / "2.png"), "unreadable")
    assert found.skipped.reason == (
        "its decoder ended the process that read it (too little memory, or a fault in the decoder)"
    )


def test_a_shard_that_is_lost_without_a_deadly_image_is_tried_again_and_then_an_error(config, work, monkeypatch):
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.deadly = {shard.keys[2]}
    monkeypatch.setattr(lost_shards, "_dying", lambda *args, **kwargs: [])
    with pytest.raises(CacheError, match=r"^encoding failed: .*died"):
        encode(config, plan)
    assert work.passes == [(1, 100), (1, 0)]


def test_more_shards_than_a_job_may_lose_end_it(tmp_path, tiny_model, work, monkeypatch):
    config = config_of(tmp_path, tiny_model, add_images(tmp_path / "three", 9))
    plan = plan_of(config)
    work.deadly = {key for shard in plan.latent_shards() for key in shard.keys}
    monkeypatch.setattr(ray_jobs, "_LOST_AT_MOST", 2)
    with pytest.raises(CacheError, match=r"^encoding failed: .*died"):
        encode(config, plan)
    assert work.passes == [(3, 2)]


def test_images_that_are_gone_are_skipped_and_their_neighbours_encoded(config, images, work):
    """The node names the first; the driver sees that another one of its shard is gone too."""
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    for number in (1, 3):
        (images / f"{number}.png").unlink()
        work.told[shard.keys[number]] = "No such file or directory"
    num, found = encode(config, plan)
    assert num == 2
    assert work.passes == [(1, 100), (1, 0)]
    assert [(item.key, item.skipped.path, item.skipped.reason, item.skipped.kind) for item in found] == [
        (shard.keys[number], str(images / f"{number}.png"), "is not there any more", "unreadable") for number in (1, 3)
    ]


def test_images_that_go_one_after_another_are_all_found(config, images, work):
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.told = dict.fromkeys(shard.keys[:2], "No such file or directory")
    (images / "0.png").unlink()

    def and_another(shard):
        if work.rows:
            (images / "1.png").unlink(missing_ok=True)

    work.before_row = and_another
    num, found = encode(config, plan)
    assert (num, [item.key for item in found]) == (2, list(shard.keys[:2]))
    assert work.passes == [(1, 100), (1, 0), (1, 0)]


def test_what_only_a_node_cannot_read_is_an_error(config, images, work):
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.told = {shard.keys[1]: "Permission denied"}
    with pytest.raises(CacheError) as error:
        encode(config, plan)
    assert str(error.value).startswith(
        f"node node-7 cannot read {images / '1.png'}: Permission denied. Is dataset.path the same folder on all machi"
    )


def test_a_folder_that_a_node_does_not_see_is_an_error_with_the_first_shard(tmp_path, tiny_model, work):
    """Not after the others, of which each image takes the node seconds."""
    plan = plan_of(config := config_of(tmp_path, tiny_model, add_images(tmp_path / "three", 9)))
    work.told = {key: "No such file or directory" for shard in plan.latent_shards() for key in shard.keys}
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        encode(config, plan)
    assert len(work.rows) == 1


def test_a_mask_that_is_gone_is_told_as_that(tmp_path, images, tiny_model, work):
    for number in range(4):
        add_image(images, f"{number}-mask.png", colour=9)
    config = config_of(tmp_path, tiny_model, images, mask="file")
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.told = {shard.keys[0]: "No such file or directory"}
    (images / "0-mask.png").unlink()
    _, (found,) = encode(config, plan)
    assert found.skipped.reason == f"its mask {images / '0-mask.png'} is not there any more"


def test_what_cannot_be_read_for_another_reason_is_told_with_it(config, images, work, monkeypatch):
    def read(address):
        raise PermissionError(13, "Permission denied", address)

    monkeypatch.setattr(lost_shards, "read_bytes", read)
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.told = {shard.keys[0]: "Permission denied"}
    _, (found,) = encode(config, plan)
    assert found.skipped.reason == "cannot be read: Permission denied"


def test_what_an_encoder_did_not_expect_is_told_with_its_traceback():
    try:
        {}["name"]
    except KeyError as error:
        text = error_text(error)
    with pytest.raises(CacheError) as raised:
        list(reports_of(Dataset(AssertionError(), ShardReport("", error=text).to_row())))
    assert str(raised.value) == (
        "encoding failed: KeyError: 'name'. Finished shards are kept; run again to go on. With --traceback, the whole "
        "error is shown."
    )
    assert '{}["name"]' in str(raised.value.__cause__)
    for error in (MemoryError(), MemoryError("Unable to allocate 4.00 GiB")):
        with pytest.raises(CacheError, match="A node has too little memory"):
            list(reports_of(Dataset(AssertionError(), ShardReport("", error=error_text(error)).to_row())))


def test_what_is_deprecated_in_ray_is_not_told_the_user(monkeypatch):
    options = ExecutionOptions()
    made = SimpleNamespace(context=SimpleNamespace(execution_options=options))
    monkeypatch.setattr(ray.data, "from_items", lambda items, override_num_blocks: made)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        waves.dataset_of({"latents/x": b""}, Reserved(cpus=1.0, gpus=2.0))
    assert not [str(warning.message) for warning in told if "exclude_resources" in str(warning.message)]
    assert (options.exclude_resources.cpu, options.exclude_resources.gpu) == (1.0, 2.0)


# ---- what a node reads once in a while not ---------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path, tiny_model, monkeypatch):
    """30 shards of two images each, one bucket; the config."""
    monkeypatch.setattr(missing, "shard_length", lambda bucket: 2)
    for number in range(60):
        add_image(tmp_path / "many", f"{number:02d}.png", colour=number)
    return config_of(tmp_path, tiny_model, tmp_path / "many")


def in_order(monkeypatch):
    monkeypatch.setattr(waves, "_from_anywhere", lambda wave: wave)


def test_a_shard_that_a_node_could_not_read_once_is_encoded_as_it_is(many, work, monkeypatch):
    in_order(monkeypatch)
    plan = plan_of(many)
    names = [shard.name for shard in plan.latent_shards()]
    work.stumbles = Counter(dict.fromkeys(names[1:21], 1))
    assert encode(many, plan) == (60, [])
    assert work.passes == [(30, 100), (20, 0)]


def test_more_than_twenty_such_shards_are_no_stumbling(many, work, monkeypatch):
    in_order(monkeypatch)
    plan = plan_of(many)
    names = [shard.name for shard in plan.latent_shards()]
    work.stumbles = Counter(dict.fromkeys(names[1:22], 1))
    with pytest.raises(CacheError, match=r"node node-7 cannot read .*: Stale file handle\. Is dataset\.path the same"):
        encode(many, plan)
    assert work.rows == names[:22]


def test_a_shard_that_comes_back_a_second_time_is_no_stumbling(many, work, monkeypatch):
    in_order(monkeypatch)
    plan = plan_of(many)
    names = [shard.name for shard in plan.latent_shards()]
    work.stumbles = Counter({names[5]: 2})
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        encode(many, plan)
    assert work.passes == [(30, 100), (1, 0)]


# ---- beside a training run -------------------------------------------------------------------------------------------


def first_image_gone(plan, work):
    """Of the first shard, which is also told; its name."""
    shard = next(plan.latent_shards())
    work.told[shard.keys[0]] = "No such file or directory"
    Path(shard.records[0].path).unlink()
    return shard.name


def wait_until(is_so):
    deadline = time.monotonic() + 20
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_shard_that_training_waits_for_is_encoded_again_beside_the_others(many, work):
    plan = plan_of(many)
    name = first_image_gone(plan, work)
    wave = [shard.name for shard in plan.latent_shards()]
    # The third of the others waits until the first has come a second time: it is not after them.
    work.before_row = lambda shard: shard["name"] == wave[2] and wait_until(lambda: work.rows.count(name) == 2)
    work.share = replace(SHARE, num_actors=8, max_actors=9)
    undecodable = []
    num = encode_latents(many, plan, lambda *_: None, Clock(), undecodable, reserved=Reserved(1.0, 0.0))
    assert (num, len(undecodable)) == (59, 1)
    assert work.rows.index(name, 1) < work.rows.index(wave[2])
    assert work.passes == [(30, 100), (1, 0)]
    pool = work.options["encode"]["compute"]
    assert (pool.min_size, pool.max_size) == (1, 1)  # no eight encoders for it


def test_a_shard_whose_decoder_has_died_is_missed_long_before_the_wave_ends(tmp_path, tiny_model, work, monkeypatch):
    monkeypatch.setattr(missing, "shard_length", lambda bucket: 2)
    for number in range(200):
        add_image(tmp_path / "many", f"{number:03d}.png", colour=number)
    plan = plan_of(config := config_of(tmp_path, tiny_model, tmp_path / "many"))
    shards = list(plan.latent_shards())
    name, last = shards[3].name, shards[-1].name
    work.deadly = {shards[3].keys[1]}
    work.before_row = lambda shard: shard["name"] == last and wait_until(lambda: name in work.rows)
    undecodable = []
    num = encode_latents(config, plan, lambda *_: None, Clock(), undecodable, reserved=Reserved(1.0, 0.0))
    assert (num, [item.key for item in undecodable]) == (199, [shards[3].keys[1]])
    assert 64 <= work.rows.index(name) < work.rows.index(last)
    assert work.passes == [(100, 100), (1, 0)]


def test_a_slow_shard_that_was_given_up_is_counted_once(tmp_path, tiny_model, work, monkeypatch):
    monkeypatch.setattr(missing, "shard_length", lambda bucket: 1)
    for number in range(70):
        add_image(tmp_path / "many", f"{number:03d}.png", colour=number)
    plan = plan_of(config := config_of(tmp_path, tiny_model, tmp_path / "many"))
    rows = Job.iter_rows

    def first_comes_last(job):
        first, *others = rows(job)
        yield from (*others, first)

    monkeypatch.setattr(Job, "iter_rows", first_comes_last)
    said = []
    num = encode_latents(config, plan, lambda *told: said.append(told), Clock(), [], reserved=Reserved(1.0, 0.0))
    assert (num, said[-1]) == (70, ("images", 70, 70))
    assert work.passes == [(70, 100), (1, 0)]


def test_an_error_beside_the_others_is_the_jobs(many, work):
    plan = plan_of(many)
    name = first_image_gone(plan, work)
    names = [shard.name for shard in plan.latent_shards()]

    def die(shard):
        if shard["name"] == name and work.rows:
            raise ray.exceptions.WorkerCrashedError

    work.before_row = die
    with pytest.raises(CacheError, match=r"encoding failed: .*died"):
        encode_latents(many, plan, lambda *_: None, Clock(), [], reserved=Reserved(1.0, 0.0))
    assert set(names) >= set(work.rows)


def test_where_the_run_stops_what_is_encoded_beside_the_others_stops_too(many, work):
    """First one shard is encoded again, then two others; in the first of these two the run stops."""
    plan = plan_of(many)
    shards = list(plan.latent_shards())
    for shard in shards[:3]:
        work.told[shard.keys[0]] = "No such file or directory"
        Path(shard.records[0].path).unlink()
    others_told, stopped, again, beside = threading.Event(), threading.Event(), [], []

    def before_row(shard):
        if "without" in shard:  # of a job beside the wave
            beside.append(threading.current_thread())
            again.append(shard["name"])
            (others_told if len(again) == 1 else stopped).wait(20)
        elif shard["name"] == shards[3].name:
            others_told.set()
            wait_until(lambda: work.rows.count(shards[0].name) == 2)
            wait_until(lambda: not beside[0].is_alive())
        elif shard["name"] == shards[4].name:
            wait_until(lambda: len(again) > 1)

    class Stopped(Exception):
        pass

    def progress(stage, done, total):
        if len(again) > 1:
            raise Stopped

    work.before_row = before_row
    with pytest.raises(Stopped):
        encode_latents(many, plan, progress, Clock(), [], reserved=Reserved(1.0, 0.0))
    num_threads = threading.active_count()
    stopped.set()
    wait_until(lambda: threading.active_count() < num_threads)
    assert threading.active_count() < num_threads
    assert again == [shard.name for shard in shards[:2]]  # and not the third


def test_otherwise_it_is_encoded_after_the_others(many, work, monkeypatch):
    in_order(monkeypatch)
    plan = plan_of(many)
    name = first_image_gone(plan, work)
    assert encode(many, plan)[0] == 59
    assert work.rows[-1] == name


# ---- waves -----------------------------------------------------------------------------------------------------------


def test_a_wave_is_as_long_as_its_encoders_need(many, work, monkeypatch):
    for name, number in (("_SHARDS_AT_FIRST", 2), ("_SHARDS_PER_ENCODER", 5), ("_SHARDS_AT_MOST", 12)):
        monkeypatch.setattr(waves, name, number)
    for num_actors, sizes in ((1, [2, 5, 5, 5, 5, 5, 3]), (2, [2, 10, 10, 8]), (9, [2, 12, 12, 4])):
        work.share, work.passes = replace(SHARE, num_actors=num_actors, max_actors=num_actors), []
        assert encode(many, plan_of(many)) == (60, [])
        assert [size for size, _ in work.passes] == sizes


def test_the_next_wave_is_made_while_one_runs_and_no_further_ahead(many, work, monkeypatch):
    monkeypatch.setattr(waves, "_SHARDS_AT_FIRST", 5)
    monkeypatch.setattr(waves, "_SHARDS_PER_ENCODER", 5)
    made = []

    def look(shard):
        wait_until(lambda: len(work.made) > len(work.passes))  # of the last wave, until there is none to come
        made.append((len(work.passes), len(work.made)))

    work.before_row = lambda shard: len(work.passes) < 6 and look(shard)
    assert encode(many, plan_of(many)) == (60, [])
    assert {number for number, _ in made} == {1, 2, 3, 4, 5}
    assert all(ahead == number + 1 for number, ahead in made)


def test_no_further_wave_is_made_for_a_job_that_has_ended(many, work, monkeypatch):
    monkeypatch.setattr(waves, "_SHARDS_AT_FIRST", 5)
    shards, go_on, threads = [*plan_of(many).latent_shards()], threading.Event(), []

    def slow():
        yield from shards[:6]
        threads.append(threading.current_thread())
        go_on.wait(20)
        yield from shards[6:]

    made = waves.waves_of(slow(), SHARE, None)
    assert len(next(made)[0]) == 5
    wait_until(lambda: threads)
    made.close()
    go_on.set()
    threads[0].join(20)
    assert [len(names) for names in work.made] == [5]


def test_two_jobs_side_by_side_begin_at_different_shards(many, work, monkeypatch):
    """Else each would encode what the other one encodes at the same time."""
    plan = plan_of(many)
    names = [shard.name for shard in plan.latent_shards()]
    for _ in range(8):
        encode(many, plan)
    starts = {names.index(made[0]) for made in work.made}
    assert len(starts) > 1
    for made in work.made:
        start = names.index(made[0])
        assert made == names[start:] + names[:start]
    work.made.clear()  # training waits for them in their order
    encode_latents(many, plan, lambda *_: None, Clock(), [], reserved=Reserved(1.0, 0.0))
    assert work.made == [names]


def test_what_another_job_has_written_counts_as_done_and_not_as_encoded(many, work):
    plan = plan_of(many)
    work.there = {shard.name for shard in itertools.islice(plan.latent_shards(), 10)}
    work.there |= {shard.name for shard in plan.text_shards()}
    said, clock = [], Clock()
    assert encode_latents(many, plan, lambda *progress: said.append(progress), clock, []) == 40
    assert said[-1] == ("images", 60, 60)
    assert clock.counts["there"] == 20
    assert encode_text(many, plan, lambda *progress: said.append(progress), clock) == 0
    assert said[-1][1] == said[-1][2] == clock.counts["there"] - 20


def test_who_stops_ends_the_job_at_once(many, work, monkeypatch):
    """And not when somebody drops the error, which holds on to all that was running."""
    ended, rows = [], Job.iter_rows

    def watched(job):
        try:
            yield from rows(job)
        finally:
            ended.append(True)

    def stop(stage, done, total):
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "iter_rows", watched)
    for encode_some in (lambda *a: encode_latents(*a, Clock(), []), lambda *a: encode_text(*a, Clock())):
        ended.clear()
        with pytest.raises(KeyboardInterrupt) as error:
            encode_some(many, plan_of(many), stop)
        assert ended == [True]
        del error


def test_a_call_in_a_thread_gives_its_result_or_its_error():
    release = threading.Event()
    call = InThread(lambda: release.wait(20) and 7)
    assert not call.done
    release.set()
    assert call.result() == 7
    assert call.done
    with pytest.raises(ZeroDivisionError):
        InThread(lambda: 1 // 0).result()
