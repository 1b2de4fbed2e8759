from pathlib import Path

import pytest

from sdxl_ray.errors import CheckpointError
from sdxl_ray.run_folder import checkpoint_name, checkpoint_step, find_checkpoint, list_checkpoints


@pytest.fixture
def run(tmp_path):
    """Three complete checkpoints, one that is being written, and two that are no checkpoints."""
    for name in ("step_000200", "step_000100", "step_1000000", "step_foo", "step_000100 (1)"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "step_000300").mkdir()
    return tmp_path / "run"


def test_names_and_steps():
    for step in (0, 500, 1_234_567):
        assert checkpoint_step(Path("runs/cat/checkpoints") / checkpoint_name(step)) == step
    assert checkpoint_name(500) == "step_000500"
    assert checkpoint_step(Path("step_foo")) is None


def test_complete_checkpoints_by_step(run):
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [
        "step_000100",
        "step_000200",
        "step_1000000",
    ]
    assert list_checkpoints(run / "nowhere") == []


def test_the_last_one_or_the_one_asked_for(run):
    checkpoints = run / "checkpoints"
    assert find_checkpoint(run) == (run, checkpoints / "step_1000000")
    assert find_checkpoint(str(run), 200) == (run, checkpoints / "step_000200")
    assert find_checkpoint(checkpoints / "step_000100") == (run, checkpoints / "step_000100")


@pytest.mark.parametrize(
    ("path", "step", "said"),
    [
        ("", 300, "no checkpoint of step 300. Found: step_000100, step_000200, step_1000000."),
        ("checkpoints/step_000300", None, "no complete checkpoint step_000300. Found: step_000100"),
        ("checkpoints/step_foo", None, "no complete checkpoint step_foo. Found: step_000100"),
        ("checkpoints/step_000100", 200, "no complete checkpoint step_000100 of step 200. Found:"),
    ],
)
def test_what_is_not_there_or_not_complete_is_refused(run, path, step, said):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(run / path, step)
    assert said in str(error.value)


def test_a_run_whose_own_name_looks_like_a_step(tmp_path):
    run = tmp_path / "step_by_step"
    (run / "checkpoints" / "step_000010").mkdir(parents=True)
    (run / "checkpoints" / "step_000010" / "state.json").write_text("{}")
    assert find_checkpoint(run) == (run, run / "checkpoints" / "step_000010")
