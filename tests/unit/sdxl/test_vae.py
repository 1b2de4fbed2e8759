import pytest
import torch

from sdxl_ray.sdxl.components import load_vae
from sdxl_ray.sdxl.vae import NonFiniteLatents, decode_latents, encode_posterior, pixels_from_uint8, sample_latents


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_posterior_is_diffusers_times_the_scaling_factor(vae, pixel_values):
    mean, std = encode_posterior(vae, pixel_values)
    expected = vae.encode(pixel_values).latent_dist
    assert mean.shape == std.shape == (2, 4, 6, 8)
    torch.testing.assert_close(mean, expected.mean * vae.config.scaling_factor)
    torch.testing.assert_close(std, expected.std * vae.config.scaling_factor)


def test_a_draw_is_diffusers_draw(vae, pixel_values):
    mean, std = encode_posterior(vae, pixel_values)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = vae.encode(pixel_values).latent_dist.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    torch.testing.assert_close(sample_latents(mean, std, noise), drawn)
    assert torch.equal(sample_latents(mean, std, torch.zeros_like(noise)), mean)


def test_bf16_vae_gives_float32_near_the_fp32_one(tiny_model, vae, pixel_values):
    mean, std = encode_posterior(load_vae(tiny_model, dtype=torch.bfloat16), pixel_values)
    expected_mean, expected_std = encode_posterior(vae, pixel_values)
    assert mean.dtype == std.dtype == torch.float32
    assert (mean - expected_mean).abs().max() < 0.1 * expected_mean.std()
    assert (std - expected_std).abs().max() < 0.1 * expected_std.mean()


def test_non_finite_rows_are_named(vae, pixel_values):
    broken = torch.cat([pixel_values, pixel_values])
    broken[1, 0, 3, 3] = torch.nan
    broken[3] = torch.inf
    for tile in (0, 4):
        with pytest.raises(NonFiniteLatents, match=r"non-finite latents for images \[1, 3\] of the batch") as error:
            encode_posterior(vae, broken, tile=tile)
        assert error.value.indices == [1, 3]


def test_fp16_overflow_is_an_error_not_zeros(tiny_model, pixel_values):
    """Trap: SDXL's VAE overflows in fp16. An infinite log variance would be clamped away by diffusers."""
    vae = load_vae(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        vae.quant_conv.bias[4:].fill_(torch.inf)
    with pytest.raises(NonFiniteLatents):
        encode_posterior(vae, pixel_values)


def test_latent_statistics_of_the_config_are_used_both_ways(tiny_model, pixel_values):
    vae = load_vae(tiny_model, dtype=torch.float32)
    plain_mean, plain_std = encode_posterior(vae, pixel_values)
    images = decode_latents(vae, plain_mean)
    shift, spread = [0.5, -1.0, 2.0, 0.0], [2.0, 1.0, 4.0, 0.5]
    vae.register_to_config(latents_mean=shift, latents_std=spread)
    mean, std = encode_posterior(vae, pixel_values)
    channel = torch.tensor(spread).view(1, 4, 1, 1)
    offset = torch.tensor(shift).view(1, 4, 1, 1) * vae.config.scaling_factor
    torch.testing.assert_close(mean, (plain_mean - offset) / channel)
    torch.testing.assert_close(std, plain_std / channel)
    assert (decode_latents(vae, mean).int() - images.int()).abs().max() <= 1


def test_pixels_cover_the_range():
    images = torch.tensor([[[[0, 127, 255], [255, 0, 128]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    pixel_values = pixels_from_uint8(images)
    assert pixel_values.shape == (1, 3, 1, 2)
    assert pixel_values.dtype == torch.float32
    assert pixel_values[0, :, 0, 0].tolist() == pytest.approx([-1, -1 / 255, 1])


def test_decode_equals_diffusers_postprocessing(vae, pipeline):
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    ours = decode_latents(vae, latents)
    assert ours.shape == (2, 32, 48, 3)
    assert (ours.numpy() == (expected * 255).round().astype("uint8")).all()
