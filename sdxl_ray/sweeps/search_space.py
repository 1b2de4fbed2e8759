"""The [sweep] section in Ray Tune's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from sdxl_ray.config.schema import SearchSpace


def to_tune(parameters: Mapping[str, SearchSpace]) -> dict[str, Any]:
    """Config path -> Tune domain."""
    return {path: _domain(space) for path, space in parameters.items()}


def num_samples(parameters: Mapping[str, SearchSpace], num_trials: int) -> int:
    """Tune repeats a grid for every sample; a grid is tried once."""
    return 1 if any(space.grid is not None for space in parameters.values()) else num_trials


def _domain(space: SearchSpace) -> Any:
    if space.grid is not None:
        return tune.grid_search(list(space.grid))
    if space.choice is not None:
        return tune.choice(list(space.choice))
    if space.uniform is not None:
        return tune.uniform(*space.uniform)
    assert space.loguniform is not None
    return tune.loguniform(*space.loguniform)
