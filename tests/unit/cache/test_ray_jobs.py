"""What the Ray Data jobs make of errors that no encoder has told. With Ray: tests/integration/test_cache.py"""

import json
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray
from ray.data import ExecutionOptions

from sdxl_ray.cache import lost_shards, ray_jobs
from sdxl_ray.cache.actors import error_text
from sdxl_ray.cache.lost_shards import look_into
from sdxl_ray.cache.pools import Share
from sdxl_ray.cache.ray_jobs import Clock, Reserved, _results, _rows, encode_latents
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
        list(_results(Dataset(error)))
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
    told = {"error": error_text(StorageError("no space"))}
    with pytest.raises(StorageError, match="no space"):
        list(_results(Dataset(AssertionError(), told)))
    with pytest.raises(ZeroDivisionError):
        list(_results(Dataset(ZeroDivisionError(), {"error": ""})))


def test_a_scan_that_fails_is_no_encoding():
    died = ray.exceptions.WorkerCrashedError()
    with pytest.raises(CacheError, match=r"^scanning failed: .*\. What was found is kept; run again to go on\."):
        list(_rows(Dataset(died), "scanning failed", "What was found is kept"))


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


class Work:
    """Stands in for Ray Data: what decoding says of each work item, and how many of them may be lost.

    `deadly`: keys of images that end their decoder; `told`: those that a node cannot read -> why.
    """

    def __init__(self, monkeypatch):
        self.deadly, self.told = set(), {}
        self.passes = []  # of each job: how many shards, and may be lost
        self.options = {}
        self.context = SimpleNamespace(max_errored_blocks=0)
        share = Share(device="cpu", num_actors=1, max_actors=1, cpus_per_actor=0.5, cpus_per_decode=0.5,
                      gpus_per_actor=0, threads=1)  # fmt: skip
        monkeypatch.setattr(ray_jobs, "_share", lambda *args, **kwargs: share)
        monkeypatch.setattr(ray_jobs, "_from_items", self.from_items)
        monkeypatch.setattr(lost_shards, "_dying", self.dying)

    def from_items(self, items, reserved):
        self.items = [json.loads(item["shard"]) for item in items]
        return self

    def map(self, function, **options):
        self.options["decode"] = options
        return self

    def map_batches(self, function, **options):
        self.options["encode"] = options
        return self

    def left(self, shard):
        return [key for key in shard["keys"] if key not in shard.get("without", ())]

    def iter_rows(self):
        may_lose = self.context.max_errored_blocks
        self.passes.append((len(self.items), may_lose))
        for shard in self.items:
            keys = self.left(shard)
            if self.deadly & set(keys):
                may_lose -= 1
                if may_lose < 0:
                    raise ray.exceptions.WorkerCrashedError
                continue
            row = {"name": shard["name"], "num": 0, "skipped": "[]", "error": "", "unreadable": "", "tiled": 0}
            unreadable = [key for key in keys if key in self.told]
            if unreadable:
                told = {"key": unreadable[0], "node": "node-7", "reason": self.told[unreadable[0]]}
                yield {**row, "unreadable": json.dumps(told)}
            else:
                yield {**row, "num": len(keys), "encode_s": 0.0, "decode_s": 0.0}

    def dying(self, shard, keys, num_cpus, *, max_retries):
        return [key for key in keys if key in self.deadly]


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


def test_an_image_dies_of_its_neighbours_only_once(config, monkeypatch):
    """All at once may be more than the memory takes; alone, only one of the two that died dies again."""
    (shard,) = plan_of(config).latent_shards()
    asked = []

    def dying(shard, keys, num_cpus, *, max_retries):
        asked.append((list(keys), max_retries))
        return [key for key in keys if key in (asked[0][0][1:3] if len(asked) == 1 else asked[0][0][1])]

    monkeypatch.setattr(lost_shards, "_dying", dying)
    undecodable = []
    again = look_into(json.dumps(asdict(shard)), undecodable, num_cpus=0.5)
    assert asked == [(list(shard.keys), 0), ([shard.keys[1]], 1), ([shard.keys[2]], 1)]
    assert [item.key for item in undecodable] == [shard.keys[1]]
    assert json.loads(again)["without"] == [shard.keys[1]]


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


def test_images_that_go_one_after_another_are_all_found(config, images, work, monkeypatch):
    plan = plan_of(config)
    (shard,) = plan.latent_shards()
    work.told = dict.fromkeys(shard.keys[:2], "No such file or directory")
    (images / "0.png").unlink()
    from_items = work.from_items

    def and_another(items, reserved):
        if work.passes:
            (images / "1.png").unlink(missing_ok=True)
        return from_items(items, reserved)

    monkeypatch.setattr(ray_jobs, "_from_items", and_another)
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
    rows, all_rows = [], work.iter_rows

    def watched():
        for row in all_rows():
            rows.append(row)
            yield row

    work.iter_rows = watched
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        encode(config, plan)
    assert len(rows) == 1


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
        list(_results(Dataset(AssertionError(), {"error": text})))
    assert str(raised.value) == (
        "encoding failed: KeyError: 'name'. Finished shards are kept; run again to go on. With --traceback, the whole "
        "error is shown."
    )
    assert '{}["name"]' in str(raised.value.__cause__)
    for error in (MemoryError(), MemoryError("Unable to allocate 4.00 GiB")):
        with pytest.raises(CacheError, match="A node has too little memory"):
            list(_results(Dataset(AssertionError(), {"error": error_text(error)})))


def test_what_is_deprecated_in_ray_is_not_told_the_user(monkeypatch):
    options = ExecutionOptions()
    made = SimpleNamespace(context=SimpleNamespace(execution_options=options))
    monkeypatch.setattr(ray.data, "from_items", lambda items, override_num_blocks: made)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ray_jobs._from_items([{}], Reserved(cpus=1.0, gpus=2.0))
    assert not [str(warning.message) for warning in told if "exclude_resources" in str(warning.message)]
    assert (options.exclude_resources.cpu, options.exclude_resources.gpu) == (1.0, 2.0)
