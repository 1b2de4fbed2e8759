import sys
import types

import numpy as np
import pytest
from PIL import Image

from sdxl_ray.errors import ConfigError
from sdxl_ray.tracking.trackers import TensorBoardTracker, WandbTracker


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "0-a-cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
    return path


def test_tensorboard_reads_what_was_written(tmp_path, image):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "tensorboard")
    tracker.log(1, {"train/loss": 0.5, "train/grad_norm": 2.0})
    tracker.log(2, {"train/loss": 0.25})
    tracker.log_images(2, [image])

    def read():
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    assert len(read().Scalars("train/loss")) == 2  # also while the run goes on
    tracker.close()
    events = read()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("train/grad_norm")] == [(1, 2.0)]
    (drawn,) = events.Images("validation/0-a-cat")
    assert (drawn.step, drawn.height, drawn.width) == (2, 16, 24)


def test_without_wandb_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as error:
        WandbTracker("cats", name="cat", run_id="1", folder=tmp_path, config={})
    assert str(error.value) == 'tracking.wandb_project = "cats" needs wandb: pip install "sdxl-ray[wandb]"'


def test_wandb_continues_one_run(tmp_path, monkeypatch, image):
    """A stand-in for the service: what is sent to it."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda path: f"image {path}"))
    tracker = WandbTracker("cats", name="cat", run_id="id-1", folder=tmp_path, config={"adapter": {"rank": 4}})
    tracker.log(3, {"train/loss": 0.5})
    tracker.log_images(3, [image])
    tracker.close()
    assert calls == [
        (
            "init",
            {
                "project": "cats",
                "name": "cat",
                "id": "id-1",
                "resume": "allow",
                "dir": str(tmp_path),
                "config": {"adapter": {"rank": 4}},
            },
        ),
        ("log", {"train/loss": 0.5}, 3),
        ("log", {"validation/0-a-cat": f"image {image}"}, 3),
        ("finish",),
    ]
