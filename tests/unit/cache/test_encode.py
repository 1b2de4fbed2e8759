import types
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_ray.cache import encode
from sdxl_ray.cache.encode import LatentEncoder, TextEncoder, in_halves_that_fit, loading
from sdxl_ray.errors import CacheError
from sdxl_ray.sdxl.architecture import VAE_CONFIG
from sdxl_ray.sdxl.components import load_vae
from sdxl_ray.sdxl.text import encode_prompts
from sdxl_ray.sdxl.vae import NonFiniteLatents, encode_posterior, pixels_from_uint8

CPU = torch.device("cpu")


def encoder(model, batch_size, dtype="fp32", **settings):
    return LatentEncoder(model, dtype=dtype, device=CPU, batch_size=batch_size, revision="", variant="", **settings)


def images(num, height_width=(64, 64)):
    return list(np.random.default_rng(0).integers(0, 256, (num, *height_width, 3), dtype=np.uint8))


def limited(monkeypatch, fits):
    """A device with memory for what `fits(num, height, width)` alone; the sizes that are tried."""
    tried = []

    def posterior(vae, pixel_values, *, tile=0):
        num, _, height, width = pixel_values.shape
        height, width = (min(8 * tile or length, length) for length in (height, width))
        tried.append((num, height, width))
        if not fits(num, height, width):
            raise torch.OutOfMemoryError
        return encode_posterior(vae, pixel_values, tile=tile)

    monkeypatch.setattr(encode, "encode_posterior", posterior)
    return tried


def names(num):
    return [f"{number}.png" for number in range(num)]


def test_latents_do_not_depend_on_the_batch_size(tiny_model):
    one, three = (encoder(tiny_model, size).encode(images(5), names(5)) for size in (1, 3))
    for name in ("mean", "std"):
        assert one[name].shape == (5, 4, 8, 8)
        assert one[name].dtype == torch.bfloat16
        torch.testing.assert_close(one[name], three[name], rtol=0.01, atol=0.01)


def test_a_latent_is_that_of_its_image_in_any_batch(tiny_model):
    """In bf16 as well, and through the fp32 VAE's own posterior."""
    for dtype in ("fp32", "bf16"):
        latents = encoder(tiny_model, 4, dtype)
        together = latents.encode(images(4), names(4))
        for number in range(4):
            alone = latents.encode(images(4)[number : number + 1], names(1))
            for name, tensor in alone.items():
                difference = (tensor[0].float() - together[name][number].float()).abs().max()
                assert difference < 0.02 * together[name].float().std()


def test_latents_in_any_memory_format_are_the_plain_vaes(tiny_model):
    vae = load_vae(tiny_model, dtype=torch.float32)
    mean, std = encode_posterior(vae, pixels_from_uint8(torch.from_numpy(np.stack(images(2)))).contiguous())
    found = encoder(tiny_model, 2).encode(images(2), names(2))
    torch.testing.assert_close(found["mean"].float(), mean, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(found["std"].float(), std, rtol=0.01, atol=1e-3)


# ---- how many at once ------------------------------------------------------------------------------------------------


def test_one_at_a_time_on_the_cpu_unless_told(tiny_model, monkeypatch):
    tried = limited(monkeypatch, lambda num, height, width: True)
    encoder(tiny_model, 0).encode(images(3), names(3))
    assert [num for num, _, _ in tried] == [1, 1, 1]


@pytest.mark.parametrize(
    ("free_gib", "dtype", "height_width", "compile", "expected"),
    [
        (24, torch.bfloat16, (1024, 1024), False, 9),  # 2 GiB each, of 80 % of what is free
        (24, torch.float32, (1024, 1024), False, 4),
        (80, torch.bfloat16, (1024, 1024), False, 15),  # 2^31 elements
        (80, torch.bfloat16, (512, 512), False, 32),
        (80, torch.bfloat16, (512, 512), True, 8),
        (1, torch.bfloat16, (1024, 1024), False, 1),
        (0, torch.bfloat16, (1024, 1024), False, 1),
    ],
)
def test_as_many_as_fit_on_a_gpu(tiny_model, monkeypatch, free_gib, dtype, height_width, compile, expected):
    latents = encoder(tiny_model, 0)
    latents.device, latents.compile = torch.device("cuda", 0), compile
    latents.vae = types.SimpleNamespace(config=types.SimpleNamespace(block_out_channels=(128, 256)), dtype=dtype)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free_gib << 30) - (1 << 20), 96 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 20)
    assert latents._automatic_batch_size(*height_width) == expected


def test_the_memory_of_one_image_is_what_the_estimate_says():
    """The true VAE, without its numbers: five maps of its first level are alive at once, where three more are left."""
    height, width = 512, 768
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with FakeTensorMode(), torch.no_grad():
            vae = AutoencoderKL(**VAE_CONFIG)
            pixel_values = torch.empty(1, 3, height, width)
            with LiveBytes() as memory:
                vae.encode(pixel_values)
    finally:
        torch.set_default_dtype(previous)
    one_map = 128 * height * width * 2
    assert memory.peak == 5 * one_map
    assert memory.peak < encode._LIVE_MAPS * one_map


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return results

    def forget(self, key):
        self.now -= self.sizes.pop(key)


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_a_compiled_vae_gives_the_same_with_few_sizes_of_batches(tiny_model, monkeypatch):
    """Traced by torch's compiler, but run as it is: making machine code takes a minute."""
    compiled, plain = [], nn.Module.compile

    def record(graph, inputs):
        compiled.extend(len(tensor) for tensor in inputs if tensor.shape[1:] == (3, 64, 64))
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: plain(module, backend=record, **how))
    latents = encoder(tiny_model, 4, compile=True)
    for num in (4, 7, 3, 1):
        found = latents.encode(images(num), names(num))
        expected = encoder(tiny_model, 1).encode(images(num), names(num))
        for name, tensor in found.items():
            assert len(tensor) == num
            torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=0.01)
    assert compiled == [4, 1]  # 3 images are filled up to 4


# ---- out of memory ---------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_until_it_fits(tiny_model, monkeypatch):
    expected = encoder(tiny_model, 1).encode(images(5), names(5))
    tried = limited(monkeypatch, lambda num, height, width: num == 1)
    latents = encoder(tiny_model, 5)
    found = latents.encode(images(5), names(5))
    assert torch.equal(found["mean"], expected["mean"])
    assert [num for num, _, _ in tried] == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    tried.clear()
    assert torch.equal(latents.encode(images(5), names(5))["mean"], expected["mean"])
    assert [num for num, _, _ in tried] == [1] * 5  # no failed attempt a second time
    assert latents.tiled == []


def test_what_did_not_fit_is_not_tried_again_for_that_size_alone(tiny_model, monkeypatch):
    tried = limited(monkeypatch, lambda num, height, width: num * height * width <= 2 * 64 * 64)
    latents = encoder(tiny_model, 4)
    for _ in range(2):
        latents.encode(images(6), names(6))
        latents.encode(images(5, (32, 64)), names(5))
    assert [num for num, height, _ in tried if height == 64] == [4, 2, 2, 2, 2, 2, 2]
    assert [num for num, height, _ in tried if height == 32] == [4, 1] * 2


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
    limited(monkeypatch, lambda num, height, width: False)
    with pytest.raises(CacheError) as error:
        encoder(tiny_model, 5).encode(images(5), names(5))
    text = str(error.value)
    assert text.startswith("cpu has too little free memory while encoding one image of 64x64 pixels. ")
    for cure in ("nvidia-smi", "cache.gpus_per_encoder", "dataset.resolution"):
        assert cure in text


def test_an_image_without_room_is_encoded_in_tiles_and_named(tiny_model, monkeypatch):
    monkeypatch.setattr(encode, "_TILES", (8, 4))
    pixels = images(3, (64, 96))
    expected = encoder(tiny_model, 3).encode(pixels, names(3))
    tried = limited(monkeypatch, lambda num, height, width: height * width <= 64 * 64)
    latents = encoder(tiny_model, 3)
    found = latents.encode(pixels, names(3))
    assert tried[:3] == [(3, 64, 96), (1, 64, 96), (1, 64, 64)]  # in halves, then tiles of the larger size
    assert latents.tiled == names(3)
    for name, tensor in found.items():
        assert tensor.shape == (3, 4, 8, 12)
        assert tensor.dtype == torch.bfloat16
        assert (tensor.float() - expected[name].float()).abs().mean() < 0.3 * expected[name].float().std()

    tried = limited(monkeypatch, lambda num, height, width: height * width <= 32 * 32)
    latents.encode(pixels[:1], names(1))
    assert tried == [(1, 64, 96), (1, 64, 64), (1, 32, 32)]
    assert latents.tiled == [*names(3), "0.png"]


def test_no_room_for_the_smallest_tile_either(tiny_model, monkeypatch):
    monkeypatch.setattr(encode, "_TILES", (8, 4))
    limited(monkeypatch, lambda num, height, width: False)
    latents = encoder(tiny_model, 1)
    with pytest.raises(CacheError, match="while encoding one image of 64x96 pixels, even in tiles"):
        latents.encode(images(1, (64, 96)), names(1))
    assert latents.tiled == []


def test_no_memory_for_the_last_try_in_fp32_halves_the_batch_too(tiny_model, monkeypatch):
    def posterior(vae, pixel_values, *, tile=0):
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

    def prompts(encoders, texts, num_chunks):
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError
        return encode_prompts(encoders, texts, num_chunks)

    monkeypatch.setattr(encode, "encode_prompts", prompts)
    found, same_counts = text_encoder.encode(captions)
    assert (sizes, same_counts) == ([3, 1, 2, 1, 1], counts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.01, atol=0.01)


def test_a_latent_that_is_not_finite_is_blamed_on_its_image_also_after_halving(tiny_model, monkeypatch):
    """Image 3 of 0-4 has the brightest pixel; the batch is split twice before it is met."""
    pixels = [np.minimum(image, 250) for image in images(5)]
    pixels[3][0, 0, 0] = 255

    def posterior(vae, pixel_values, *, tile=0):
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


def test_long_captions_are_read_in_chunks(tiny_model):
    captions = ["a cat", "a red roof of an old stone house " * 15]
    text_encoder = TextEncoder(tiny_model, device=CPU, batch_size=0, revision="", variant="", num_chunks=2)
    assert text_encoder.batch_size == 32
    tensors, counts = text_encoder.encode(captions)
    embeds, pooled, expected_counts = encode_prompts(text_encoder.encoders, captions, 2)
    assert tensors["prompt_embeds"].shape == (2, 154, 64)
    assert counts == expected_counts == [4, 122]
    assert torch.equal(tensors["prompt_embeds"], embeds.to(torch.bfloat16))
    assert torch.equal(tensors["pooled_prompt_embeds"], pooled.to(torch.bfloat16))


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


def test_after_an_image_that_only_fp32_can_encode_the_others_are_encoded_as_ever(tiny_model, monkeypatch):
    """Else what a latent is would depend on the images before it."""
    latents = encoder(tiny_model, 1, "bf16")
    expected = latents.encode(images(2)[1:], names(1))

    def posterior(vae, pixel_values, *, tile=0):
        dtypes.append(vae.dtype)
        if len(dtypes) == 1:
            raise NonFiniteLatents([0])
        return encode_posterior(vae, pixel_values, tile=tile)

    dtypes = []
    monkeypatch.setattr(encode, "encode_posterior", posterior)
    found = latents.encode(images(2), names(2))
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert torch.equal(found["mean"][1], expected["mean"][0])
    assert torch.equal(found["std"][1], expected["std"][0])


def test_how_many_fit_is_remembered_for_the_size_that_was_tried(tiny_model, monkeypatch):
    """Each failed attempt costs as much as a batch; wide images are no tall ones."""
    latents = encoder(tiny_model, 4)
    tried = limited(monkeypatch, lambda num, height, width: num <= 2)
    for _ in range(2):
        latents.encode(images(4, (64, 128)), names(4))
    assert tried == [(4, 64, 128), *[(2, 64, 128)] * 4]
