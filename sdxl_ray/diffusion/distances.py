"""How far a prediction is from its target, pixel by pixel: squared, absolute, or the one where small and the other
where large.

With d = prediction - target:

    mse         d^2
    mae         |d|
    huber       2c (sqrt(d^2 + c^2) - c)     pseudo-Huber: d^2 where |d| << c, 2c |d| where |d| >> c
    smooth_l1    2 (sqrt(d^2 + c^2) - c)     the same over c: 2 |d| where |d| >> c

c may depend on the noise level (arXiv:2403.16728). With c0 = huber_c and sigma = sqrt((1 - abar) / abar):

    constant      c0
    exponential   exp(-alpha t), alpha = -ln(c0) / T        1 at t = 0, c0 at t = T
    snr           (1 - c0) / (1 + sigma)^2 + c0             1 at no noise, c0 at nothing but noise
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.errors import ConfigError

# (prediction (B, 4, h, w), target (B, 4, h, w), timesteps (B,)) -> (B, 4, h, w) float32
Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HUBER_SCHEDULES = ("constant", "exponential", "snr")


def mse(prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """d^2 in float32, whatever the precision of the prediction."""
    return (prediction.float() - target.float()) ** 2


def mae(prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """|d| in float32."""
    return (prediction.float() - target.float()).abs()


def make_distance(name: str, schedule: NoiseSchedule, *, huber_c: float, huber_schedule: str) -> Distance:
    """The distance of this name.

    Args:
        name: mse, mae, huber or smooth_l1.
        schedule: of huber and smooth_l1, where their c comes from; on the device where the timesteps will be.
        huber_c: c0 above, in units of the prediction; more than 0.
        huber_schedule: constant, exponential or snr.

    Raises:
        ConfigError: no such distance or schedule of c.
    """
    if name == "mse":
        return mse
    if name == "mae":
        return mae
    if name not in ("huber", "smooth_l1"):
        raise ConfigError(f'loss.error = "{name}", expected one of: mse, huber, smooth_l1, mae.')
    all_c = _c_of_each_timestep(schedule, huber_c, huber_schedule)
    scaled = name == "huber"

    def distance(prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        difference = prediction.float() - target.float()
        c = all_c[timesteps].view(-1, *([1] * (difference.ndim - 1)))
        # sqrt(d^2 + c^2) - c as it is loses all digits where d << c. This is the same number, and its gradient is
        # finite everywhere.
        distance = 2 * difference**2 / (torch.hypot(difference, c) + c)
        return c * distance if scaled else distance

    return distance


def _c_of_each_timestep(schedule: NoiseSchedule, huber_c: float, huber_schedule: str) -> torch.Tensor:
    """(T,) float32, computed once: a lookup in the step copies nothing and loops over nothing."""
    if huber_schedule not in HUBER_SCHEDULES:
        raise ConfigError(f'loss.huber_schedule = "{huber_schedule}", expected one of: {", ".join(HUBER_SCHEDULES)}.')
    alphas_cumprod = schedule.alphas_cumprod.double()
    if huber_schedule == "constant":
        c = torch.full_like(alphas_cumprod, huber_c)
    elif huber_schedule == "exponential":
        timesteps = torch.arange(len(alphas_cumprod), dtype=torch.float64, device=alphas_cumprod.device)
        c = torch.exp(math.log(huber_c) / len(alphas_cumprod) * timesteps)
    else:
        # 1 / (1 + sigma) without sigma, which is infinite at the end of a zero-terminal-SNR schedule
        signal_scale, noise_scale = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        c = (1 - huber_c) * (signal_scale / (signal_scale + noise_scale)) ** 2 + huber_c
    return c.float()
