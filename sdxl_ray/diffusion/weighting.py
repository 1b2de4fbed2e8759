"""How much each noise level counts: a function of (snr, objective) only, so schedule and objective cannot disagree.

A weighting is stated as a weight on the squared error of the predicted image, x_0. With snr = abar / (1 - abar), the
error of the same prediction is snr times as large in epsilon and snr + 1 times as large in v (for x_t given, x_0 is
linear in either; arXiv:2202.00512, section 4). Hence the weight on the objective's own error:

                       the predicted image          epsilon                v_prediction
    min_snr            min(snr, g)                  min(snr, g) / snr      min(snr, g) / (snr + 1)
    soft_min_snr       snr g / (snr + g)            g / (snr + g)          snr g / ((snr + g) (snr + 1))
    debiased           no published form            1 / sqrt(snr)          1 / (snr + 1)
    debiased_sqrt      no published form            1 / sqrt(snr)          1 / sqrt(snr + 1)

min_snr        Min-SNR-gamma, arXiv:2303.09556, section 3.4.
soft_min_snr   arXiv:2401.11605: 1 / (sigma^2 + 1 / g) on x_0, with sigma^2 = 1 / snr. k-diffusion's "soft-min-snr",
               (sigma s)^2 / (sigma^2 + s^2)^2 on its own scaled target, is the same at g = 1 / s^2.
debiased       arXiv:2310.08442 for epsilon. The two forms for v are those of kohya's scripts (debiased) and of
               OneTrainer (debiased_sqrt). As in both, snr counts as at most 1000. On x_0 the three would be sqrt(snr),
               1 and sqrt(snr + 1): they contradict each other, so there is none for objective = "sample".

The closed forms are finite from snr = 0 (zero-terminal-SNR) on, min_snr for epsilon by its limit 1. Only 1 / sqrt(snr)
is not, and epsilon cannot be trained at snr = 0 anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdxl_ray.errors import ConfigError

Weighting = Callable[[torch.Tensor], torch.Tensor]  # snr (B,) -> weight (B,), both float32

_MAX_DEBIASED_SNR = 1000.0  # as in kohya's scripts (pull request 889): only t = 0 of SDXL's schedule lies above

# (snr, gamma) -> weight. Written so that nothing is divided by a zero snr, nor inf by inf.
_FORMS: dict[str, dict[str, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "min_snr": {
        "epsilon": lambda snr, gamma: gamma / snr.clamp(min=gamma),
        "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
        "sample": lambda snr, gamma: snr.clamp(max=gamma),
    },
    "soft_min_snr": {
        "epsilon": lambda snr, gamma: gamma / (snr + gamma),
        "v_prediction": lambda snr, gamma: gamma / (snr + gamma) * (snr / (snr + 1)),
        "sample": lambda snr, gamma: gamma / (snr + gamma) * snr,
    },
    "debiased": {
        "epsilon": lambda snr, gamma: snr.clamp(max=_MAX_DEBIASED_SNR).rsqrt(),
        "v_prediction": lambda snr, gamma: 1 / (snr.clamp(max=_MAX_DEBIASED_SNR) + 1),
    },
    "debiased_sqrt": {
        "epsilon": lambda snr, gamma: snr.clamp(max=_MAX_DEBIASED_SNR).rsqrt(),
        "v_prediction": lambda snr, gamma: (snr.clamp(max=_MAX_DEBIASED_SNR) + 1).rsqrt(),
    },
}


def make_weighting(name: str, objective: str, *, gamma: float) -> Weighting | None:
    """The weight of a noise level on the squared error of `objective`, or None where all count the same.

    Args:
        name: constant, min_snr, soft_min_snr, debiased or debiased_sqrt.
        objective: a key of `objectives.OBJECTIVES`.
        gamma: of min_snr and soft_min_snr, the snr above which levels count less.

    Raises:
        ConfigError: no such weighting, or none that is published for this objective.
    """
    if name == "constant":
        return None
    if name not in _FORMS:
        raise ConfigError(f'loss.weighting = "{name}", expected one of: {", ".join(("constant", *_FORMS))}.')
    if objective not in _FORMS[name]:
        raise ConfigError(
            f'loss.weighting = "{name}" has no published form for loss.objective = "{objective}" '
            f"(only for {' and '.join(_FORMS[name])}). "
            'Set loss.weighting = "min_snr", "soft_min_snr" or "constant", which have one for all objectives.'
        )
    form = _FORMS[name][objective]
    return lambda snr: form(snr, gamma)
