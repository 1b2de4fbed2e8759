"""The learning rate as a pure function of the optimizer step. docs/learning-rates.md draws the curves."""

from __future__ import annotations

import math
from collections.abc import Callable

LrSchedule = Callable[[int], float]  # optimizer step, counted from 1 -> learning rate

LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex")


def lr_schedule(
    name: str,
    *,
    peak: float,
    warmup_steps: int,
    max_steps: int,
    end_share: float = 0.0,
    power: float = 2.0,
    cycles: int = 3,
    decay_steps: int = 0,
) -> LrSchedule:
    """The learning rate of step 1 .. max_steps. Linear warm-up reaches `peak` at step `warmup_steps`.

    It counts optimizer steps, whatever the number of workers and the accumulation. All but constant fall from `peak`
    at the end of the warm-up down to `end_share * peak` at the step after the last, so that no step is wasted on the
    rate of the end. With p from 0 to 1 on that way, and f(p) how much is left of what falls:

        rate(p) = peak * (end_share + (1 - end_share) * f(p))

        linear           1 - p
        cosine           (1 + cos(pi p)) / 2                 arXiv:1608.03983, one cycle
        cosine_restarts  the same `cycles` times, each from the peak, all of one length
        polynomial       (1 - p)^power
        rex              (1 - p) / (1/2 + (1 - p) / 2)       arXiv:2107.04197
        wsd              1, then linear over the last `decay_steps` steps (warm-up, stable, decay: arXiv:2404.06395)

    A warm-up longer than the run never reaches the peak. A fall of wsd that is longer than what the warm-up leaves is
    linear; one of 0 steps is constant.

    Args:
        name: one of LR_SCHEDULES.
        warmup_steps: the step that is the first at `peak`; 0 and 1 both mean no warm-up.
        end_share: 0 to 1; constant takes no notice of it.
    """
    begin = max(warmup_steps, 1)  # the first step at the peak
    length = max(1, max_steps + 1 - begin)  # steps from there to the step after the last
    fall = min(decay_steps, length)  # of wsd

    def restarts(done: int) -> float:
        # In whole numbers: a phase of 0.999... where it should be 1 would waste a step instead of starting again.
        phase = done * cycles % length / length
        return 0.0 if done == length else 0.5 * (1.0 + math.cos(math.pi * phase))

    # done: 0 .. length -> f(p), with p = done / length
    left: dict[str, Callable[[int], float]] = {
        "linear": lambda done: 1.0 - done / length,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * (done / length))),
        "cosine_restarts": restarts,
        "polynomial": lambda done: (1.0 - done / length) ** power,
        "wsd": lambda done: 1.0 if done <= length - fall else (length - done) / fall,
        "rex": lambda done: (1.0 - done / length) / (0.5 + 0.5 * (1.0 - done / length)),
    }

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        if name == "constant":
            return peak
        done = min(length, max(0, step - begin))
        return peak * (end_share + (1.0 - end_share) * left[name](done))

    return rate
