"""fp32 master weights, AdamW on them, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

LrSchedule = Callable[[int], float]  # optimizer step, counted from 1 -> learning rate


class MasterWeights:
    """The adapter's weights in fp32, and one flat buffer that holds their gradients.

    The U-Net computes with copies in its own precision: with fp32 adapters inside a bf16 model, every adapted layer
    would keep an fp32 copy of its input for the backward pass (7.3 instead of 5.2 GiB for a 1024² image). In bf16
    alone, updates smaller than 2^-8 of a weight would vanish. The flat buffer is summed over the workers at once.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], compute_dtype: torch.dtype, num_extra: int = 0) -> None:
        """
        Args:
            parameters: the adapter's, in fp32; from here on they are copies in `compute_dtype`.
            num_extra: more numbers to be summed along with the gradients, at the end of `buffer`.
        """
        self.parameters = dict(parameters)
        first = next(iter(self.parameters.values()))
        total = sum(parameter.numel() for parameter in self.parameters.values())
        self.buffer = torch.zeros(total + num_extra, device=first.device)  # fp32: gradients, then the extras
        self.gradient = self.buffer[:total]
        self.extras = self.buffer[total:]
        self.masters: dict[str, nn.Parameter] = {}
        start = 0
        for name, parameter in self.parameters.items():
            master = nn.Parameter(parameter.detach().float().clone())
            master.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)
            self.masters[name] = master
            start += parameter.numel()
            parameter.data = parameter.data.to(compute_dtype)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of the last backward pass to the fp32 sum, so that accumulation does not round in bf16."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.masters[name].grad += parameter.grad  # type: ignore[operator]
                parameter.grad = None

    def zero(self) -> None:
        self.buffer.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model, rounded to its precision."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def restore(self) -> None:
        """Put the fp32 masters themselves into the model: what is exported is not rounded to the compute precision."""
        for name, parameter in self.parameters.items():
            parameter.data = self.masters[name].data

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: master.detach().cpu().clone() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish()


def adamw(
    masters: MasterWeights, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); fused into one kernel on accelerators."""
    parameters = list(masters.masters.values())
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        weight_decay=weight_decay,
        fused=True if parameters[0].device.type == "cuda" else None,
    )


def lr_schedule(name: str, *, peak: float, warmup_steps: int, max_steps: int) -> LrSchedule:
    """The learning rate of step 1 .. max_steps. Linear warm-up reaches `peak` at step `warmup_steps`.

    linear, cosine: from `peak` at the end of the warm-up down to 0 at the step after the last, so that no step is
    wasted on a rate of 0. It counts optimizer steps, whatever the number of workers and the accumulation.
    """
    decay: Callable[[float], float] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[name]

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - max(warmup_steps, 1)) / max(1, max_steps + 1 - max(warmup_steps, 1))
        return peak * decay(min(1.0, max(0.0, progress)))

    return rate


def clip_by_norm(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale the flat gradient in place to at most `max_norm` (0: leave it) and return its norm before. No host sync."""
    norm = torch.linalg.vector_norm(gradient)
    if max_norm > 0:
        gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
