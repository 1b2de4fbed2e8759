"""What was trained, in the few words that headers and model cards repeat. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What was attached to the model and trained; the weights themselves say the rest.

    kind                 "lora", "dora", "loha", "lokr", or "full": the U-Net itself
    rank                 inner dimension; blocks may have others
    alpha                the adapter's output is times alpha / rank
    targets              "attention", "all-linear" or module names, as given to `attach_adapter`
    rank_stabilized      alpha / sqrt(rank) instead
    factor               LoKr: size of the small Kronecker factor, -1: as near to a square as it goes
    text_encoder_rank    of the LoRA of text encoder 1, 0: it was not trained
    text_encoder_2_rank  the same of text encoder 2
    """

    kind: str
    rank: int
    alpha: float
    targets: str | tuple[str, ...] = "attention"
    rank_stabilized: bool = False
    factor: int = -1
    text_encoder_rank: int = 0
    text_encoder_2_rank: int = 0
