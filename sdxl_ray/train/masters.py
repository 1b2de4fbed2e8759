"""fp32 master weights of what is trained, and the flat buffer of their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


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

    def freeze(self, names: Iterable[str]) -> None:
        """From now on these weights stay as they are: no gradient is computed, and no optimizer touches them.

        A gradient of None says so to every optimizer; with one of zeros, weight decay and old momentum would still move
        them. Their place in the buffer stays and holds zeros after the next `zero`.
        """
        for name in names:
            self.parameters[name].requires_grad_(False)
            self.parameters[name].grad = None
            self.masters[name].grad = None

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


def clip_by_norm(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale the flat gradient in place to at most `max_norm` (0: leave it) and return its norm before. No host sync."""
    norm = torch.linalg.vector_norm(gradient)
    if max_norm > 0:
        gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
