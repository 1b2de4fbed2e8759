"""What the driver tells of a run beside which it stands. With Ray: tests/integration."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray

from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.errors import TrainingError
from sdxl_ray.train import watching
from sdxl_ray.train.watching import WatchedBackground, run_and_watch


def test_damaged_images_and_captions_that_are_cut_are_told_once_each():
    lines = []
    background = SimpleNamespace(
        skipped=[Skipped("/a.png", "cannot be decoded: cut", "images")],
        num_long_captions=0,
        plan=SimpleNamespace(max_tokens=77),
    )

    watched = WatchedBackground(background, None, lambda event: lines.append(event["text"]))

    def look():
        before = len(lines)
        watched.show_notes()
        return lines[before:]

    assert look() == ["note: /a.png: cannot be decoded: cut; it does not count in training"]
    assert look() == []
    background.skipped = [Skipped("/b.png", "cannot be decoded: cut", "images"), *background.skipped]
    background.num_long_captions = 9
    assert look() == [
        "note: /b.png: cannot be decoded: cut; it does not count in training",
        "note: 9 captions are longer than 77 tokens; the rest of them is not seen (cache.caption_chunks)",
    ]
    assert look() == []


# ---- the process in between dies -------------------------------------------------------------------------------------


@pytest.fixture
def dead(monkeypatch):
    """A monitor that answers nothing any more."""

    def get(_):
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(watching.ray, "get", get)
    call = SimpleNamespace(remote=lambda: None)
    return SimpleNamespace(drain=call, fatal_error=call, request_stop=call)


def trainer(*, finished=True, error=None):
    def fit():
        if error is not None:
            raise error
        return SimpleNamespace(return_value={"finished": finished})

    return SimpleNamespace(fit=fit)


def test_what_was_finished_before_is_not_lost_with_it(dead):
    assert run_and_watch(trainer(), dead, lambda event: None, None) == {"finished": True}


@pytest.mark.parametrize(
    ("end", "also"),
    [
        ({"finished": False}, ""),
        ({"error": RuntimeError("CUDA out of memory")}, " The workers: the workers failed: CUDA"),
    ],
)
def test_a_run_that_ends_with_it_says_so_and_what_the_workers_said(dead, end, also):
    with pytest.raises(TrainingError) as error:
        run_and_watch(trainer(**end), dead, lambda event: None, None)
    text = "Checkpoints are kept; --resume continues from the last one."
    assert str(error.value).startswith("the process that this one and the workers talk through has died, ")
    assert str(error.value).partition(text)[2].startswith(also)


def test_in_a_trial_it_is_tune_that_has_ended_it(dead):
    with ThreadPoolExecutor(1) as threads:
        error = threads.submit(run_and_watch, trainer(), dead, lambda event: None, None).exception()
    assert isinstance(error, ray.exceptions.ActorDiedError)


def test_a_process_that_cannot_be_reached_just_now_has_no_events(monkeypatch):
    def get(_):
        raise ray.exceptions.ActorUnavailableError("for a moment", None)

    monkeypatch.setattr(watching.ray, "get", get)
    monitor = SimpleNamespace(drain=SimpleNamespace(remote=lambda: None))
    assert watching._show_events(monitor, pytest.fail) is False
