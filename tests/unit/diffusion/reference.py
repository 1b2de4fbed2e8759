"""SDXL's forward process once more, in plain Python's double precision: independent of torch and of our code."""

import math

TIMESTEPS = (0, 1, 10, 50, 100, 150, 200, 250, 300, 500, 750, 900, 998, 999)


def _plain():
    """abar_t: the product of 1 - beta_t, with beta_t = (a + (b - a) t / 999)^2, a^2 = 0.00085, b^2 = 0.012."""
    product, found = 1.0, []
    for t in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        found.append(product)
    return found


def _rescaled(plain):
    """Algorithm 1 of arXiv:2305.08891, on sqrt(abar): shifted so that the last is 0, scaled so that the first stays."""
    roots = [math.sqrt(value) for value in plain]
    return [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]


ALPHAS_CUMPROD = {False: _plain(), True: _rescaled(_plain())}


def alphas_cumprod(timestep, zero_terminal_snr=False):
    return ALPHAS_CUMPROD[zero_terminal_snr][timestep]


def snr(timestep, zero_terminal_snr=False):
    abar = alphas_cumprod(timestep, zero_terminal_snr)
    return abar / (1 - abar)
