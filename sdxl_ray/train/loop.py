"""The loop, whole, without Ray: everything else in train/ is a noun it uses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from sdxl_ray.diffusion.loss import LossForm, diffusion_loss
from sdxl_ray.diffusion.objectives import Objective
from sdxl_ray.diffusion.randomness import keyed_seed
from sdxl_ray.errors import TrainingError
from sdxl_ray.records import Batch
from sdxl_ray.train.masters import clip_by_norm
from sdxl_ray.train.optimizers import set_learning_rate
from sdxl_ray.train.plan import Plan
from sdxl_ray.train.state import TrainState

# Sums that travel with the gradients, so that a step needs one collective: loss, weight, samples, asked to stop.
NUM_EXTRAS = 4
PLAIN_LOSS = LossForm()  # mean squared error over the whole image


class Reporter(Protocol):
    """Where the loop's results go: Ray Train and trackers in production, a list in tests."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Plain numbers, on every rank; one of them writes."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """An evaluation's numbers. Collective."""

    def images(self, step: int) -> None:
        """Time to draw. Each rank draws its share."""

    def checkpoint(self, step: int, state: TrainState) -> None:
        """Time to save. Collective."""

    def asked_to_stop(self) -> bool:
        """Whether this rank was asked to save and stop; ranks need not agree, the loop makes them."""


def run(
    state: TrainState,
    plan: Plan,
    batches: Iterator[Batch],
    objective: Objective,
    report: Reporter,
    evaluate: Callable[[], dict[str, float]] | None = None,
    form: LossForm = PLAIN_LOSS,
) -> bool:
    """Train until `plan.max_steps`; True if it got there, False if it was asked to stop and has saved.

    All ranks call it, and all do the same number of steps by construction.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    clock = Clock(state.device)
    votes = StopVotes(state.device)
    if state.step == 0:
        state.agree_on_start()
    while state.step < plan.max_steps:
        state.step += 1
        metrics = train_step(state, plan, batches, objective, clock, form=form, stop=report.asked_to_stop())

        stopping = votes.decide(metrics.pop("stop"))  # all ranks alike: the sum over them
        saving = plan.save.due(state.step) or stopping
        if plan.log.due(state.step) or saving:
            report.metrics(state.step, numbers(state, plan, metrics, clock))  # the only host sync of most steps
        with clock.paused():
            if evaluate is not None and plan.evaluate.due(state.step):  # all ranks
                with state.evaluated_weights():
                    values = evaluate()
                state.last_eval_loss = values["eval/loss"]
                report.evaluated(state.step, values)
            if plan.validate.due(state.step):  # each rank its share of the prompts
                with state.evaluated_weights():
                    report.images(state.step)
            if saving:  # all ranks
                report.checkpoint(state.step, state)
        if stopping:
            return False
    return True


def train_step(
    state: TrainState,
    plan: Plan,
    batches: Iterator[Batch],
    objective: Objective,
    clock: Clock,
    *,
    form: LossForm = PLAIN_LOSS,
    stop: bool = False,
) -> dict[str, torch.Tensor]:
    """One optimizer update; metrics as tensors that are still on the device.

    The loss of the step is the sum of the samples' losses over the sum of their weights, over all micro-batches of all
    ranks. So a remainder of a bucket counts for what it is, a rank without a micro-batch adds nothing, and the result
    does not depend on how a global batch is dealt out.
    """
    masters, loss_scale = state.masters, state.loss_scale
    state.freeze_finished()
    masters.zero()
    loss_sum, weight_sum, num_samples, stop_votes = masters.extras
    for number in plan.of_step(state.position, state.workers.world_rank):
        waited = time.perf_counter()
        batch = next(batches).to(state.device)
        clock.waited_s += time.perf_counter() - waited
        # Only dropout inside the adapter draws from torch's generator; keyed by the micro-batch, not by the rank.
        torch.manual_seed(keyed_seed(plan.seed, number, "dropout"))
        batch = state.conditioned(batch)
        losses = diffusion_loss(
            state.denoise,
            batch,
            objective,
            timesteps=batch.timesteps,
            noise=batch.noise,
            form=form,
            parent=state.parent,
        )
        weighted = (losses * batch.weights).sum()
        (weighted if loss_scale is None else loss_scale.scale(weighted)).backward()
        masters.accumulate()
        loss_sum += weighted.detach()
        weight_sum += batch.weights.sum()
        num_samples += len(batch)
    stop_votes += float(stop)
    state.workers.sum(masters.buffer)  # collective: all ranks, also one without a micro-batch

    # No weight at all where every image of the step turned out damaged: then its gradient is zero too.
    weight_sum.clamp_(min=1e-12)
    masters.gradient.div_(weight_sum)
    if loss_scale is not None:
        loss_scale.unscale(state.optimizer)
    grad_norm = clip_by_norm(masters.gradient, plan.max_grad_norm)
    set_learning_rate(state.optimizer, state.learning_rate(state.step))
    if loss_scale is None:
        state.optimizer.step()
    else:
        loss_scale.step(state.optimizer)  # or nothing, where the gradient is not finite
    masters.publish()
    if state.ema is not None:
        state.ema.update(state.step)
    state.position = plan.next_position(state.position)
    clock.num_samples += num_samples
    clock.num_steps += 1
    return {
        "train/loss": loss_sum / weight_sum,
        "train/grad_norm": grad_norm,
        "stop": stop_votes > 0,
    }


class StopVotes:
    """Whether any rank was asked to stop, from the sum over all of them.

    On an accelerator, this step's sum is copied to the host behind the step and looked at after the next one, when it
    has long arrived: looking at once would make the host wait in every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.delayed = device.type == "cuda"
        self.waiting: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def decide(self, vote: torch.Tensor) -> bool:
        if not self.delayed:
            return bool(vote)
        before = self.waiting
        on_host = torch.empty((), dtype=vote.dtype, pin_memory=True)
        on_host.copy_(vote, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.waiting = (on_host, arrived)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


class Clock:
    """Wall time between two log lines, without what evaluation, images and checkpoints took."""

    def __init__(self, device: torch.device) -> None:
        self.num_samples = torch.zeros((), device=device)  # of all ranks, summed on the device
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.paused_s = 0.0
        self.waited_s = 0.0  # for data
        self.num_steps = 0
        self.num_samples.zero_()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - began

    def busy_s(self) -> float:
        return max(time.perf_counter() - self.started - self.paused_s, 1e-9)


def numbers(state: TrainState, plan: Plan, metrics: dict[str, torch.Tensor], clock: Clock) -> dict[str, float]:
    """Plain numbers for the trackers. The host waits for the device here.

    Raises:
        TrainingError: the loss or the gradient is not finite; no checkpoint of it is written.
    """
    values = {name: float(value) for name, value in metrics.items() if name != "stop"}
    if state.loss_scale is not None:
        scale = state.loss_scale.value()  # raises where no scale helps
        if not math.isfinite(values["train/loss"] + values["train/grad_norm"]):
            values = {}  # the step was skipped, and the scale lowered for the next
        values["train/loss_scale"] = scale
    if not all(math.isfinite(value) for value in values.values()):
        raise TrainingError(
            f"step {state.step}: loss {values['train/loss']:g}, gradient norm {values['train/grad_norm']:g}: "
            "not finite. Lower optimizer.learning_rate, check that loss.objective is what the base model predicts, and "
            "look at `sdxl-ray cache` for damaged images. `--resume` continues from the last checkpoint."
        )
    busy_s = clock.busy_s()  # after the line above, which waited for the device
    values |= {
        "train/learning_rate": state.learning_rate(state.step),
        "train/epoch": plan.order.epochs_at(state.position),
        "perf/images_per_s": float(clock.num_samples) / busy_s,
        "perf/step_s": busy_s / max(1, clock.num_steps),
        "perf/data_wait_share": clock.waited_s / busy_s,
    }
    if state.device.type == "cuda":
        values["memory/peak_gib"] = torch.cuda.max_memory_allocated(state.device) / 2**30
    clock.restart()
    return values
