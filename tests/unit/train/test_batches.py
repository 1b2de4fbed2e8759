import dataclasses
import itertools
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.cache.caption_variants import decorate, draw_variant
from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder
from sdxl_ray.cache.images import load_pixels
from sdxl_ray.cache.live import LiveEntries
from sdxl_ray.cache.shard_reader import ShardReader, UnreadableShard
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.cache.store import ShardStore
from sdxl_ray.config.load import with_overrides
from sdxl_ray.diffusion.noise import NoiseRecipe
from sdxl_ray.diffusion.randomness import keyed_generator, keyed_normal
from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.sdxl.vae import sample_latents
from sdxl_ray.storage import open_folder
from sdxl_ray.train.batches import BatchBuilder, Conditions, Draws, _draw_caption, prefetch
from sdxl_ray.train.data import load_data
from sdxl_ray.train.entries import CacheEntries
from sdxl_ray.train.order import DataOrder, MicroBatch
from sdxl_ray.train.plan import Every, Plan, Share
from sdxl_ray.train.setup import build_entries
from tests.tiny import cache_without_ray, tiny_config, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tiny_cache):
    config, index_path = tiny_cache
    return load_data(with_overrides(config, {"eval.holdout": 0.0}), index_path)


@pytest.fixture(scope="module")
def place():
    return {"device": CPU, "batch_size": 1, "revision": "", "variant": ""}


def no_report(text):
    raise AssertionError(text)


def make_entries(data, config=None, *, report=no_report, **settings):
    if config is not None:
        return build_entries(config, data, device=CPU, report=report)
    nothing = SimpleNamespace(latents=no_report)
    return CacheEntries(data.reader, live=SimpleNamespace(), repair=nothing, rules={}, report=report, **settings)


def make_builder(data, *, entries=None, caption_dropout=0.3, seed=7, draws=None, **settings):
    return BatchBuilder(
        data.train,
        entries or make_entries(data),
        seed=seed,
        num_timesteps=1000,
        draws=draws or Draws(caption_dropout=caption_dropout),
        **settings,
    )


def alone(micro_batch, step=1):
    """The micro-batch as the only one of its step."""
    return Share(micro_batch, step=step, first=0, total=len(micro_batch.rows))


def micro_batches(data, epoch, *, micro_batch_size=4, repeats=2):
    buckets, _ = data.train.codes("bucket")
    order = DataOrder(buckets, [repeats] * len(buckets), micro_batch_size=micro_batch_size, seed=7)
    return list(order.epoch(epoch))


def entry_of(data, sample):
    return data.reader.read(sample.latent_shards[0], sample.latent_keys[0])


def texts_of(data, sample):
    return [data.reader.read(*place) for place in zip(sample.text_shards, sample.text_keys, strict=True)]


def assert_same(found, expected):
    """Two batches, to the bit."""
    assert found.sample_ids == expected.sample_ids
    for name in found.__slots__:
        mine, other = getattr(found, name), getattr(expected, name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other), name
        else:
            assert mine == other, name


def one(data, row, *, epoch=0, repeat=0):
    return MicroBatch(number=0, epoch=epoch, rows=(row,), repeats=(repeat,))


def rows_of_epoch(data, epoch, micro_batch_size, builder=None):
    """(sample, repeat) -> all that this sample brings into the step, as plain numbers."""
    builder = builder or make_builder(data)
    found = {}
    for micro_batch in micro_batches(data, epoch, micro_batch_size=micro_batch_size):
        batch = builder.training(alone(micro_batch))
        for place, key in enumerate(zip(micro_batch.rows, micro_batch.repeats, strict=True)):
            assert batch.sample_ids[place] == data.train[key[0]].sample_id
            found[key] = {
                name: getattr(batch, name)[place].float().numpy().tobytes()
                for name in batch.__slots__
                if name != "sample_ids" and getattr(batch, name) is not None
            }
    return found


# ---- keyed randomness ------------------------------------------------------------------------------------------------


def test_what_a_sample_brings_does_not_depend_on_its_micro_batch(data):
    """Nor on the rank that builds it: a builder does not know of ranks. Field notes, trap 9."""
    expected = rows_of_epoch(data, 0, 1)
    assert len(expected) == 2 * len(data.train)
    for micro_batch_size in (2, 4):
        assert rows_of_epoch(data, 0, micro_batch_size) == expected


def test_building_twice_gives_the_same_bytes_whatever_was_built_between(data):
    builder = make_builder(data)
    first = rows_of_epoch(data, 0, 4, builder)
    rows_of_epoch(data, 1, 3, builder)
    assert rows_of_epoch(data, 0, 4, builder) == first


@pytest.mark.parametrize("name", ["noise", "timesteps", "latents"])
def test_repeats_epochs_and_seeds_draw_afresh(data, name):
    """latents too: each draws from the posterior anew (field notes, trap 29)."""
    drawn = [
        getattr(builder.training(alone(one(data, 0, epoch=epoch, repeat=repeat))), name)
        for builder in (make_builder(data), make_builder(data, seed=8))
        for epoch in (0, 1)
        for repeat in (0, 1)
    ]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == len(drawn)


def test_two_samples_of_a_batch_have_different_noise_and_timesteps(data):
    batch = next(
        make_builder(data).training(alone(micro_batch))
        for micro_batch in micro_batches(data, 0)
        if len(micro_batch.rows) == 4
    )
    assert len({row.numpy().tobytes() for row in batch.noise}) == 4
    assert len(set(batch.timesteps.tolist())) > 1


def test_every_caption_of_an_image_is_used(data):
    row = next(row for row, sample in enumerate(data.train) if len(sample.captions) == 2)
    builder = make_builder(data, caption_dropout=0.0)
    first, second = (text["prompt_embeds"] for text in texts_of(data, data.train[row]))
    assert not torch.equal(first, second)
    seen = [builder.training(alone(one(data, row, epoch=epoch))).prompt_embeds[0] for epoch in range(20)]
    num_first = sum(torch.equal(embeds, first) for embeds in seen)
    assert num_first + sum(torch.equal(embeds, second) for embeds in seen) == 20
    assert 3 <= num_first <= 17


def test_a_caption_with_many_variants_is_drawn_no_more_often_than_one_with_few(data):
    """A line of tags with ten shuffled variants, and a sentence with two."""
    sample = dataclasses.replace(data.train[0], captions=("x",) * 13, caption_bases=(-1, *[0] * 10, 1, 1))
    drawn = [_draw_caption(sample, (0, epoch, 0, sample.sample_id)) for epoch in range(600)]
    assert set(drawn) == set(range(1, 13))  # the first is for evaluation
    assert abs(sum(place > 10 for place in drawn) - 300) < 4 * 600**0.5 / 2


def test_evaluation_reads_the_caption_as_it_is(varied, tiny_model, place):
    config, data = varied("disk", "cached", shuffle_tags=True, tag_dropout=0.5, caption_variants=3)
    builder = BatchBuilder(data.train, make_entries(data, config), seed=7, num_timesteps=1000)
    sample = data.train[0]
    assert sample.caption_bases[0] < 0
    expected = TextEncoder(tiny_model, **place).encode([sample.captions[0]])[0]["prompt_embeds"]
    assert torch.equal(builder.evaluation(0, 1).prompt_embeds, expected)


# ---- caption dropout -------------------------------------------------------------------------------------------------


def test_full_caption_dropout_is_zero_embeddings_and_changes_nothing_else(data):
    micro_batch = micro_batches(data, 0)[0]
    dropped = make_builder(data, caption_dropout=1.0).training(alone(micro_batch))
    kept = make_builder(data, caption_dropout=0.0).training(alone(micro_batch))
    assert torch.equal(dropped.prompt_embeds, torch.zeros_like(kept.prompt_embeds))
    assert torch.equal(dropped.pooled_prompt_embeds, torch.zeros_like(kept.pooled_prompt_embeds))
    for name in ("latents", "noise", "timesteps", "add_time_ids", "weights"):
        assert torch.equal(getattr(dropped, name), getattr(kept, name))


def test_no_caption_dropout_is_the_cached_embeddings(data):
    builder = make_builder(data, caption_dropout=0.0)
    for row, sample in enumerate(data.train):
        batch = builder.training(alone(one(data, row)))
        cached = texts_of(data, sample)
        assert any(
            torch.equal(batch.prompt_embeds[0], text["prompt_embeds"])
            and torch.equal(batch.pooled_prompt_embeds[0], text["pooled_prompt_embeds"])
            for text in cached
        )


def test_caption_dropout_drops_its_share(data):
    builder = make_builder(data, caption_dropout=0.3)
    dropped = [
        bool((builder.training(alone(one(data, row, epoch=epoch))).prompt_embeds == 0).all())
        for epoch in range(30)
        for row in range(len(data.train))
    ]
    assert abs(np.mean(dropped) - 0.3) < 5 * (0.3 * 0.7 / len(dropped)) ** 0.5


# ---- cached = online -------------------------------------------------------------------------------------------------


def test_a_cached_batch_is_what_encoding_on_the_spot_gives(data, tiny_model, place):
    """To the bit, in the cache's bf16, before the same draw from the posterior."""
    images, text = LatentEncoder(tiny_model, dtype="fp32", **place), TextEncoder(tiny_model, **place)
    builder = make_builder(data, caption_dropout=0.0)
    for row, sample in enumerate(data.train):
        batch = builder.training(alone(one(data, row, epoch=3)))
        posterior = images.encode([load_pixels(sample.image_record())], [sample.path])
        noise = keyed_normal(posterior["mean"].shape[1:], 7, 3, 0, sample.sample_id, "posterior")
        latents = sample_latents(posterior["mean"].float(), posterior["std"].float(), noise[None])
        assert batch.latents.dtype == torch.float32
        assert torch.equal(batch.latents, latents)
        encoded = [text.encode([caption])[0] for caption in sample.captions]
        assert any(
            torch.equal(batch.prompt_embeds, each["prompt_embeds"])
            and torch.equal(batch.pooled_prompt_embeds, each["pooled_prompt_embeds"])
            for each in encoded
        )


def find_crop(resized, crop):
    """Where the crop fits best in the resized image, (top, left); there it differs by rounding only."""
    height, width = crop.shape[:2]
    errors = {
        (top, left): np.abs(resized[top : top + height, left : left + width] - crop).mean()
        for top in range(resized.shape[0] - height + 1)
        for left in range(resized.shape[1] - width + 1)
    }
    best = min(errors, key=lambda offset: errors[offset])
    assert errors[best] < 1
    return best


def test_time_ids_are_the_real_crop_in_diffusers_order(data, tiny_model):
    from diffusers import StableDiffusionXLPipeline

    unet = load_unet(tiny_model, dtype=torch.float32)
    builder = make_builder(data)
    offsets = set()
    for row, sample in enumerate(data.train):
        (time_ids,) = builder.training(alone(one(data, row))).add_time_ids
        assert time_ids.dtype == torch.float32
        original_hw, crop_top_left, target_hw = (tuple(map(int, pair)) for pair in time_ids.reshape(3, 2))
        expected = StableDiffusionXLPipeline._get_add_time_ids(
            SimpleNamespace(unet=unet), original_hw, crop_top_left, target_hw, torch.float32, 32
        )
        assert torch.equal(time_ids[None], expected)
        assert tuple(time_ids.tolist()) == sample.micro_conditioning().as_time_ids()
        # the pixels at that offset of the resized image are what was encoded
        record = sample.image_record()
        with Image.open(sample.path) as image:
            assert original_hw == (image.height, image.width)
            resized = np.asarray(image.resize(record.resized_hw[::-1], Image.Resampling.LANCZOS)).astype(int)
        assert crop_top_left == find_crop(resized, load_pixels(record))
        offsets.add(crop_top_left)
    assert len(offsets) > 2  # the data set does have crops


def test_time_ids_keep_sizes_that_bf16_would_round(data):
    sample = dataclasses.replace(data.train[0], original_hw=(1365, 1023))
    builder = BatchBuilder([sample], make_entries(data), seed=0, num_timesteps=1000)
    assert builder.training(alone(one(data, 0))).add_time_ids[0, :2].tolist() == [1365.0, 1023.0]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_fixed_noise_levels_of_the_posterior_mean(data):
    batch = make_builder(data).evaluation(2, 4)
    sample = data.train[2]
    assert batch.timesteps.tolist() == [125, 375, 625, 875]
    mean = entry_of(data, sample)["mean"].float()
    text = texts_of(data, sample)[0]
    for place in range(4):
        assert torch.equal(batch.latents[place], mean)
        assert torch.equal(batch.prompt_embeds[place], text["prompt_embeds"])
    assert len({noise.numpy().tobytes() for noise in batch.noise}) == 4


def test_evaluation_does_not_depend_on_the_runs_seed_or_dropout(data):
    """So that trials of a sweep can be compared."""
    first = make_builder(data, seed=1, caption_dropout=1.0).evaluation(0, 4)
    second = make_builder(data, seed=2, caption_dropout=0.0, weights={data.train[0].dataset: 7.0}).evaluation(0, 4)
    assert_same(first, second)
    assert first.weights.tolist() == [1.0] * 4


# ---- datasets: weights, crops, masks ---------------------------------------------------------------------------------


class FakeEntries:
    """Entries that say which crop and caption they are of; some with masks, some damaged."""

    def __init__(self, masks=None, damaged=()):
        self.masks, self.damaged, self.asked = masks or {}, damaged, []

    def latents(self, sample, variant):
        self.asked.append((sample.sample_id, variant))
        if sample.sample_id in self.damaged:
            return None
        height, width = sample.target_hw[0] // 8, sample.target_hw[1] // 8
        entry = {"mean": torch.full((4, height, width), float(variant)), "std": torch.ones(4, height, width)}
        mask = self.masks.get(sample.sample_id)
        return entry if mask is None else {**entry, "mask": mask}

    def text(self, sample, caption, draw):
        return {"prompt_embeds": torch.ones(77, 8), "pooled_prompt_embeds": torch.ones(4)}


def fake_builder(data, entries, samples=None, **settings):
    samples = samples or [dataclasses.replace(data.train[0], sample_id=name, target_hw=(64, 64)) for name in "abcd"]
    return BatchBuilder(samples, entries, seed=0, num_timesteps=1000, **settings)


FOUR = MicroBatch(number=0, epoch=0, rows=(0, 1, 2, 3), repeats=(0, 0, 0, 0))


def test_a_datasets_weight_is_the_weight_of_its_samples_and_changes_nothing_else(data):
    names = ["cats", "dogs", "cats", "birds"]
    samples = [dataclasses.replace(data.train[0], dataset=name, sample_id=str(row)) for row, name in enumerate(names)]
    plain = fake_builder(data, FakeEntries(), samples).training(alone(FOUR))
    weighted = fake_builder(data, FakeEntries(), samples, weights={"cats": 0.5, "dogs": 2.0}).training(alone(FOUR))
    assert plain.weights.tolist() == [1, 1, 1, 1]
    assert weighted.weights.tolist() == [0.5, 2, 0.5, 1]
    assert weighted.weights.dtype == torch.float32
    assert_same(dataclasses.replace(weighted, weights=plain.weights), plain)


@pytest.mark.parametrize(("crop_epochs", "expected"), [(1, [0, 1, 2, 0, 1, 2, 0]), (2, [0, 0, 1, 1, 2, 2, 0])])
def test_crops_take_turns_and_the_time_ids_are_the_crops_own(data, crop_epochs, expected):
    crops = ((0, 0), (0, 8), (0, 3))
    sample = dataclasses.replace(data.train[0], crops=crops)
    entries = FakeEntries()
    builder = fake_builder(data, entries, [sample], crop_epochs={sample.dataset: crop_epochs})
    for epoch, variant in enumerate(expected):
        batch = builder.training(alone(one(data, 0, epoch=epoch, repeat=1)))
        assert entries.asked[-1] == (sample.sample_id, variant)
        assert tuple(batch.add_time_ids[0, 2:4].tolist()) == crops[variant]
    builder.evaluation(0, 2)
    assert entries.asked[-1] == (sample.sample_id, 0)


def test_masks_are_shares_and_samples_without_one_count_fully(data):
    mask = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    batch = fake_builder(data, FakeEntries({"b": mask})).training(alone(FOUR))
    assert batch.masks.shape == (4, 1, 8, 8) and batch.masks.dtype == torch.float32
    assert torch.equal(batch.masks[1, 0], mask.float() / 255)
    assert (batch.masks[[0, 2, 3]] == 1).all()
    plain = fake_builder(data, FakeEntries()).training(alone(FOUR))
    assert plain.masks is None
    assert_same(dataclasses.replace(batch, masks=None), plain)


def test_evaluation_has_the_mask_too(data):
    mask = torch.full((8, 8), 255, dtype=torch.uint8)
    builder = fake_builder(data, FakeEntries({"b": mask}))
    assert torch.equal(builder.evaluation(1, 3).masks, torch.ones(3, 1, 8, 8))
    assert builder.evaluation(0, 3).masks is None


# ---- damaged images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["b", "ad", "abcd"])
def test_a_damaged_image_counts_nothing_and_changes_no_other(data, damaged):
    whole = fake_builder(data, FakeEntries()).training(alone(FOUR))
    batch = fake_builder(data, FakeEntries(damaged=damaged)).training(alone(FOUR))
    assert batch.sample_ids == whole.sample_ids
    for row, name in enumerate("abcd"):
        assert batch.weights[row] == (name not in damaged)
        for field in ("noise", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "add_time_ids"):
            assert torch.equal(getattr(batch, field)[row], getattr(whole, field)[row])
        if name in damaged:
            assert (batch.latents[row] == 0).all()
        else:
            assert torch.equal(batch.latents[row], whole.latents[row])


def test_a_damaged_held_out_image_counts_nothing(data):
    batch = fake_builder(data, FakeEntries(damaged="b")).evaluation(1, 3)
    assert batch.weights.tolist() == [0, 0, 0]
    assert (batch.latents == 0).all() and batch.noise.any()


@pytest.fixture
def damaged_cache(tiny_cache, tmp_path):
    """(data, sample): a copy of the tiny cache in which the sample's latent has a flipped bit."""
    config, index_path = tiny_cache
    copy = shutil.copytree(config.cache.path, tmp_path / "cache")
    config = with_overrides(config, {"eval.holdout": 0.0, "cache.path": str(copy)})
    data = load_data(config, index_path)
    return config, data


def flip_a_bit(cache, shard, key, name):
    """In the first byte of one tensor of one entry."""
    from safetensors import safe_open

    path = Path(cache) / shard
    content = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        row = json.loads(file.metadata()["sdxl_ray.keys"]).index(key)
        num_rows = len(json.loads(file.metadata()["sdxl_ray.keys"]))
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + start + (end - start) // num_rows * row] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_entry_is_encoded_anew_and_noted(tiny_cache, data, damaged_cache, kind):
    """Training goes on with equal numbers, and the next `sdxl-ray cache` replaces the entry."""
    config, copy = damaged_cache
    sample = copy.train[0]
    shards, keys = (
        (sample.latent_shards, sample.latent_keys) if kind == "latents" else (sample.text_shards, sample.text_keys)
    )
    flip_a_bit(config.cache.path, shards[0], keys[0], "mean" if kind == "latents" else "pooled_prompt_embeds")
    told = []
    builder = make_builder(copy, entries=make_entries(copy, config, report=told.append))
    expected = make_builder(data)
    for epoch in range(6):
        assert_same(
            builder.training(alone(one(copy, 0, epoch=epoch))), expected.training(alone(one(data, 0, epoch=epoch)))
        )
    (line,) = told
    assert keys[0] in line and "damaged" in line and line.endswith("For this run it is encoded anew.")
    assert ShardStore(config.cache.path).shard_of(keys[0]) is None
    assert ShardStore(tiny_cache[0].cache.path).shard_of(keys[0]) == shards[0]


def test_damage_that_cannot_be_noted_does_not_stop_the_run(damaged_cache, monkeypatch):
    config, copy = damaged_cache
    sample = copy.train[0]
    flip_a_bit(config.cache.path, sample.latent_shards[0], sample.latent_keys[0], "std")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdxl_ray.cache.shards.mark_damaged", refuse)
    told = []
    make_builder(copy, entries=make_entries(copy, config, report=told.append)).training(alone(one(copy, 0)))
    assert len(told) == 2 and "could not be noted in the cache" in told[1]


def empty_shard(cache, shard):
    kind = {"mean": torch.zeros(0, 4, 8, 8)} if shard.startswith("latents") else {"prompt_embeds": torch.zeros(0, 4)}
    write_shard(open_folder(str(cache)), shard, [], kind, {})


def test_on_demand_an_entry_that_its_shard_lacks_is_a_damaged_image(tmp_path, data, damaged_cache):
    """It turned out damaged when it was encoded, beside training; the driver tells of it."""
    empty_shard(tmp_path, "latents/64x64/s.safetensors")
    sample = dataclasses.replace(data.train[0], latent_shards=("latents/64x64/s.safetensors",))
    of_the_shard = dataclasses.replace(data, reader=ShardReader(tmp_path))
    entries = make_entries(of_the_shard, report=no_report, on_demand=True)
    assert entries.latents(sample, 0) is None and entries.latents(sample, 0) is None
    config = with_overrides(damaged_cache[0], {"cache.mode": "ondemand", "cache.path": str(tmp_path)})
    assert make_entries(of_the_shard, config, report=no_report).latents(sample, 0) is None


LOSSES = {
    "gone": lambda path, shard: path.unlink(),
    "cut": lambda path, shard: path.write_bytes(path.read_bytes()[:-1]),
    "no shard": lambda path, shard: path.write_bytes(b"no shard"),
    "another's": lambda path, shard: empty_shard(str(path).removesuffix(shard), shard),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_shard_that_is_lost_is_encoded_anew_and_told_once(data, damaged_cache, kind, loss):
    """Training goes on with equal numbers."""
    config, copy = damaged_cache
    in_row = [each.latent_shards[:1] if kind == "latents" else each.text_shards for each in copy.train]
    ((shard, _),) = Counter(itertools.chain(*in_row)).most_common(1)
    rows = [row for row, shards in enumerate(in_row) if shard in shards]
    assert len(rows) > 3
    LOSSES[loss](Path(config.cache.path) / shard, shard)
    told = []
    builder = make_builder(copy, entries=make_entries(copy, config, report=told.append))
    expected = make_builder(data)
    for row in rows[:4]:
        assert_same(builder.training(alone(one(copy, row))), expected.training(alone(one(data, row))))
        assert_same(builder.evaluation(row, 2), expected.evaluation(row, 2))
    (line,) = told
    assert line.startswith(f"{config.cache.path}/{shard}: ")
    assert ("has no entry" if loss == "another's" else "cannot be read (") in line
    assert line.endswith(" For this run what it lacks is encoded anew.")


def test_a_shard_that_cannot_be_read_is_asked_for_again_after_a_while(data, damaged_cache, monkeypatch):
    """A store that does not answer takes minutes to say so."""
    config, copy = damaged_cache
    sample, told, asked = copy.train[0], [], []
    entries = make_entries(copy, config, report=told.append)
    expected = entries.latents(sample, 0)
    read = copy.reader.read

    def fail(shard, key):
        asked.append(shard)
        raise UnreadableShard(f"{shard}: cannot be read (timed out).")

    now = [1000.0]
    monkeypatch.setattr("sdxl_ray.train.entries.time.monotonic", lambda: now[0])
    monkeypatch.setattr(copy.reader, "read", fail)
    for _ in range(3):
        assert torch.equal(entries.latents(sample, 0)["mean"], expected["mean"])
    assert (len(asked), len(told)) == (1, 1)
    now[0] += 601
    monkeypatch.setattr(copy.reader, "read", lambda shard, key: asked.append(shard) or read(shard, key))
    assert torch.equal(entries.latents(sample, 0)["mean"], expected["mean"])
    assert (len(asked), len(told)) == (2, 1)


def test_on_demand_a_shard_that_is_gone_is_waited_for_and_what_ends_the_wait_ends_the_run(data, damaged_cache):
    config, copy = damaged_cache
    sample = copy.train[0]
    path = Path(config.cache.path) / sample.latent_shards[0]
    content = path.read_bytes()
    path.unlink()
    waited = []

    def wait(shard):
        waited.append(shard)
        if len(waited) == 2:
            raise CacheError(f"{shard} will not come: the encoder failed")
        path.write_bytes(content)

    reader = ShardReader(config.cache.path, wait=wait)
    entries = make_entries(dataclasses.replace(copy, reader=reader), on_demand=True)
    assert torch.equal(entries.latents(sample, 0)["mean"], entry_of(data, sample)["mean"])
    path.unlink()
    reader._open.clear()
    with pytest.raises(CacheError, match="will not come: the encoder failed"):
        entries.latents(sample, 0)


# ---- modes of the cache: the same batches ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied(tmp_path_factory, tiny_model):
    """Settings of a data set with mirrored images, masks and several crops, by mode: (config, data)."""
    folder = tmp_path_factory.mktemp("varied")
    write_images(folder / "images")
    for number in range(0, 13, 3):
        with Image.open(folder / "images" / f"{number:02d}.png") as image:
            mask = Image.linear_gradient("L").resize(image.size)
        mask.save(folder / "images" / f"{number:02d}-mask.png")
    section = {
        "path": str(folder / "images"), "name": "images", "resolution": 64, "bucket_step": 16, "flip": True,
        "crop": "random", "crop_variants": 2, "mask": "file", "trigger_word": "ohwx",
    }  # fmt: skip

    def make(mode, text="cached", **more):
        config = tiny_config(folder, tiny_model, eval__holdout=0.0, cache__mode=mode, cache__text=text)
        config = type(config).model_validate({**config.model_dump(mode="json"), "dataset": [{**section, **more}]})
        return config, load_data(config, cache_without_ray(config))

    return make


def batches_of(config, data, **settings):
    builder = make_builder(data, entries=make_entries(data, config), caption_dropout=0.3, **settings)
    return [builder.training(alone(micro_batch)) for epoch in range(2) for micro_batch in micro_batches(data, epoch)], [
        builder.evaluation(row, 2) for row in range(0, len(data.train), 5)
    ]


def test_batches_are_the_same_in_all_modes(varied):
    """Cached, encoded by the worker each time, and captions encoded while training: equal to the bit."""
    on_disk = varied("disk")
    assert not set(on_disk[1].train[0].latent_shards) & {""}
    expected = batches_of(*on_disk)
    assert any(batch.masks is not None for batch in expected[0])
    assert any(sample.flip for sample in on_disk[1].train)
    assert any(len(sample.crops) == 2 for sample in on_disk[1].train)
    for mode, text in (("off", "cached"), ("disk", "online"), ("off", "online")):
        config, data = varied(mode, text)
        # no shard is read where it says so
        assert ("" in (data.train[0].latent_shards or ("",))) == (mode == "off")
        assert ("" in (data.train[0].text_shards or ("",))) == (text == "online")
        found = batches_of(config, data)
        for kind in range(2):
            assert len(found[kind]) == len(expected[kind])
            for batch, same in zip(found[kind], expected[kind], strict=True):
                assert_same(batch, same)


def test_captions_are_varied_while_training_and_not_in_the_evaluation(varied, tiny_model, place):
    config, data = varied("disk", "online", shuffle_tags=True, tag_dropout=0.5, caption_prefix="photo: ")
    sample = dataclasses.replace(data.train[0], captions=("red, green, blue, large, small",), caption_bases=(0,))
    text = TextEncoder(tiny_model, **place)
    builder = BatchBuilder(
        [sample], make_entries(data, config), seed=7, num_timesteps=1000
    )  # fmt: skip
    rules = CaptionRules.of(config.datasets[0])
    seen = set()
    for epoch in range(6):
        draw = keyed_generator(7, epoch, 0, sample.sample_id, "caption_variant")
        caption = draw_variant(sample.captions[0], rules, draw)
        seen.add(caption)
        batch = builder.training(alone(one(data, 0, epoch=epoch)))
        assert torch.equal(batch.prompt_embeds, text.encode([caption])[0]["prompt_embeds"])
    assert len(seen) > 2
    expected = text.encode([decorate(sample.captions[0], rules)])[0]["prompt_embeds"]
    assert torch.equal(builder.evaluation(0, 1).prompt_embeds, expected)
    assert decorate(sample.captions[0], rules) == "photo: ohwx, red, green, blue, large, small"


def test_without_encoders_none_is_loaded(data, tiny_cache, monkeypatch):
    monkeypatch.setattr(LiveEntries, "_images", no_report)
    monkeypatch.setattr(LiveEntries, "_texts", no_report)
    batch = make_builder(data, entries=make_entries(data, tiny_cache[0])).training(alone(one(data, 0)))
    assert len(batch.latents) == 1


# ---- prefetching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [0, 1, 3, 20])
def test_prefetch_keeps_the_order(num_items):
    slow_first = threading.Event()

    def build(item):
        if item == 0 and num_items > 1:
            slow_first.wait(5)  # until the second one is being made
        if item == 1:
            slow_first.set()
        return item

    assert list(prefetch(build, range(num_items))) == list(range(num_items))


def test_prefetch_makes_no_more_than_its_depth_ahead():
    asked = []
    batches = prefetch(lambda item: item, (asked.append(item) or item for item in range(100)), depth=3)
    assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(asked) == 5 + 3


def test_prefetch_raises_where_the_batch_is_due():
    def build(item):
        if item == 2:
            raise ValueError("damaged")
        return item

    batches = prefetch(build, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)


# ---- draws and conditions --------------------------------------------------------------------------------------------


def shares_of_a_step(data, *, step, micro_batch_size, num_ranks):
    """Each rank's share of one step, as `Plan.remaining` gives them."""
    buckets, _ = data.train.codes("bucket")
    order = DataOrder(buckets, [1] * len(buckets), micro_batch_size=micro_batch_size, seed=7)
    every = Every(0)
    plan = Plan(order, num_ranks, 1, 4, 4 * num_ranks, every, every, every, every, 1.0, 7)
    return [share for rank in range(num_ranks) for share in plan.remaining(0, 0, rank) if share.step == step]


@pytest.mark.parametrize("step", [1, 2])
def test_the_noise_levels_of_a_step_are_spread_over_all_ranks(data, step):
    """One sample in each of N equal intervals of [0, 1000), N being the samples of all ranks together."""
    builder = make_builder(data, draws=Draws(stratified=True))
    shares = shares_of_a_step(data, step=step, micro_batch_size=2, num_ranks=3)
    levels = [int(level) for share in shares for level in builder.training(share).timesteps]
    total = shares[0].total
    assert len(levels) == total == sum(len(share.micro_batch.rows) for share in shares) > 3
    assert sorted(int(level / 1000 * total) for level in levels) == list(range(total))


def test_another_step_spreads_them_otherwise_and_a_sample_alone_is_as_without(data):
    builder = make_builder(data, draws=Draws(stratified=True))
    (micro_batch, *_) = micro_batches(data, 0)
    levels = {tuple(builder.training(alone(micro_batch, step)).timesteps.tolist()) for step in range(1, 9)}
    assert len(levels) > 1
    single = alone(one(data, 0))
    assert_same(builder.training(single), make_builder(data, draws=Draws()).training(single))


def test_the_perturbation_falls_to_nothing_and_leaves_the_noise_as_it_is(data):
    (micro_batch, *_) = micro_batches(data, 0)
    plain = make_builder(data, draws=Draws()).training(alone(micro_batch))
    builder = make_builder(data, draws=Draws(noise=NoiseRecipe(perturbation=0.2), perturbation_end=10))
    first, middle, last = (builder.training(alone(micro_batch, step)) for step in (1, 6, 11))
    assert 0.15 < float(first.perturbation.std()) < 0.25
    assert torch.equal(first.perturbation * 0.5, middle.perturbation)
    assert_same(last, plain)
    assert torch.equal(first.noise, plain.noise)


def test_untold_sizes_are_six_zeros_as_often_as_asked(data):
    builder = make_builder(data, draws=Draws(size_dropout=0.5))
    told = [
        bool(builder.training(alone(one(data, row, epoch=epoch))).add_time_ids.any())
        for row in range(len(data.train))
        for epoch in range(40)
    ]
    assert 0.4 < sum(told) / len(told) < 0.6
    everything = make_builder(data, draws=Draws(size_dropout=1.0)).training(alone(one(data, 0)))
    assert everything.add_time_ids.tolist() == [[0.0] * 6]


def test_a_dropped_caption_is_the_encoded_empty_text_where_that_is_asked(data):
    nothing = make_entries(data).prompt("", *data.prompts[""])
    builder = make_builder(data, caption_dropout=1.0, conditions=Conditions(dropped_text=nothing))
    batch = builder.training(alone(one(data, 0)))
    assert torch.equal(batch.prompt_embeds[0], nothing["prompt_embeds"])
    assert torch.equal(batch.pooled_prompt_embeds[0], nothing["pooled_prompt_embeds"])
    assert nothing["prompt_embeds"].any()  # not the zeros that it stands in for


@pytest.mark.parametrize("to_zeros", [True, False])
def test_text_that_is_encoded_in_the_step_comes_as_ids(data, to_zeros):
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return torch.full((len(texts), 2, 1, 77), len(texts[0]), dtype=torch.int64)

    builder = make_builder(data, caption_dropout=1.0, conditions=Conditions(tokenize=tokenize, drop_to_zeros=to_zeros))
    batch = builder.training(alone(one(data, 0)))
    assert batch.prompt_embeds.numel() == batch.pooled_prompt_embeds.numel() == 0
    assert batch.input_ids.shape == (1, 2, 1, 77)
    if to_zeros:
        assert seen[0] in data.train[0].captions and batch.dropped.tolist() == [True]
    else:
        assert seen == [""] and batch.dropped is None
    evaluated = builder.evaluation(0, 3)
    assert evaluated.input_ids.shape == (3, 2, 1, 77) and evaluated.dropped is None
    assert seen[-1] == data.train[0].captions[0]


def test_samples_whose_target_is_the_parents_prediction(data):
    dataset = data.train[0].dataset
    assert make_builder(data).training(alone(one(data, 0))).from_parent is None
    assert make_builder(data, from_parent=[dataset]).training(alone(one(data, 0))).from_parent.tolist() == [True]
    assert make_builder(data, from_parent=["others"]).training(alone(one(data, 0))).from_parent is None


def test_what_the_reader_has_to_say_about_its_copies_is_told_in_the_run(data):
    said = []
    make_entries(data, report=said.append)
    data.reader.report("cache.local_path = /full: takes no more copies")
    assert said == ["cache.local_path = /full: takes no more copies"]
