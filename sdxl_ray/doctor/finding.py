"""What an examination returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found. `cure` is what to type next."""

    subject: str
    state: State
    found: str
    cure: str = ""
