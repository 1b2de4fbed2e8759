"""What the index says before anything is encoded."""

import dataclasses
import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from sdxl_ray.cache import collection, foreseen
from sdxl_ray.cache.foreseen import index_tables, places_of_prompts
from sdxl_ray.cache.planning import find_missing
from sdxl_ray.cache.shards import text_key
from tests.unit.cache.planned import (
    add_images,
    by_name,
    config_of,
    fill,
    missing,
    name_of,
    plan_of,
    samples_of,
)


def test_the_index_names_the_shard_to_come(config):
    plan = plan_of(config)
    shards = list(plan.latent_shards())
    (Path(config.cache.path)).mkdir(exist_ok=True)
    fill(plan)
    (Path(config.cache.path) / shards[0].name).unlink()
    again = plan_of(config, cache__mode="ondemand")
    ranks = np.random.default_rng(1).permutation(20)
    find_missing(again, in_order=ranks)
    to_come = {key: shard.name for shard in again.latent_shards() for key in shard.keys}
    here = {key: shard.name for shard in shards[1:] for key in shard.keys}
    assert to_come.keys() == set(shards[0].keys)
    for sample in samples_of(again):
        (key,) = sample.latent_keys
        assert sample.latent_shards == ((to_come | here)[key],)
    fill(again)
    assert missing(plan_of(config)) == (0, 0)
    again.store.refresh()
    find_missing(again)
    assert missing(again) == (0, 0)
    assert {each.latent_shards for each in samples_of(again)} == {
        each.latent_shards for each in samples_of(plan_of(config))
    }


def test_captions_that_are_missing_too_have_their_shard_in_the_index(config):
    plan = plan_of(config)
    names = {key: shard.name for shard in plan.text_shards() for key in shard.keys}
    assert all(sample.text_shards == tuple(names[key] for key in sample.text_keys) for sample in samples_of(plan))
    fingerprint = plan.text_fingerprint
    key = text_key("draw a cat", fingerprint)
    assert places_of_prompts(plan)["draw a cat"] == {"shard": names[key], "key": key}
    fill(plan)
    full = plan_of(config)
    assert places_of_prompts(full)["draw a cat"] == {"shard": names[key], "key": key}


def test_copies_of_an_image_are_encoded_once_and_stay_samples_of_their_own(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    shutil.copy(images / "00.txt", images / "copy.txt")
    shutil.copy(images / "00.png", images / "zopy.png")
    shutil.copy(images / "00.txt", images / "zopy.txt")
    plan = plan_of(config)
    assert missing(plan) == (20, 22)
    samples = by_name(plan)
    assert len(samples) == plan.num_samples == 22
    first = samples["00.png"].sample_id
    assert [samples[name].sample_id for name in ("copy.png", "zopy.png")] == [f"{first}-2", f"{first}-3"]
    assert len({sample.sample_id for sample in samples.values()}) == 22


def test_repeated_identities_are_numbered_across_pieces(config, images, monkeypatch):
    for number in range(5):
        shutil.copy(images / "00.png", images / f"copy {number}.png")
        shutil.copy(images / "00.txt", images / f"copy {number}.txt")
    before = [sample.sample_id for sample in samples_of(plan_of(config))]
    monkeypatch.setattr(foreseen, "PIECE", 3)
    monkeypatch.setattr(collection, "PIECE", 4)
    plan = plan_of(config)
    assert [sample.sample_id for sample in samples_of(plan)] == before
    assert {identity.partition("-")[2] for identity in before} == {"", "2", "3", "4", "5", "6"}
    assert len(list(index_tables(plan))) == 9


def test_the_same_image_in_two_datasets_is_encoded_once(config, images, tmp_path, tiny_model):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    (other / "03.txt").write_text("seen by somebody else")
    plan = plan_of(config_of(tmp_path, tiny_model, images, other))
    assert missing(plan) == (20, 23)
    samples = samples_of(plan)
    assert Counter(sample.dataset for sample in samples) == {"images": 20, "other": 20}
    assert len({sample.sample_id for sample in samples}) == 40
    assert samples[3].latent_shards == samples[23].latent_shards
    assert samples[3].sample_id != samples[23].sample_id.removesuffix("-2")
    assert plan.num_images == 40


def test_a_dataset_keeps_its_samples_when_another_joins(config, images, tmp_path, tiny_model):
    alone = samples_of(plan_of(config))
    joined = samples_of(plan_of(config_of(tmp_path, tiny_model, images, add_images(tmp_path / "b", 3, colour=500))))
    assert joined[:20] == [dataclasses.replace(each, text_shards=after.text_shards, latent_shards=after.latent_shards)
                           for each, after in zip(alone, joined, strict=False)]  # fmt: skip


def test_one_image_with_two_captions_is_encoded_once(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    (images / "copy.txt").write_text("another view")
    plan = plan_of(config)
    assert missing(plan) == (20, 23)
    assert len({sample.sample_id for sample in samples_of(plan)}) == 21


def test_samples_do_not_depend_on_where_the_folder_lies(config, images, tmp_path):
    def without_place(plan):
        return [dataclasses.replace(sample, path=name_of(sample)) for sample in samples_of(plan)]

    before = plan_of(config)
    moved = tmp_path / "elsewhere" / "deep" / "images"
    shutil.copytree(images, moved)
    assert without_place(plan_of(config, dataset__path=str(moved))) == without_place(before)


def test_samples_say_what_happened_to_the_image(config, images):
    sample = by_name(plan_of(config))["00.png"]
    assert sample.original_hw == (60, 80)
    assert sample.captions == ("caption of 00.png",)
    assert sample.image_hash == hashlib.sha256((images / "00.png").read_bytes()).hexdigest()
    assert sample.dataset == "images"
    assert sample.image_record().micro_conditioning == sample.micro_conditioning()
    assert all(r >= b for r, b in zip(sample.resized_hw, sample.target_hw, strict=True))


def test_each_row_keeps_its_own_shards_across_pieces(config, monkeypatch):
    before = samples_of(plan_of(config))
    assert len({sample.latent_shards for sample in before}) == 3
    monkeypatch.setattr(foreseen, "PIECE", 4)
    assert samples_of(plan_of(config)) == before


def test_which_of_two_copies_is_the_first_does_not_depend_on_the_order_of_the_datasets(images, tmp_path, tiny_model):
    """Else noise and order of a resumed run would be others."""
    other = shutil.copytree(images, tmp_path / "another")

    def ids(*folders):
        return {
            sample.path: sample.sample_id for sample in samples_of(plan_of(config_of(tmp_path, tiny_model, *folders)))
        }

    found = ids(images, other)
    assert found == ids(other, images)
    assert not any("-" in found[str(other / f"{number:02d}.png")] for number in range(20))
