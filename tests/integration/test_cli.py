"""The command line as a user meets it: what it prints, how fast, with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_ray.config.load import load_config
from sdxl_ray.demo.run import demo_config

ROOT = Path(__file__).parent.parent.parent


def sdxl_ray(*arguments: str, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [str(Path(sys.executable).parent / "sdxl-ray"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.fixture
def settings(tmp_path, tiny_model) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(
        f'[model]\npath = "{tiny_model}"\ndtype = "fp32"\n'
        '[dataset]\npath = "builtin:photographs"\nresolution = 64\nbucket_step = 32\n'
        '[train]\nduration = "3 epochs"\nmicro_batch_size = 2\nnum_workers = 2\n'
        '[eval]\nholdout = 0.15\n[cluster]\naccelerator = "cpu"\n'
    )
    return path


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = sdxl_ray("--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert min(seconds) < 0.5
    commands = ("init", "check", "doctor", "demo", "cache", "train", "sweep", "generate", "export")
    assert all(f"\n  {command} " in done.stdout for command in commands)


def test_init_writes_a_file_that_check_accepts(tmp_path, tiny_model):
    done = sdxl_ray("init", "my.toml", "--preset", "8gb", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Set dataset.path in it, then: sdxl-ray check my.toml" in done.stdout
    assert load_config(tmp_path / "my.toml").train.gradient_checkpointing == "full"
    checked = sdxl_ray("check", "my.toml", "dataset.path=builtin:photographs", f"model.path={tiny_model}", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "images      21 of 21" in checked.stdout

    again = sdxl_ray("init", "my.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "my.toml exists already" in again.stderr
    assert sdxl_ray("init", "other.toml", "--preset", "12gb", cwd=tmp_path).returncode == 2


def test_check_explains_the_run_in_seconds(settings):
    started = time.perf_counter()
    done = sdxl_ray("check", str(settings))
    assert time.perf_counter() - started < 5
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line}
    assert lines["images"].startswith("21 of 21 in")
    assert lines["batch"] == "4 images a step = 2 x 1 accumulated x 2 workers"
    assert lines["split"].startswith(("20 to train on, 1 held out", "18 to train on", "19 to train on"))
    assert "3.0 epochs" in lines["length"]
    assert "176 layers" in lines["adapter"]
    assert "images and" in lines["cache"]
    assert "GiB" in lines["disk"]
    assert f"Next: sdxl-ray train {settings}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "Missing argument"),
        (["train", "missing.toml"], 2, "missing.toml: no such file. `sdxl-ray init missing.toml` writes one"),
        (["check", "SETTINGS", "adapter.rnk=4"], 2, "on the command line: adapter.rnk"),
        (["check", "SETTINGS", "dataset.path=nowhere"], 2, "nowhere does not exist"),
        (["check", "SETTINGS", "model.path=./nothing"], 2, "nothing"),
        (["train", "SETTINGS", "--resume", "--overwrite"], 2, "contradict each other"),
        (["generate", "no-such-run", "-p", "a cat"], 2, "expected a run's folder"),
        (["export", "no-such-run"], 1, "no checkpoint. Found: none"),
        (["sweep", "SETTINGS"], 2, "sweep.parameters is empty"),
        (["train", "SETTINGS", "--address", "http://127.0.0.1:8265"], 1, "is the address for submitting jobs"),
    ],
)
def test_mistakes_end_with_their_code_and_without_a_traceback(settings, arguments, code, words):
    given = [str(settings) if argument == "SETTINGS" else argument for argument in arguments]
    done = sdxl_ray(*given, cwd=settings.parent)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    if code == 2 and "error:" in done.stderr:
        assert "Traceback" in sdxl_ray("--traceback", *given, cwd=settings.parent).stderr


def test_the_demo_is_what_its_config_file_says():
    """configs/demo.toml, for `ray job submit`, and `sdxl-ray demo` are the same run."""
    from_file = load_config(ROOT / "configs" / "demo.toml").model_dump()
    from_code = demo_config(Path("runs/demo").absolute()).model_dump()
    for places in ("run", "cache"):
        from_file.pop(places)
        from_code.pop(places)
    assert from_code == from_file


def test_versions_agree():
    from sdxl_ray import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def terminated(settings: Path, *arguments: str, when: Callable[[str], bool]) -> tuple[int, str]:
    """Exit code and standard error of a command that gets SIGTERM, as clusters end a job, once `when(its log)`."""
    log = settings.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdxl_ray", arguments[0], str(settings), *arguments[1:]],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=settings.parent,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
    end = time.monotonic() + 120
    while process.poll() is None and not when(log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cache", "train"])
def test_sigterm_while_encoding_keeps_what_is_finished(settings, command):
    cache = settings.parent / "cache"
    shards = list[Path]()

    def one_is_there(_: str) -> bool:
        shards[:] = cache.glob("text/*.safetensors")
        return bool(shards)

    code, said = terminated(settings, command, f"cache.path={cache}", "dataset.resolution=256", when=one_is_there)
    assert (code, said) == (143, "interrupted; what is finished is kept: run again to go on\n")
    assert shards[0].exists()


@pytest.mark.slow
def test_a_sweep_that_sigterm_has_stopped_is_not_called_done(settings):
    """Also where no trial was waiting."""
    with settings.open("a") as file:
        file.write('[sweep]\nnum_trials = 1\n[sweep.parameters]\n"optimizer.learning_rate" = { choice = [1e-4] }\n')
    changes = ("train.num_workers=1", "train.duration=500 steps", "eval.every=5 steps", "run.output=runs")
    code, said = terminated(settings, "sweep", *changes, when=lambda log: "| step" in log)
    assert code == 130
    assert "the sweep was stopped; what its trials have done is in " in said
    assert "Continue with --resume." in said


@pytest.mark.slow
def test_the_demo_ends_with_its_three_commands(tmp_path):
    done = sdxl_ray("demo", "--folder", str(tmp_path / "demo"), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for words in ("encoded 21 images", "eval  20/20", "verified, relative error", "sdxl-ray init my.toml"):
        assert words in done.stdout
    assert (tmp_path / "demo" / "export" / "demo.safetensors").exists()
    assert (tmp_path / "demo" / "samples" / "comparison.png").exists()
    assert (tmp_path / "demo" / "log.txt").read_text().splitlines()[-1] == "  sdxl-ray train my.toml"

    started = time.perf_counter()
    again = sdxl_ray("cache", str(tmp_path / "demo" / "config.toml"))
    assert time.perf_counter() - started < 15
    assert "nothing to encode" in again.stdout
