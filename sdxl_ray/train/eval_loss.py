"""A loss that can be compared from step to step and trial to trial: always the same images, noise and noise levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.diffusion.objectives import Objective
from sdxl_ray.errors import TrainingError
from sdxl_ray.records import Batch
from sdxl_ray.train.state import TrainState

# Four ranges of noise levels: what is learnt about composition (noisy) and about texture (clean) differs.
RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))


@torch.no_grad()
def stable_eval_loss(
    state: TrainState, batches: Callable[[], Iterable[Batch]], objective: Objective
) -> dict[str, float]:
    """`eval/loss` and its parts by noise level. All ranks: each brings its share of the held-out samples.

    Args:
        batches: called anew for every evaluation; gives this rank's share.
        objective: with constant weighting, so that the value does not depend on how the training loss is weighted.

    Raises:
        TrainingError: no held-out image can be decoded.
    """
    was_training = state.unet.training
    state.unet.eval()  # no dropout in the adapter
    device = state.device if state.device.type != "mps" else "cpu"  # which has no float64
    sums = torch.zeros(2, len(RANGES), dtype=torch.float64, device=device)
    try:
        for batch in batches():
            on_device = state.conditioned(batch.to(state.device))
            losses = diffusion_loss(
                state.denoise, on_device, objective, timesteps=on_device.timesteps, noise=on_device.noise
            )
            place = torch.clamp(on_device.timesteps // 250, max=len(RANGES) - 1).to(sums.device)
            # 1 each, whatever their dataset's weight; 0 where the image is damaged
            sums[0].index_add_(0, place, (losses * on_device.weights).to(sums))
            sums[1].index_add_(0, place, on_device.weights.to(sums))
    finally:
        state.unet.train(was_training)
    state.workers.sum(sums)  # collective
    totals, counts = sums.cpu()
    if not counts.sum():  # on all ranks alike
        raise TrainingError(
            "the eval loss cannot be computed: no held-out image can be decoded. Look at the warnings above, then run "
            "`sdxl-ray cache` again, or take the damaged images out."
        )
    values = {"eval/loss": float(totals.sum() / counts.sum())}
    for (low, high), total, count in zip(RANGES, totals, counts, strict=True):
        if count:
            values[f"eval/loss_t{low:03d}_{high}"] = float(total / count)
    return values
