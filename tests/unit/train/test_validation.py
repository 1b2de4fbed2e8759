import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.config.load import with_overrides
from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.adapters import adapter_disabled
from sdxl_ray.sdxl.components import load_vae
from sdxl_ray.sdxl.sampling import file_stem
from sdxl_ray.train import validation
from sdxl_ray.train.setup import validation_prompts
from sdxl_ray.train.validation import draw_share, vae_on
from tests.tiny import PROMPTS, make_training

NAMES = ["00_a_red_house.png", "01_a_cat_on_the_moon.png", "02_trees.png"]


@pytest.fixture(scope="module")
def training(tiny_cache):
    return make_training(*tiny_cache)


@pytest.fixture(scope="module")
def vae(tiny_model):
    return load_vae(tiny_model, dtype=torch.float32)


@pytest.fixture
def draw(training, vae, config):
    def draw_into(folder, *, world_rank=0, world_size=1):
        return draw_share(
            training.state.unet,
            vae,
            training.scheduler_config,
            validation_prompts(config, training.data),
            folder,
            world_rank=world_rank,
            world_size=world_size,
            height_width=(64, 72),
            num_steps=2,
            guidance_scale=4.0,
            seed=3,
            prediction_type="epsilon",
        )

    return draw_into


def pixels(paths):
    return {path.name: np.asarray(Image.open(path)) for path in paths}


def assert_same_images(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def test_images_are_named_by_number_and_prompt(draw, tmp_path):
    written = draw(tmp_path / "samples")
    assert [path.name for path in written] == NAMES
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == NAMES
    images = pixels(written)
    assert {image.shape for image in images.values()} == {(64, 72, 3)}
    assert len({image.tobytes() for image in images.values()}) == 3


def test_shares_are_disjoint_complete_and_what_one_rank_would_draw(draw, tmp_path):
    alone = pixels(draw(tmp_path / "alone"))
    shares = [pixels(draw(tmp_path / "shared", world_rank=rank, world_size=2)) for rank in range(2)]
    assert [list(share) for share in shares] == [NAMES[::2], NAMES[1::2]]
    assert_same_images(shares[0] | shares[1], alone)
    assert draw(tmp_path / "none", world_rank=3, world_size=4) == []


def test_a_fresh_adapter_is_the_base_model_and_a_trained_one_is_not(draw, training, tmp_path):
    fresh = pixels(draw(tmp_path / "fresh"))
    masters = training.state.masters
    saved = masters.state_dict()
    try:
        with torch.no_grad():
            for name, master in masters.masters.items():
                if "lora_B" in name:
                    master.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        masters.publish()
        trained = pixels(draw(tmp_path / "trained"))
        with adapter_disabled(training.state.unet):
            base = pixels(draw(tmp_path / "base"))
    finally:
        masters.load_state_dict(saved)
    assert_same_images(base, fresh)
    assert all(not np.array_equal(trained[name], fresh[name]) for name in NAMES)
    assert training.state.unet.training


def test_prompts_come_from_the_cache_and_an_empty_negative_prompt_is_zeros(training, config):
    prompts = validation_prompts(config, training.data)
    assert prompts.texts == PROMPTS
    assert prompts.prompt_embeds.shape == (3, 77, 64) and prompts.pooled_prompt_embeds.shape == (3, 32)
    assert prompts.prompt_embeds.abs().sum() > 0
    assert not prompts.negative_prompt_embeds.any() and not prompts.negative_pooled_prompt_embeds.any()
    assert prompts.negative_prompt_embeds.shape == (1, 77, 64)


def test_a_negative_prompt_is_its_own_embedding(training, config):
    prompts = validation_prompts(with_overrides(config, {"validation.negative_prompt": "trees"}), training.data)
    assert torch.equal(prompts.negative_prompt_embeds[0], prompts.prompt_embeds[2])


def test_a_prompt_that_the_cache_lacks_is_an_error(training, config):
    text = 'the cache has no embedding of the validation prompt "a boat". Run `sdxl-ray cache` with this config.'
    with pytest.raises(CacheError) as error:
        validation_prompts(with_overrides(config, {"validation.prompts": ["a boat"]}), training.data)
    assert str(error.value) == text


def test_a_prompt_without_a_shard_is_encoded_now(training, config):
    """To the bit what the cache has."""
    data = dataclasses.replace(training.data, prompts=dict.fromkeys((*PROMPTS, ""), ("", "")))
    found, expected = (validation_prompts(config, each) for each in (data, training.data))
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.pooled_prompt_embeds, expected.pooled_prompt_embeds)


def test_without_prompts_there_is_nothing_to_draw(training, config):
    assert validation_prompts(with_overrides(config, {"validation.prompts": []}), training.data) is None


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A cat, on the moon!", "a_cat_on_the_moon"),
        ("../../etc/passwd", "etc_passwd"),
        ("x" * 100, "x" * 40),
        ("", "empty"),
        ("?!", "empty"),
    ],
)
def test_file_stems_fit_every_system(prompt, stem):
    assert file_stem(prompt) == stem


def test_the_vae_is_on_the_device_only_while_drawing(draw, vae, monkeypatch, tmp_path):
    moves = []
    monkeypatch.setattr(vae, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(validation, "draw_images", lambda *_, **__: moves.append("draw") or [Image.new("RGB", (8, 8))])
    draw(tmp_path / "samples")
    assert moves == ["cpu", "draw", "draw", "draw", "cpu"]  # the first is the U-Net's device

    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(validation, "draw_images", fail)
    moves.clear()
    with pytest.raises(torch.OutOfMemoryError):
        draw(tmp_path / "samples")
    assert moves == ["cpu", "cpu"]


def test_vae_on():
    moves = []
    with vae_on(SimpleNamespace(to=moves.append), "cuda:1"):
        assert moves == ["cuda:1"]
    assert moves == ["cuda:1", "cpu"]
