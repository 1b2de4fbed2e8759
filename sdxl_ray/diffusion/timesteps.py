"""Which noise level a sample gets. Both ends, 0 and T - 1, can be drawn."""

from __future__ import annotations


def uniform_timestep(u: float, num_timesteps: int) -> int:
    """u in [0, 1) to 0 .. num_timesteps - 1, each equally likely."""
    return min(int(u * num_timesteps), num_timesteps - 1)


def stratified_timesteps(count: int, num_timesteps: int) -> list[int]:
    """`count` levels spread evenly: the middles of equal intervals, so that an evaluation sees all noise levels."""
    return [int((index + 0.5) / count * num_timesteps) for index in range(count)]
