"""Training in fp16: the loss is scaled up, so that small gradients are not rounded to 0 on their way back."""

from __future__ import annotations

from typing import Any

import torch

from sdxl_ray.errors import TrainingError

# Far below 1, scaling has no purpose any more: 26 steps in a row were not finite since 2^16.
_LEAST_SCALE = 2.0**-10


class LossScale:
    """torch.amp.GradScaler (arXiv:1710.03740, section 3.2) for masters whose gradients are views of one flat buffer.

    In a step:

        scale(loss).backward()       for each micro-batch
        (sum the buffer over all workers, divide by the weights)
        unscale(optimizer)           the buffer holds the gradient; whether it is finite is noted on the device
        (clip)
        step(optimizer)              the optimizer's, or nothing where the gradient is not finite; and the next scale

    After 2000 good steps in a row the scale doubles; after a skipped one it halves. A skipped step leaves the weights
    and the optimizer's state as they were, and it counts as a step of the run. All workers see the same summed
    buffer, so they decide alike and need no collective. The buffer is fp32, so sums over micro-batches and workers do
    not overflow where the single gradients do not.

    A fused AdamW skips on the device; for all other optimizers the host waits once in each step to look. bf16 and
    fp32 have the range of fp32 and need none of this: the caller has no LossScale then.
    """

    def __init__(self, device: torch.device, *, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scaler = torch.amp.GradScaler(device.type, init_scale=initial, growth_interval=growth_interval)
        # Makes the scale's tensor now: a rank without a micro-batch in its first step never calls `scale`.
        self.scaler.scale(torch.zeros((), device=device))

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the current scale, fp32 scalar, to call `backward` on."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the masters' gradients by the scale, in place, and note whether all are finite. No host sync."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, unless a gradient was not finite, and the next scale. After `unscale`."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def value(self) -> float:
        """The current scale, for the log. The host waits here.

        Raises:
            TrainingError: it fell so far that the gradient is not finite whatever the scale.
        """
        scale = float(self.scaler.get_scale())
        if scale < _LEAST_SCALE:
            raise TrainingError(
                f"the gradient in fp16 is not finite whatever the loss is scaled by (the scale fell to {scale:.2g}). "
                'Set model.dtype = "bf16" where the device has it, or "fp32"; or lower optimizer.learning_rate.'
            )
        return scale

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the scale, and how many good steps it has seen."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)
