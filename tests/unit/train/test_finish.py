import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_ray.cache.index import Index
from sdxl_ray.config.load import config_from_dict, with_overrides
from sdxl_ray.export.metadata import DatasetFacts
from sdxl_ray.records import EncodedSample
from sdxl_ray.train.data import Samples
from sdxl_ray.train.finish import dataset_facts, export_run, sample_images
from tests.tiny import make_training, train


def export(config, index_path, folder, **more):
    """A short run, exported: (files, masters of the adapter)."""
    training = make_training(config, index_path)
    train(training)
    masters = training.state.masters.state_dict()
    files = export_run(config, training, folder, name="tiny", sample_folder=None, started_at=1e9, **more)
    return files, masters


def test_a_finished_run_leaves_verified_files_that_say_how_they_were_made(config, index_path, tmp_path):
    config = with_overrides(
        config,
        {"train.accumulation": 2, "loss.weighting": "min_snr", "lr_schedule.name": "cosine", "eval.holdout": 0.0},
    )
    files, _ = export(config, index_path, tmp_path)
    assert [(file.path.name, file.format) for file in files] == [
        ("tiny.safetensors", "kohya"),
        ("tiny.diffusers.safetensors", "diffusers"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["README.md", *(file.path.name for file in files)]
    )
    for file in files:
        assert file.relative_error < 1e-4
        with safe_open(file.path, "pt") as opened:
            header = opened.metadata()
        assert header["ss_steps"] == "4"
        assert header["ss_epoch"] == "1"  # 8 micro-batches of 7 an epoch
        assert header["ss_network_dim"] == "2" and float(header["ss_learning_rate"]) == 1e-2
        assert header["ss_gradient_accumulation_steps"] == "2" and header["ss_total_batch_size"] == "4"
        assert header["ss_num_train_images"] == "13"
        assert header["ss_seed"] == "7" and header["ss_lr_scheduler"] == "cosine"
        assert header["ss_min_snr_gamma"] == "5.0"
        assert header["modelspec.prediction_type"] == "epsilon"
        buckets = json.loads(header["ss_bucket_info"])["buckets"].values()
        # (width, height) in kohya's header
        assert sorted((tuple(bucket["resolution"]), bucket["count"]) for bucket in buckets) == [
            ((48, 80), 2),
            ((64, 64), 7),
            ((80, 48), 4),
        ]
        assert str(tmp_path.parent.parent) not in " ".join(header.values())  # where things lay is nobody's business


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exports_hold_the_masters(config, index_path, tmp_path, dtype):
    """Also of a run that computed with bf16 copies."""
    config = with_overrides(config, {"model.dtype": dtype, "export.formats": ["diffusers"]})
    (file,), masters = export(config, index_path, tmp_path)
    exported = {name.removeprefix("unet."): tensor for name, tensor in load_file(file.path).items()}
    assert exported.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(exported[name], master)
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
    assert any(master.abs().sum() > 0 for name, master in masters.items() if "lora_B" in name)


def test_the_model_card_shows_the_images_that_were_drawn(config, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "00_a_red_house.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "02_trees.png")
    found = [(image.path.name, image.prompt) for image in sample_images(config, tmp_path)]
    assert found == [("00_a_red_house.png", "a red house"), ("02_trees.png", "trees")]
    assert sample_images(config, None) == []


def encoded(dataset, image, captions, *, flip=False, edge=512):
    return EncodedSample(
        sample_id=f"{dataset}-{image}-{flip}-{edge}",
        dataset=dataset,
        path=f"{image}.jpg",
        address="",
        image_hash=f"{image:064x}",
        verify=True,
        original_hw=(600, 600),
        target_hw=(edge, edge),
        resized_hw=(edge, edge),
        crops=((0, 0),),
        flip=flip,
        mask="",
        captions=tuple(captions),
        scaled_jpeg=False,
        caption_bases=tuple(range(len(captions))),
        latent_keys=("k",),
        latent_shards=("s",),
        text_keys=tuple("k" for _ in captions),
        text_shards=tuple("s" for _ in captions),
    )


def test_facts_of_several_datasets_count_each_image_once():
    """However many samples it makes, and of those that are trained on only."""
    config = config_from_dict(
        {
            "dataset": [
                {"path": "cats", "repeats": 3, "flip": True},
                {"path": "photographs", "role": "regularization"},
                {"path": "dogs"},
                {"path": "birds", "disabled": True},
                {"path": "eval", "role": "eval"},
            ]
        }
    )
    samples = [
        encoded("cats", number, [f"cat, number {number}", "the cat sits on the red sofa"], flip=flip, edge=edge)
        for flip in (False, True)
        for edge in (512, 768)
        for number in range(2)
    ]
    samples += [encoded("photographs", number, ["a photo"]) for number in range(10, 13)]
    samples += [encoded("dogs", 20, ["dog"]), encoded("eval", 30, ["bird"])]
    index = Index.of(samples)
    trained_on = np.array([row for row, sample in enumerate(samples) if sample.dataset in ("cats", "photographs")])
    assert dataset_facts(config, Samples(index, trained_on[::-1])) == (
        DatasetFacts("cats", 2, 3, {"cat": 2, "number 0": 1, "number 1": 1}),
        DatasetFacts("photographs", 3, 1, {"a photo": 3}, regularization=True),
    )


def test_the_largest_size_and_the_first_trigger_word_reach_the_header(config, index_path, tmp_path):
    config = with_overrides(config, {"dataset.trigger_word": "ohwx"})
    files, _ = export(config, index_path, tmp_path)
    with safe_open(files[0].path, "pt") as opened:
        header = opened.metadata()
    assert header["ss_resolution"] == "(64, 64)"
    assert header["modelspec.trigger_phrase"] == "ohwx"
    assert json.loads(header["ss_dataset_dirs"]).keys() == {"images"}
