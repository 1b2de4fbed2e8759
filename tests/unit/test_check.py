"""What `sdxl-ray check` says, on the tiny data set. .venv/bin/pytest tests/unit/test_check.py"""

import pytest

from sdxl_ray.check import ACTIVATIONS_GIB, estimate_memory_gib, explain
from sdxl_ray.config.load import with_overrides
from sdxl_ray.sdxl import fingerprint

UNET, ADAPTER = 2_567_463_684, 23_000_000


@pytest.fixture
def config(tiny_cache):
    return tiny_cache[0]


def test_evaluation_that_takes_much_of_the_run_is_named(config):
    """Four held-out images at 4 levels, before the first step and after steps 2 and 4, make 48 forward passes.
    Training has 4 of the 5 micro-batches of an epoch of 9 images."""
    often = explain(with_overrides(config, {"eval.every": "2 steps"}))
    assert often.eval_share == pytest.approx(48 / (48 + 4 / 5 * 9))
    assert "evaluation is 87% of the run's forward passes: 3 times 4 images at 4 noise levels" in often.text()
    assert "Raise eval.every" in often.text()
    seldom = explain(with_overrides(config, {"eval.every": "400 steps", "train.duration": "400 steps"}))
    assert seldom.eval_share < 0.1
    assert "forward passes" not in seldom.text()
    none = explain(with_overrides(config, {"eval.holdout": 0.0}))
    assert none.eval_share == 0


def test_the_limit_of_held_out_images_counts(config):
    assert "11 to train on, 2 held out" in explain(with_overrides(config, {"eval.max_images": 2})).text()


def test_an_objective_that_is_not_the_models_is_a_note(config):
    assert "loss.objective" not in explain(config).text()
    wrong = explain(with_overrides(config, {"loss.objective": "v_prediction"}))
    assert 'note: loss.objective = "v_prediction", but the scheduler of model.path says "epsilon"' in wrong.text()


def test_the_variant_is_what_is_counted(config, monkeypatch):
    asked = []

    def shapes(model, **where):
        asked.append(where)
        return {}

    monkeypatch.setattr("sdxl_ray.check.unet_weight_shapes", shapes)
    monkeypatch.setattr("sdxl_ray.check.count_adapter_parameters", lambda *_, **__: (0, 0))
    # the tiny model has no such files, and nothing else of this test reads the weights
    monkeypatch.setattr(fingerprint, "variant_to_load", lambda *_: None)
    explain(with_overrides(config, {"model.variant": "fp16"}))
    assert asked == [{"revision": None, "variant": "fp16"}]


def test_drawing_counts_where_it_takes_more_than_a_step(config):
    def estimate(**changes):
        given = {"dataset.resolution": 1024, "train.micro_batch_size": 1, "validation.prompts": ["a cat"]}
        changed = with_overrides(config, given | {name.replace("__", "."): value for name, value in changes.items()})
        return estimate_memory_gib(changed, UNET, ADAPTER)

    small = {"train__gradient_checkpointing": "full", "model__dtype": "bf16"}
    step = ACTIVATIONS_GIB["attention"]["full"]
    without = estimate(validation__prompts=[], **small)
    assert estimate(**small) == pytest.approx(without - step + 0.31 + 0.8)
    assert estimate(train__micro_batch_size=4, **small) == estimate(
        train__micro_batch_size=4, validation__prompts=[], **small
    )
