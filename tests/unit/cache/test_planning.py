"""What the cache lacks, and in which shards it will be."""

import csv
import dataclasses
import hashlib
import io
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_ray.cache import collection, foreseen
from sdxl_ray.cache import missing as missing_module
from sdxl_ray.cache.foreseen import index_tables
from sdxl_ray.cache.index import Index, write_index
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.missing import ENTRIES_PER_SHARD
from sdxl_ray.cache.planning import drop_undecodable, find_missing, plan_cache
from sdxl_ray.cache.scan import ScannedFile, scan_file
from sdxl_ray.cache.shards import mark_damaged, shard_name, text_key, write_shard
from sdxl_ray.cache.skipped import Skipped, write_skipped
from sdxl_ray.storage import open_folder
from tests.unit.cache.planned import (
    add_image,
    add_images,
    by_name,
    changed,
    config_of,
    fill,
    missing,
    name_of,
    plan_of,
    samples_of,
)


def latent_keys(plan):
    return {key for sample in samples_of(plan) for key in sample.latent_keys}


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_of_an_empty_cache_everything_is_missing(config):
    plan = plan_of(config)
    assert missing(plan) == (20, 20 + 2)  # the captions, a validation prompt and the empty one
    assert {key for shard in plan.latent_shards() for key in shard.keys} == latent_keys(plan)
    captions = {caption for sample in samples_of(plan) for caption in sample.captions}
    assert {caption for shard in plan.text_shards() for caption in shard.captions} == {*captions, "draw a cat", ""}
    assert sum(plan.buckets.values()) == plan.num_images == plan.num_samples == 20
    assert plan.missing_by_bucket() == plan.buckets


def test_every_key_of_a_shard_is_that_of_its_caption(config, monkeypatch):
    """Prompts are needed first, captions after them; an embedding under another's key would never be noticed."""
    for length in (64, 3):
        monkeypatch.setattr(missing_module, "ENTRIES_PER_SHARD", length)
        shards = list(plan_of(config).text_shards())
        pairs = [pair for shard in shards for pair in zip(shard.keys, shard.captions, strict=True)]
        fingerprint = plan_of(config).text_fingerprint
        assert pairs == [(text_key(caption, fingerprint), caption) for _, caption in pairs]
        assert [caption for _, caption in pairs][:3] == ["", "draw a cat", "caption of 00.png"]
        assert all(shard.name == shard_name("text", shard.keys) for shard in shards)


def test_every_key_of_a_shard_is_that_of_its_image(config):
    plan = plan_of(config, dataset__flip=True, dataset__crop="random", dataset__crop_variants=3)
    of_key = {
        key: sample.image_record(variant)
        for sample in samples_of(plan)
        for variant, key in enumerate(sample.latent_keys)
    }
    pairs = [pair for shard in plan.latent_shards() for pair in zip(shard.keys, shard.records, strict=True)]
    assert dict(pairs) == of_key
    assert len(pairs) == len(of_key) == plan.num_missing_latents > 40


def test_each_shard_is_one_bucket_and_holds_what_its_records_say(config):
    for shard in plan_of(config).latent_shards():
        ((height, width),) = {record.bucket_hw for record in shard.records}
        assert shard.name == shard_name("latents", shard.keys, f"{height}x{width}")
        assert len(shard.keys) == len(shard.records)


def test_images_with_and_without_masks_are_not_in_one_shard(config, images):
    """One has a tensor more than the other."""
    for number in range(0, 20, 2):
        shutil.copy(images / f"{number:02d}.png", images / f"{number:02d}-mask.png")
    shards = list(plan_of(config, dataset__mask="file").latent_shards())
    assert {frozenset(bool(record.mask) for record in shard.records) for shard in shards} == {
        frozenset({True}),
        frozenset({False}),
    }
    assert sum(len(shard.keys) for shard in shards) == 20


def test_a_full_cache_misses_nothing(config):
    fill(plan_of(config))
    plan = plan_of(config)
    assert missing(plan) == (0, 0)
    assert list(plan.latent_shards()) == list(plan.text_shards()) == []
    assert plan.missing_by_bucket() == Counter()


def test_the_same_plan_twice(config):
    first, second = plan_of(config), plan_of(config)
    assert samples_of(first) == samples_of(second)
    for name in ("latent_shards", "text_shards"):
        assert list(getattr(first, name)()) == list(getattr(second, name)())
    for name in ("prompts", "index_path", "vae_fingerprint", "text_fingerprint", "buckets"):
        assert getattr(first, name) == getattr(second, name)


def test_a_deleted_shard_alone_is_missing(config):
    plan = plan_of(config)
    shards = list(plan.latent_shards())
    fill(plan)
    (Path(config.cache.path) / shards[1].name).unlink()
    again = plan_of(config)
    assert list(again.latent_shards()) == [shards[1]]
    assert again.missing_text == []
    assert again.missing_by_bucket() == {shards[1].name.split("/")[1]: len(shards[1].keys)}


def test_a_damaged_entry_alone_is_missing_until_it_is_written_again(config):
    plan = plan_of(config)
    shard = list(plan.latent_shards())[1]
    text = next(iter(plan.text_shards()))
    fill(plan)
    mark_damaged(config.cache.path, shard.name, shard.keys[1])
    mark_damaged(config.cache.path, text.name, text.keys[0])
    again = plan_of(config)
    assert missing(again) == (1, 1)
    (found,) = again.latent_shards()
    assert (found.keys, found.records) == (shard.keys[1:2], shard.records[1:2])
    assert next(iter(again.text_shards())).captions == text.captions[:1]
    sample = next(each for each in samples_of(again) if shard.keys[1] in each.latent_keys)
    assert sample.latent_shards == (found.name,)
    fill(again)
    assert missing(plan_of(config)) == (0, 0)


def test_a_shard_that_is_written_again_is_not_damaged_any_more(config):
    plan = plan_of(config)
    shard = next(iter(plan.latent_shards()))
    fill(plan)
    for key in shard.keys:
        mark_damaged(config.cache.path, shard.name, key)
    again = plan_of(config)
    assert list(again.latent_shards()) == [shard]
    fill(again)
    assert missing(plan_of(config)) == (0, 0)
    assert not list(Path(config.cache.path).rglob("*.damaged"))


def test_missing_entries_are_cut_into_shards(config, monkeypatch):
    monkeypatch.setattr(missing_module, "shard_length", lambda bucket: 3)
    monkeypatch.setattr(missing_module, "ENTRIES_PER_SHARD", 10)
    plan = plan_of(config)
    assert missing(plan) == (20, 22)
    assert max(len(shard.keys) for shard in plan.latent_shards()) == 3
    assert [len(shard.keys) for shard in plan.text_shards()] == [10, 10, 2]
    assert ENTRIES_PER_SHARD == 64


# ---- what a change costs ---------------------------------------------------------------------------------------------


def test_another_image_only_adds(config, images):
    before = plan_of(config)
    fill(before)
    add_image(images, "05b.png", colour=999)
    after = plan_of(config)
    assert missing(after) == (1, 1)
    assert {each.sample_id for each in samples_of(before)} < {each.sample_id for each in samples_of(after)}


def test_another_caption_touches_no_latent(config, images):
    fill(plan_of(config))
    (images / "03.txt").write_text("something else")
    assert missing(plan_of(config)) == (0, 1)


def test_another_trigger_word_touches_all_captions_and_no_latent(config):
    fill(plan_of(config))
    assert missing(plan_of(config, dataset__trigger_word="ohwx")) == (0, 20)


def test_longer_captions_are_encoded_anew_with_the_prompts(config):
    fill(plan_of(config))
    longer = plan_of(config, cache__caption_chunks=3)
    assert missing(longer) == (0, 22)
    assert longer.max_tokens == 227
    fill(longer)
    assert missing(plan_of(config, cache__caption_chunks=3)) == missing(plan_of(config)) == (0, 0)


@pytest.mark.parametrize("change", [{"dataset__resolution": 128}, {"cache__vae_dtype": "fp32"}])
def test_another_resolution_or_vae_touches_no_caption_and_keeps_the_old_latents(config, change):
    fill(plan_of(config))
    other = plan_of(config, **change)
    assert missing(other) == (20, 0)
    fill(other)
    assert missing(plan_of(config, **change)) == missing(plan_of(config)) == (0, 0)


def test_one_resolution_more_adds_its_latents_only(config):
    fill(plan_of(config))
    both = plan_of(config, dataset__resolution=[64, 128])
    assert (both.num_samples, missing(both)) == (40, (20, 0))


def test_flipped_images_add_their_latents_only(config):
    fill(plan_of(config))
    flipped = plan_of(config, dataset__flip=True)
    assert (flipped.num_samples, missing(flipped)) == (40, (20, 0))
    assert Counter(sample.flip for sample in samples_of(flipped)) == {True: 20, False: 20}


def test_another_crop_touches_only_what_is_cropped_elsewhere(config):
    before = plan_of(config)
    fill(before)
    moved = plan_of(config, dataset__crop="random")
    elsewhere = {name_of(new) for new in samples_of(moved)} - {
        name_of(new)
        for new, old in zip(samples_of(moved), samples_of(before), strict=True)
        if (new.path, new.crops) == (old.path, old.crops)
    }
    assert missing(moved) == (len(elsewhere), 0)
    assert 0 < len(elsewhere) < 20


def test_more_crop_variants_add_theirs_only(config):
    two = plan_of(config, dataset__crop="random", dataset__crop_variants=2)
    fill(two)
    four = plan_of(config, dataset__crop="random", dataset__crop_variants=4)
    assert missing(four) == (len(latent_keys(four) - latent_keys(two)), 0)
    assert latent_keys(two) < latent_keys(four)
    sample = next(each for each in samples_of(four) if len(each.crops) == 4)
    assert len(sample.latent_keys) == len(sample.latent_shards) == 4
    assert {tuple(sample.micro_conditioning(variant).crop_top_left) for variant in range(4)} == set(sample.crops)


def test_a_mask_touches_the_images_that_have_one(config, images):
    fill(plan_of(config))
    shutil.copy(images / "03.png", images / "03-mask.png")
    # Without `mask` it is an image like any other, and lacks a caption.
    (images / "03-mask.txt").write_text("caption of 03.png")
    fill(plan_of(config))
    masked = plan_of(config, dataset__mask="file")
    assert missing(masked) == (1, 0)
    assert by_name(masked)["03.png"].mask == str(images / "03-mask.png")


def test_another_model_touches_what_it_changes(config, tiny_model, tmp_path):
    """One byte of the VAE's weights: all latents, no caption. A moved model: nothing."""
    fill(plan_of(config))
    other = tmp_path / "other-model"
    shutil.copytree(tiny_model, other)
    assert missing(plan_of(config, model__path=str(other))) == (0, 0)
    (weights,) = (other / "vae").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert missing(plan_of(config, model__path=str(other))) == (20, 0)


OF_TRAINING = [
    {"dataset__repeats": 5},
    {"dataset__max_unreadable": 0.5},
    {"dataset__weight": 0.5},
    {"dataset__end": "3 epochs"},
]


def test_settings_that_change_no_tensor_cost_nothing_and_share_an_index(config):
    fill(plan_of(config))
    for changes in OF_TRAINING:
        other = plan_of(config, **changes)
        assert missing(other) == (0, 0)
        assert other.index_path == plan_of(config).index_path
    regularization = {"dataset__role": "regularization"}
    with_prior = plan_of(config, **regularization, dataset__prior_prediction=True)
    assert with_prior.index_path == plan_of(config, **regularization).index_path


@pytest.mark.parametrize("role", ["eval", "regularization"])
def test_another_role_has_an_index_of_its_own(tmp_path, images, tiny_model, role):
    """What is only evaluated has no mirror images and one crop, so its index says something else."""
    others = add_images(tmp_path / "others", 3, colour=700)
    config = config_of(tmp_path, tiny_model, images, others, flip=True)
    fill(plan_of(config))
    other = plan_of(config, dataset__others__role=role)
    assert missing(other) == (0, 0)
    assert other.index_path != plan_of(config).index_path


def test_each_collection_has_an_index_of_its_own(config, images, tmp_path):
    changes = [
        {},
        {"cache__vae_dtype": "fp32"},
        {"dataset__trigger_word": "ohwx"},
        {"dataset__flip": True},
        {"dataset__resolution": 128},
        {"cache__caption_chunks": 2},
        {"cache__text": "online"},
        {"cache__mode": "off"},
    ]
    plans = [plan_of(config, **change) for change in changes]
    two = plan_of(config_of(tmp_path, config.model.path, images, add_images(tmp_path / "more", 3, colour=500)))
    paths = [plan.index_path for plan in (*plans, two)]
    assert len(set(paths)) == len(paths)
    names = [Path(path).parent.name for path in paths]
    assert all(name.startswith("images-") for name in names)
    assert names[-1].startswith("images-and-1-")
    assert plan_of(config, cache__mode="ondemand").index_path == paths[0]


# ---- where it is encoded ---------------------------------------------------------------------------------------------


def test_text_that_is_encoded_while_training_leaves_the_prompts(config):
    plan = plan_of(config, cache__text="online", dataset__shuffle_tags=True)
    assert missing(plan) == (20, 2)
    assert next(iter(plan.text_shards())).captions == ("", "draw a cat")
    assert all(sample.text_keys == sample.text_shards == () for sample in samples_of(plan))
    assert samples_of(plan)[0].captions == ("caption of 00.png",)
    fill(plan)
    assert missing(plan_of(config, cache__text="online", dataset__shuffle_tags=True)) == (0, 0)


def test_images_that_are_encoded_while_training_have_no_shards(config):
    plan = plan_of(config, cache__mode="off")
    assert missing(plan) == (0, 22)
    assert list(plan.latent_shards()) == []
    assert plan.missing_by_bucket() == Counter()
    for sample in samples_of(plan):
        assert sample.latent_shards == ("",)
        assert len(sample.latent_keys[0]) == 32
        assert sample.text_shards[0].startswith("text/")
    assert [dataclasses.replace(each, latent_shards=()) for each in samples_of(plan)] == [
        dataclasses.replace(each, latent_shards=()) for each in samples_of(plan_of(config))
    ]


def test_nothing_at_all_in_the_cache(config):
    plan = plan_of(config, cache__mode="off", cache__text="online")
    assert missing(plan) == (0, 2)
    assert {(each.latent_shards, each.text_shards) for each in samples_of(plan)} == {(("",), ())}


# ---- on demand: in the order in which training needs them ------------------------------------------------------------


def test_on_demand_what_is_needed_first_is_encoded_first(config, monkeypatch):
    monkeypatch.setattr(missing_module, "shard_length", lambda bucket: 8)
    plan = plan_of(config)
    usual = [len(shard.keys) for shard in plan.latent_shards()]
    ranks = np.random.default_rng(0).permutation(20)
    find_missing(plan, in_order=ranks)
    samples = samples_of(plan)
    rank_of = {sample.latent_keys[0]: rank for sample, rank in zip(samples, ranks.tolist(), strict=True)}
    shards = [[rank_of[key] for key in shard.keys] for shard in plan.latent_shards()]
    assert max(map(len, shards)) == 2 < max(usual)
    assert all(shard == sorted(shard) for shard in shards)
    assert [shard[0] for shard in shards] == sorted(shard[0] for shard in shards)
    assert sorted(rank for shard in shards for rank in shard) == list(range(20))
    captions = [caption for shard in plan.text_shards() for caption in shard.captions]
    in_order = [
        sample.captions[0] for _, sample in sorted(zip(ranks.tolist(), samples, strict=True), key=lambda it: it[0])
    ]
    assert captions == ["", "draw a cat", *in_order]
    assert all(
        text_key(text, plan.text_fingerprint) == key
        for shard in plan.text_shards()
        for key, text in zip(shard.keys, shard.captions, strict=True)
    )


def test_on_demand_a_copy_is_encoded_when_the_first_of_them_is_needed(config, images):
    shutil.copy(images / "00.png", images / "99.png")
    (images / "99.txt").write_text("the last one")
    plan = plan_of(config)
    ranks = np.arange(21)[::-1].copy()  # the copy first
    find_missing(plan, in_order=ranks)
    first = next(iter(plan.latent_shards()))
    assert by_name(plan)["99.png"].latent_keys[0] == by_name(plan)["00.png"].latent_keys[0] == first.keys[0]


def test_long_captions_are_counted_from_the_headers(config):
    plan = plan_of(config)
    for shard in plan.text_shards():
        counts = [78 if "0" in caption else 77 for caption in shard.captions]
        write_shard(
            plan.store.folder,
            shard.name,
            shard.keys,
            {"prompt_embeds": torch.zeros(len(counts), 1)},
            {"num_tokens": str(counts)},
        )
    plan.store.refresh()
    assert plan.num_long_captions() == sum("0" in f"{number:02d}" for number in range(20))
    plan.num_chunks = 2
    assert plan.num_long_captions() == 0


def test_a_file_that_could_not_be_read_is_tried_again_and_then_remembered(config, images, monkeypatch):
    opened = []

    def scan(file, max_pixels, **changes):
        opened.append(name_of(file))
        scanned = scan_file(file, max_pixels, **changes)
        is_offline = offline and "00.png" in file.path
        return ScannedFile("", 0, 0, "cannot be read: Input/output error", "unreadable") if is_offline else scanned

    monkeypatch.setattr("sdxl_ray.cache.scan.scan_file", scan)
    offline = True
    assert plan_of(config).num_samples == 19
    offline = False
    opened.clear()
    assert plan_of(config).num_samples == 20
    assert opened == ["00.png"]
    plan_of(config)
    assert opened == ["00.png"]


# ---- images that turn out damaged when they are decoded --------------------------------------------------------------


def test_images_that_cannot_be_decoded_are_dropped_with_their_copies_and_remembered(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    shutil.copy(images / "00.txt", images / "copy.txt")
    plan = plan_of(config)
    bad = by_name(plan)["00.png"]
    reason = "cannot be decoded: truncated"
    drop_undecodable(plan, {bad.latent_keys[0]: Skipped(bad.path, reason)})
    find_missing(plan)
    assert [(name_of(item), item.dataset, item.reason) for item in plan.skipped] == [
        ("00.png", "images", reason),
        ("copy.png", "images", reason),
    ]
    assert missing(plan) == (19, 21)
    Memo(open_folder(config.cache.path)).mark({bad.image_hash: reason})
    again = plan_of(config)
    assert samples_of(again) == samples_of(plan)
    assert {item.reason for item in again.skipped} == {reason}


def test_one_bad_crop_takes_the_whole_image_out(config):
    plan = plan_of(config, dataset__crop="random", dataset__crop_variants=3)
    bad = next(sample for sample in samples_of(plan) if len(sample.crops) == 3)
    find_missing(plan, in_order=np.arange(plan.num_missing_latents))
    drop_undecodable(plan, {bad.latent_keys[1]: Skipped(bad.path, "changed while it was being cached")})
    assert plan.num_samples == 19
    find_missing(plan)  # in the order of those that are left
    assert len(plan.order) == plan.num_missing_latents
    assert not set(bad.latent_keys) & {key for shard in plan.latent_shards() for key in shard.keys}


# ---- names -----------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "line\nbreak.png",
    "return\rhere.png",
    "😺 猫 naïve.png",
    "x" * 251 + ".png",
    'quote",comma.png',
    "-mask.png.png",
    "=cmd().png",
    "tar:512+9:a.png",
    "row:1:image:b.png",
    "s3:__bucket?region=x.png",
    " space .png",
    "%41.png",
]


def test_odd_names_survive_from_the_listing_to_the_index_and_the_list_of_skipped(tmp_path, tiny_model):
    folder = tmp_path / "imag\nes 猫"
    for number, name in enumerate(ODD_NAMES):
        add_image(folder / "good", name, colour=number, caption=f"caption {number}")
        (folder / "bad" / name).parent.mkdir(exist_ok=True)
        (folder / "bad" / name).write_bytes(b"no image")
    config = config_of(tmp_path, tiny_model, folder, max_unreadable=0.5)
    plan = plan_of(config)
    write_index(plan.index_path, index_tables(plan))
    index = Index.read(plan.index_path)
    samples = [index[row] for row in range(len(index))]
    assert {sample.path: sample.captions for sample in samples} == {
        str(folder / "good" / name): (f"caption {number}",) for number, name in enumerate(ODD_NAMES)
    }
    for sample in samples:
        assert hashlib.sha256(Path(sample.path).read_bytes()).hexdigest() == sample.image_hash
    write_skipped(plan)
    rows = list(csv.reader(io.StringIO(plan.folder.read("skipped.csv").decode("utf-8"), newline="")))
    assert rows[0] == ["dataset", "path", "reason"]
    assert {path for _, path, _ in rows[1:]} == {str(folder / "bad" / name) for name in ODD_NAMES}
    assert {reason for _, _, reason in rows[1:]} == {"not an image that Pillow can read"}
    assert missing(plan_of(config)) == missing(plan)  # and from the memo


def test_a_name_that_is_not_utf_8_is_reported_and_does_no_harm(config, images):
    Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")).write_bytes((images / "00.png").read_bytes())
    plan = plan_of(config)
    assert plan.num_samples == 20
    (item,) = plan.skipped
    reason = "cannot be read: its name is not UTF-8; rename it"
    assert (item.path, item.reason) == (str(images / r"caf\xe9.png"), reason)
    write_skipped(plan)
    write_index(plan.index_path, index_tables(plan))


# ---- who belongs to whom ---------------------------------------------------------------------------------------------


def test_every_pair_in_the_index_is_the_right_one(tmp_path, tiny_model, monkeypatch):
    """Image and caption, latent and image, embedding and caption; with pieces, copies, and bad ones among them."""
    monkeypatch.setattr(collection, "PIECE", 11)
    monkeypatch.setattr(foreseen, "PIECE", 13)
    monkeypatch.setattr(missing_module, "ENTRIES_PER_SHARD", 7)
    draw = random.Random(5)
    folders = [tmp_path / "b", tmp_path / "a"]
    expected = []
    for number in range(90):
        folder = draw.choice(folders)
        path = add_image(
            folder,
            f"{draw.randrange(10**6)}.png",
            size=draw.choice([(80, 60), (64, 64)]),
            colour=number * 3,
            caption="x",
        )
        captions = tuple(f"{number} {word}" for word in draw.sample(("one", "two", "three"), draw.choice((1, 2))))
        path.with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
        if number % 3 == 1:
            draw.choice((path, path.with_suffix(".txt"))).write_bytes(b"\xe9")
        else:
            expected.append((folder.name, hashlib.sha256(path.read_bytes()).hexdigest(), captions))
    plan = plan_of(config_of(tmp_path, tiny_model, *folders, flip=True, max_unreadable=0.9))
    write_index(plan.index_path, index_tables(plan))
    index = Index.read(plan.index_path)
    samples = [index[row] for row in range(len(index))]
    assert sorted((each.dataset, each.image_hash, each.captions) for each in samples if each.flip) == sorted(expected)
    assert sorted((each.dataset, each.image_hash, each.captions) for each in samples if not each.flip) == sorted(
        expected
    )
    latents = {
        key: (shard.name, record)
        for shard in plan.latent_shards()
        for key, record in zip(shard.keys, shard.records, strict=True)
    }
    texts = {
        key: (shard.name, caption)
        for shard in plan.text_shards()
        for key, caption in zip(shard.keys, shard.captions, strict=True)
    }
    for sample in samples:
        assert latents[sample.latent_keys[0]] == (
            sample.latent_shards[0],
            dataclasses.replace(sample.image_record(), path=latents[sample.latent_keys[0]][1].path),
        )
        assert [texts[key] for key in sample.text_keys] == list(zip(sample.text_shards, sample.captions, strict=True))


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path, tiny_model):
    """Hard links to eight images: only those are encoded. The second time nothing is opened."""
    source = add_images(tmp_path / "source", 8)
    for number in range(100_000):
        folder = tmp_path / "images" / f"{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(source / f"{number % 8:02d}.png", folder / f"{number}.png")
        os.link(source / f"{number % 8:02d}.txt", folder / f"{number}.txt")
    config = config_of(tmp_path, tiny_model, tmp_path / "images")
    started = time.monotonic()
    plan = plan_of(config)
    first_s = time.monotonic() - started
    assert (plan.num_samples, missing(plan)) == (100_000, (8, 10))
    fill(plan)
    started = time.monotonic()
    plan = plan_of(config)
    write_index(plan.index_path, index_tables(plan))
    assert time.monotonic() - started < first_s < 300
    index = Index.read(plan.index_path)
    assert len(np.unique(index.sample_ids())) == len(index) == 100_000
    assert index[99_999].captions == ("caption of 07.png",)


def test_the_model_may_be_asked_about_without_a_cache(config, tmp_path):
    """As `sdxl-ray check` does: nothing is written but the memo."""
    config = changed(config, cache__path=str(tmp_path / "elsewhere"))
    plan = plan_cache(config.datasets, config.model, config.cache, model_path=config.model.path)
    assert missing(plan) == (20, 21)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["scan.parquet"]


def test_what_stays_of_a_plan_keeps_its_places_in_the_order_of_training(config):
    plan = plan_of(config)
    find_missing(plan, in_order=np.arange(20)[::-1].copy())
    drop_undecodable(plan, {samples_of(plan)[3].latent_keys[0]: Skipped("03.png", "cut")})
    assert plan.order.tolist() == [rank for rank in range(19, -1, -1) if rank != 16]
