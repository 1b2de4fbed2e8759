"""What encoding takes of a cluster; the rest of the pipeline is tested with Ray, in tests/integration/test_cache.py."""

import inspect
import itertools

import pytest

from sdxl_ray import connection
from sdxl_ray.cache.pipeline import build_cache, share_cluster
from sdxl_ray.config.schema import CacheSection


def share(nodes, num_items=1000, *, num_encoders=0, gpus_per_encoder=1.0, accelerator="auto"):
    return share_cluster(
        nodes,
        num_items,
        num_encoders=num_encoders,
        gpus_per_encoder=gpus_per_encoder,
        accelerator=accelerator,
    )


@pytest.mark.parametrize("num_nodes", [1, 2, 5])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 64])
def test_a_decode_task_fits_beside_all_encoders_on_every_cluster(cpus, num_nodes):
    """With two CPUs, one GPU and four encoders of a quarter, nothing was decoded for ever."""
    for gpus, num_encoders, gpus_per_encoder, accelerator in itertools.product(
        (0, 1, 2, 8), (0, 1, 2, 4, 100), (0.1, 0.25, 0.4, 1.0), ("auto", "gpu", "cpu")
    ):
        found = share(
            [(cpus, gpus)] * num_nodes,
            num_encoders=num_encoders,
            gpus_per_encoder=gpus_per_encoder,
            accelerator=accelerator,
        )
        assert found.num_actors >= 1
        assert found.num_actors * found.cpus_per_actor + found.cpus_per_decode <= cpus * num_nodes
        # Requests are whole CPUs, unless there is but one: no node keeps a piece that is too small to be used.
        assert {found.cpus_per_actor, found.cpus_per_decode} <= ({0, 1} if cpus * num_nodes > 1 else {0, 1, 0.4})
        if found.device == "cuda":
            assert found.num_actors <= num_nodes * gpus * {0.1: 10, 0.25: 4, 0.4: 2, 1.0: 1}[gpus_per_encoder]
        else:
            assert found.gpus_per_actor == 0


@pytest.mark.parametrize(
    ("nodes", "settings", "num_actors", "device"),
    [
        ([(16, 8)], {}, 8, "cuda"),
        ([(16, 8), (16, 8), (4, 0)], {}, 16, "cuda"),
        ([(16, 8)], {"num_encoders": 3}, 3, "cuda"),
        ([(16, 8)], {"num_encoders": 100, "gpus_per_encoder": 0.5}, 16, "cuda"),
        ([(16, 8)], {"num_encoders": 100, "gpus_per_encoder": 0.4}, 16, "cuda"),
        ([(16, 8)], {"num_items": 2}, 2, "cuda"),
        ([(16, 8)], {"accelerator": "cpu"}, 1, "cpu"),
        ([(16, 0)], {}, 1, "mps"),
        ([(16, 0)], {"num_encoders": 100, "accelerator": "cpu"}, 15, "cpu"),
        ([(16, 0), (16, 0)], {}, 1, "cpu"),
    ],
)
def test_encoders_and_their_device(nodes, settings, num_actors, device):
    found = share(nodes, **settings)
    assert (found.num_actors, found.device) == (num_actors, device)


def test_by_default_every_gpu_encodes():
    assert CacheSection().num_encoders == 0
    assert share([(96, 8)]).num_actors == 8


def test_an_encoder_lies_on_one_gpu():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        CacheSection(gpus_per_encoder=2.0)


def test_ray_is_reached_as_every_command_reaches_it():
    assert inspect.signature(build_cache).parameters["connect"].default is connection.connect
