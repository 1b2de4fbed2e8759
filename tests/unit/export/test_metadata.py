"""The header: both conventions, strings only, nothing of the machine."""

import dataclasses
import json

import pytest

from sdxl_ray.export import metadata as metadata_module
from sdxl_ray.export.metadata import (
    DatasetFacts,
    TrainingFacts,
    build_metadata,
    plain_lora_metadata,
    public_name,
    tag_frequency,
    whole_model_metadata,
)
from sdxl_ray.export.spec import AdapterSpec

SPEC = AdapterSpec("lora", 16, 8.0)
FACTS = TrainingFacts(
    name="tabby",
    base_model="/models/private/illustrious.safetensors",
    num_steps=2000,
    prediction_type="v_prediction",
    resolution_hw=(1024, 896),
    trigger_phrase="sks tabby",
    num_epochs=10,
    datasets=(
        DatasetFacts(
            "/data/someone/cats",
            40,
            repeats=5,
            tags=tag_frequency(
                [["Sks Tabby, sitting"], ["sks tabby, a long sentence about the cat of my neighbour", "sks  tabby"]]
            ),
        ),
    ),
    buckets={(1024, 1024): 30, (832, 1216): 10},
    micro_batch_size=2,
    accumulation=3,
    num_workers=4,
    learning_rate=1e-4,
    optimizer="adamw",
    seed=7,
    finished_at=1_700_000_000.0,
)


def test_all_values_are_strings_and_unknown_ones_are_absent():
    metadata = build_metadata(FACTS, SPEC)
    assert all(isinstance(value, str) for value in metadata.values())
    assert "None" not in metadata.values()
    assert "ss_lr_scheduler" not in metadata


def test_kohya_keys():
    metadata = build_metadata(FACTS, SPEC)
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_alpha": "8.0",
        "ss_steps": "2000",
        "ss_epoch": "10",
        "ss_learning_rate": "0.0001",
        "ss_total_batch_size": "24",
        "ss_num_train_images": "200",
        "ss_resolution": "(896, 1024)",
        "ss_enable_bucket": "True",
        "ss_output_name": "tabby",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [1216, 832], "count": 10},
        "1": {"resolution": [1024, 1024], "count": 30},
    }
    assert json.loads(metadata["ss_dataset_dirs"]) == {"cats": {"n_repeats": 5, "img_count": 40}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"cats": {"sks tabby": 2, "sitting": 1}}


def test_several_datasets_and_regularization():
    datasets = (
        DatasetFacts("cats", 40, 5, tags={"cat": 40}),
        DatasetFacts("cats-2", 10, tags={"kitten": 3}),
        DatasetFacts("photographs", 100, 2, tags={"photo": 100}, regularization=True),
    )
    metadata = build_metadata(dataclasses.replace(FACTS, datasets=datasets), SPEC)
    assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"]) == ("210", "200")
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "cats": {"n_repeats": 5, "img_count": 40},
        "cats-2": {"n_repeats": 1, "img_count": 10},
    }
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"photographs": {"n_repeats": 2, "img_count": 100}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"cats": {"cat": 40}, "cats-2": {"kitten": 3}}
    assert "ss_reg_dataset_dirs" not in build_metadata(FACTS, SPEC)


def test_modelspec_keys():
    metadata = build_metadata(FACTS, SPEC)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "tabby",
        "modelspec.resolution": "896x1024",
        "modelspec.trigger_phrase": "sks tabby",
        "modelspec.prediction_type": "v",
        "modelspec.date": "2023-11-14T22:13:20+00:00",
    }
    assert expected.items() <= metadata.items()


def test_nothing_of_the_machine_and_no_sentences():
    everything = json.dumps(build_metadata(FACTS, SPEC))
    for private in ("/data", "someone", "/models", "private", "neighbour"):
        assert private not in everything


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("/home/me/models/noob.safetensors", "noob.safetensors"),
        ("models/noob.safetensors", "noob.safetensors"),
        ("C:\\models\\noob.safetensors", "noob.safetensors"),
        ("./noob", "noob"),
        ("~/noob/", "noob"),
        ("builtin:tiny", "builtin:tiny"),
    ],
)
def test_public_name(model, public):
    assert public_name(model) == public


def test_tags_are_counted_as_kohya_does():
    assert tag_frequency([["Cat, sitting ,"], ["cat"], [""]]) == {"cat": 2, "sitting": 1}


def test_a_tag_counts_once_in_an_image():
    """Of its variants, each has the same tags in another order."""
    assert tag_frequency([["cat, red", "red, cat", "cat"], ["red"]]) == {"red": 2, "cat": 1}


def test_rare_tags_give_way_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(metadata_module, "_MAX_COUNTED", 10)
    images = [[f"cat, tag {number}"] for number in range(100)]
    counted = tag_frequency(images)
    assert next(iter(counted.items())) == ("cat", 100)
    assert len(counted) <= 10


def test_the_header_stays_small():
    assert len(tag_frequency([[f"tag {number}"] for number in range(2000)])) == 1000


@pytest.mark.parametrize(
    ("spec", "module", "arguments"),
    [
        (AdapterSpec("lora", 16, 8.0), "networks.lora", None),
        (AdapterSpec("lora", 16, 8.0, rank_stabilized=True), "networks.lora", {"rs_lora": "True"}),
        (
            AdapterSpec("dora", 16, 8.0),
            "lycoris.kohya",
            {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"},
        ),
        (AdapterSpec("loha", 8, 8.0), "lycoris.kohya", {"algo": "loha"}),
        (AdapterSpec("lokr", 8, 8.0, factor=4), "lycoris.kohya", {"algo": "lokr", "factor": "4"}),
    ],
)
def test_kinds_are_told_by_their_network(spec, module, arguments):
    metadata = build_metadata(FACTS, spec)
    assert metadata["ss_network_module"] == module
    assert metadata["ss_network_dim"] == str(spec.rank)
    assert json.loads(metadata.get("ss_network_args", "null")) == arguments
    plain = plain_lora_metadata(metadata, rank=32)
    assert plain["ss_network_module"] == "networks.lora" and "ss_network_args" not in plain
    assert (plain["ss_network_dim"], plain["ss_network_alpha"]) == ("32", "32.0")
    assert plain["sdxl_ray.adapter"] == metadata["sdxl_ray.adapter"]


def test_what_was_trained_is_said_without_defaults():
    spec = AdapterSpec("lokr", 8, 8.0, ("to_q",), factor=4, text_encoder_rank=4)
    said = json.loads(build_metadata(FACTS, spec)["sdxl_ray.adapter"])
    assert said == {"kind": "lokr", "rank": 8, "alpha": 8.0, "targets": ["to_q"], "factor": 4, "text_encoder_rank": 4}
    assert json.loads(build_metadata(FACTS, SPEC)["sdxl_ray.adapter"]) == {
        "kind": "lora",
        "rank": 16,
        "alpha": 8.0,
        "targets": "attention",
    }
    full = build_metadata(FACTS, AdapterSpec("full", 16, 16.0))
    assert json.loads(full["sdxl_ray.adapter"]) == {"kind": "full"}
    assert "ss_network_module" not in full and "ss_network_dim" not in full


def test_the_objective_has_kohyas_names():
    facts = dataclasses.replace(
        FACTS,
        text_encoder_learning_rates=(1e-5, 5e-6),
        weighting="debiased",
        zero_terminal_snr=True,
        error="mae",
        noise_offset=0.05,
        multires_noise_discount=0.3,
        multires_noise_levels=6,
        input_perturbation=0.1,
        ema_decay=0.999,
        timestep_range=(100, 900),
    )
    expected = {
        "ss_text_encoder_lr": "[1e-05, 5e-06]",
        "ss_debiased_estimation": "True",
        "ss_zero_terminal_snr": "True",
        "ss_loss_type": "l1",
        "ss_noise_offset": "0.05",
        "ss_multires_noise_discount": "0.3",
        "ss_multires_noise_iterations": "6",
        "ss_ip_noise_gamma": "0.1",
        "ss_ema_decay": "0.999",
        "modelspec.timestep_range": "100,900",
    }
    metadata = build_metadata(facts, SPEC)
    assert expected.items() <= metadata.items()
    assert "ss_min_snr_gamma" not in metadata
    unknown = build_metadata(FACTS, SPEC)
    assert not (expected.keys() - {"modelspec.timestep_range"}) & unknown.keys()
    same = dataclasses.replace(facts, text_encoder_learning_rates=(1e-5, 1e-5), weighting="min_snr", error="huber")
    assert build_metadata(same, SPEC)["ss_text_encoder_lr"] == "1e-05"
    assert build_metadata(same, SPEC)["ss_debiased_estimation"] == "False"
    assert build_metadata(same, SPEC)["ss_loss_type"] == "huber"


def test_multires_levels_mean_nothing_without_a_discount():
    facts = dataclasses.replace(FACTS, multires_noise_discount=0.0, multires_noise_levels=6)
    assert not [key for key in build_metadata(facts, SPEC) if "multires" in key]


@pytest.mark.parametrize(("objective", "said"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")])
def test_what_the_model_predicts(objective, said):
    facts = dataclasses.replace(FACTS, prediction_type=objective)
    assert build_metadata(facts, SPEC)["modelspec.prediction_type"] == said


def test_a_whole_model_is_no_lora():
    metadata = whole_model_metadata(build_metadata(FACTS, SPEC))
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.title"] == "tabby"
    assert not any(key.startswith("ss_") for key in metadata)
    assert whole_model_metadata({}) == plain_lora_metadata({}, rank=4) == {}
