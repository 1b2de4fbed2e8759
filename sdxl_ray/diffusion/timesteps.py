"""Which noise level a sample gets. Both ends, 0 and T - 1, can be drawn.

One uniform number u becomes a level by the inverse of the distribution's cumulative sum, so that whatever spreads u
evenly (the strata of a step) spreads the levels evenly too, for any distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdxl_ray.diffusion.randomness import keyed_generator
from sdxl_ray.errors import ConfigError

DISTRIBUTIONS = ("uniform", "logit_normal")
BIASES = ("none", "less_noise", "more_noise", "range")


def uniform_timestep(u: float, num_timesteps: int) -> int:
    """u in [0, 1) to 0 .. num_timesteps - 1, each equally likely."""
    return min(int(u * num_timesteps), num_timesteps - 1)


def stratified_timesteps(count: int, num_timesteps: int) -> list[int]:
    """`count` levels spread evenly: the middles of equal intervals, so that an evaluation sees all noise levels."""
    return [int((index + 0.5) / count * num_timesteps) for index in range(count)]


@dataclass(frozen=True, eq=False)
class TimestepSampler:
    """weights: (T,) float64, how often each level is drawn, up to a common factor; not all zero."""

    weights: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """(T,) float64, adding up to 1."""
        return self.weights / self.weights.sum()

    def __call__(self, u: float) -> int:
        """The first level whose cumulative probability exceeds u, for u in [0, 1). Never one of probability 0."""
        level = int(np.searchsorted(self._cumulative, u * self._cumulative[-1], side="right"))
        return min(level, self._last)  # u = 1 is not drawn, but never out of range

    @cached_property
    def _cumulative(self) -> np.ndarray:
        # Not normalised: equal weights add up to whole numbers, and then a draw is `uniform_timestep` to the bit.
        return np.cumsum(self.weights)

    @cached_property
    def _last(self) -> int:
        return int(np.flatnonzero(self.weights)[-1])


def make_sampler(
    num_timesteps: int = 1000,
    *,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    bias: str = "none",
    bias_factor: float = 1.0,
    bias_share: float = 0.25,
    bias_begin: int = 0,
    bias_end: int = 999,
    minimum: int = 0,
    maximum: int = 999,
) -> TimestepSampler:
    """A sampler of the levels `minimum` .. `maximum`, both included.

    Args:
        distribution: uniform; or logit_normal (arXiv:2403.03206, section 3.1): the probability of level t is
            Phi((logit((t + 1) / T) - mean) / std) - Phi((logit(t / T) - mean) / std). A mean above 0 gives more noise.
        bias: multiplies the probability of some levels by `bias_factor`. less_noise: the first `bias_share` of the
            levels from minimum to maximum. more_noise: the last. range: bias_begin .. bias_end, both included.
        maximum: T - 1 if it is above that, and likewise bias_end.

    Raises:
        ConfigError: no level is left, a range holds none of those that are seen, or a name is unknown.
    """
    maximum = min(maximum, num_timesteps - 1)
    if minimum > maximum:
        raise ConfigError(
            f"loss.timestep_min = {minimum} is above loss.timestep_max = {maximum}: no noise level is left. "
            "Set loss.timestep_min to at most loss.timestep_max."
        )
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f'loss.timesteps = "{distribution}", expected one of: {", ".join(DISTRIBUTIONS)}.')
    weights = (
        np.ones(num_timesteps) if distribution == "uniform" else _logit_normal(num_timesteps, logit_mean, logit_std)
    )
    weights[:minimum] = 0
    weights[maximum + 1 :] = 0
    weights[_biased(bias, bias_share, bias_begin, bias_end, minimum, maximum)] *= bias_factor
    if not weights.any():
        raise ConfigError(
            f"no noise level from loss.timestep_min = {minimum} to loss.timestep_max = {maximum} has a probability "
            f"above 0 (loss.timesteps = {distribution}, loss.logit_mean = {logit_mean:g}, loss.logit_std = "
            f"{logit_std:g}, loss.timestep_bias = {bias}, loss.bias_factor = {bias_factor:g}). Widen the limits or "
            "loss.logit_std, or set loss.bias_factor above 0."
        )
    return TimestepSampler(weights)


def strata(seed: int, step: int, total: int) -> np.ndarray:
    """(total,) int64: which of `total` equal intervals of [0, 1) each sample of a step draws its u from.

    A permutation, so each interval is taken once; keyed by the step, so no place in a step always gets the same noise.
    """
    return keyed_generator(seed, step, "strata").permutation(total)


def stratified_uniform(key_u: float, place: int, total: int, permutation: Sequence[int] | np.ndarray) -> float:
    """(permutation[place] + key_u) / total: uniform in its interval if key_u is uniform in [0, 1), and in [0, 1) over
    all steps. Over one step the mean of any function of u varies less than with independent draws.

    With total = 1 it is key_u, to the bit.
    """
    stratum = int(permutation[place])
    # The sum may round up to the next whole number, which belongs to the next sample's interval, or is 1.
    return min((stratum + key_u) / total, math.nextafter((stratum + 1) / total, 0.0))


def _biased(bias: str, share: float, begin: int, end: int, minimum: int, maximum: int) -> slice:
    """The levels that are drawn more often, among `minimum` .. `maximum`."""
    if bias not in BIASES:
        raise ConfigError(f'loss.timestep_bias = "{bias}", expected one of: {", ".join(BIASES)}.')
    if bias == "none":
        return slice(0, 0)
    if bias == "range":
        first, last = max(begin, minimum), min(end, maximum)
        if first > last:
            raise ConfigError(
                f"loss.bias_begin = {begin} to loss.bias_end = {end} holds no noise level between loss.timestep_min = "
                f"{minimum} and loss.timestep_max = {maximum}. Let them overlap, with loss.bias_begin the smaller."
            )
        return slice(first, last + 1)
    count = max(1, round(share * (maximum - minimum + 1)))
    return slice(minimum, minimum + count) if bias == "less_noise" else slice(maximum + 1 - count, maximum + 1)


def _logit_normal(num_timesteps: int, mean: float, std: float) -> np.ndarray:
    """(T,) float64 probability of each of T equal intervals of (0, 1), where logit(x) is normal."""
    logits = [math.log(edge / (num_timesteps - edge)) for edge in range(1, num_timesteps)]
    scores = [-math.inf, *((logit - mean) / std for logit in logits), math.inf]
    # Above the middle the difference of the upper tails: that of the cumulative values, both near 1, has few digits.
    return np.array(
        [
            _normal_tail(low) - _normal_tail(high) if low > 0 else _normal_tail(-high) - _normal_tail(-low)
            for low, high in itertools.pairwise(scores)
        ]
    )


def _normal_tail(score: float) -> float:
    """The probability that a standard normal number is above `score`."""
    return 0.5 * math.erfc(score / math.sqrt(2))
