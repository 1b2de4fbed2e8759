"""Values that carry their unit, so that no reader has to guess what `every = 500` counts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_DURATION = re.compile(r"\s*(\d+)\s*(step|steps|epoch|epochs)\s*")
_WARMUP_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e-\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Duration:
    """A number of optimizer steps or of passes over the data."""

    value: int
    unit: str  # "steps" or "epochs"

    def in_steps(self, steps_per_epoch: float) -> int:
        """Steps, where `steps_per_epoch` may be fractional: a step can straddle two epochs."""
        if self.unit == "steps":
            return self.value
        # Rounded first: 100 epochs of 1.1 steps are 110 steps, but 100 * 1.1 is 110.00000000000001.
        return math.ceil(round(self.value * steps_per_epoch, 6))

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


@dataclass(frozen=True, slots=True)
class Warmup:
    """Either a number of steps or epochs, or a share of the whole run."""

    duration: Duration | None = None
    percent: float | None = None

    def in_steps(self, max_steps: int, steps_per_epoch: float) -> int:
        if self.duration is not None:
            return self.duration.in_steps(steps_per_epoch)
        return round(max_steps * (self.percent or 0.0) / 100)

    def __str__(self) -> str:
        return str(self.duration) if self.duration is not None else f"{self.percent:.15g} %"


def parse_duration(given: Any) -> Duration:
    """`2000 steps` or `10 epochs`."""
    if isinstance(given, Duration):
        return given
    match = _DURATION.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        raise ValueError('needs a whole number and its unit, such as "2000 steps" or "10 epochs"')
    return Duration(int(match[1]), match[2].rstrip("s") + "s")


def parse_warmup(given: Any) -> Warmup:
    """`100 steps`, `1 epoch` or `5 %`."""
    if isinstance(given, Warmup):
        return given
    share = _WARMUP_SHARE.fullmatch(given) if isinstance(given, str) else None
    if share is not None and float(share[1]) <= 100:
        return Warmup(percent=float(share[1]))
    try:
        return Warmup(duration=parse_duration(given))
    except ValueError:
        raise ValueError('needs a number and its unit, such as "100 steps", "1 epoch" or "5 %"') from None


DurationField = Annotated[Duration, BeforeValidator(parse_duration), PlainSerializer(str)]
WarmupField = Annotated[Warmup, BeforeValidator(parse_warmup), PlainSerializer(str)]
