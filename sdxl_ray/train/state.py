"""What a step reads and changes, and what of it a restart brings back: `TrainState.state_dict` is the whole list."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sdxl_ray.diffusion.loss import Denoiser
from sdxl_ray.records import Batch
from sdxl_ray.sdxl.adapters import load_start_state_dict, start_state_dict
from sdxl_ray.train.ema import Ema
from sdxl_ray.train.lr_schedules import LrSchedule
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.optimizers import inference_weights, load_optimizer_state, optimizer_state
from sdxl_ray.train.scaling import LossScale
from sdxl_ray.train.text import TrainedText


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
    parent: Denoiser | None = None  # the base model, for samples whose target is its prediction
    text: TrainedText | None = None  # text encoders that are trained
    ema: Ema | None = None
    averages_evaluated: bool = True  # whether eval loss and images are the average's, where there is an Ema
    loss_scale: LossScale | None = None  # with fp16
    step: int = 0  # optimizer steps done
    position: int = 0  # micro-batches consumed by all ranks together
    last_eval_loss: float | None = None

    def conditioned(self, batch: Batch) -> Batch:
        """The batch with its embeddings, where they are made in each step."""
        return batch if self.text is None else self.text.embed(batch, self.step)

    def freeze_finished(self) -> None:
        """Text encoders that have learnt for as long as they should stay as they are from this step on."""
        if self.text is None:
            return
        finished = self.text.finished(self.step)
        self.masters.freeze(name for name in self.masters.masters if name.partition(".")[0] in finished)

    def agree_on_start(self) -> None:
        """Rank 0's beginning becomes everyone's. Collective: all ranks, before the first step.

        What is drawn is the same everywhere, but PiSSA's and OLoRA's beginning is computed, and machines with other
        processors or numbers of threads compute other last digits.
        """
        frozen = start_state_dict(self.unet)
        if not frozen or self.workers.world_size == 1:
            return
        for tensors in (frozen, self.masters.masters):
            for name, tensor in tensors.items():
                shared = tensor.detach().to(self.device, copy=True)
                if self.workers.world_rank:
                    shared.zero_()
                self.workers.sum(shared)
                with torch.no_grad():
                    tensors[name].copy_(shared)
        load_start_state_dict(self.unet, frozen)
        self.masters.publish()

    @contextlib.contextmanager
    def evaluated_weights(self, *, average: bool | None = None) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated, drawn with and exported; afterwards those of training.

        These differ where the optimizer says so (schedule-free), and where there is a moving average.

        Args:
            average: whether to take the moving average; None: as for the eval loss.
        """
        use = self.averages_evaluated if average is None else average
        with contextlib.ExitStack() as stack:
            stack.callback(self.masters.publish)  # called last, when the masters are those of training again
            stack.enter_context(inference_weights(self.optimizer))
            if self.ema is not None and use:
                stack.enter_context(self.ema.applied(self.masters.masters))
            self.masters.publish()
            yield

    def average(self) -> dict[str, torch.Tensor] | None:
        """What is exported instead of the masters, by their names; None where it is the masters themselves."""
        if self.ema is not None:
            return self.ema.state_dict()
        if not any("train_mode" in group for group in self.optimizer.param_groups):  # only schedule-free ones have it
            return None
        with inference_weights(self.optimizer):
            return self.masters.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides its config. Randomness is keyed, so none of it is here."""
        return {
            "adapter": self.masters.state_dict(),
            "average": self.average(),
            "start": start_state_dict(self.unet) or None,
            "optimizer": optimizer_state(self.optimizer),
            "progress": {
                "step": self.step,
                "position": self.position,
                "last_eval_loss": self.last_eval_loss,
                "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masters.load_state_dict(state["adapter"])
        if state.get("start") is not None:
            load_start_state_dict(self.unet, state["start"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema is not None:
            if state.get("average") is None:
                self.ema.restart()
            else:
                self.ema.load_state_dict(state["average"])
        progress = state["progress"]
        if self.loss_scale is not None and progress.get("loss_scale"):
            self.loss_scale.load_state_dict(progress["loss_scale"])
        self.step = progress["step"]
        self.position = progress["position"]
        self.last_eval_loss = progress["last_eval_loss"]
