"""What a module is called: in diffusers, in Stability's sgm code, and in a kohya file.

ComfyUI, A1111, Forge, InvokeAI and kohya know SDXL's U-Net by its sgm names, diffusers by its own. With
L = layers_per_block + 1 (3 in SDXL) the blocks correspond as follows; inside transformer blocks the names are equal.

    diffusers                              sgm
    conv_in                                input_blocks.0.0
    time_embedding.linear_1 / linear_2     time_embed.0 / .2
    add_embedding.linear_1 / linear_2      label_emb.0.0 / .2
    down_blocks.i.resnets.j                input_blocks.{L*i + j + 1}.0
    down_blocks.i.attentions.j             input_blocks.{L*i + j + 1}.1
    down_blocks.i.downsamplers.0.conv      input_blocks.{L*(i + 1)}.0.op
    mid_block.resnets.j                    middle_block.{2*j}
    mid_block.attentions.0                 middle_block.1
    up_blocks.i.resnets.j                  output_blocks.{L*i + j}.0
    up_blocks.i.attentions.j               output_blocks.{L*i + j}.1
    up_blocks.i.upsamplers.0.conv          output_blocks.{L*i + L - 1}.2.conv
    conv_out                               out.2
    in a resnet: conv1                     in_layers.2
                 conv2                     out_layers.3
                 time_emb_proj             emb_layers.1
                 conv_shortcut             skip_connection

A kohya stem is a prefix and the sgm path with `_` for `.`:
`lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`. Norms have no names here: a LoRA cannot change them.

Source: `_maybe_map_sgm_blocks_to_diffusers` and `_convert_unet_lora_key` in diffusers 0.42,
loaders/lora_conversion_utils.py, which read these names; the tests send every module of SDXL through both and expect
it back.
"""

from __future__ import annotations

import re

SDXL_LAYERS_PER_BLOCK = 2

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<inner>.+)"
)


def sgm_path(module_path: str, *, layers_per_block: int = SDXL_LAYERS_PER_BLOCK) -> str:
    """`down_blocks.1.attentions.0.proj_in` is `input_blocks.4.1.proj_in`.

    Raises:
        ValueError: a module that SDXL has not, or that a LoRA cannot change.
    """
    if module_path in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module_path]
    found = _BLOCK.fullmatch(module_path)
    if found is None:
        raise ValueError(f"'{module_path}' is no module of an SDXL U-Net that a LoRA can change")
    block, layer = int(found["block"] or 0), int(found["layer"])
    side, kind, inner = found["side"] or "mid", found["kind"], found["inner"]
    if kind == "resnets":
        if inner not in _IN_RESNET:
            raise ValueError(
                f"'{module_path}': no sgm name for '{inner}' in a resnet, known are {', '.join(_IN_RESNET)}"
            )
        inner = _IN_RESNET[inner]

    stride = layers_per_block + 1
    match side, kind:
        case "down", "resnets":
            return f"input_blocks.{stride * block + layer + 1}.0.{inner}"
        case "down", "attentions":
            return f"input_blocks.{stride * block + layer + 1}.1.{inner}"
        case "down", "downsamplers" if inner == "conv":
            return f"input_blocks.{stride * (block + 1)}.0.op"
        case "mid", "resnets":
            return f"middle_block.{2 * layer}.{inner}"
        case "mid", "attentions":
            return f"middle_block.1.{inner}"
        case "up", "resnets":
            return f"output_blocks.{stride * block + layer}.0.{inner}"
        case "up", "attentions":
            return f"output_blocks.{stride * block + layer}.1.{inner}"
        case "up", "upsamplers" if inner == "conv":
            return f"output_blocks.{stride * block + layers_per_block}.2.conv"
    raise ValueError(f"'{module_path}' is no module of an SDXL U-Net that a LoRA can change")


def unet_stem(module_path: str, *, layers_per_block: int = SDXL_LAYERS_PER_BLOCK) -> str:
    """The kohya name of a U-Net module: `lora_unet_` and its sgm path, flattened."""
    return "lora_unet_" + sgm_path(module_path, layers_per_block=layers_per_block).replace(".", "_")


def text_encoder_stem(module_path: str, *, encoder: int) -> str:
    """The kohya name of a module in text encoder 1 or 2, always with `text_model_`.

    transformers >= 5.6 flattened `CLIPTextModel` (text encoder 1: `encoder.layers.0...`) and left
    `CLIPTextModelWithProjection` (text encoder 2) as it was. Files keep the old name: ComfyUI, A1111 and InvokeAI know
    no other. `text_projection` lies outside the text model in both.
    """
    if encoder not in (1, 2):
        raise ValueError(f"SDXL has text encoders 1 and 2, not {encoder}")
    if not module_path.startswith(("text_model.", "text_projection")):
        module_path = f"text_model.{module_path}"
    return f"lora_te{encoder}_" + module_path.replace(".", "_")
