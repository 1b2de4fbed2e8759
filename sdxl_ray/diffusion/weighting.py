"""How much each noise level counts: a function of (snr, objective) only, so schedule and objective cannot disagree."""

from __future__ import annotations

from collections.abc import Callable

import torch

Weighting = Callable[[torch.Tensor], torch.Tensor]  # snr (B,) -> weight (B,)


def min_snr(gamma: float, objective: str) -> Weighting:
    """Min-SNR-gamma (arXiv:2303.09556, section 3.4) as a weight on the objective's own squared error.

    The paper weights the error of the predicted image by min(snr, gamma). The error of epsilon is snr times that, and
    the error of v is (snr + 1) times that; hence min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).
    """

    def epsilon(snr: torch.Tensor) -> torch.Tensor:
        return snr.clamp(max=gamma) / snr

    def v_prediction(snr: torch.Tensor) -> torch.Tensor:
        return snr.clamp(max=gamma) / (snr + 1)

    return {"epsilon": epsilon, "v_prediction": v_prediction}[objective]
