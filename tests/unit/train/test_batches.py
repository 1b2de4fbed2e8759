import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.cache.buckets import assign_bucket, make_buckets
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder
from sdxl_ray.cache.images import load_pixels
from sdxl_ray.config.load import with_overrides
from sdxl_ray.diffusion.randomness import keyed_normal
from sdxl_ray.records import ImageRecord
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.sdxl.vae import sample_latents
from sdxl_ray.train.batches import BatchBuilder, prefetch
from sdxl_ray.train.data import load_data
from sdxl_ray.train.plan import DataOrder, MicroBatch


@pytest.fixture(scope="module")
def data(tiny_cache):
    config, index_path = tiny_cache
    return load_data(with_overrides(config, {"eval.holdout": 0.0}), index_path)


def make_builder(data, *, caption_dropout=0.3, seed=7):
    return BatchBuilder(
        data.train, data.locations, data.reader, seed=seed, num_timesteps=1000, caption_dropout=caption_dropout
    )


def micro_batches(data, epoch, *, micro_batch_size=4, repeats=2):
    buckets = [sample.bucket for sample in data.train]
    return DataOrder(buckets, [repeats] * len(buckets), micro_batch_size=micro_batch_size, seed=7).epoch(epoch)


def one(data, row, *, epoch=0, repeat=0):
    return MicroBatch(number=0, epoch=epoch, rows=(row,), repeats=(repeat,))


def rows_of_epoch(data, epoch, micro_batch_size, builder=None):
    """(sample, repeat) -> all that this sample brings into the step, as plain numbers."""
    builder = builder or make_builder(data)
    found = {}
    for micro_batch in micro_batches(data, epoch, micro_batch_size=micro_batch_size):
        batch = builder.training(micro_batch)
        for place, key in enumerate(zip(micro_batch.rows, micro_batch.repeats, strict=True)):
            assert batch.sample_ids[place] == data.train[key[0]].sample_id
            found[key] = {
                name: getattr(batch, name)[place].float().numpy().tobytes()
                for name in batch.__slots__
                if name != "sample_ids"
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
        getattr(builder.training(one(data, 0, epoch=epoch, repeat=repeat)), name)
        for builder in (make_builder(data), make_builder(data, seed=8))
        for epoch in (0, 1)
        for repeat in (0, 1)
    ]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == len(drawn)


def test_two_samples_of_a_batch_have_different_noise_and_timesteps(data):
    batch = next(
        make_builder(data).training(micro_batch) for micro_batch in micro_batches(data, 0) if len(micro_batch.rows) == 4
    )
    assert len({row.numpy().tobytes() for row in batch.noise}) == 4
    assert len(set(batch.timesteps.tolist())) > 1


def test_every_caption_of_an_image_is_used(data):
    row = next(row for row, sample in enumerate(data.train) if len(sample.captions) == 2)
    builder = make_builder(data, caption_dropout=0.0)
    first, second = (data.reader.read(data.locations[key])["prompt_embeds"] for key in data.train[row].text_keys)
    assert not torch.equal(first, second)
    seen = [builder.training(one(data, row, epoch=epoch)).prompt_embeds[0] for epoch in range(20)]
    num_first = sum(torch.equal(embeds, first) for embeds in seen)
    assert num_first + sum(torch.equal(embeds, second) for embeds in seen) == 20
    assert 3 <= num_first <= 17


# ---- caption dropout -------------------------------------------------------------------------------------------------


def test_full_caption_dropout_is_zero_embeddings_and_changes_nothing_else(data):
    micro_batch = micro_batches(data, 0)[0]
    dropped = make_builder(data, caption_dropout=1.0).training(micro_batch)
    kept = make_builder(data, caption_dropout=0.0).training(micro_batch)
    assert torch.equal(dropped.prompt_embeds, torch.zeros_like(kept.prompt_embeds))
    assert torch.equal(dropped.pooled_prompt_embeds, torch.zeros_like(kept.pooled_prompt_embeds))
    for name in ("latents", "noise", "timesteps", "add_time_ids", "weights"):
        assert torch.equal(getattr(dropped, name), getattr(kept, name))


def test_no_caption_dropout_is_the_cached_embeddings(data):
    builder = make_builder(data, caption_dropout=0.0)
    for row, sample in enumerate(data.train):
        batch = builder.training(one(data, row))
        cached = [data.reader.read(data.locations[key]) for key in sample.text_keys]
        assert any(
            torch.equal(batch.prompt_embeds[0], text["prompt_embeds"])
            and torch.equal(batch.pooled_prompt_embeds[0], text["pooled_prompt_embeds"])
            for text in cached
        )


def test_caption_dropout_drops_its_share(data):
    builder = make_builder(data, caption_dropout=0.3)
    dropped = [
        bool((builder.training(one(data, row, epoch=epoch)).prompt_embeds == 0).all())
        for epoch in range(30)
        for row in range(len(data.train))
    ]
    assert abs(np.mean(dropped) - 0.3) < 5 * (0.3 * 0.7 / len(dropped)) ** 0.5


# ---- cached = online -------------------------------------------------------------------------------------------------


def record_of(sample, config):
    """The image as stage 1 sees it, from its file."""
    with Image.open(sample.path) as image:
        original_hw = (image.height, image.width)
    record = ImageRecord(sample.path, sample.image_hash, original_hw, sample.captions)
    return assign_bucket(record, make_buckets(config.dataset.resolution, config.dataset.bucket_step), "center")


def test_a_cached_batch_is_what_encoding_on_the_spot_gives(data, tiny_cache, tiny_model):
    """To the bit, in the cache's bf16, before the same draw from the posterior."""
    config, _ = tiny_cache
    place = {"device": torch.device("cpu"), "batch_size": 1, "revision": "", "variant": ""}
    images, text = LatentEncoder(tiny_model, dtype="fp32", **place), TextEncoder(tiny_model, **place)
    builder = make_builder(data, caption_dropout=0.0)
    for row, sample in enumerate(data.train):
        batch = builder.training(one(data, row, epoch=3))
        posterior = images.encode([load_pixels(record_of(sample, config))], [sample.path])
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


def test_time_ids_are_the_real_crop_in_diffusers_order(data, tiny_cache, tiny_model):
    from diffusers import StableDiffusionXLPipeline

    config, _ = tiny_cache
    unet = load_unet(tiny_model, dtype=torch.float32)
    builder = make_builder(data)
    offsets = set()
    for row, sample in enumerate(data.train):
        (time_ids,) = builder.training(one(data, row)).add_time_ids
        assert time_ids.dtype == torch.float32
        original_hw, crop_top_left, target_hw = (tuple(map(int, pair)) for pair in time_ids.reshape(3, 2))
        expected = StableDiffusionXLPipeline._get_add_time_ids(
            SimpleNamespace(unet=unet), original_hw, crop_top_left, target_hw, torch.float32, 32
        )
        assert torch.equal(time_ids[None], expected)
        assert tuple(time_ids.tolist()) == sample.micro_conditioning.as_time_ids()
        # the pixels at that offset of the resized image are what was encoded
        record = record_of(sample, config)
        with Image.open(sample.path) as image:
            assert original_hw == (image.height, image.width)
            resized = np.asarray(image.resize(record.resized_hw[::-1], Image.Resampling.LANCZOS)).astype(int)
        assert crop_top_left == find_crop(resized, load_pixels(record))
        offsets.add(crop_top_left)
    assert len(offsets) > 2  # the data set does have crops


def test_time_ids_keep_sizes_that_bf16_would_round(data):
    sample = dataclasses.replace(data.train[0], original_hw=(1365, 1023))
    builder = BatchBuilder([sample], data.locations, data.reader, seed=0, num_timesteps=1000, caption_dropout=0.0)
    assert builder.training(one(data, 0)).add_time_ids[0, :2].tolist() == [1365.0, 1023.0]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_fixed_noise_levels_of_the_posterior_mean(data):
    batch = make_builder(data).evaluation(2, 4)
    sample = data.train[2]
    assert batch.timesteps.tolist() == [125, 375, 625, 875]
    mean = data.reader.read(data.locations[sample.latent_key])["mean"].float()
    text = data.reader.read(data.locations[sample.text_keys[0]])
    for place in range(4):
        assert torch.equal(batch.latents[place], mean)
        assert torch.equal(batch.prompt_embeds[place], text["prompt_embeds"])
    assert len({noise.numpy().tobytes() for noise in batch.noise}) == 4


def test_evaluation_does_not_depend_on_the_runs_seed_or_dropout(data):
    """So that trials of a sweep can be compared."""
    first = make_builder(data, seed=1, caption_dropout=1.0).evaluation(0, 4)
    second = make_builder(data, seed=2, caption_dropout=0.0).evaluation(0, 4)
    for name in first.__slots__:
        if name != "sample_ids":
            assert torch.equal(getattr(first, name), getattr(second, name))


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
