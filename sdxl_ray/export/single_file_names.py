"""A whole SDXL in one file: what each weight is called in Stability's layout, and how it lies there.

    part of the diffusers layout    prefix in the file                           names below it
    unet                            model.diffusion_model.                       sgm's, see `names`
    vae                             first_stage_model.                           latent diffusion's, below
    text_encoder   (CLIP-L)         conditioner.embedders.0.transformer.         transformers', with `text_model.`
    text_encoder_2 (OpenCLIP bigG)  conditioner.embedders.1.model.               OpenCLIP's, below

    diffusers' VAE                        latent diffusion's
    encoder.down_blocks.i.resnets.j       encoder.down.i.block.j                 conv_shortcut is nin_shortcut
    encoder.down_blocks.i.downsamplers.0  encoder.down.i.downsample
    decoder.up_blocks.i.resnets.j         decoder.up.{n-1-i}.block.j             counted from the other end
    decoder.up_blocks.i.upsamplers.0      decoder.up.{n-1-i}.upsample
    mid_block.resnets.j                   mid.block_{j+1}
    mid_block.attentions.0                mid.attn_1: norm, q, k, v, proj_out    1x1 convolutions: (out, in, 1, 1)
    conv_norm_out                         norm_out

    transformers' CLIP                    OpenCLIP's
    embeddings.token_embedding.weight     token_embedding.weight
    embeddings.position_embedding.weight  positional_embedding
    encoder.layers.i                      transformer.resblocks.i: ln_1, ln_2, mlp.c_fc, mlp.c_proj, attn.out_proj
    self_attn.q_proj, k_proj, v_proj      attn.in_proj_weight, attn.in_proj_bias: the three, one below the other
    final_layer_norm                      ln_final
    text_projection.weight (out, in)      text_projection (in, out)

sd_xl_base_1.0.safetensors has 2515 tensors: 1680, 248, 197 and 390. Two of them no folder holds: the text model's
`position_ids`, 0 to 76, and OpenCLIP's `logit_scale`, which only its image side uses. Readers that load strictly ask
for both.

Source: the reading side in diffusers 0.42, loaders/single_file_utils.py (`convert_ldm_unet_checkpoint`,
`convert_ldm_vae_checkpoint`, `convert_ldm_clip_checkpoint`, `convert_open_clip_checkpoint`); the tests send every
weight of SDXL through them and expect it back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdxl_ray.export.names import SDXL_LAYERS_PER_BLOCK, sgm_path
from sdxl_ray.export.tensor_file import LazyTensor, lazy

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
# ln(100), where OpenCLIP's training clips it; SDXL's text side never reads it.
_LOGIT_SCALE = math.log(100.0)

_UNET_NORMS = {"norm1": ("conv1", "in_layers.2", "in_layers.0"), "norm2": ("conv2", "out_layers.3", "out_layers.0")}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # what diffusers called them before 0.17, as many VAE folders still do
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_IN_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(?P<layer>\d+)\.(?P<inner>.+)\.(?P<leaf>weight|bias)")


def single_file_tensors(
    parts: Mapping[str, Mapping[str, LazyTensor]], *, layers_per_block: int = SDXL_LAYERS_PER_BLOCK
) -> dict[str, LazyTensor]:
    """All weights under their names in the file, in its shapes; nothing is computed yet.

    Args:
        parts: unet, vae, text_encoder and text_encoder_2, each with its weights under the names of the diffusers
            layout; those of the text encoders with `text_model.`, as `canonical_text_name` makes them.

    Raises:
        ValueError: a weight that SDXL has not.
    """
    unet = {unet_name(name, layers_per_block=layers_per_block): weight for name, weight in parts["unet"].items()}
    found = {
        "unet": unet,
        "vae": vae_tensors(parts["vae"]),
        "text_encoder": clip_tensors(parts["text_encoder"]),
        "text_encoder_2": open_clip_tensors(parts["text_encoder_2"]),
    }
    return {PREFIXES[part] + name: weight for part, weights in found.items() for name, weight in weights.items()}


def unet_name(name: str, *, layers_per_block: int = SDXL_LAYERS_PER_BLOCK) -> str:
    """`down_blocks.1.resnets.0.norm1.weight` is `input_blocks.4.0.in_layers.0.weight`. ValueError: not SDXL's."""
    path, _, leaf = name.rpartition(".")
    if path == "conv_norm_out":
        return f"out.0.{leaf}"
    owner, _, last = path.rpartition(".")
    if last in _UNET_NORMS and re.search(r"\.resnets\.\d+$", owner):
        beside, its_name, own_name = _UNET_NORMS[last]
        module = sgm_path(f"{owner}.{beside}", layers_per_block=layers_per_block)
        return f"{module.removesuffix(its_name)}{own_name}.{leaf}"
    return f"{sgm_path(path, layers_per_block=layers_per_block)}.{leaf}"


def vae_tensors(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The VAE's weights under latent diffusion's names; attention's matrices become 1x1 convolutions."""
    num_levels = 1 + max(int(level[1]) for name in weights if (level := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    found = {}
    for name, weight in weights.items():
        new_name = vae_name(name, num_levels=num_levels)
        if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", new_name) and len(weight.shape) == 2:
            weight = LazyTensor((*weight.shape, 1, 1), weight.dtype, _as_convolution(weight))
        found[new_name] = weight
    return found


def vae_name(name: str, *, num_levels: int = 4) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` is `decoder.up.3.block.1.conv1.weight`. ValueError: not a VAE's."""
    path, _, leaf = name.rpartition(".")
    side, _, rest = path.partition(".")
    if side in ("quant_conv", "post_quant_conv") and not rest:
        return name
    if side in ("encoder", "decoder") and (inner := _inside_vae(rest, num_levels)):
        return f"{side}.{inner}.{leaf}"
    raise ValueError(f"'{name}' is no weight of SDXL's VAE")


def _inside_vae(path: str, num_levels: int) -> str | None:
    if path in ("conv_in", "conv_out", "conv_norm_out"):
        return path.replace("conv_norm_out", "norm_out")
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(\w+)", path)
    if block:
        side, number, kind, layer, inner = block.groups()
        level = f"{side}.{number if side == 'down' else num_levels - 1 - int(number)}"
        if kind == "resnets":
            return f"{level}.block.{layer}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{level}.{kind.removesuffix('rs')}.{inner}"  # "downsamplers" is "downsample" with "rs"
    middle = re.fullmatch(r"mid_block\.resnets\.(\d+)\.(\w+)", path)
    if middle:
        return f"mid.block_{int(middle[1]) + 1}.{middle[2].replace('conv_shortcut', 'nin_shortcut')}"
    attention = re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path)
    if attention and attention[1] in _VAE_ATTENTION:
        return f"mid.attn_1.{_VAE_ATTENTION[attention[1]]}"
    return None


def canonical_text_name(name: str) -> str:
    """The name with `text_model.`, which transformers >= 5.6 leaves out in text encoder 1 and files keep."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def clip_tensors(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Text encoder 1, which keeps its names; with the `position_ids` (1, 77) int64 of the original file."""
    num_positions = weights["text_model.embeddings.position_embedding.weight"].shape[0]
    position_ids = lazy(torch.arange(num_positions)[None])
    return {"text_model.embeddings.position_ids": position_ids, **_without_position_ids(weights)}


def open_clip_tensors(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Text encoder 2 under OpenCLIP's names: q, k, v one below the other, the projection transposed."""
    found: dict[str, LazyTensor] = {}
    for name, weight in _without_position_ids(weights).items():
        layer = _OPEN_CLIP_LAYER.fullmatch(name)
        if name in _OPEN_CLIP:
            found[_OPEN_CLIP[name]] = weight
        elif name == "text_projection.weight":
            found["text_projection"] = LazyTensor(weight.shape[::-1], weight.dtype, _transposed(weight))
        elif layer and layer["inner"] in _IN_OPEN_CLIP_BLOCK:
            block = f"transformer.resblocks.{layer['layer']}"
            found[f"{block}.{_IN_OPEN_CLIP_BLOCK[layer['inner']]}.{layer['leaf']}"] = weight
        elif layer and layer["inner"] == "self_attn.q_proj":
            three = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            rows = sum(one.shape[0] for one in three)
            stacked = LazyTensor((rows, *weight.shape[1:]), weight.dtype, _stacked(three))
            found[f"transformer.resblocks.{layer['layer']}.attn.in_proj_{layer['leaf']}"] = stacked
        elif not layer or layer["inner"] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"'{name}' is no weight of SDXL's text encoder 2")
    found["logit_scale"] = lazy(torch.tensor(_LOGIT_SCALE))
    return found


def _without_position_ids(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Old folders hold them, new ones do not."""
    return {name: weight for name, weight in weights.items() if not name.endswith(".position_ids")}


def _as_convolution(weight: LazyTensor) -> Callable[[], Tensor]:
    return lambda: weight.make()[:, :, None, None]


def _transposed(weight: LazyTensor) -> Callable[[], Tensor]:
    return lambda: weight.make().T.contiguous()


def _stacked(weights: list[LazyTensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([weight.make() for weight in weights])
