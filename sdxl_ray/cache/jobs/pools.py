"""How much of a cluster encoding takes: pure arithmetic, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_CPUS_PER_CPU_ENCODER = 0.2  # so that decoding, which has to keep up with it, is not short of a whole core


@dataclass(frozen=True, slots=True)
class Node:
    """What Ray counts on one machine."""

    cpus: float
    gpus: float
    accelerators: tuple[str, ...] = ()  # "L4", ... as Ray calls them


@dataclass(frozen=True, slots=True)
class Share:
    """What encoding takes of the cluster."""

    num_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_decode: float  # of each decode task
    device: str  # for `actors.torch_device`
    threads: int = 0  # of torch in each actor on a CPU; 0: as Ray sets it
    num_decoding: int = 1  # decode tasks at once, if nothing else runs there


def share_cluster(
    nodes: Sequence[Node],
    num_items: int,
    *,
    num_encoders: int,
    max_encoders: int = 0,
    gpus_per_encoder: float = 1.0,
    accelerator: str = "auto",
    accelerator_type: str = "",
    reserved_cpus: float = 0.0,
    reserved_gpus: float = 0.0,
    num_pools: int = 1,
) -> Share:
    """How many encoders, and what each reserves, so that a decode task always fits beside all of them.

    Actors are placed first and stay: with every CPU in their hands, decoding would wait for them and they for it,
    silently (ray issue 44687). So an encoder on a GPU reserves no CPU, which it hardly uses, and one on CPUs a fraction
    of a core; decode tasks then take what is left of each core.

    Args:
        num_encoders: as wished; 0 is one per GPU, without GPUs one.
        max_encoders: what the pool may grow to; 0: it does not grow.
        accelerator: "auto", "gpu" or "cpu" (cluster.accelerator).
        accelerator_type: only GPUs of nodes with this one count.
        reserved_cpus, reserved_gpus: what training workers have or will have.
        num_pools: encoding pools at the same time: captions and images.
    """
    num_cpus = max(0.0, sum(node.cpus for node in nodes) - reserved_cpus)
    able = [node for node in nodes if not accelerator_type or accelerator_type in node.accelerators]
    spare = int(sum(node.gpus for node in nodes) - reserved_gpus)
    num_gpus = min(spare, sum(int(node.gpus) for node in able))
    # None there, but asked for, and nobody has taken it: the pool waits for a node that the autoscaler starts. Beside a
    # run that has taken them all, waiting would last until the run is over, which itself waits for us.
    may_come = accelerator == "gpu" and not reserved_gpus
    if (num_gpus > 0 or may_come) and accelerator != "cpu":
        gpus_per_actor = gpus_per_encoder / num_pools  # the pools share each GPU
        # A fraction lies on one GPU: of encoders that take 0.4, two fit on each.
        room = num_gpus * max(1, int(1 / gpus_per_encoder)) if num_gpus > 0 else num_encoders or 1
        num_actors = max(1, min(num_encoders or num_gpus, room, num_items))
        most = max(num_actors, min(max_encoders, num_items))
        cpus_per_decode = 1.0 if max((node.cpus for node in nodes), default=0) >= 1 and num_cpus >= 1 else 0.4
        num_decoding = max(1, int(num_cpus / cpus_per_decode))
        return Share(num_actors, most, 0.0, gpus_per_actor, cpus_per_decode, "cuda", num_decoding=num_decoding)
    device = "mps" if accelerator != "cpu" and len(nodes) == 1 else "cpu"  # Ray does not count Apple's GPU
    cores = max(1, int(num_cpus))
    num_actors = max(1, min(num_encoders or 1, cores, num_items))
    most = max(num_actors, min(max_encoders, num_items))
    # Of `most`: a pool may grow although the cluster does not.
    taken = min(_CPUS_PER_CPU_ENCODER, 0.4 * max(num_cpus, 0.5) / (most * num_pools))
    left = max(num_cpus, 0.5) - taken * most * num_pools
    cpus_per_decode = max(0.1, int(100 * min(1.0, left / cores / num_pools)) / 100)
    return Share(
        num_actors,
        most,
        taken,
        0.0,
        cpus_per_decode,
        device,
        threads=max(1, cores // num_actors),
        num_decoding=max(1, int(num_cpus / cpus_per_decode)),
    )
