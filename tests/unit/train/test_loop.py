"""The loop and everything it uses, on the tiny SDXL, in fp32 on the CPU: what a run is equal to."""

import dataclasses
import math

import pytest
import torch

from sdxl_ray.config.load import with_overrides
from sdxl_ray.diffusion.loss import diffusion_loss
from sdxl_ray.errors import TrainingError
from sdxl_ray.run_folder import checkpoint_name, list_checkpoints
from sdxl_ray.sdxl.adapters import start_state_dict
from sdxl_ray.tracking.metrics import METRICS
from sdxl_ray.train.loop import Clock, run, train_step
from sdxl_ray.train.plan import Share
from tests.tiny import ListReporter, assert_close, assert_equal, make_training, run_workers, snapshot, train


def with_settings(config, **overrides):
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})


# ---- one process -----------------------------------------------------------------------------------------------------


def test_the_same_seed_twice_gives_the_same_bytes(config, index_path):
    config = with_settings(config, adapter__dropout=0.2)
    first, second = make_training(config, index_path), make_training(config, index_path)
    reports = [train(first), train(second)]
    assert reports[0].losses() == reports[1].losses()
    assert reports[0].evaluations == reports[1].evaluations
    assert_equal(snapshot(second.state), snapshot(first.state))


def test_another_seed_gives_another_run(config, index_path):
    losses = [train(make_training(with_settings(config, run__seed=seed), index_path)).losses() for seed in (7, 8)]
    assert losses[0] != losses[1]


def test_training_changes_the_adapter_and_nothing_else(config, index_path):
    training = make_training(config, index_path)
    before = {name: tensor.clone() for name, tensor in training.state.unet.state_dict().items()}
    train(training)
    changed = {
        name for name, tensor in training.state.unet.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter__dropout": 0.3},
        {"adapter__dropout": 0.3, "train__gradient_checkpointing": "full", "train__accumulation": 2},
        {"model__dtype": "bf16", "loss__min_snr_gamma": 5.0, "lr_schedule__name": "cosine"},
    ],
    ids=["plain", "dropout", "dropout, gradient checkpointing, accumulation", "bf16, min-SNR, cosine"],
)
def test_a_resumed_run_is_the_uninterrupted_run(config, index_path, tmp_path, settings):
    config = with_settings(config, train__duration="5 steps", checkpoint__every="2 steps", **settings)
    whole = make_training(config, index_path)
    uninterrupted = train(whole, ListReporter(folder=tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_000004", "step_000005"]
    for step in (2, 4):
        resumed = make_training(config, index_path, checkpoint=tmp_path / checkpoint_name(step))
        assert resumed.state.step == step
        report = train(resumed)
        tail = {number: loss for number, loss in uninterrupted.losses().items() if number > step}
        assert report.losses() == tail
        assert report.evaluations == uninterrupted.evaluations
        assert_equal(snapshot(resumed.state), snapshot(whole.state))
        assert resumed.state.position == whole.state.position


def test_gradient_checkpointing_changes_no_number(config, index_path):
    """With dropout: the recomputed masks have to be the first ones."""
    losses = [
        train(
            make_training(with_settings(config, adapter__dropout=0.3, train__gradient_checkpointing=mode), index_path)
        ).losses()
        for mode in ("none", "full")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_gradient_of_a_step_is_that_of_all_its_samples_at_once(config, index_path):
    """Each sample counts the same, although the two micro-batches differ in size (field notes, trap 12)."""
    config = with_settings(
        config, train__accumulation=2, train__max_grad_norm=0.0, train__micro_batch_size=3, loss__stratified=False
    )
    training = make_training(config, index_path)
    state, plan = training.state, training.plan
    micro_batches = [plan.order[number] for number in range(plan.order.micro_batches_per_epoch)]
    order = [training.builder.training(Share(each, 1, 0, len(each.rows))) for each in micro_batches]
    position = next(index for index in range(len(order) - 1) if len(order[index]) != len(order[index + 1]))
    state.position = position
    with torch.no_grad():  # away from zero, so that lora_A has gradients too
        for name, master in state.masters.masters.items():
            if "lora_B" in name:
                master.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    state.masters.publish()

    both = order[position : position + 2]
    losses = [
        diffusion_loss(state.denoise, batch, training.objective, timesteps=batch.timesteps, noise=batch.noise)
        for batch in both
    ]
    mean = torch.cat(losses).mean()
    expected = torch.autograd.grad(mean, list(state.masters.parameters.values()))
    metrics = train_step(state, plan, training.batches(), training.objective, Clock(state.device))
    torch.testing.assert_close(metrics["train/loss"], mean.detach(), rtol=1e-6, atol=0)
    flat = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(state.masters.gradient, flat, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(metrics["train/grad_norm"], flat.norm(), rtol=1e-5, atol=0)
    assert state.position == position + 2


def test_weights_of_samples_count(config, index_path):
    """A sample of weight 0 is as good as absent."""
    config = with_settings(config, train__max_grad_norm=0.0)
    training = make_training(config, index_path)
    first = next(training.batches())
    assert len(first) == 2
    half = dataclasses.replace(first, weights=torch.tensor([1.0, 0.0]))
    metrics = train_step(training.state, training.plan, iter([half]), training.objective, Clock(torch.device("cpu")))
    alone = make_training(config, index_path)
    with torch.no_grad():
        losses = diffusion_loss(
            alone.state.denoise, first, alone.objective, timesteps=first.timesteps, noise=first.noise
        )
    assert float(metrics["train/loss"]) == pytest.approx(float(losses[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train__log_every": 1, "checkpoint__every": "1 steps"}, {"raised_at": 2, "checkpoints": [1], "logged": [1]}),
        ({"train__log_every": 10, "checkpoint__every": "3 steps"}, {"raised_at": 3, "checkpoints": [], "logged": []}),
        ({"train__log_every": 10, "checkpoint__every": "9 steps"}, {"raised_at": 4, "checkpoints": [], "logged": []}),
    ],
    ids=["logged", "saved later", "last step"],
)
def test_a_non_finite_loss_stops_the_run_before_any_checkpoint(config, index_path, settings, expected):
    training = make_training(with_settings(config, eval__holdout=0.2, **settings), index_path)

    def poisoned():
        for number, batch in enumerate(training.batches()):
            yield dataclasses.replace(batch, latents=batch.latents * math.nan) if number == 1 else batch

    report = ListReporter()
    with pytest.raises(TrainingError) as error:
        run(training.state, training.plan, poisoned(), training.objective, report)
    assert str(error.value) == (
        f"step {expected['raised_at']}: loss nan, gradient norm nan: not finite. "
        "Lower optimizer.learning_rate, check that loss.objective is what the base model predicts, and look at "
        "`sdxl-ray cache` for damaged images. `--resume` continues from the last checkpoint."
    )
    assert report.checkpoints == expected["checkpoints"]
    assert [step for step, _ in report.logged] == expected["logged"]


def test_metrics_have_declared_names_and_plain_numbers(config, index_path):
    training = make_training(with_settings(config, eval__every="2 steps"), index_path)
    report = train(training)
    assert [step for step, _ in report.logged] == [1, 2, 3, 4]
    assert [step for step, _ in report.evaluations] == [2, 4]
    expected = {name for name in METRICS if name.startswith(("train/", "perf/"))} - {"train/loss_scale"}  # fp16 only
    for _, values in report.logged:
        assert set(values) == expected
        assert all(type(value) is float and math.isfinite(value) for value in values.values())
        assert 0 <= values["perf/data_wait_share"] <= 1
    for _, values in report.evaluations:
        assert set(values) == {name for name in METRICS if name.startswith("eval/")}
    assert report.logged[-1][1]["train/epoch"] == 4 / training.plan.order.micro_batches_per_epoch
    assert training.state.last_eval_loss == report.evaluations[-1][1]["eval/loss"]


def test_everything_periodic_happens_when_it_is_due(config, index_path):
    config = with_settings(
        config,
        train__duration="7 steps",
        train__log_every=3,
        eval__every="4 steps",
        validation__every="5 steps",
        checkpoint__every="2 steps",
    )
    report = train(make_training(config, index_path))
    # the last step has everything; a checkpoint is preceded by its numbers
    assert report.checkpoints == [2, 4, 6, 7]
    assert [step for step, _ in report.logged] == [2, 3, 4, 6, 7]
    assert [step for step, _ in report.evaluations] == [4, 7]
    assert report.image_steps == [5, 7]


def test_without_holdout_and_prompts_nothing_is_evaluated_or_drawn(config, index_path):
    report = train(make_training(with_settings(config, eval__holdout=0.0, validation__prompts=[]), index_path))
    assert report.evaluations == [] and report.image_steps == []


def test_asked_to_stop_saves_and_stops(config, index_path, tmp_path):
    training = make_training(config, index_path)
    report = ListReporter(folder=tmp_path, stop_at=2)
    assert run(training.state, training.plan, training.batches(), training.objective, report) is False
    assert report.checkpoints == [2]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002"]


# ---- two processes ---------------------------------------------------------------------------------------------------


def _run(workers, config, index_path, checkpoint=None, folder=None, stop_at=None):
    training = make_training(config, index_path, workers=workers, checkpoint=checkpoint)
    report = ListReporter(folder=folder if workers.world_rank == 0 else None)
    report.stop_at = (stop_at or {}).get(workers.world_rank, 0)
    finished = run(training.state, training.plan, training.batches(), training.objective, report, training.evaluate)
    return {
        "finished": finished,
        "step": training.state.step,
        "losses": report.losses(),
        "evaluations": report.evaluations,
        "checkpoints": report.checkpoints,
        "snapshot": snapshot(training.state),
    }


def _alone(config, index_path, **more):
    from sdxl_ray.train.state import Workers

    return _run(Workers(), config, index_path, **more)


def test_two_workers_are_one_worker_with_accumulation(config, index_path, tmp_path):
    """Over one epoch of 5 micro-batches: 3 steps, of which the last leaves rank 1 without a micro-batch."""
    config = with_settings(config, train__duration="1 epochs", checkpoint__every="1 steps", ema__decay=0.9)
    two = with_settings(config, train__num_workers=2)
    accumulating = with_settings(config, train__accumulation=2)
    results = run_workers(_run, 2, two, index_path, None, tmp_path / "two")
    expected = _alone(accumulating, index_path, folder=tmp_path / "one")
    assert expected["step"] == 3
    for result in results:
        assert result["finished"]
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert_close(result["snapshot"], expected["snapshot"], rtol=1e-5, atol=1e-7)
    assert_equal(results[1]["snapshot"], results[0]["snapshot"])

    # the evaluation does not depend on the number of workers either
    (step, found), (_, wanted) = results[0]["evaluations"][0], expected["evaluations"][0]
    assert step == 3
    assert found == results[1]["evaluations"][0][1]
    assert found == pytest.approx(wanted, rel=1e-5)

    # and a resume may change the number of workers, in both directions
    down = _alone(accumulating, index_path, checkpoint=tmp_path / "two" / "step_000001")
    assert_close(down["snapshot"], expected["snapshot"], rtol=1e-5, atol=1e-7)
    up = run_workers(_run, 2, two, index_path, tmp_path / "one" / "step_000001")
    assert list(up[0]["losses"]) == [2, 3]
    assert_close(up[0]["snapshot"], expected["snapshot"], rtol=1e-5, atol=1e-7)


def _start_otherwise(workers, config, index_path):
    """As `_run`, but rank 1 computed another beginning."""
    training = make_training(config, index_path, workers=workers)
    if workers.world_rank:
        with torch.no_grad():
            for master in training.state.masters.masters.values():
                master += 1e-3
    train(training)
    return snapshot(training.state), start_state_dict(training.state.unet)


def test_ranks_that_compute_another_start_take_the_first_ones(config, index_path):
    config = with_settings(config, train__num_workers=2, train__duration="2 steps", adapter__init="pissa")
    (first, start), (second, other) = run_workers(_start_otherwise, 2, config, index_path)
    assert_equal(second, first)
    assert start and all(torch.equal(start[name], other[name]) for name in start)


def test_a_stop_asked_of_one_rank_stops_both_at_the_same_step(config, index_path, tmp_path):
    config = with_settings(config, train__num_workers=2, train__duration="20 steps")
    results = run_workers(_run, 2, config, index_path, None, tmp_path, {1: 3})
    for result in results:
        assert not result["finished"]
        assert (result["step"], result["checkpoints"]) == (3, [3])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000003"]
