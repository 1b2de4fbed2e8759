"""Stage 2 on a local Ray: what a killed, stopped or differently spread run comes to is what the plain run comes to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_ray.config.load import dump_config, load_config, with_overrides
from sdxl_ray.errors import CheckpointError, ConfigError, TrainingError
from sdxl_ray.generate import generate_images
from sdxl_ray.tracking.metrics import read_metrics
from sdxl_ray.train.launch import FitResult, export_lora, fit

from .conftest import actor_processes, small_config

pytestmark = pytest.mark.usefixtures("local_ray")

LAST = "step_000030"


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared_cache, tiny_model):
    """30 steps on two workers with dropout, so that every source of randomness is in play."""
    return small_config(
        tmp_path_factory.mktemp("runs"),
        shared_cache,
        "plain",
        tiny_model,
        adapter={"dropout": 0.1},
        train={"duration": "30 steps"},
        eval={"every": "15 steps"},
        checkpoint={"every": "5 steps", "keep": 2},
        lr_schedule={"name": "cosine", "warmup": "4 steps"},
        validation={
            "prompts": ["a cup of coffee"], "every": "30 steps", "num_steps": 2, "height": 64, "width": 64,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(config) -> FitResult:
    return fit(config)


def adapter(run_folder: Path, name: str = LAST) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "checkpoints" / name / "adapter.safetensors")


def losses(run_folder: Path) -> dict[int, float]:
    return {
        line["step"]: line["train/loss"] for line in read_metrics(run_folder / "metrics.jsonl") if "train/loss" in line
    }


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit by bit: adapter, optimizer and the loss of every step."""
    for name, tensor in adapter(expected).items():
        assert adapter(found)[name].equal(tensor), name
    states = [
        torch.load(folder / "checkpoints" / LAST / "optimizer.pt", weights_only=True)["state"]
        for folder in (found, expected)
    ]
    for number, moments in states[1].items():
        assert all(states[0][number][name].equal(value) for name, value in moments.items()), number
    assert losses(found) == losses(expected)


def test_a_run_leaves_behind_what_it_should(plain, config):
    folder = plain.run_folder
    assert plain.step == 30
    assert [file.format for file in plain.exports] == ["kohya", "diffusers"]
    assert all(file.relative_error < 1e-4 and file.path.exists() for file in plain.exports)
    assert load_config(folder / "config.toml") == config
    assert {path.name for path in (folder / "checkpoints").glob("step_*")} == {"step_000025", LAST}  # keep = 2
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert sorted(losses(folder)) == list(range(1, 31))
    evaluated = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "eval/loss" in line]
    assert evaluated == [0, 15, 30]
    assert len(list((folder / "samples").glob("*/00_a_cup_of_coffee.png"))) == 2  # base and step 30
    assert "a_cup_of_coffee" not in (folder / "export" / "README.md").read_text()
    assert not list(folder.glob("**/.tmp-*"))


def test_a_stopped_robbed_resumed_and_killed_run_comes_to_the_same_bytes(config, plain, tmp_path):
    """SIGTERM in the middle, the newest checkpoint lost, --resume with another number to keep, SIGKILL of a worker."""
    stopped = with_overrides(config, {"run.name": "stopped", "validation.prompts": []})
    checkpoints = Path(stopped.run.output) / "stopped" / "checkpoints"
    settings = tmp_path / "stopped.toml"
    settings.write_text(dump_config(stopped))
    text, code = train_until(settings, "step  6/30", signal.SIGTERM)
    assert code == 130, text
    assert "stopping: the step is finished and saved first" in text
    assert "Continue with --resume" in text
    saved = sorted(checkpoints.glob("step_*"))
    assert len(saved) == 2, text
    assert "step_000006" < saved[-1].name < LAST, "the signal came too late to prove anything"

    with pytest.raises(ConfigError, match=r"holds a run with a checkpoint of step \d+. --resume continues it"):
        fit(stopped)
    with pytest.raises(ConfigError) as raised:
        fit(with_overrides(stopped, {"adapter.rank": 8, "run.seed": 5}), resume=True)
    assert "adapter.rank: the checkpoint has 4, the config says 8" in str(raised.value)
    assert "run.seed: the checkpoint has 0, the config says 5" in str(raised.value)

    shutil.rmtree(saved[-1])  # Ray's own list still has it
    starts: list[int] = []
    killed: list[int] = []

    def kill_one(event):
        if event["event"] == "started":
            starts.append(event["step"])
        if event["event"] == "checkpoint" and event["step"] >= starts[0] + 10 and not killed:
            killed.append(actor_processes("RayTrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)

    # With one checkpoint to keep, the one it began with is gone by the time of the kill.
    result = fit(with_overrides(stopped, {"checkpoint.keep": 1}), resume=True, on_event=kill_one)
    assert killed
    assert starts[0] == int(saved[0].name.removeprefix("step_"))
    assert starts[1] > starts[0], "the run did not continue from a later checkpoint after the kill"
    assert_same_run(result.run_folder, plain.run_folder)
    assert [path.name for path in checkpoints.glob("step_*")] == [LAST]


def train_until(settings: Path, line_start: str, number: signal.Signals) -> tuple[str, int]:
    """Run `sdxl-ray train` and send it a signal when a line begins so; (what it printed, exit code)."""
    command = [sys.executable, "-m", "sdxl_ray", "train", str(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    alarm = threading.Timer(150, process.kill)
    alarm.start()
    output = []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if line.startswith(line_start):
            process.send_signal(number)
    process.wait()
    alarm.cancel()
    return "".join(output), process.returncode


@pytest.mark.slow  # the same is held without Ray in tests/unit/train/test_loop.py
def test_one_worker_with_the_same_global_batch_comes_to_the_same(config, plain):
    alone = with_overrides(
        config, {"run.name": "alone", "train.num_workers": 1, "train.accumulation": 2, "validation.prompts": []}
    )
    result = fit(alone, export=False)
    assert result.exports == ()
    found, expected = adapter(result.run_folder), adapter(plain.run_folder)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    assert losses(result.run_folder) == pytest.approx(losses(plain.run_folder), rel=1e-4)


def test_export_and_generate_from_a_checkpoint_and_from_the_file(plain, tmp_path):
    """Export needs neither images nor a complete cache; an earlier checkpoint does not take the final file's name."""
    before = plain.exports[0].path.read_bytes()
    by_folder = export_lora(plain.run_folder / "checkpoints" / "step_000025", formats=["kohya"])
    assert [file.path.name for file in by_folder] == ["plain-step_000025.safetensors"]
    assert plain.exports[0].path.read_bytes() == before
    files = export_lora(plain.run_folder, step=25, formats=["kohya"])
    assert [file.path.name for file in files] == ["plain-step_000025.safetensors"]
    assert files[0].relative_error < 1e-4

    from_run = generate_images(plain.run_folder, ["a cat"], out=tmp_path / "run", num_steps=2, compare=True)
    from_checkpoint = generate_images(plain.run_folder, ["a cat"], out=tmp_path / "step", step=30, num_steps=2)
    from_file = generate_images(
        plain.exports[1].path,
        ["a cat"],
        out=tmp_path / "file",
        model=load_config(plain.run_folder / "config.toml").model.path,
        height_width=(64, 64),
        num_steps=2,
    )
    assert [path.name for path in from_run] == ["00_a_cat.png", "comparison.png"]
    assert from_checkpoint[0].read_bytes() == from_run[0].read_bytes()
    assert from_file[0].exists()


def test_resume_without_a_checkpoint_says_so(config):
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from\. Leave out --resume"):
        fit(with_overrides(config, {"run.name": "never_started"}), resume=True)


def test_more_workers_than_fit_are_refused_at_once(config):
    started = time.monotonic()
    with pytest.raises(Exception, match=r"train.num_workers = 64 with 1 CPU each do not fit"):
        fit(with_overrides(config, {"run.name": "too_many", "train.num_workers": 64}))
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_the_death_of_the_process_in_between_is_told_as_that(config):
    """Of all that a run has, this one has no second."""

    def kill(event):
        if event["event"] == "checkpoint":
            os.kill(actor_processes("RunMonitor")[0], signal.SIGKILL)

    killed = with_overrides(config, {"run.name": "between"})
    with pytest.raises(TrainingError, match=r"talk through has died.* Checkpoints are kept; --resume continues"):
        fit(killed, on_event=kill)
    assert fit(killed, resume=True).step == 30
