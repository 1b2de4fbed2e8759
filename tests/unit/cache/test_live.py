"""What is encoded on the spot is what a shard holds, to the bit."""

import dataclasses
import hashlib
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_ray.cache import reading
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder
from sdxl_ray.cache.live import LiveEntries
from sdxl_ray.cache.shard_reader import ShardReader
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.cache.skipped import UnreadableLimit
from sdxl_ray.errors import CacheError, DatasetError, StorageError
from sdxl_ray.records import EncodedSample
from sdxl_ray.storage import open_folder

CPU = torch.device("cpu")


def write_image(folder, number=0, *, alpha=False):
    """72 x 100 pixels; with `alpha`, the right half is transparent."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((100, 72), Image.Resampling.BICUBIC)
    if alpha:
        opacity = np.full((72, 100), 255, np.uint8)
        opacity[:, 50:] = 0
        image.putalpha(Image.fromarray(opacity))
    path = folder / f"{number}.png"
    image.save(path)
    return path


def sample_of(path, *, crops=((0, 0),), flip=False, mask="", captions=("a cat",)):
    return EncodedSample(
        sample_id=path.stem,
        dataset="images",
        path=str(path),
        address="",
        image_hash=hashlib.sha256(path.read_bytes()).hexdigest(),
        verify=True,
        original_hw=(72, 100),
        target_hw=(64, 64),
        resized_hw=(64, 89),
        crops=crops,
        flip=flip,
        mask=mask,
        captions=captions,
        scaled_jpeg=False,
        caption_bases=tuple(range(len(captions))),
        latent_keys=tuple(f"{number:032x}" for number in range(len(crops))),
        latent_shards=("",) * len(crops),
        text_keys=(),
        text_shards=(),
    )


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(reading, "PAUSE_S", 0.0)


@pytest.fixture
def told():
    return []


@pytest.fixture
def live(tiny_model, told):
    return LiveEntries(
        tiny_model, revision="", variant="", vae_dtype="fp32", caption_chunks=1, device=CPU, report=told.append
    )


@pytest.fixture(scope="module")
def place():
    return {"device": CPU, "batch_size": 1, "revision": "", "variant": ""}


def shard_of(folder, samples, encoder):
    """What stage 1 would write for these samples, read back: one entry for each crop."""
    records = [sample.image_record(variant) for sample in samples for variant in range(len(sample.crops))]
    pixels, masks = zip(*map(reading.load_image, records), strict=True)
    tensors = encoder.encode(list(pixels), [record.path for record in records])
    if records[0].mask:
        tensors["mask"] = torch.from_numpy(np.stack(masks))
    keys = [f"{number:032x}" for number in range(len(records))]
    write_shard(open_folder(str(folder)), "latents/64x64/s.safetensors", keys, tensors, {})
    reader = ShardReader(folder)
    return [reader.read("latents/64x64/s.safetensors", key) for key in keys]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mask", ["", "alpha"])
def test_latents_are_those_of_a_shard(live, tiny_model, place, tmp_path, flip, mask):
    """Of every crop, mirrored or not, with the mask."""
    sample = sample_of(write_image(tmp_path, alpha=bool(mask)), crops=((0, 0), (0, 12), (0, 25)), flip=flip, mask=mask)
    expected = shard_of(tmp_path / "cache", [sample], LatentEncoder(tiny_model, dtype="fp32", **place))
    found = [live.latents(sample, variant) for variant in range(3)]
    for entry, shard in zip(found, expected, strict=True):
        assert entry.keys() == shard.keys() == {"mean", "std", *(["mask"] if mask else [])}
        for name in entry:
            assert entry[name].dtype == shard[name].dtype
            assert torch.equal(entry[name], shard[name]), name
    assert not torch.equal(found[0]["mean"], found[2]["mean"])
    if mask:
        assert 0 < found[0]["mask"].float().mean() < 255


def test_text_is_that_of_a_shard(live, tiny_model, place, tmp_path):
    captions = ["a cat", "two dogs on a hill, at night"]
    tensors, _ = TextEncoder(tiny_model, **place).encode(captions)
    write_shard(open_folder(str(tmp_path)), "text/s.safetensors", ["0" * 32, "1" * 32], tensors, {})
    for caption, key in zip(captions, ("0" * 32, "1" * 32), strict=True):
        expected, found = ShardReader(tmp_path).read("text/s.safetensors", key), live.text(caption)
        assert found.keys() == expected.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
        for name in found:
            assert found[name].dtype == torch.bfloat16
            assert torch.equal(found[name], expected[name])


def test_long_captions_are_read_in_chunks(tiny_model, told):
    live = LiveEntries(
        tiny_model, revision="", variant="", vae_dtype="fp32", caption_chunks=2, device=CPU, report=told.append
    )
    assert live.text("cat " * 100)["prompt_embeds"].shape[0] == 2 * 77
    assert not told


def test_captions_that_were_just_encoded_are_not_encoded_again(live, monkeypatch):
    encoder = live._texts()
    encoded, encode = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda captions: encoded.append(captions) or encode(captions))
    for caption in ("a", "b", "a", "a"):
        live.text(caption)
    assert encoded == [["a"], ["b"]]


def test_an_image_that_cannot_be_decoded_is_nothing_and_told_once(live, told, tmp_path):
    path = write_image(tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    sample = sample_of(path)
    assert live.latents(sample, 0) is None and live.latents(sample, 0) is None
    (line,) = told
    assert line.startswith(f"{path}: cannot be decoded") and line.endswith("it does not count in training")


def test_too_many_images_that_cannot_be_decoded_are_an_error(tiny_model, told, tmp_path):
    limits = {"images": UnreadableLimit("/data/cats", 0.3, 4)}
    place = {"revision": "", "variant": "", "vae_dtype": "fp32", "caption_chunks": 1, "device": CPU}
    live = LiveEntries(tiny_model, **place, report=told.append, limits=limits)
    samples = [sample_of(write_image(tmp_path, number)) for number in range(4)]
    for number in (1, 3):
        path = tmp_path / f"{number}.png"
        path.write_bytes(path.read_bytes()[:300])
    assert live.latents(samples[0], 0) is not None
    assert live.latents(samples[1], 0) is None and live.latents(samples[1], 0) is None
    elsewhere = dataclasses.replace(samples[3], dataset="unlimited")
    assert live.latents(elsewhere, 0) is None
    with pytest.raises(DatasetError, match=r"^/data/cats: 2 of 4 images cannot be used, more than .* = 0\.3 allows:"):
        live.latents(samples[3], 0)


def test_captions_that_are_cut_are_told_once(live, told):
    live.text("a cat")
    assert not told
    live.text("cat " * 75)  # and two markers
    assert not told
    live.text("cat " * 76)
    live.text("dog " * 90)
    start = "cat " * 10
    assert told == [
        f'the caption "{start}..." has 78 tokens; what is beyond 77 is not seen, of this caption and perhaps others '
        "(cache.caption_chunks)"
    ]


def test_an_image_that_has_changed_is_nothing(live, told, tmp_path):
    path = write_image(tmp_path)
    sample = sample_of(path)
    write_image(tmp_path, 1).replace(path)
    assert live.latents(sample, 0) is None
    assert len(told) == 1 and "changed" in told[0]


def test_a_machine_without_memory_is_an_error_and_no_image_that_does_not_count(live, told, tmp_path, monkeypatch):
    def fail(record):
        raise MemoryError("can't allocate memory: you tried to allocate 402653184 bytes")

    sample = sample_of(write_image(tmp_path))
    monkeypatch.setattr(reading, "load_pixels", fail)
    with pytest.raises(CacheError, match=r"0\.png: this machine has too little memory to decode it \(can't allocate"):
        live.latents(sample, 0)
    assert told == []


def test_an_image_that_this_machine_does_not_see_is_an_error(live, told, tmp_path):
    path = write_image(tmp_path)
    sample = sample_of(path)
    path.unlink()
    with pytest.raises(CacheError, match=r"cannot be read on this machine .* Make the images visible to all machines"):
        live.latents(sample, 0)
    assert not told


def test_an_image_that_is_gone_is_nothing_where_only_its_listing_was_known(live, told, tmp_path):
    """With cache.mode = "off" nobody has opened it before."""
    path = write_image(tmp_path)
    sample = dataclasses.replace(sample_of(path), verify=False)
    path.unlink()
    assert live.latents(sample, 0) is None and live.latents(sample, 0) is None
    assert told == [f"{path}: cannot be read: No such file or directory; it does not count in training"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_store_that_fails_is_asked_twice_and_then_named(live, tmp_path, monkeypatch, verify):
    sample = dataclasses.replace(sample_of(write_image(tmp_path)), verify=verify)
    expected, load = live.latents(sample, 0), reading.load_pixels
    answers = [StorageError("s3://bucket/0.png: timed out while reading.")]

    def fail(record):
        if answers:
            raise answers.pop()
        return load(record)

    monkeypatch.setattr(reading, "load_pixels", fail)
    assert torch.equal(live.latents(sample, 0)["mean"], expected["mean"])
    answers += [StorageError("s3://bucket/0.png: timed out while reading.")] * 2
    with pytest.raises(CacheError, match=r"0\.png: cannot be read on this machine \(s3://bucket/0\.png: timed out"):
        live.latents(sample, 0)


def test_threads_that_share_it_get_what_one_gets(live, tmp_path):
    samples = [sample_of(write_image(tmp_path, number)) for number in range(6)]
    expected = [live.latents(sample, 0) for sample in samples]
    found = [None] * len(samples)

    def work(first):
        for number in range(first, len(samples), 3):
            found[number] = live.latents(samples[number], 0)
            live.text(f"caption {number}")

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for entry, alone in zip(found, expected, strict=True):
        assert torch.equal(entry["mean"], alone["mean"]) and torch.equal(entry["std"], alone["std"])


def test_nothing_is_loaded_before_it_is_needed(live, tmp_path):
    assert live._latent_encoder is live._text_encoder is None
    live.latents(sample_of(write_image(tmp_path)), 0)
    assert live._latent_encoder is not None and live._text_encoder is None


def test_encoding_in_tiles_is_told_once(live, told, tmp_path, monkeypatch):
    encoder = live._images()
    encode = encoder.encode

    def in_tiles(pixels, names):
        encoder.tiled.extend(names)
        return encode(pixels, names)

    monkeypatch.setattr(encoder, "encode", in_tiles)
    for number in range(3):
        live.latents(sample_of(write_image(tmp_path, number)), 0)
    assert len(told) == 1 and told[0].startswith(f"{tmp_path}/0.png: encoded in tiles, since cpu has no room for it")
    assert encoder.tiled == []


def test_each_image_that_cannot_be_decoded_is_told(live, told, tmp_path):
    for number in range(2):
        path = write_image(tmp_path, number)
        path.write_bytes(path.read_bytes()[:300])
        assert live.latents(sample_of(path), 0) is None
    assert [line.partition(":")[0] for line in told] == [f"{tmp_path}/0.png", f"{tmp_path}/1.png"]


def test_images_that_can_be_decoded_count_for_what_is_no_accident(tiny_model, told, tmp_path):
    """20 bad ones of 20 would be none; of 40 they are within half."""
    limits = {"images": UnreadableLimit("/data/cats", 0.5, 1000)}
    place = {"revision": "", "variant": "", "vae_dtype": "fp32", "caption_chunks": 1, "device": CPU}
    live = LiveEntries(tiny_model, **place, report=told.append, limits=limits)
    good, bad = sample_of(write_image(tmp_path, 0)), sample_of(write_image(tmp_path, 1))
    (tmp_path / "1.png").write_bytes(b"no image")
    for number in range(40):
        sample = dataclasses.replace(
            bad if number >= 20 else good, image_hash=f"{number:016x}" + "0" * 48, verify=False
        )
        assert (live.latents(sample, 0) is None) == (number >= 20)
