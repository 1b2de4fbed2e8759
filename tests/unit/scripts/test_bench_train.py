"""scripts/bench_train.py on a machine that has torch, diffusers and peft, and none of what Ray and the config need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
ABSENT = ("ray", "pyarrow", "pydantic", "typer", "rich", "tomli_w", "tensorboard", "wandb")

# Not a finder that raises: `importlib.util.find_spec("rich")`, by which libraries look for what is optional, has to
# answer None as it does where a package is not installed.
WITHOUT_THEM = f"""
import importlib.machinery, runpy, sys

class PathFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = PathFinder
for name in {ABSENT!r}:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " is not hidden")
sys.argv = ["bench_train.py", *sys.argv[1:]]
runpy.run_path({str(REPOSITORY / "scripts" / "bench_train.py")!r}, run_name="__main__")
"""


def bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_THEM, "--tiny", "--device", "cpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.json"
    done = bench(
        *("--batch", "1,2", "--resolution", "64", "--checkpointing", "none,full", "--recipe", "sdxl-ray,diffusers"),
        *("--rank", "4", "--steps", "2", "--warmup", "1", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")) | {"stdout": done.stdout}


@pytest.mark.slow
def test_each_point_of_the_grid_is_a_row(result):
    points = [(row["recipe"], row["checkpointing"], row["batch"]) for row in result["rows"]]
    expected = [(r, c, b) for r in ("sdxl-ray", "diffusers") for c in ("none", "full") for b in (1, 2)]
    assert points == expected
    assert all(row["status"] == "ok" and len(row["step_s"]) == 2 for row in result["rows"])
    assert result["stdout"].count("\nsdxl-ray ") == 4


@pytest.mark.slow
def test_figures_agree_with_each_other(result):
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["step_s_median"])
        flops_per_s = row["images_per_s"] * row["forward_backward_flops_per_image"]
        assert row["tflops_per_s"] == pytest.approx(flops_per_s / 1e12)
        assert row["share_of_peak"] == pytest.approx(row["tflops_per_s"] / result["matrix_peak"]["tflops_per_s"])
        assert row["peak_memory_gib"] > 0


@pytest.mark.slow
def test_checkpointing_repeats_work_that_the_mathematics_does_not_need(result):
    none, full = (next(r for r in result["rows"] if r["checkpointing"] == mode) for mode in ("none", "full"))
    assert none["executed_flops_per_image"] == none["forward_backward_flops_per_image"]
    assert full["forward_backward_flops_per_image"] == none["forward_backward_flops_per_image"]
    assert full["executed_flops_per_image"] > 1.2 * none["executed_flops_per_image"]
    assert none["forward_backward_flops_per_image"] > 1.5 * none["forward_flops_per_image"]


@pytest.mark.slow
def test_recipes_and_checkpointing_train_the_same_network(result):
    """Equal weights, batches and start: the last loss differs by rounding only."""
    losses = [row["last_loss"] for row in result["rows"] if row["batch"] == 1]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-2)


def test_an_unknown_recipe_is_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import bench_train

    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--recipe", "kohya"])
    with pytest.raises(SystemExit) as stop:
        bench_train.main()
    assert stop.value.code == 2
    assert "unknown: kohya; known: sdxl-ray, diffusers" in capsys.readouterr().err


@pytest.mark.slow
def test_flops_of_sdxl_are_those_of_the_field_notes(monkeypatch):
    """1024², attention, rank 16: 14.188 TFLOP a step, 19.336 with full checkpointing."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    from bench_train import count_flops

    none, full = (count_flops(False, 1024, mode, 16, "attention") for mode in ("none", "full"))
    assert none.forward / 1e12 == pytest.approx(6.803, abs=1e-3)
    assert none.forward_backward / 1e12 == pytest.approx(14.188, abs=1e-3)
    assert full.executed / 1e12 == pytest.approx(19.336, abs=1e-3)


@pytest.mark.slow
def test_out_of_memory_is_a_row(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import bench_train
    import torch

    def too_large(row, *arguments):
        if row.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(row, *arguments)

    run = bench_train.run_sdxl_ray
    monkeypatch.setattr(bench_train, "run_sdxl_ray", too_large)
    arguments = "bench_train.py --tiny --device cpu --resolution 64 --checkpointing none --rank 4 --steps 1 --warmup 0"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--batch", "1,2,3"])
    bench_train.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sdxl-ray ")]
    assert ["out of memory" in line for line in lines] == [False, True, False]
