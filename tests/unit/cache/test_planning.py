import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdxl_ray.cache.planning import (
    ENTRIES_PER_SHARD,
    Skipped,
    check_readable,
    drop_undecodable,
    find_missing,
    plan_cache,
    shard_length,
    write_skipped,
)
from sdxl_ray.cache.scan import scan_file, scan_images
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.config.load import config_from_dict, with_overrides
from sdxl_ray.errors import DatasetError


def add_image(folder, name, *, size=(80, 60), colour=0, caption=None):
    """An image of its own colour, with a caption file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 256, 7)).save(path)
    path.with_suffix(".txt").write_text(caption or f"caption of {path.name}", encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(20):
        add_image(folder, f"{number:02d}.png", size=[(80, 60), (60, 80), (64, 64)][number % 3], colour=number)
    return folder


@pytest.fixture
def config(tmp_path, images, tiny_model):
    return config_from_dict(
        {
            "model": {"path": tiny_model},
            "dataset": {"path": str(images), "resolution": 64, "bucket_step": 8},
            "cache": {"path": str(tmp_path / "cache")},
        }
    )


def plan_of(config, **changes):
    config = with_overrides(config, {key.replace("__", "."): value for key, value in changes.items()})
    return plan_cache(config.dataset, config.model, config.cache, model_path=config.model.path, prompts=["draw a cat"])


def fill(plan):
    """Stands in for the encoders: writes every missing shard."""
    root = plan.store.cache
    for shard in plan.missing_latents:
        write_shard(root, shard.name, shard.keys, {"mean": torch.zeros(len(shard.keys), 4)}, {})
    for shard in plan.missing_text:
        write_shard(root, shard.name, shard.keys, {"prompt_embeds": torch.zeros(len(shard.keys), 4)}, {})


def missing(plan):
    return plan.num_missing_latents, plan.num_missing_text


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_of_an_empty_cache_everything_is_missing(config):
    plan = plan_of(config)
    assert missing(plan) == (20, 20 + 2)  # the captions, a validation prompt and the empty one
    assert {key for shard in plan.missing_latents for key in shard.keys} == {each.latent_key for each in plan.samples}
    assert {caption for shard in plan.missing_text for caption in shard.captions} == {
        *(caption for sample in plan.samples for caption in sample.captions),
        "draw a cat",
        "",
    }
    assert sum(plan.buckets.values()) == plan.num_images == 20


def test_each_shard_is_one_bucket_and_holds_what_its_records_say(config):
    for shard in plan_of(config).missing_latents:
        buckets = {record.bucket_hw for record in shard.records}
        assert len(buckets) == 1
        height, width = buckets.pop()
        assert shard.name.startswith(f"latents/{height}x{width}/")
        assert len(shard.keys) == len(shard.records)


def test_a_full_cache_misses_nothing(config):
    fill(plan_of(config))
    assert missing(plan_of(config)) == (0, 0)


def test_the_same_plan_twice(config):
    first, second = plan_of(config), plan_of(config)
    for name in ("samples", "records", "missing_latents", "missing_text", "prompts", "folder"):
        assert getattr(first, name) == getattr(second, name)


def test_a_deleted_shard_alone_is_missing(config):
    plan = plan_of(config)
    fill(plan)
    lost = plan.missing_latents[1]
    (plan.store.cache / lost.name).unlink()
    again = plan_of(config)
    assert again.missing_latents == [lost]
    assert again.missing_text == []


@pytest.mark.parametrize(
    ("bucket", "length"), [("1024x1024", 32), ("512x512", 64), ("64x64", 64), ("8192x8192", 1), ("2048x512", 32)]
)
def test_shards_are_sized_by_their_pixels(bucket, length):
    assert shard_length(bucket) == length


def test_missing_entries_are_cut_into_shards(config, monkeypatch):
    monkeypatch.setattr("sdxl_ray.cache.planning.shard_length", lambda bucket: 3)
    monkeypatch.setattr("sdxl_ray.cache.planning.ENTRIES_PER_SHARD", 10)
    plan = plan_of(config)
    assert missing(plan) == (20, 22)
    assert max(len(shard.keys) for shard in plan.missing_latents) == 3
    assert sorted(len(shard.keys) for shard in plan.missing_text) == [2, 10, 10]
    assert ENTRIES_PER_SHARD == 64


# ---- what a change costs ---------------------------------------------------------------------------------------------


def test_another_image_only_adds(config, images):
    before = plan_of(config)
    fill(before)
    add_image(images, "new.png", colour=999)
    after = plan_of(config)
    assert missing(after) == (1, 1)
    assert {sample.sample_id for sample in before.samples} < {sample.sample_id for sample in after.samples}


def test_another_caption_touches_no_latent(config, images):
    fill(plan_of(config))
    (images / "03.txt").write_text("something else")
    assert missing(plan_of(config)) == (0, 1)


def test_another_trigger_word_touches_all_captions_and_no_latent(config):
    fill(plan_of(config))
    assert missing(plan_of(config, dataset__trigger_word="ohwx")) == (0, 20)


@pytest.mark.parametrize("change", [{"dataset__resolution": 128}, {"cache__vae_dtype": "fp32"}])
def test_another_resolution_or_vae_touches_no_caption_and_keeps_the_old_latents(config, change):
    fill(plan_of(config))
    changed = plan_of(config, **change)
    assert missing(changed) == (20, 0)
    fill(changed)
    assert missing(plan_of(config, **change)) == missing(plan_of(config)) == (0, 0)


def test_another_crop_touches_only_what_is_cropped_elsewhere(config):
    before = plan_of(config)
    fill(before)
    moved = plan_of(config, dataset__crop="random")
    changed = {sample.path for sample in moved.samples} - {
        new.path for new in moved.samples for old in before.samples
        if (new.path, new.crop_top_left) == (old.path, old.crop_top_left)
    }  # fmt: skip
    assert missing(moved) == (len(changed), 0)


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


def test_settings_that_change_no_tensor_cost_nothing(config):
    fill(plan_of(config))
    assert missing(plan_of(config, dataset__repeats=5, dataset__max_unreadable=0.5)) == (0, 0)


def test_each_dataset_has_an_index_of_its_own(config):
    folders = {
        plan_of(config).folder,
        plan_of(config, dataset__repeats=2).folder,
        plan_of(config, cache__vae_dtype="fp32").folder,
    }
    assert len(folders) == 3
    assert all(folder.name.startswith("images-") for folder in folders)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_copies_of_an_image_are_encoded_once_and_stay_samples_of_their_own(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    shutil.copy(images / "00.txt", images / "copy.txt")
    plan = plan_of(config)
    assert missing(plan) == (20, 22)
    assert len(plan.samples) == 21
    assert len({sample.sample_id for sample in plan.samples}) == 21


def test_one_image_with_two_captions_is_encoded_once(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    (images / "copy.txt").write_text("another view")
    plan = plan_of(config)
    assert missing(plan) == (20, 23)
    assert len({sample.sample_id for sample in plan.samples}) == 21


def test_samples_do_not_depend_on_where_the_folder_lies(config, images, tmp_path):
    def without_place(plan):
        return [dataclasses.replace(sample, path=Path(sample.path).name) for sample in plan.samples]

    before = plan_of(config)
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(images, moved)
    after = plan_of(config, dataset__path=str(moved))
    assert without_place(after) == without_place(before)
    assert [sample.sample_id for sample in before.samples] == sorted(sample.sample_id for sample in before.samples)


def test_samples_say_what_happened_to_the_image(config, images):
    plan = plan_of(config)
    sample = next(each for each in plan.samples if each.path.endswith("00.png"))
    record = plan.records[sample.latent_key]
    assert sample.original_hw == (60, 80)
    assert sample.captions == ("caption of 00.png",)
    assert sample.micro_conditioning == record.micro_conditioning
    assert sample.repeats == 1


def test_long_captions_are_counted_from_the_headers(config):
    plan = plan_of(config)
    keys = sorted({key for sample in plan.samples for key in sample.text_keys})
    plan.store.num_tokens = dict.fromkeys(keys[:3], 78) | dict.fromkeys(keys[3:], 77)
    assert plan.num_long_captions() == 3


# ---- unreadable images -----------------------------------------------------------------------------------------------


def spoil(images, num):
    for number in range(num):
        (images / f"{number:02d}.png").write_bytes(b"no image")


def test_a_few_unreadable_images_are_skipped_with_their_reason(config, images):
    spoil(images, 3)
    plan = plan_of(config)
    assert len(plan.samples) == 17
    reason = "not an image that Pillow can read"
    assert plan.skipped == [Skipped(str(images / f"{number:02d}.png"), reason) for number in range(3)]
    write_skipped(plan)
    with plan.skipped_path.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *([item.path, item.reason] for item in plan.skipped)]
    assert list(plan.folder.iterdir()) == [plan.skipped_path]


def test_unreadable_captions_count_like_unreadable_images(config, images):
    (images / "05.txt").write_bytes(b"\xe9")
    plan = plan_of(config)
    assert [Path(item.path).name for item in plan.skipped] == ["05.png"]
    assert "is not UTF-8" in plan.skipped[0].reason


def test_too_many_unreadable_images_stop_the_run_and_are_listed(config, images):
    spoil(images, 5)
    with pytest.raises(DatasetError) as error:
        plan_of(config)
    lines = str(error.value).splitlines()
    assert lines[0] == "5 of 20 images cannot be used, more than dataset.max_unreadable = 0.2 allows:"
    assert lines[1:6] == [f"  {images / f'{number:02d}.png'}: not an image that Pillow can read" for number in range(5)]
    assert lines[6].startswith("The whole list: ")
    assert lines[7] == "Repair or remove them, or raise dataset.max_unreadable."
    written = Path(lines[6].removeprefix("The whole list: ")).read_text(encoding="utf-8").splitlines()
    assert len(written) == 6


def test_as_many_as_allowed_are_allowed(config, images):
    spoil(images, 4)
    assert len(plan_of(config).samples) == 16
    plan = plan_of(config)
    plan.num_images, plan.skipped = 100, [Skipped("x", "y")] * 29
    check_readable(plan, 0.29)  # 0.29 * 100 is 28.999999999999996
    with pytest.raises(DatasetError, match=r"29 of 100 images .* more than dataset\.max_unreadable = 0\.28 allows"):
        check_readable(plan, 0.28)


def test_no_readable_image_at_all_is_an_error_whatever_is_allowed(config, images):
    spoil(images, 20)
    with pytest.raises(DatasetError, match=r"^20 of 20 images cannot be used, which leaves none:"):
        plan_of(config, dataset__max_unreadable=1.0)


def test_a_bad_image_needs_no_caption(config, images):
    spoil(images, 1)
    (images / "00.txt").unlink()
    assert len(plan_of(config).samples) == 19


# ---- the memo --------------------------------------------------------------------------------------------------------


def opened_by(config, **changes):
    """The names of the files that a plan opens."""
    opened = []

    def scan(files, *, memo, max_pixels):
        opened.extend(Path(file[0]).name for file in files if file not in memo)
        return scan_images(files, memo=memo, max_pixels=max_pixels)

    config = with_overrides(config, {key.replace("__", "."): value for key, value in changes.items()})
    plan = plan_cache(config.dataset, config.model, config.cache, model_path=config.model.path, scan=scan)
    return opened, plan


def test_a_second_plan_opens_no_image(config, images):
    spoil(images, 1)
    assert len(opened_by(config)[0]) == 20
    assert opened_by(config)[0] == []


def test_the_limit_on_pixels_is_never_remembered_wrongly(config):
    opened_by(config)
    opened, plan = opened_by(config, dataset__max_pixels=64 * 64, dataset__max_unreadable=0.9)
    assert len(plan.samples) == 6
    assert len(opened) == 14
    assert {item.reason for item in plan.skipped} == {
        f"{size} is more than dataset.max_pixels = 4096" for size in ("80x60", "60x80")
    }
    opened, plan = opened_by(config)
    assert len(plan.samples) == 20


def test_a_file_that_could_not_be_read_is_tried_again_and_then_remembered(config, images, monkeypatch):
    def offline(file, max_pixels):
        scanned = scan_file(file, max_pixels)
        return (
            dataclasses.replace(scanned, problem="cannot be read: Input/output error")
            if "00.png" in file[0]
            else scanned
        )

    with monkeypatch.context() as patch:
        patch.setattr("sdxl_ray.cache.scan.scan_file", offline)
        assert len(plan_of(config).samples) == 19
    assert opened_by(config)[0] == ["00.png"]
    assert opened_by(config)[0] == []


def test_images_that_cannot_be_decoded_are_dropped_with_their_copies_and_remembered(config, images):
    shutil.copy(images / "00.png", images / "copy.png")
    shutil.copy(images / "00.txt", images / "copy.txt")
    plan = plan_of(config)
    memo = Path(config.cache.path) / "scan.parquet"
    drop_undecodable(plan, [Skipped(str(images / "00.png"), "cannot be decoded: truncated")], memo)
    find_missing(plan)
    assert sorted(Path(item.path).name for item in plan.skipped) == ["00.png", "copy.png"]
    assert missing(plan) == (19, 21)
    again = plan_of(config)
    assert again.samples == plan.samples
    assert {item.reason for item in again.skipped} == {"cannot be decoded: truncated"}


def test_an_image_that_changed_meanwhile_is_not_remembered_as_bad(config, images):
    plan = plan_of(config)
    memo = Path(config.cache.path) / "scan.parquet"
    drop_undecodable(plan, [Skipped(str(images / "00.png"), "changed while it was being cached")], memo)
    assert len(plan.samples) == 19
    assert len(plan_of(config).samples) == 20
