import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_ray.config.load import with_overrides
from sdxl_ray.errors import CheckpointError, ConfigError, StorageError
from sdxl_ray.run_folder import ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, list_checkpoints
from sdxl_ray.train import checkpoints
from sdxl_ray.train.checkpoints import check_resumable, load_checkpoint, read_progress, save_checkpoint
from sdxl_ray.train.data import load_data, run_identity
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.optimizers import ParameterGroup, make_optimizer
from sdxl_ray.train.state import TrainState
from tests.tiny import assert_equal, snapshot

IDENTITY = {"adapter.rank": 2, "run.seed": 7}


def make_state(*, steps=0, dtype=torch.bfloat16) -> TrainState:
    """A state without a U-Net, `steps` optimizer steps old."""
    parameters = {
        "x.lora_A.weight": nn.Parameter(torch.full((2, 8), 1 / 3)),
        "x.lora_B.weight": nn.Parameter(torch.zeros(8, 2)),
    }
    masters = MasterWeights(parameters, dtype)
    optimizer = make_optimizer(
        "adamw",
        [ParameterGroup(tuple(masters.masters.values()))],
        learning_rate=1e-2,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        options={},
    )
    state = TrainState(nn.Module(), lambda *_: None, masters, optimizer, lambda step: 1e-2, torch.device("cpu"))
    for _ in range(steps):
        masters.gradient.copy_(torch.linspace(-1, 1, 32))
        optimizer.step()
        state.step += 1
        state.position += 3
    masters.publish()
    return state


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_round_trip_to_the_bit(tmp_path):
    state = make_state(steps=2)
    state.last_eval_loss = 0.25
    path = save_checkpoint(tmp_path, state, IDENTITY)
    assert path == tmp_path / "step_000002"
    assert files_below(path) == [ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE]

    fresh = make_state()
    fresh.load_state_dict(load_checkpoint(path))
    assert_equal(snapshot(fresh), snapshot(state))
    assert (fresh.step, fresh.position, fresh.last_eval_loss) == (2, 6, 0.25)
    assert read_progress(path)["identity"] == IDENTITY
    for name, parameter in fresh.masters.parameters.items():
        assert torch.equal(parameter, state.masters.masters[name].bfloat16())


def test_a_checkpoint_holds_the_masters_not_their_roundings(tmp_path):
    saved = load_checkpoint(save_checkpoint(tmp_path, make_state(steps=1), {}))["adapter"]["x.lora_A.weight"]
    assert saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float())


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, make_state(steps=2), IDENTITY)
    again = make_state(steps=2)
    with torch.no_grad():
        again.masters.masters["x.lora_A.weight"].fill_(9.0)
    path = save_checkpoint(tmp_path, again, IDENTITY)
    assert load_checkpoint(path)["adapter"]["x.lora_A.weight"].unique().tolist() == [9.0]
    assert files_below(tmp_path) == ["step_000002", *(f"step_000002/{name}" for name in sorted(files_below(path)))]


@pytest.mark.parametrize("failing", [ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE])
@pytest.mark.parametrize(
    ("code", "reason", "cure"),
    [
        (errno.ENOSPC, "no space left on the device", "Free some space"),
        (errno.EDQUOT, "the disk quota is used up", "Free some space"),
        (errno.EROFS, "the file system is read-only", "Make it writable"),
    ],
)
def test_a_full_disk_half_way_tears_nothing(tmp_path, monkeypatch, failing, code, reason, cure):
    earlier = save_checkpoint(tmp_path, make_state(steps=1), IDENTITY)
    before = files_below(tmp_path)

    write = checkpoints._write

    def fail_half_way(path, content):
        if path.name != failing:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(code, "as the kernel says it")

    monkeypatch.setattr(checkpoints, "_write", fail_half_way)
    with pytest.raises(StorageError) as error:
        save_checkpoint(tmp_path, make_state(steps=2), IDENTITY)
    assert str(error.value) == (
        f"{tmp_path / 'step_000002'}: {reason} while saving a checkpoint. {cure}, then continue with --resume."
    )
    assert files_below(tmp_path) == before
    assert load_checkpoint(earlier)["progress"]["step"] == 1


def test_a_failure_that_is_no_full_disk_is_not_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("basic_ios::clear")))
    with pytest.raises(RuntimeError, match="basic_ios"):
        save_checkpoint(tmp_path, make_state(steps=2), IDENTITY)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", [ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "garbage"])
def test_a_missing_or_damaged_file_is_named_with_the_cure(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, make_state(steps=1), IDENTITY)
    content = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        damaged = {"empty": b"", "cut short": content[: len(content) // 2], "garbage": b"\x93garbage" * 100}[damage]
        (path / name).write_bytes(damaged)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    text = str(error.value)
    if name == STATE_FILE:
        assert text.startswith(f"{path}: no readable state.json (")
        assert text.endswith("); expected a checkpoint of sdxl-ray.")
    else:
        assert text.startswith(f"{path}: damaged or incomplete (")
        assert text.endswith("). Delete this folder to continue from the one before it.")


def test_only_complete_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path):
    complete = ["step_000020", "step_000500", "step_001000", "step_1000000"]
    for name in (*reversed(complete), "step_000300", ".tmp-0a1b", "step_12", "x"):
        (tmp_path / name).mkdir()
        if name != "step_000300":
            (tmp_path / name / STATE_FILE).write_text("{}")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == complete
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_leftovers_of_a_killed_save_are_cleared_by_the_next(tmp_path):
    (tmp_path / ".tmp-killed").mkdir()
    (tmp_path / ".tmp-killed" / ADAPTER_FILE).write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, make_state(steps=1), IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


# ---- which runs may be continued -------------------------------------------------------------------------------------


def test_a_run_with_equal_settings_can_be_resumed(config, index_path):
    identity = run_identity(config, load_data(with_overrides(config, {"eval.holdout": 0.2}), index_path))
    check_resumable(json.loads(json.dumps(identity)), identity, Path("runs/cat"))


def test_every_setting_that_differs_is_listed():
    saved = {"adapter.rank": 16, "run.seed": 7, "model.dtype": "bf16", "optimizer.name": "lion"}
    current = {"adapter.rank": 8, "run.seed": 7, "model.dtype": "fp32", 'dataset "cats"': "repeats 2"}
    with pytest.raises(ConfigError) as error:
        check_resumable(saved, current, Path("runs/cat"))
    assert str(error.value) == (
        "runs/cat cannot be resumed with these settings:\n"
        "  adapter.rank: the checkpoint has 16, the config says 8\n"
        "  model.dtype: the checkpoint has 'bf16', the config says 'fp32'\n"
        "  dataset \"cats\": the checkpoint has the default, the config says 'repeats 2'\n"
        "  optimizer.name: the checkpoint has 'lion', the config says the default\n"
        "Set them back, or start another run with run.name=..."
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 8),
        ("adapter.rank", 4),
        ("adapter.targets", "all-linear"),
        ("loss.objective", "v_prediction"),
        ("train.micro_batch_size", 3),
        ("eval.holdout", 0.5),
        ("dataset.repeats", 2),
        ("cache.vae_dtype", "bf16"),
    ],
)
def test_what_decides_the_data_or_the_weights_may_not_change(config, index_path, key, value):
    changed = with_overrides(config, {key: value})
    before, after = (run_identity(each, load_data(each, index_path)) for each in (config, changed))
    with pytest.raises(ConfigError, match='  dataset "' if key.startswith("dataset") else f"  {key}: "):
        check_resumable(before, after, Path("runs/cat"))


@pytest.mark.parametrize(
    ("kind", "name"), [("vae", "model (VAE, with cache.vae_dtype)"), ("text", "model (text encoders)")]
)
def test_a_run_is_not_continued_with_another_vae_or_other_text_encoders(config, index_path, tmp_path, kind, name):
    """The ids of its samples are the same: they say nothing of what encodes them."""
    config = with_overrides(config, {"eval.holdout": 0.2})
    folder = Path(shutil.copytree(Path(index_path).parent, tmp_path / "data"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    expected = manifest[f"{kind}_fingerprint"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, f"{kind}_fingerprint": "f" * 16}), encoding="utf-8")
    before, after = (
        run_identity(config, load_data(config, place)) for place in (index_path, str(folder / "index.parquet"))
    )
    with pytest.raises(ConfigError) as error:
        check_resumable(before, after, Path("runs/cat"))
    assert str(error.value).splitlines()[1:-1] == [
        f"  {name}: the checkpoint has '{expected}', the config says '{'f' * 16}'"
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("train.num_workers", 4), ("train.accumulation", 2), ("train.log_every", 5)]
)
def test_what_decides_neither_may_change(config, index_path, key, value):
    data = load_data(with_overrides(config, {"eval.holdout": 0.2}), index_path)
    check_resumable(
        run_identity(config, data), run_identity(with_overrides(config, {key: value}), data), Path("runs/cat")
    )
