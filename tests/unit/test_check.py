"""What `sdxl-ray check` says, on the tiny data set. .venv/bin/pytest tests/unit/test_check.py"""

import json
import re
import shutil

import pytest

from sdxl_ray.cache.planning import CachePlan
from sdxl_ray.check import ACTIVATIONS_GIB, estimate_memory_gib, explain, preview_crops
from sdxl_ray.config.load import with_overrides
from sdxl_ray.errors import ConfigError, StorageError
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


@pytest.mark.parametrize("text", ["cached", "online"])
def test_the_preview_shows_captions_as_training_reads_them(config, tmp_path, text):
    settings = {"cache.text": text, "dataset.trigger_word": "ohwx", "dataset.caption_suffix": ", drawn"}
    page = tmp_path / "sheet.html"
    (note,) = preview_crops(with_overrides(config, settings), page, num_shown=1)
    assert "6 of 13 images have several captions" in note
    found = re.findall(r'<ul class="captions"><li>([^<]*)</li>', page.read_text(encoding="utf-8"))
    assert found
    assert all(re.fullmatch(r"ohwx, [^,]+, drawn", caption) for caption in found), found


def test_a_preview_that_cannot_be_written_is_no_bug_of_ours(config, tmp_path):
    with pytest.raises(StorageError, match=r"a folder is in the place of the file while writing the contact sheet"):
        preview_crops(config, tmp_path)


@pytest.mark.parametrize("path", ["taken", "taken/runs"])
def test_a_file_in_the_place_of_the_runs_folder_is_told_before_anything_is_done(config, tmp_path, path):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError) as error:
        explain(with_overrides(config, {"run.output": str(tmp_path / path)}))
    assert str(error.value) == (
        f"run.output = {tmp_path / path}: {tmp_path / 'taken'} is a file, and the run needs a folder there."
    )


def test_captions_that_are_cut_are_told(config, monkeypatch):
    assert "tokens" not in explain(config).text()
    monkeypatch.setattr(CachePlan, "num_long_captions", lambda plan: 3)
    assert (
        "note: 3 captions are longer than 77 tokens; the rest of them is not seen (cache.caption_chunks)\n"
        in explain(config).text() + "\n"
    )
    other = with_overrides(config, {"dataset.caption_suffix": ", drawn"})
    assert "(cache.caption_chunks); of those that are encoded already" in explain(other).text()


def test_the_limit_of_held_out_images_counts(config):
    assert "11 to train on, 2 held out" in explain(with_overrides(config, {"eval.max_images": 2})).text()


def test_an_enlarged_image_counts_once(config):
    text = explain(with_overrides(config, {"dataset.resolution": [256, 512], "dataset.flip": True})).text()
    assert "13 images are smaller than a bucket of theirs and are enlarged, up to" in text


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


# ---- training methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.kind": "lokr", "export.formats": ["diffusers"]}, "diffusers cannot read a LoKr"),
        ({"adapter.targets": ["nothing"]}, "adapter.targets"),
        ({"adapter.blocks": {"nowhere": {"rank": 4}}}, "adapter.blocks: 'nowhere' is found in the name of none"),
        ({"optimizer.options": {"betta": 1}}, "betta"),
        ({"train.gradient_checkpointing": 1000}, "train.gradient_checkpointing = 1000, but this U-Net has"),
        ({"adapter.start_from": "/nowhere/x.safetensors"}, "no such file"),
        (
            {"train.micro_batch_size": "auto", "train.global_batch_size": 3, "train.num_workers": 2},
            "train.global_batch_size = 3 cannot be shared evenly by 2 workers",
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused(config, changes, expected):
    with pytest.raises(ConfigError) as error:
        explain(with_overrides(config, changes))
    assert expected in str(error.value)


def test_a_schedule_that_ends_in_pure_noise_does_not_go_with_epsilon(config, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "zero-snr")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    with pytest.raises(ConfigError, match="ends in pure noise"):
        explain(with_overrides(config, {"model.path": str(folder)}))


def test_a_batch_size_that_is_found_later_is_said_to_be(config):
    auto = {"train.micro_batch_size": "auto", "train.global_batch_size": 4, "train.accumulation": 1}
    text = explain(with_overrides(config, auto)).text()
    assert "batch       4 images a step = 1 x 4 accumulated x 1 workers" in text
    assert 'note: train.micro_batch_size = "auto" is found out when the run starts; here it is taken as 1' in text


@pytest.mark.parametrize(("kind", "expected"), [
    ("dora", "dora rank 2 on 176 layers"), ("lokr", "lokr rank 2 on 176 layers"), ("full", "the whole U-Net: 1 M"),
])  # fmt: skip
def test_what_is_trained_is_counted(config, kind, expected):
    rank = {"adapter.rank": 16, "adapter.alpha": 0.0} if kind == "full" else {}  # it has none
    assert expected in explain(with_overrides(config, {"adapter.kind": kind, **rank})).text()


def test_memory_falls_with_quantised_weights_and_with_each_checkpointed_block(config):
    def estimate(**changes):
        given = {
            "dataset.resolution": 1024,
            "train.micro_batch_size": 1,
            "validation.prompts": [],
            "model.dtype": "bf16",
        }
        changed = with_overrides(config, given | {name.replace("__", "."): value for name, value in changes.items()})
        return estimate_memory_gib(changed, UNET, ADAPTER)

    sizes = [estimate(model__quantize=kind) for kind in ("none", "int8", "int4")]
    # docs/memory.md: 4.782, 2.419 and 1.381 GiB of weights
    assert sizes[0] - sizes[1] == pytest.approx(4.782 - 2.419, abs=0.01)
    assert sizes[1] - sizes[2] == pytest.approx(2.419 - 1.381, abs=0.01)
    dial = [estimate(train__gradient_checkpointing=mode) for mode in ("none", 0, 5, 10, 35, 69, "transformer", "full")]
    assert dial[0] == dial[1]
    assert dial[1:] == sorted(dial[1:], reverse=True)
    assert estimate(ema__decay=0.99) > estimate()
    assert (
        estimate(adapter__kind="full", adapter__rank=16, adapter__alpha=0.0) < estimate()
    )  # what is trained is counted as the adapter
