"""How much of a cluster encoding takes."""

import itertools

import pytest

from sdxl_ray.cache.jobs.pools import Node, share_cluster
from sdxl_ray.config.schema import CacheSection


def share(nodes, num_items=1000, *, num_encoders=0, **settings):
    nodes = [node if isinstance(node, Node) else Node(*node) for node in nodes]
    return share_cluster(nodes, num_items, num_encoders=num_encoders, **settings)


@pytest.mark.parametrize("num_nodes", [1, 2, 5])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 64])
def test_a_decode_task_fits_beside_all_encoders_on_every_cluster(cpus, num_nodes):
    """With two CPUs, one GPU and four encoders of a quarter, nothing was decoded for ever."""
    for gpus, num_encoders, gpus_per_encoder, accelerator, num_pools, reserved in itertools.product(
        (0, 1, 2, 8), (0, 1, 2, 4, 100), (0.1, 0.25, 0.4, 1.0), ("auto", "gpu", "cpu"), (1, 2), (0, 1, 2)
    ):
        if accelerator == "gpu" and not gpus:
            continue  # waits for a node to come
        left = cpus * num_nodes - reserved
        if left <= 0:
            continue
        found = share(
            [(cpus, gpus)] * num_nodes,
            num_encoders=num_encoders,
            gpus_per_encoder=gpus_per_encoder,
            accelerator=accelerator,
            num_pools=num_pools,
            reserved_cpus=reserved,
        )
        assert 1 <= found.num_actors <= found.max_actors
        actors_cpus = found.max_actors * found.cpus_per_actor * num_pools
        assert actors_cpus + found.cpus_per_decode <= left + 1e-9
        assert 0 < found.cpus_per_decode <= 1
        # A decode task lies on one machine: somewhere as much must be left of one, however the actors are spread.
        assert actors_cpus + num_nodes * found.cpus_per_decode <= left + (num_nodes - 1) * found.cpus_per_decode + 1e-9
        if found.device == "cuda":
            assert found.cpus_per_actor == 0
            assert found.num_actors <= num_nodes * gpus * {0.1: 10, 0.25: 4, 0.4: 2, 1.0: 1}[gpus_per_encoder]
        else:
            assert found.gpus_per_actor == 0
            assert found.threads >= 1


def test_on_two_cores_two_decode_tasks_fit_beside_the_encoder():
    found = share([(2, 0)], accelerator="cpu")
    assert found.num_actors == 1
    assert found.cpus_per_actor + 2 * found.cpus_per_decode <= 2
    assert found.threads == 2


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 96])
@pytest.mark.parametrize("num_encoders", [0, 1, 3, 100])
def test_without_gpus_as_many_images_are_decoded_at_once_as_there_are_cores(cpus, num_encoders):
    found = share([(cpus, 0)], num_encoders=num_encoders, accelerator="cpu")
    assert found.num_actors * found.cpus_per_actor + cpus * found.cpus_per_decode <= cpus + 1e-9


@pytest.mark.parametrize("cpus", [2, 4, 16])
def test_captions_and_images_at_once_leave_room_to_decode(cpus):
    found = share([(cpus, 0)], accelerator="cpu", num_pools=2)
    assert 2 * found.num_actors * found.cpus_per_actor + found.cpus_per_decode <= cpus


def test_a_pool_that_may_grow_leaves_room_to_decode_when_it_has_grown():
    found = share([(4, 0)], accelerator="cpu", num_encoders=1, max_encoders=16)
    assert (found.num_actors, found.max_actors) == (1, 16)
    assert 16 * found.cpus_per_actor + found.cpus_per_decode <= 4 + 1e-9


@pytest.mark.parametrize(
    ("nodes", "settings", "num_actors", "device"),
    [
        ([(16, 8)], {}, 8, "cuda"),
        ([(16, 8), (16, 8), (4, 0)], {}, 16, "cuda"),
        ([(16, 8)], {"num_encoders": 3}, 3, "cuda"),
        ([(16, 8)], {"num_encoders": 100, "gpus_per_encoder": 0.5}, 16, "cuda"),
        ([(16, 8)], {"num_encoders": 100, "gpus_per_encoder": 0.4}, 16, "cuda"),
        ([(16, 8)], {"num_items": 2}, 2, "cuda"),
        ([(16, 8)], {"reserved_gpus": 2}, 6, "cuda"),
        ([(16, 8)], {"reserved_gpus": 8}, 1, "mps"),
        ([(16, 8), (16, 0)], {"reserved_gpus": 8}, 1, "cpu"),
        ([(16, 8)], {"accelerator": "cpu"}, 1, "cpu"),
        ([(16, 0)], {}, 1, "mps"),
        ([(16, 0)], {"accelerator": "gpu"}, 1, "cuda"),  # of a node that is still to come
        ([(16, 0)], {"num_encoders": 100, "accelerator": "cpu"}, 16, "cpu"),
        ([(16, 0), (16, 0)], {}, 1, "cpu"),
    ],
)
def test_encoders_and_their_device(nodes, settings, num_actors, device):
    found = share(nodes, **settings)
    assert (found.num_actors, found.device) == (num_actors, device)


def test_only_gpus_of_the_wanted_kind_count():
    nodes = [Node(16, 8, ("A100",)), Node(16, 4, ("L4",)), Node(16, 0)]
    assert share(nodes).num_actors == 12
    assert share(nodes, accelerator_type="L4").num_actors == 4


def test_a_pool_grows_no_further_than_there_is_work():
    assert share([(16, 2)], max_encoders=64).max_actors == 64
    assert share([(16, 2)], num_items=5, max_encoders=64).max_actors == 5
    assert share([(16, 2)], max_encoders=1).max_actors == 2


def test_by_default_every_gpu_encodes():
    assert CacheSection().num_encoders == 0
    assert share([(96, 8)]).num_actors == 8


def test_an_encoder_lies_on_one_gpu():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        CacheSection(gpus_per_encoder=2.0)


@pytest.mark.parametrize("settings", [{"accelerator": "gpu"}, {"accelerator_type": "L4"}, {}])
def test_beside_a_run_that_has_every_gpu_encoding_is_on_cpus(settings):
    """Waiting for a GPU that the run gives back at its end, while it waits for the encoder, would never end."""
    found = share([Node(8, 2, ("L4",))], reserved_cpus=2, reserved_gpus=2, num_pools=2, **settings)
    assert found.device in ("cpu", "mps")
    assert found.gpus_per_actor == 0


def test_beside_a_run_captions_and_images_share_each_gpu_that_is_left():
    found = share([(16, 4)], reserved_gpus=3, reserved_cpus=3, num_pools=2)
    assert (found.device, found.num_actors, found.gpus_per_actor) == ("cuda", 1, 0.5)


def test_encoders_on_a_type_of_their_own_leave_the_others_to_the_run():
    nodes = [Node(8, 8, ("H100",)), Node(8, 4, ("L4",))]
    found = share(nodes, accelerator_type="L4", reserved_gpus=8, reserved_cpus=8, num_pools=2)
    assert (found.device, found.num_actors, found.gpus_per_actor) == ("cuda", 4, 0.5)
