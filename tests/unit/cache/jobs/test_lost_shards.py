"""Which image of a shard is at fault, without Ray. As part of a job: test_ray_jobs.py"""

from dataclasses import asdict

import pytest

from sdxl_ray.cache.jobs import lost_shards
from sdxl_ray.cache.jobs.lost_shards import LostShards
from sdxl_ray.cache.jobs.reports import ShardReport, packed, unpacked
from sdxl_ray.errors import CacheError
from tests.unit.cache.planned import add_image, config_of, plan_of


@pytest.fixture
def shard(tmp_path, tiny_model):
    """Four images of one bucket."""
    for number in range(4):
        add_image(tmp_path / "images", f"{number}.png", colour=number)
    (shard,) = plan_of(config_of(tmp_path, tiny_model, tmp_path / "images")).latent_shards()
    return shard


def unreadable(shard, *, name="", node="node-7"):
    told = {"key": shard.keys[1], "node": node, "reason": "Stale file handle"}
    return ShardReport(name or shard.name, unreadable=told)


def test_an_image_dies_of_its_neighbours_only_once(shard, monkeypatch):
    """All at once may be more than the memory takes; alone, only one of the two that died dies again."""
    asked = []

    def dying(fields, keys, num_cpus, *, max_retries):
        asked.append((list(keys), max_retries, num_cpus))
        return [key for key in keys if key in (asked[0][0][1:3] if len(asked) == 1 else asked[0][0][1])]

    monkeypatch.setattr(lost_shards, "_dying", dying)
    undecodable = []
    again = LostShards(undecodable, num_cpus=0.5).without_the_faulty(packed(asdict(shard)), None)
    assert asked == [(list(shard.keys), 0, 0.5), ([shard.keys[1]], 1, 0.5), ([shard.keys[2]], 1, 0.5)]
    assert [item.key for item in undecodable] == [shard.keys[1]]
    assert unpacked(again)["without"] == [shard.keys[1]]


def test_what_the_driver_can_read_is_put_back_unchanged_where_the_node_has_read_others(shard):
    undecodable = []
    lost, item = LostShards(undecodable), packed(asdict(shard))
    lost.finished(ShardReport("latents/other", num=4, node="node-7"))
    assert lost.without_the_faulty(item, unreadable(shard)) == item
    assert undecodable == []
    with pytest.raises(CacheError, match=r"^node node-7 cannot read .*1\.png: Stale file handle\. "):
        lost.without_the_faulty(item, unreadable(shard))


@pytest.mark.parametrize(
    "report",
    [
        ShardReport("latents/other", num=4, node="node-8"),  # of another node
        ShardReport("latents/other", node="node-7"),  # nothing could be decoded
    ],
)
def test_a_node_of_which_no_shard_has_come_does_not_see_the_folder(shard, report):
    lost = LostShards([])
    lost.finished(report)
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        lost.without_the_faulty(packed(asdict(shard)), unreadable(shard))


def test_twenty_shards_may_be_put_back(shard):
    lost, item = LostShards([]), packed(asdict(shard))
    lost.finished(ShardReport("latents/other", num=4, node="node-7"))
    for number in range(20):
        lost.without_the_faulty(item, unreadable(shard, name=f"latents/{number}"))
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        lost.without_the_faulty(item, unreadable(shard, name="latents/20"))


def test_beside_another_job_a_node_of_which_nothing_has_come_may_stumble_once(shard):
    """What the other job has written, no node reads images for."""
    lost, item = LostShards([]), packed(asdict(shard))
    lost.finished(ShardReport("latents/other", num_there=4))
    assert lost.without_the_faulty(item, unreadable(shard, name="latents/0")) == item
    with pytest.raises(CacheError, match="node node-7 cannot read"):
        lost.without_the_faulty(item, unreadable(shard, name="latents/1"))


def test_what_was_at_fault_before_stays_left_out(shard, monkeypatch):
    deadly = [shard.keys[0]]
    monkeypatch.setattr(lost_shards, "_dying", lambda fields, keys, *_, **__: [key for key in keys if key in deadly])
    undecodable = []
    lost = LostShards(undecodable)
    again = lost.without_the_faulty(packed(asdict(shard)), None)
    deadly.append(shard.keys[2])
    again = lost.without_the_faulty(again, None)
    assert unpacked(again)["without"] == [shard.keys[0], shard.keys[2]]
    assert [item.key for item in undecodable] == [shard.keys[0], shard.keys[2]]
