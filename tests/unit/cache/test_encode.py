import numpy as np
import pytest
import torch

from sdxl_ray.cache import encode
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder
from sdxl_ray.errors import CacheError
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
