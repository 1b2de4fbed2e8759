"""Stage 3 on a local Ray: trials over one cache, bad ones stopped, nothing left behind, the best LoRA handed back."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from sdxl_ray.config.load import load_config, with_overrides
from sdxl_ray.errors import ConfigError
from sdxl_ray.sweeps.ranking import read_trials
from sdxl_ray.sweeps.tuner import sweep
from sdxl_ray.tracking.metrics import read_metrics

from .conftest import actor_processes, small_config


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared_cache, tiny_model):
    return small_config(
        tmp_path_factory.mktemp("sweeps"),
        shared_cache,
        "four",
        tiny_model,
        train={"duration": "24 steps", "num_workers": 1, "micro_batch_size": 4},
        eval={"every": "6 steps"},
        cache={"mode": "ondemand"},  # a sweep encodes everything first all the same: its trials share one index
        sweep={
            "num_trials": 4,
            "max_concurrent": 2,
            "grace_steps": 6,
            "reduction_factor": 2,
            "parameters": {
                "optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]},
                "adapter.rank": {"choice": [2, 8]},
            },
        },
    )


@pytest.mark.usefixtures("local_ray")
def test_four_trials_of_learning_rate_and_rank(config):
    lines: list[str] = []
    started = time.monotonic()
    result = sweep(config, on_event=lambda event: lines.append(event.get("text", "")))
    seconds = time.monotonic() - started
    assert seconds < 300

    assert len(result.trials) == 4
    assert sum(trial.outcome == "stopped early" for trial in result.trials) >= 1, result.table()
    assert not any(trial.problem for trial in result.trials)
    ranked = [trial.best_loss for trial in result.trials]
    assert ranked == sorted(ranked)
    assert all({"optimizer.learning_rate", "adapter.rank"} == trial.parameters.keys() for trial in result.trials)
    assert any("| 4 ended, 0 running" in line or "| 3 ended" in line for line in lines), lines

    # the best LoRA is the best evaluation of all, and its file is verified
    every_loss = [
        line["eval/loss"]
        for trial in result.trials
        for line in read_metrics(trial.folder / "metrics.jsonl")
        if line["step"] > 0 and "eval/loss" in line
    ]
    assert result.best.best_loss == min(every_loss)
    assert [file.path.name for file in result.exports] == ["four.safetensors", "four.diffusers.safetensors"]
    assert all(file.path.exists() and file.relative_error < 1e-4 for file in result.exports)

    best = load_config(result.best_config_path)
    assert best.optimizer.learning_rate == result.best.parameters["optimizer.learning_rate"]
    assert best.adapter.rank == result.best.parameters["adapter.rank"]
    assert best.run.name == "four-best"
    with (result.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.name for trial in result.trials]

    # no trial encodes anything, and nothing of the trials is left on the cluster
    written = max(path.stat().st_mtime for path in result.folder.parent.glob("four/config.toml"))
    shards = list(Path(config.cache.path).glob("**/*.safetensors"))
    assert shards and all(shard.stat().st_mtime <= written for shard in shards)
    assert_nothing_left()


def assert_nothing_left(timeout_s: float = 30) -> None:
    """No worker of Ray Train, no placement group, every CPU free; Ray takes some seconds for it."""
    import ray
    from ray.util.state import list_placement_groups

    deadline = time.monotonic() + timeout_s
    while True:
        groups = [group for group in list_placement_groups() if group.state not in ("REMOVED",)]
        free = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
        workers = actor_processes("RayTrainWorker")
        if not groups and free[0] == free[1] and not workers:
            return
        assert time.monotonic() < deadline, (groups, free, workers)
        time.sleep(0.5)


def test_a_folder_in_use_is_not_overwritten(config):
    with pytest.raises(ConfigError, match="--resume continues it, --overwrite deletes it"):
        sweep(config)


def test_a_sweep_without_parameters_says_how_to_name_them(config):
    with pytest.raises(ConfigError, match=r"sweep.parameters is empty"):
        sweep(with_overrides(config, {"sweep.parameters": {}, "run.name": "none"}))


def test_trials_are_read_from_what_they_left(config):
    """Also after the sweep's process is gone."""
    trials = read_trials(config_folder(config) / "trials", max_steps=24)
    assert len(trials) == 4
    assert {trial.outcome for trial in trials} <= {"finished", "stopped early"}


def config_folder(config):
    return Path(config.run.output) / config.run.name
