"""Names of a whole model in one file, against diffusers' own readers of such files."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ray.export.single_file_names import (
    PREFIXES,
    canonical_text_name,
    single_file_tensors,
    unet_name,
    vae_name,
    vae_tensors,
)
from sdxl_ray.export.tensor_file import LazyTensor, lazy
from sdxl_ray.sdxl.architecture import TEXT_ENCODER_2_CONFIG, TEXT_ENCODER_CONFIG, UNET_CONFIG, VAE_CONFIG


@pytest.fixture(scope="module")
def true_parts():
    """Every weight of SDXL by name and shape, without memory."""
    with torch.device("meta"):
        found = {
            "unet": UNet2DConditionModel(**UNET_CONFIG),
            "vae": AutoencoderKL(**VAE_CONFIG),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER_CONFIG)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2_CONFIG)),
        }
    parts = {part: {name: lazy(tensor) for name, tensor in model.state_dict().items()} for part, model in found.items()}
    for part in ("text_encoder", "text_encoder_2"):
        parts[part] = {canonical_text_name(name): tensor for name, tensor in parts[part].items()}
    return parts


def test_there_are_as_many_tensors_as_in_sd_xl_base(true_parts):
    """sd_xl_base_1.0.safetensors: 2515 tensors."""
    names = list(single_file_tensors(true_parts))
    counts = {part: sum(name.startswith(prefix) for name in names) for part, prefix in PREFIXES.items()}
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 390}
    assert len(names) == len(set(names)) == 2515


def test_every_weight_of_sdxl_comes_back_under_its_own_name(true_parts):
    file = {name: tensor.make() for name, tensor in single_file_tensors(true_parts).items()}
    found = {
        "unet": convert_ldm_unet_checkpoint(file, UNET_CONFIG),
        "vae": convert_ldm_vae_checkpoint(file, VAE_CONFIG),
        "text_encoder": convert_ldm_clip_checkpoint(file),
        "text_encoder_2": convert_open_clip_checkpoint(None, file, prefix=PREFIXES["text_encoder_2"]),
    }
    found["text_encoder"].pop("text_model.embeddings.position_ids")
    for part, weights in true_parts.items():
        assert {name: tuple(tensor.shape) for name, tensor in found[part].items()} == {
            name: weight.shape for name, weight in weights.items()
        }


def test_announced_shapes_are_those_that_are_made(true_parts):
    for name, tensor in single_file_tensors(true_parts).items():
        made = tensor.make()
        assert tuple(made.shape) == tensor.shape and made.dtype == tensor.dtype, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("down_blocks.1.resnets.0.norm1.weight", "input_blocks.4.0.in_layers.0.weight"),
        ("mid_block.resnets.1.norm2.bias", "middle_block.2.out_layers.0.bias"),
        ("up_blocks.0.attentions.2.norm.weight", "output_blocks.2.1.norm.weight"),
        ("up_blocks.0.upsamplers.0.conv.bias", "output_blocks.2.2.conv.bias"),
        ("conv_norm_out.weight", "out.0.weight"),
    ],
)
def test_unet_names_as_published_checkpoints_have_them(name, expected):
    assert unet_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.down_blocks.2.resnets.0.conv_shortcut.weight", "encoder.down.2.block.0.nin_shortcut.weight"),
        ("encoder.down_blocks.1.downsamplers.0.conv.bias", "encoder.down.1.downsample.conv.bias"),
        ("decoder.up_blocks.0.resnets.2.norm1.weight", "decoder.up.3.block.2.norm1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
        ("decoder.mid_block.resnets.1.conv1.weight", "decoder.mid.block_2.conv1.weight"),
        ("encoder.mid_block.attentions.0.to_out.0.bias", "encoder.mid.attn_1.proj_out.bias"),
        ("encoder.mid_block.attentions.0.query.weight", "encoder.mid.attn_1.q.weight"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_vae_names_as_published_checkpoints_have_them(name, expected):
    assert vae_name(name) == expected


def test_attention_of_old_vae_folders_is_a_convolution_already():
    name = "decoder.mid_block.attentions.0.query.weight"
    weights = {name: lazy(torch.ones(8, 8, 1, 1)), "decoder.up_blocks.3.resnets.0.conv1.weight": lazy(torch.ones(1))}
    assert vae_tensors(weights)["decoder.mid.attn_1.q.weight"].make().shape == (8, 8, 1, 1)


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0.norm3.weight", "class_embedding.weight"])
def test_a_weight_that_sdxl_has_not_is_refused(name):
    with pytest.raises(ValueError, match=r"is no module of an SDXL U-Net|no sgm name for 'norm3'"):
        unet_name(name)
    with pytest.raises(ValueError, match="is no weight of SDXL's VAE"):
        vae_name(name)


def test_q_k_v_lie_one_below_the_other_and_the_projection_is_transposed():
    size = 4
    layer = "text_model.encoder.layers.0.self_attn"
    weights = {f"{layer}.{letter}_proj.weight": torch.full((size, size), float(i)) for i, letter in enumerate("qkv")}
    weights |= {f"{layer}.{letter}_proj.bias": torch.full((size,), float(i)) for i, letter in enumerate("qkv")}
    weights["text_projection.weight"] = torch.arange(8.0).reshape(2, 4)
    from sdxl_ray.export.single_file_names import open_clip_tensors

    found = open_clip_tensors({name: lazy(tensor) for name, tensor in weights.items()})
    assert torch.equal(
        found["transformer.resblocks.0.attn.in_proj_weight"].make()[:, 0],
        torch.tensor([0.0] * 4 + [1.0] * 4 + [2.0] * 4),
    )
    assert torch.equal(
        found["transformer.resblocks.0.attn.in_proj_bias"].make(), torch.tensor([0.0] * 4 + [1.0] * 4 + [2.0] * 4)
    )
    assert torch.equal(found["text_projection"].make(), torch.arange(8.0).reshape(2, 4).T)
    with pytest.raises(ValueError, match="no weight of SDXL's text encoder 2"):
        open_clip_tensors(
            {"text_model.encoder.layers.0.norm.weight": LazyTensor((1,), torch.float32, lambda: torch.ones(1))}
        )
