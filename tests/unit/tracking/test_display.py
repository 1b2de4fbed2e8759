from dataclasses import replace

import pytest

from sdxl_ray.cache.pipeline import CacheResult
from sdxl_ray.tracking.console import Console
from sdxl_ray.tracking.display import RunDisplay

STARTED = {
    "event": "started",
    "step": 0,
    "max_steps": 100,
    "checkpoint": "",
    "memory_total_gib": 0.0,
    "num_train": 19,
    "num_held_out": 2,
    "num_left_out": 0,
}


@pytest.fixture
def said(capsys):
    """Call with events; what a person reads of them."""
    display = RunDisplay(Console(live=False))

    def lines(*events):
        for event in events:
            display(event)
        return capsys.readouterr().out.splitlines()

    return lines


def evaluated(step, loss):
    return {"event": "metrics", "step": step, "max_steps": 100, "values": {"eval/loss": loss}}


def cached(**changes):
    """The event of a run of stage 1 that found all of it there, but for `changes`."""
    result = CacheResult(
        index_path="cache/datasets/cats-1/index.parquet",
        num_samples=9,
        num_latents_encoded=0,
        num_captions_encoded=0,
        num_long_captions=0,
        max_tokens=77,
        skipped=(),
        skipped_path="cache/datasets/cats-1/skipped.csv",
        buckets={"64x64": 9},
        seconds=5.0,
    )
    return {"event": "cache", "result": replace(result, **changes)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["       nothing to encode: all of it was there"]),
        ({"num_tried": 1}, ["       nothing was encoded: what was missing cannot be used"]),
        ({"num_tried": 12, "num_there": 12}, ["       12 entries were encoded by another job at the same time"]),
        (
            {"notes": ("cats: 1 of 9 images have a mask",)},
            ["       nothing to encode: all of it was there", "       cats: 1 of 9 images have a mask"],
        ),
    ],
)
def test_what_stage_1_has_done(said, changes, expected):
    assert said(cached(**changes)) == ["cache: 9 samples (64x64 9)", *expected]


def test_a_start_says_how_many_images_are_trained_on_and_evaluated(said):
    assert said(STARTED) == ["train: 100 steps; 19 samples to train on, 2 for the eval loss"]
    assert said({**STARTED, "num_held_out": 0}) == ["train: 100 steps; 19 samples to train on, no eval loss"]
    assert said({**STARTED, "num_left_out": 5}) == [
        "train: 100 steps; 19 samples to train on, 2 for the eval loss",
        "       5 images are evaluated, so their copies are not trained on",
    ]


def test_an_eval_loss_is_told_against_the_first(said):
    assert said(STARTED, evaluated(0, 1.5), evaluated(50, 1.25))[1:] == [
        "eval    0/100 | eval loss 1.5000 (before training)",
        "eval   50/100 | eval loss 1.2500 (-0.2500 since the first)",
    ]


def test_after_a_resume_the_first_is_that_of_this_start(said):
    resumed = {**STARTED, "step": 40, "checkpoint": "runs/a/checkpoints/step_000040"}
    assert said(resumed, evaluated(50, 1.25), evaluated(100, 1.0)) == [
        "train: continuing at step 40 of 100, runs/a/checkpoints/step_000040; 19 samples to train on, 2 for the eval "
        "loss",
        "eval   50/100 | eval loss 1.2500",
        "eval  100/100 | eval loss 1.0000 (-0.2500 since the first after step 40)",
    ]
