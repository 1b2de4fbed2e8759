"""When a person hears that encoders wait for room. What Ray would say is given here."""

import time
import warnings
from types import SimpleNamespace

import pytest
import ray
from ray import cloudpickle

from sdxl_ray.cache.jobs import room as module
from sdxl_ray.cache.jobs.pools import Share
from sdxl_ray.cache.jobs.room import Begun, Mark, Reserved, Room, marked

ON_GPUS = Share(8, 8, 0.0, 1.0, 1.0, "cuda")
ON_CPUS = Share(1, 1, 0.2, 0.0, 0.4, "cpu")
TOTAL = {"CPU": 32.0, "GPU": 8.0}


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """Stands in for the key-value store of a cluster."""
    keys = {}
    monkeypatch.setattr(module, "_internal_kv_put", lambda key, value: keys.update({key: value}))
    monkeypatch.setattr(module, "_internal_kv_exists", lambda key: key in keys)
    return keys


def test_encoders_without_a_gpu_are_told_with_what_helps():
    text = Room("images", ON_GPUS).lacking({"CPU": 20.0}, TOTAL)
    assert text == (
        "no images encoded for 60 s: an encoder needs 1 GPU, and free are 0 of 8 GPUs. It begins as soon as there is "
        "room. Wait for what else runs on this cluster, or end it; or lower cache.gpus_per_encoder, or encode on CPUs "
        'with cluster.accelerator = "cpu".'
    )
    assert "lower cache.gpus_per_text_encoder or" in Room("text", ON_GPUS).lacking({"CPU": 20.0}, TOTAL)


def test_an_encoder_that_training_has_left_no_core_for_is_told_with_what_helps():
    text = Room("images", ON_CPUS, Reserved(cpus=32.0)).lacking({"GPU": 0.0}, TOTAL)
    assert text == (
        "no images encoded for 60 s: an encoder needs 0.2 CPU, and free are 0 of 32 CPUs. It begins as soon as there "
        "is room. Training will wait for it. Lower train.num_workers or cluster.cpus_per_worker, add a machine, or set "
        'cache.mode = "disk" or "off".'
    )


def test_an_encoder_that_has_begun_may_take_as_long_as_it_likes_to_load():
    """It holds what it needs, so that nothing need be free."""
    room = Room("text", ON_GPUS)
    room.encoding.set()
    assert room.lacking({}, TOTAL) == ""


def test_decoding_without_a_core_is_told_until_it_has_begun():
    room = Room("images", ON_GPUS)
    room.encoding.set()
    assert "a task that decodes images needs 1 CPU, and free are 0.5 of 32 CPUs." in room.lacking({"CPU": 0.5}, TOTAL)
    assert room.lacking({"CPU": 1.0}, TOTAL) == ""
    room.decoding.set()
    assert room.lacking({}, TOTAL) == ""


def test_where_there_is_room_encoders_are_only_starting():
    assert Room("images", ON_GPUS).lacking({"GPU": 1.0}, TOTAL) == ""
    assert Room("images", ON_CPUS).lacking({"CPU": 0.2}, TOTAL) == ""


def test_a_mark_travels_to_other_processes(store):
    mark = Mark()
    call = cloudpickle.loads(cloudpickle.dumps(marked(lambda row: row["x"] + 1, mark, name="decode_shard")))
    assert call.__name__ == "decode_shard"
    assert not mark.is_set()
    assert call({"x": 1}) == call({"x": 1}) == 2
    assert mark.is_set()
    assert not Mark().is_set()


def test_a_mark_that_cannot_be_set_ends_no_shard(monkeypatch):
    def fail(key, value):
        raise ray.exceptions.RpcError("gone")

    monkeypatch.setattr(module, "_internal_kv_put", fail)
    assert marked(lambda row: row["x"], Mark(), name="x")({"x": 1}) == 1


def test_an_encoder_counts_how_often_it_has_begun(store, monkeypatch):
    actor = ["a"]
    monkeypatch.setattr(module, "_internal_kv_get", store.get)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor[0]))
    mark = Mark()
    assert [cloudpickle.loads(cloudpickle.dumps(Begun(mark)))() for _ in range(3)] == [1, 2, 3]
    assert mark.is_set()
    actor[0] = "b"
    assert [Begun(mark)(), Begun(Mark())()] == [1, 1]


def slow(pauses):
    for pause in pauses:
        time.sleep(pause)
        yield pause


def said(room, pauses, monkeypatch, free):
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    monkeypatch.setattr(ray, "cluster_resources", lambda: TOTAL)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert list(room.watched(slow(pauses))) == pauses
        time.sleep(0.2)
    return [str(warning.message) for warning in told if "encoded for" in str(warning.message)]


def test_it_is_said_once_where_nothing_comes_and_only_there(monkeypatch):
    full = {"GPU": 0.0}
    assert len(said(Room("images", ON_GPUS, after_s=0.2), [0.0, 1.0], monkeypatch, full)) == 1
    assert said(Room("images", ON_GPUS, after_s=2.0), [0.25] * 10, monkeypatch, full) == []  # something comes
    assert said(Room("images", ON_GPUS, after_s=0.2), [0.0, 1.0], monkeypatch, {"GPU": 1.0}) == []


def test_a_cluster_that_does_not_answer_ends_nothing(monkeypatch):
    def fail():
        raise ConnectionError("no head")

    room = Room("images", ON_GPUS, after_s=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "available_resources", fail)
        assert list(room.watched(slow([0.0, 0.5]))) == [0.0, 0.5]


def test_who_stops_listening_ends_the_job():
    ended = []

    def job():
        try:
            yield from range(9)
        finally:
            ended.append(True)

    watched = Room("images", ON_GPUS).watched(job())
    assert next(watched) == 0
    watched.close()
    assert ended == [True]
