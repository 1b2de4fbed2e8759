"""SDXL at its true size, on the meta device: the published parameter counts prove the configs."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ray.diffusion.schedule import NoiseSchedule
from sdxl_ray.sdxl import architecture
from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter, detach_adapter
from sdxl_ray.sdxl.architecture import build_unet
from sdxl_ray.sdxl.tiny import unet_config

TINY = unet_config()


def num_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def meta_unet():
    return build_unet(dtype=torch.bfloat16, device="meta")


def test_unet_has_the_published_number_of_parameters(meta_unet):
    assert num_parameters(meta_unet) == 2_567_463_684
    assert {parameter.dtype for parameter in meta_unet.parameters()} == {torch.bfloat16}


def test_vae_has_the_published_number_of_parameters():
    with torch.device("meta"):
        vae = AutoencoderKL(**architecture.VAE_CONFIG)
    assert num_parameters(vae) == 83_653_863


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (CLIPTextModel, architecture.TEXT_ENCODER_CONFIG, 123_060_480),
        (CLIPTextModelWithProjection, architecture.TEXT_ENCODER_2_CONFIG, 694_659_840),
    ],
    ids=["text_encoder", "text_encoder_2"],
)
def test_text_encoders_have_the_published_numbers_of_parameters(model, config, expected):
    with torch.device("meta"):
        assert num_parameters(model(CLIPTextConfig(**config))) == expected


def test_text_encoders_and_unet_fit_together():
    widths = [
        config["hidden_size"] for config in (architecture.TEXT_ENCODER_CONFIG, architecture.TEXT_ENCODER_2_CONFIG)
    ]
    unet = architecture.UNET_CONFIG
    assert sum(widths) == unet["cross_attention_dim"]
    pooled = architecture.TEXT_ENCODER_2_CONFIG["projection_dim"]
    assert 6 * unet["addition_time_embed_dim"] + pooled == unet["projection_class_embeddings_input_dim"]


@pytest.mark.parametrize(
    ("targets", "num_modules", "num_parameters"), [("attention", 560, 23_224_320), ("all-linear", 722, 42_557_440)]
)
def test_adapters_of_rank_16(meta_unet, targets, num_modules, num_parameters):
    attach_adapter(meta_unet, rank=16, alpha=16.0, targets=targets)
    parameters = adapter_parameters(meta_unet)
    detach_adapter(meta_unet)
    assert len(parameters) == 2 * num_modules
    assert sum(parameter.numel() for parameter in parameters.values()) == num_parameters


def test_the_schedule_is_sdxls():
    schedule = NoiseSchedule.from_config(architecture.SCHEDULER_CONFIG)
    assert schedule.num_timesteps == 1000
    # the last value of diffusers' scaled_linear schedule: even the noisiest image holds 0.47 % of the signal
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0047, abs=5e-5)


def test_random_weights_are_frozen_seeded_and_of_the_usual_size():
    one, again, other = (build_unet(dtype=torch.float32, device="cpu", seed=seed, config=TINY) for seed in (3, 3, 4))
    assert not one.training and not any(parameter.requires_grad for parameter in one.parameters())
    pairs = list(zip(one.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right in pairs)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)
    assert (one.conv_norm_out.weight == 1).all() and (one.conv_norm_out.bias == 0).all()
    weight = one.down_blocks[1].attentions[0].transformer_blocks[0].ff.net[0].proj.weight
    assert weight.std().item() == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.05)


def test_weights_larger_than_the_pool_are_filled_to_the_end():
    pool = torch.arange(1.0, 8.0)  # 7 numbers
    flat = torch.full((17,), float("nan"))
    assert architecture._fill(flat, pool, 5, scale=2.0) == (5 + 17) % 7
    assert flat.tolist() == [2 * float((5 + place) % 7 + 1) for place in range(17)]
