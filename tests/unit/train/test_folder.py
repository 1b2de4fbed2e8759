"""What may be deleted, and what may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_ray.config.load import config_from_dict, load_config
from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.train.folder import claim_folder, inspect_folder, is_ours, keep_index, prune_checkpoints


@pytest.fixture
def config(tmp_path):
    return config_from_dict({"run": {"name": "my", "output": str(tmp_path)}})


@pytest.fixture
def run(tmp_path, config):
    folder = tmp_path / "my"
    claim_folder(folder, config, resume=False)
    return folder


def save(run, step):
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    return checkpoint


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["holiday.jpg", "checkpoints/sdxl.safetensors", "environment.json"])
def test_a_folder_that_is_no_run_is_neither_used_nor_deleted(tmp_path, content, overwrite):
    folder = tmp_path / "my"
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text("{}")
    with pytest.raises(ConfigError, match="is not empty and not a run of sdxl-ray"):
        inspect_folder(folder, resume=False, overwrite=overwrite)
    assert (folder / content).exists()


def test_a_new_run_takes_a_new_or_an_empty_folder(tmp_path, config):
    folder = tmp_path / "my"
    assert inspect_folder(folder, resume=False, overwrite=False) is None
    folder.mkdir()
    assert inspect_folder(folder, resume=False, overwrite=False) is None
    claim_folder(folder, config, resume=False)
    assert is_ours(folder)
    assert load_config(folder / "config.toml") == config


def test_a_run_with_a_checkpoint_needs_a_decision(run):
    save(run, 500)
    with pytest.raises(ConfigError, match=r"checkpoint of step 500\. --resume continues it, --overwrite deletes it"):
        inspect_folder(run, resume=False, overwrite=False)
    assert inspect_folder(run, resume=False, overwrite=True) is None
    assert (run / "checkpoints" / "step_000500").exists(), "looking deletes nothing"
    assert inspect_folder(run, resume=True, overwrite=False) == run / "checkpoints" / "step_000500"


def test_overwriting_starts_from_nothing_and_resuming_keeps_all_but_rays_list(run, config):
    save(run, 500)
    (run / "metrics.jsonl").write_text("{}\n")
    notes = run / "checkpoints" / "checkpoint_manager_snapshot.json"
    notes.write_text("{}")
    run_id = json.loads((run / "environment.json").read_text())["run_id"]
    claim_folder(run, config, resume=True)
    assert not notes.exists()
    assert (run / "checkpoints" / "step_000500").exists()
    assert json.loads((run / "environment.json").read_text())["run_id"] == run_id

    claim_folder(run, config, resume=False)
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "environment.json"]
    assert json.loads((run / "environment.json").read_text())["run_id"] != run_id


def test_resuming_nothing_says_so(run):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        inspect_folder(run, resume=True, overwrite=False)


def test_the_index_is_the_runs_own(run, tmp_path):
    source = tmp_path / "cache"
    source.mkdir()
    (source / "index.parquet").write_bytes(b"rows")
    (source / "manifest.json").write_text('{"prompts": {}}')
    kept = Path(keep_index(run, str(source / "index.parquet")))
    (source / "index.parquet").write_bytes(b"other rows")
    assert kept.read_bytes() == b"rows"
    assert (kept.parent / "manifest.json").exists()


def test_the_newest_checkpoints_stay(run):
    for step in (5, 10, 100, 20):
        save(run, step)
    (run / "checkpoints" / "step_000200").mkdir()  # without state.json: not whole, not counted, not touched
    prune_checkpoints(run, keep=2)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_000020", "step_000100", "step_000200"]
