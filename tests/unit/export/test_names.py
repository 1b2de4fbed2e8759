"""Our names against diffusers' own reader: every module of SDXL must come back as itself."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

from sdxl_ray.export.names import sgm_path, text_encoder_stem, unet_stem

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ONE_LAYER = {**SDXL, "layers_per_block": 1}
TWO_BLOCKS = {
    **SDXL,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
}


def unet_on_meta(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("config", [SDXL, ONE_LAYER, TWO_BLOCKS], ids=["sdxl", "one layer a block", "two blocks"])
def test_every_module_survives_the_way_through_diffusers_reader(config):
    unet = unet_on_meta(config)
    paths = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    file = {}
    for number, path in enumerate(paths):
        stem = unet_stem(path, layers_per_block=unet.config.layers_per_block)
        file[f"{stem}.lora_down.weight"] = torch.tensor(number)
        file[f"{stem}.lora_up.weight"] = torch.tensor(number)
    assert len(file) == 2 * len(paths), "two modules share a name"

    state, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(file), unet.config))
    read = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})

    assert {key.removesuffix(".lora_A.weight"): int(value) for key, value in read.items() if "lora_A" in key} == {
        path: number for number, path in enumerate(paths)
    }


@pytest.mark.parametrize(
    ("module_path", "expected"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
    ],
)
def test_names_as_published_checkpoints_have_them(module_path, expected):
    assert sgm_path(module_path) == expected


def test_kohya_stem():
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert unet_stem(path) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("path", ["down_blocks.0.resnets.0.norm1", "conv_norm_out", "up_blocks.0.upsamplers.0.norm"])
def test_a_module_without_a_name_is_refused(path):
    with pytest.raises(ValueError, match=path):
        unet_stem(path)


@pytest.mark.parametrize("path", ["encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"])
def test_text_encoder_names_are_the_same_under_every_transformers(path):
    assert text_encoder_stem(path, encoder=1) == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert text_encoder_stem(path, encoder=2) == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


def test_text_projection_lies_outside_the_text_model():
    assert text_encoder_stem("text_projection", encoder=2) == "lora_te2_text_projection"
