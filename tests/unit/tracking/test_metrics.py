import json

import pytest

from sdxl_ray.errors import StorageError
from sdxl_ray.tracking.metrics import METRICS, MetricsFile, duration, progress_line, read_metrics

VALUES = {
    "train/loss": 0.11234,
    "train/grad_norm": 0.8349,
    "train/learning_rate": 1e-4,
    "perf/images_per_s": 3.14,
    "perf/data_wait_share": 0.018,
    "perf/step_s": 0.4478,
}


def test_the_progress_line():
    assert progress_line(120, 2000, VALUES | {"memory/peak_gib": 21.43}, memory_total_gib=79.1) == (
        "step  120/2000 | loss 0.1123 | grad 0.83 | lr 1.0e-04 | 3.1 img/s | data 2% | mem 21.4/79.1 GiB | eta 14m02s"
    )


def test_the_progress_line_without_an_accelerator():
    assert progress_line(2000, 2000, VALUES) == (
        "step 2000/2000 | loss 0.1123 | grad 0.83 | lr 1.0e-04 | 3.1 img/s | data 2% | eta 0s"
    )


def test_the_progress_line_where_the_whole_memory_is_unknown():
    assert " | mem 21.4 GiB | " in progress_line(1, 9, VALUES | {"memory/peak_gib": 21.43})


def test_the_columns_of_progress_lines_are_aligned():
    lines = [progress_line(step, 2000, VALUES) for step in (1, 20, 300, 2000)]
    assert len({line.index("| eta") for line in lines}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (48.4, "48s"),
        (59.6, "1m00s"),
        (842, "14m02s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (11_220, "3h07m"),
        (360_000, "100h00m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_metrics_are_called_group_and_name():
    for name in METRICS:
        group, _, rest = name.partition("/")
        assert group in ("train", "perf", "memory", "eval")
        assert rest == rest.lower()


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def filled(path, *steps):
    file = MetricsFile(path)
    for step in steps:
        file.write(step, {"train/loss": step / 10})
    return path


def test_each_line_is_one_object_with_step_and_time(tmp_path):
    path = filled(tmp_path / "run" / "metrics.jsonl", 1, 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 0.1), (2, 0.2)]
    assert all(line["time"] > 1.7e9 for line in lines)
    assert read_metrics(path) == lines


def test_a_fresh_run_starts_empty(tmp_path):
    path = filled(tmp_path / "metrics.jsonl", 1, 2)
    MetricsFile(path)
    assert steps(path) == []


def test_on_resume_lines_after_the_checkpoint_go(tmp_path):
    path = filled(tmp_path / "metrics.jsonl", 1, 2, 3, 4)
    before = read_metrics(path)
    file = MetricsFile(path, resume_step=2)
    assert read_metrics(path) == before[:2]
    file.write(3, {"train/loss": 9.0})
    assert steps(path) == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", ['{"step": 3, "train/lo', "\0\0\0\0", "{"])
def test_half_a_line_at_the_end_is_left_out(tmp_path, half):
    path = filled(tmp_path / "metrics.jsonl", 1, 2)
    with path.open("a") as file:
        file.write(half)
    assert steps(path) == [1, 2]
    MetricsFile(path, resume_step=9).write(3, {})
    assert steps(path) == [1, 2, 3]


def test_a_loss_that_is_no_number_can_be_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    (line,) = read_metrics(path)
    assert line["train/loss"] != line["train/loss"]
    assert line["train/grad_norm"] == float("inf")


def test_a_full_disk_does_not_cost_the_history(tmp_path, monkeypatch):
    path = filled(tmp_path / "metrics.jsonl", 1, 2, 3)

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(StorageError) as error:
        MetricsFile(path, resume_step=2)
    assert str(error.value) == (
        f"{path}: no space left on the device while opening metrics.jsonl. Free some space and use --resume."
    )
    assert steps(path) == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]
