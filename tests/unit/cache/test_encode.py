import weakref

import numpy as np
import pytest
import torch

from sdxl_ray.cache import encode
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder, in_halves_that_fit, loading
from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.text import encode_prompts
from sdxl_ray.sdxl.vae import NonFiniteLatents, encode_posterior

CPU = torch.device("cpu")


def encoder(model, batch_size):
    return LatentEncoder(model, dtype="fp32", device=CPU, batch_size=batch_size, revision="", variant="")


def images(num):
    return list(np.random.default_rng(0).integers(0, 256, (num, 64, 64, 3), dtype=np.uint8))


def names(num):
    return [f"{number}.png" for number in range(num)]


def test_latents_do_not_depend_on_the_batch_size(tiny_model):
    one, three = (encoder(tiny_model, size).encode(images(5), names(5)) for size in (1, 3))
    for name in ("mean", "std"):
        assert one[name].shape == (5, 4, 8, 8)
        assert one[name].dtype == torch.bfloat16
        torch.testing.assert_close(one[name], three[name], rtol=0.01, atol=0.01)


def test_out_of_memory_halves_the_batch_until_it_fits(tiny_model, monkeypatch):
    expected = encoder(tiny_model, 1).encode(images(5), names(5))
    sizes = []

    def posterior(vae, pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 1:
            raise torch.OutOfMemoryError
        return encode_posterior(vae, pixel_values)

    monkeypatch.setattr(encode, "encode_posterior", posterior)
    found = encoder(tiny_model, 5).encode(images(5), names(5))
    assert torch.equal(found["mean"], expected["mean"])
    assert sizes == [5, 2, 1, 1, 3, 1, 2, 1, 1]


class Attempt:
    """Stands for the tensors of an attempt: known to be alive or not."""


def test_a_retry_starts_after_the_failed_attempt_is_forgotten():
    attempts, alive = [], []

    def encode(start, end):
        alive.append(sum(attempt() is not None for attempt in attempts))
        attempt = Attempt()
        attempts.append(weakref.ref(attempt))
        if end - start > 1:
            raise torch.OutOfMemoryError
        return start

    assert in_halves_that_fit(encode, 0, 4, what="image", device=CPU) == [0, 1, 2, 3]
    assert alive == [0] * 7


def test_memory_kept_in_reserve_is_given_back_before_a_retry(monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))

    def encode(start, end):
        if end - start > 1:
            raise torch.OutOfMemoryError
        return start

    assert in_halves_that_fit(encode, 0, 2, what="image", device=torch.device("cuda", 0)) == [0, 1]
    assert given_back == [True]


def test_no_memory_for_one_image_says_what_to_do(tiny_model, monkeypatch):
    def posterior(vae, pixel_values):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encode, "encode_posterior", posterior)
    with pytest.raises(CacheError) as error:
        encoder(tiny_model, 5).encode(images(5), names(5))
    text = str(error.value)
    assert text.startswith("cpu has too little free memory while encoding one image of 64x64 pixels. ")
    for cure in ("nvidia-smi", "cache.gpus_per_encoder", "dataset.resolution"):
        assert cure in text


def test_no_memory_for_the_last_try_in_fp32_halves_the_batch_too(tiny_model, monkeypatch):
    def posterior(vae, pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 1:
            raise NonFiniteLatents([0])
        if len(pixel_values) > 1:
            raise torch.OutOfMemoryError
        return encode_posterior(vae, pixel_values)

    calls = []
    monkeypatch.setattr(encode, "encode_posterior", posterior)
    assert len(encoder(tiny_model, 2).encode(images(2), names(2))["mean"]) == 2
    assert calls == [2, 2, 1, 1]


def test_no_memory_for_the_model_is_no_crash():
    with (
        pytest.raises(CacheError, match="cpu has too little free memory while loading the VAE"),
        loading("the VAE", CPU),
    ):
        raise torch.OutOfMemoryError


def test_text_is_halved_until_it_fits_too(tiny_model, monkeypatch):
    captions = ["a cat", "", "a dog"]
    text_encoder = TextEncoder(tiny_model, device=CPU, batch_size=3, revision="", variant="")
    expected, counts = text_encoder.encode(captions)
    sizes = []

    def prompts(encoders, texts):
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError
        return encode_prompts(encoders, texts)

    monkeypatch.setattr(encode, "encode_prompts", prompts)
    found, same_counts = text_encoder.encode(captions)
    assert (sizes, same_counts) == ([3, 1, 2, 1, 1], counts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.01, atol=0.01)


def test_a_latent_that_is_not_finite_is_blamed_on_its_image_also_after_halving(tiny_model, monkeypatch):
    """Image 3 of 0-4 has the brightest pixel; the batch is split twice before it is met."""
    pixels = [np.minimum(image, 250) for image in images(5)]
    pixels[3][0, 0, 0] = 255

    def posterior(vae, pixel_values):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError
        bad = [index for index, image in enumerate(pixel_values) if image.max() > 0.99]
        if bad:
            raise NonFiniteLatents(bad)
        return encode_posterior(vae, pixel_values)

    monkeypatch.setattr(encode, "encode_posterior", posterior)
    with pytest.raises(CacheError) as error:
        encoder(tiny_model, 5).encode(pixels, names(5))
    assert "for 3.png. Check that model.path has a sound VAE" in str(error.value)


def test_embeddings_do_not_depend_on_the_batch_size(tiny_model):
    captions = ["a cat", "", "a much longer caption about a cat that sleeps", "猫"]
    (one, counts), (all_at_once, same_counts) = (
        TextEncoder(tiny_model, device=CPU, batch_size=size, revision="", variant="").encode(captions)
        for size in (1, 4)
    )
    assert counts == same_counts
    assert counts[1] == min(counts)
    for name, tensor in one.items():
        assert len(tensor) == 4
        torch.testing.assert_close(tensor, all_at_once[name], rtol=0.01, atol=0.01)
