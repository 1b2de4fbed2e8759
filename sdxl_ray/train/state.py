"""What a step reads and changes, and what of it a restart brings back: `TrainState.state_dict` is the whole list."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sdxl_ray.diffusion.loss import Denoiser
from sdxl_ray.train.optimizers import LrSchedule, MasterWeights


@dataclass(frozen=True)
class Workers:
    """This rank among the others. Alone by default, so the loop runs without torch.distributed."""

    world_rank: int = 0
    world_size: int = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place. Collective: every rank has to call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


@dataclass
class TrainState:
    """One rank's state of training."""

    unet: Any  # UNet2DConditionModel with its adapter
    denoise: Denoiser
    masters: MasterWeights
    optimizer: torch.optim.Optimizer
    learning_rate: LrSchedule
    device: torch.device
    workers: Workers = field(default_factory=Workers)
    step: int = 0  # optimizer steps done
    position: int = 0  # micro-batches consumed by all ranks together
    last_eval_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides its config. Randomness is keyed, so none of it is here."""
        return {
            "adapter": self.masters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "position": self.position, "last_eval_loss": self.last_eval_loss},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masters.load_state_dict(state["adapter"])
        # The moments only: weight decay and the like are the config's, and "fused" is this device's.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.step = state["progress"]["step"]
        self.position = state["progress"]["position"]
        self.last_eval_loss = state["progress"]["last_eval_loss"]
