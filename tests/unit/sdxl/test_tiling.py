import itertools

import pytest
import torch

from sdxl_ray.sdxl.tiling import OVERLAP, TILE, decode_in_tiles, encode_in_tiles, tile_starts
from sdxl_ray.sdxl.vae import decode_latents, encode_posterior


@pytest.mark.parametrize("length", [1, 63, 64, 65, 80, 104, 112, 128, 129, 192, 256, 1000])
def test_tiles_cover_everything_with_enough_overlap(length):
    starts = tile_starts(length)
    assert starts[0] == 0
    assert starts[-1] + min(TILE, length) == length
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < step <= TILE - OVERLAP for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1


@pytest.mark.parametrize("height_width", [(128, 128), (80, 192), (104, 152), (40, 30)])
def test_a_decoder_that_sees_one_pixel_at_a_time_gives_the_whole_image(height_width):
    """What the cross-fades do to any image: nothing, where the tiles agree."""
    latents = torch.randn(1, 4, *height_width, generator=torch.Generator().manual_seed(0))
    seen = []

    def decode(part):
        seen.append(tuple(part.shape[-2:]))
        return torch.nn.functional.interpolate(part[:, :3], scale_factor=8)

    torch.testing.assert_close(decode_in_tiles(decode, latents), decode(latents), rtol=1e-6, atol=1e-6)
    assert set(seen[:-1]) == {tuple(min(TILE, length) for length in height_width)}  # no narrow rest


def decode_with_little_memory(vae, latents, monkeypatch, largest):
    """`decode_latents` on an accelerator that has room for `largest` latent pixels; and the sizes that were tried."""
    tried, decode = [], vae.decode

    def limited(part):
        tried.append(tuple(part.shape[-2:]))
        if part.shape[-2] * part.shape[-1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(part)

    monkeypatch.setattr(vae, "decode", limited)
    return decode_latents(vae, latents), tried


def test_tiles_where_the_whole_does_not_fit_and_only_there(vae, monkeypatch):
    latents = 0.5 * torch.randn(1, 4, 80, 96, generator=torch.Generator().manual_seed(0))
    whole = decode_latents(vae, latents)
    image, tried = decode_with_little_memory(vae, latents, monkeypatch, largest=80 * 96)
    assert torch.equal(image, whole)
    assert tried == [(80, 96)]
    tiled, tried = decode_with_little_memory(vae, latents, monkeypatch, largest=64 * 64)
    assert tried == [(80, 96)] + 4 * [(64, 64)]
    assert tiled.shape == whole.shape
    # these latents have the same statistics everywhere, so that a tile's group norms are nearly the image's
    difference = (tiled.int() - whole.int()).abs().float()
    assert difference.mean() < 0.1 * whole.float().std()


def test_no_room_for_a_tile_either(vae, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        decode_with_little_memory(vae, torch.zeros(1, 4, 80, 80), monkeypatch, largest=100)


# ---- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height_width", [(128, 128), (80, 192), (104, 152), (40, 30)])
def test_an_encoder_that_sees_one_cell_at_a_time_gives_the_whole_latent(height_width):
    pixel_values = torch.randn(
        2, 3, *(8 * length for length in height_width), generator=torch.Generator().manual_seed(0)
    )
    seen = []

    def encode(part):
        seen.append(tuple(part.shape[-2:]))
        return torch.nn.functional.avg_pool2d(part, 8)

    tiled = encode_in_tiles(encode, pixel_values)
    torch.testing.assert_close(tiled, encode(pixel_values), rtol=1e-6, atol=1e-6)
    assert set(seen[:-1]) == {tuple(8 * min(TILE, length) for length in height_width)}


def test_a_latent_from_tiles_is_near_the_whole_ones(vae):
    """A picture with the same statistics everywhere, so that a tile's group norms are nearly the image's.

    A tile in a wrong place would differ by more than a whole standard deviation.
    """
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, 40, 48, generator=generator) * 2 - 1
    pixel_values = torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear")
    mean, std = encode_posterior(vae, pixel_values)
    tiled_mean, tiled_std = encode_posterior(vae, pixel_values, tile=24)
    assert tiled_mean.shape == mean.shape == (1, 4, 40, 48)
    assert (tiled_mean - mean).abs().mean() < 0.2 * mean.std()
    assert (tiled_std - std).abs().mean() < 0.2 * std.mean()


def test_one_tile_is_the_whole_image(vae):
    pixel_values = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for whole, tiled in zip(
        encode_posterior(vae, pixel_values), encode_posterior(vae, pixel_values, tile=12), strict=True
    ):
        torch.testing.assert_close(tiled, whole)
