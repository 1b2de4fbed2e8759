"""A moving average of the master weights, kept in fp32 on every worker: all of them have the same weights anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


class Ema:
    """Exponential moving average of the masters: shadow += (1 - d) (master - shadow).

    In fp32: with a decay of 0.9999 an update is 1e-4 of a difference, which bf16 would round away. It begins as the
    masters are. With `warmup`, step s keeps at most d = (1 + s) / (10 + s), so that the untrained weights of the
    beginning are forgotten quickly: the average spans about the last ninth of the steps until `decay` takes over.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], decay: float, warmup: bool) -> None:
        """
        Args:
            masters: fp32, by name; kept, and read in every `update`.
            decay: above 0 and below 1; 0 is no average, and the caller makes none.
        """
        self.masters = dict(masters)
        self.decay = decay
        self.warmup = warmup
        self.shadow = {name: master.detach().float().clone() for name, master in self.masters.items()}

    def decay_at(self, step: int) -> float:
        """How much of the average the update of this step keeps."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the masters after optimizer step `step`, counted from 1. One kernel, no host sync."""
        torch._foreach_lerp_(list(self.shadow.values()), list(self.masters.values()), 1.0 - self.decay_at(step))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the masters as they are: after a checkpoint that holds no average."""
        torch._foreach_copy_(list(self.shadow.values()), list(self.masters.values()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """fp32 copies on the CPU, by the masters' names. Not inside `applied`."""
        return {name: average.cpu().clone() for name, average in self.shadow.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, average in self.shadow.items():
            average.copy_(state[name])

    @contextlib.contextmanager
    def applied(self, masters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, `masters` hold the average; afterwards what they held before, to the bit.

        The two change places tensor by tensor, so it takes the memory of the largest tensor. What is computed with
        rounded copies of the masters has to be told: `MasterWeights.publish` inside, and again afterwards. Inside,
        neither train nor save.
        """
        self._exchange(masters)
        try:
            yield
        finally:
            self._exchange(masters)

    @torch.no_grad()
    def _exchange(self, masters: Mapping[str, torch.Tensor]) -> None:
        for name, average in self.shadow.items():
            kept = masters[name].detach().clone()
            masters[name].copy_(average)
            average.copy_(kept)
