"""A LoRA file of any trainer, as factors under the names of this program's modules: to go on training from it.

    names                                                    written by
    lora_unet_input_blocks_4_1_...   .lora_down.weight       kohya, ai-toolkit, OneTrainer, this trainer
    lora_unet_down_blocks_1_...                              OneTrainer (legacy), diffusers' converter
    lora_te1_text_model_encoder_...                          all of them, for text encoder 1; lora_te2_ for 2
    unet.down_blocks.1....           .lora_A.weight          diffusers with peft; alpha in the header
                                     .lora.down.weight       diffusers before peft
    unet.....processor.to_q_lora.down.weight                 diffusers' first LoRAs
    text_encoder. , text_encoder_2.  .lora_linear_layer.     diffusers, text encoders
    diffusion_model.input_blocks.4.1....                     ComfyUI's own: sgm's names as they are, any of these ends
    text_encoders.clip_l.transformer.text_model....          the same of text encoder 1, clip_g of 2
    base_model.model.down_blocks.1....                       peft's save_pretrained, of a U-Net; alpha in the file
                                                             adapter_config.json beside it

The factor on up @ down is alpha / rank, per module. A file without alpha means alpha = rank.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ray.errors import ModelError
from sdxl_ray.export.names import unet_stem

Factors = dict[str, tuple[Tensor, Tensor, float]]

_OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a LoCon with a Tucker core",
    "boft_": "a BOFT",  # before oft_, which is in it
    "oft_": "an OFT",
    ".diff": "a full difference of weights",
}
_KOHYA = re.compile(r"(?P<stem>lora_(?P<part>unet|te1|te2)_\w+)\.(?P<leaf>lora_down\.weight|lora_up\.weight|alpha)")
_KOHYA_PARTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
_IN_TEXT_LAYER = {
    "self_attn_q_proj": "self_attn.q_proj",
    "self_attn_k_proj": "self_attn.k_proj",
    "self_attn_v_proj": "self_attn.v_proj",
    "self_attn_out_proj": "self_attn.out_proj",
    "mlp_fc1": "mlp.fc1",
    "mlp_fc2": "mlp.fc2",
}
# Ends of dotted names: (what it is, and what is left of the module's name).
_DOTTED_ENDS = (
    (".lora_A.weight", "down", ""),
    (".lora_B.weight", "up", ""),
    (".lora_A.default.weight", "down", ""),  # peft's state_dict(), with the adapter's name
    (".lora_B.default.weight", "up", ""),
    (".lora_down.weight", "down", ""),
    (".lora_up.weight", "up", ""),
    (".lora.down.weight", "down", ""),
    (".lora.up.weight", "up", ""),
    (".lora_linear_layer.down.weight", "down", ""),
    (".lora_linear_layer.up.weight", "up", ""),
    *((f".to_{letter}_lora.{end}.weight", end, f".to_{letter}") for letter in "qkv" for end in ("down", "up")),
    *((f".to_out_lora.{end}.weight", end, ".to_out.0") for end in ("down", "up")),
    (".alpha", "alpha", ""),
)
# Beginnings of dotted names -> part.
_DOTTED_BEGINNINGS = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_COMFY_UNET = "diffusion_model."
_PEFT = "base_model.model."
_OLD_TEXT_NAMES = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out.0": ".out_proj"}


def read_lora(path: Path, *, unet_config: Mapping[str, Any]) -> dict[str, Factors]:
    """`{part: {module path: (down, up, scale)}}`: the update of a module's weight is scale * up @ down.

    down is (r, in[, k, k]) and up (out, r[, 1, 1]), as in the file; parts are unet, text_encoder and text_encoder_2,
    those that the file has. Module paths are those of the models as diffusers and this transformers load them. Modules
    whose up is zero are left out: they change nothing, and kohya's files have such for the last layer of text encoder
    1, which SDXL does not read.

    Args:
        unet_config: of the U-Net at hand, from which its modules' names follow.

    Raises:
        ModelError: not a readable file, not a LoRA, or not one of this model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} cannot be read as a safetensors file ({error}). Check the path, and copy or fetch the file again."
        ) from error
    _refuse_other_kinds(path, tensors)
    _refuse_embeddings(path, tensors)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    in_unet = _unet_modules(unet_config)
    stems = _unet_stems(in_unet, unet_config["layers_per_block"])
    for key, tensor in tensors.items():
        place = _kohya_place(key, stems) or _dotted_place(key, stems)
        if place is None:
            unknown.append(key)
            continue
        part, module_path, what = place
        found.setdefault((part, _as_loaded(part, module_path)), {})[what] = tensor
    if unknown and unknown[0].startswith(_PEFT):
        raise ModelError(
            f"{path} is a file of peft's save_pretrained ('{unknown[0]}'), of something else than this U-Net: which of "
            "SDXL's text encoders, such a file does not say. Write it again with diffusers' save_lora_weights, which "
            "names the part, and set adapter.start_from to that."
        )
    strange = [f"{part}.{name}" for part, name in found if part == "unet" and name not in in_unet]
    if unknown or strange or not found:
        raise ModelError(
            f"{path} is not a LoRA of this model: of {len(tensors)} tensors, {len(unknown)} have names that mean "
            f"nothing here{_such_as(unknown)}, and {len(strange)} modules are not in the model{_such_as(strange)}. "
            "Expected lora_unet_..., lora_te1_..., lora_te2_... (kohya), unet...., text_encoder.... (diffusers) or "
            "diffusion_model...., text_encoders.... (ComfyUI) of an SDXL. Set adapter.start_from to another file, "
            "or to nothing."
        )
    is_pefts = any(key.startswith(_PEFT) for key in tensors)
    alphas = _peft_alphas(path) if is_pefts else _header_alphas(path, header)
    parts: dict[str, Factors] = {}
    for (part, module_path), one in found.items():
        if one.keys() == {"alpha"}:  # changes nothing
            continue
        if "down" not in one or "up" not in one or one["down"].shape[0] != one["up"].shape[1]:
            shapes = {what: tuple(tensor.shape) for what, tensor in one.items()}
            raise ModelError(
                f"{path}: {part}.{module_path} is not whole: expected a down (r, in) and an up (out, r), found "
                f"{shapes}. Copy or fetch the file again."
            )
        if not one["up"].any():
            continue
        rank = one["down"].shape[0]
        scale = float(one["alpha"]) / rank if "alpha" in one else alphas.scale(part, module_path, rank)
        parts.setdefault(part, {})[module_path] = (one["down"], one["up"], scale)
    return parts


def _refuse_other_kinds(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise ModelError(
                    f"{path} holds {kind} ('{key}'), and adapter.start_from takes a plain LoRA: lora_down and lora_up, "
                    "or lora_A and lora_B. Go on from a file in the format kohya-svd, or from the run's checkpoint "
                    "(`sdxl-ray train RUN --resume`), or merge it into the base model and set model.path to that."
                )


def _refuse_embeddings(path: Path, keys: Iterable[str]) -> None:
    embedding = next((key for key in keys if key.startswith("bundle_emb.")), None)
    if embedding:
        raise ModelError(
            f"{path} is a LoRA of OneTrainer with embeddings of its own words in it ('{embedding}'), which cannot be "
            "trained on here. Save it there with the switch Bundle Embeddings off, in the kohya format, and set "
            "adapter.start_from to that."
        )


def _unet_modules(unet_config: Mapping[str, Any]) -> set[str]:
    """Paths of the U-Net's modules that have a weight matrix. It is built without its weights, within a second."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    return {name.removesuffix(".weight") for name, weight in unet.named_parameters() if weight.ndim >= 2}


def _unet_stems(module_paths: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Kohya's names of the U-Net's modules, in sgm's and in diffusers' words: `_` for `.` cannot be undone."""
    stems = {}
    for module_path in module_paths:
        stems["lora_unet_" + module_path.replace(".", "_")] = module_path
        try:
            stems[unet_stem(module_path, layers_per_block=layers_per_block)] = module_path
        except ValueError:  # an embedding of another kind of U-Net: no kohya file has it
            continue
    return stems


def _kohya_place(key: str, stems: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(part, module path, down | up | alpha)"""
    name = _KOHYA.fullmatch(key)
    if name is None:
        return None
    what = name["leaf"].removeprefix("lora_").removesuffix(".weight")
    part = _KOHYA_PARTS[name["part"]]
    if part == "unet":
        return (part, stems[name["stem"]], what) if name["stem"] in stems else None
    inside = name["stem"].removeprefix(f"lora_{name['part']}_").removeprefix("text_model_")
    if inside == "text_projection":
        return part, inside, what
    layer = re.fullmatch(r"encoder_layers_(\d+)_(\w+)", inside)
    if layer is None or layer[2] not in _IN_TEXT_LAYER:
        return None
    return part, f"text_model.encoder.layers.{layer[1]}.{_IN_TEXT_LAYER[layer[2]]}", what


def _dotted_place(key: str, stems: Mapping[str, str]) -> tuple[str, str, str] | None:
    for beginning, in_place in ((_COMFY_UNET, _in_comfys_unet), (_PEFT, _in_pefts_unet)):
        if key.startswith(beginning):
            place = _split_end("unet", key.removeprefix(beginning))
            module_path = place and in_place(place[1], stems)
            return ("unet", module_path, place[2]) if place and module_path else None
    for beginning, part in _DOTTED_BEGINNINGS.items():
        if key.startswith(beginning):
            return _split_end(part, key.removeprefix(beginning))
    return None


def _in_comfys_unet(sgm: str, stems: Mapping[str, str]) -> str | None:
    return stems.get("lora_unet_" + sgm.replace(".", "_"))


def _in_pefts_unet(name: str, stems: Mapping[str, str]) -> str | None:
    module_path = name.removeprefix("unet.")
    return module_path if stems.get("lora_unet_" + module_path.replace(".", "_")) == module_path else None


def _split_end(part: str, rest: str) -> tuple[str, str, str] | None:
    rest = f".{rest}".replace(".processor.", ".")
    for end, what, instead in _DOTTED_ENDS:
        if rest.endswith(end) and len(rest) > len(end):
            module_path = rest.removesuffix(end) + instead
            if part != "unet":
                for old, new in _OLD_TEXT_NAMES.items():
                    module_path = module_path.removesuffix(old) + new if module_path.endswith(old) else module_path
            return part, module_path.removeprefix("."), what
    return None


@functools.cache
def _has_text_model(part: str) -> bool:
    """Whether paths in this encoder begin with `text_model.`: transformers 5.6 took it out of encoder 1's."""
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    small = CLIPTextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        return hasattr(kind(small), "text_model")


def _as_loaded(part: str, module_path: str) -> str:
    """The path in the model at hand, whatever the file says."""
    bare = module_path.removeprefix("text_model.")
    if part == "unet" or not bare.startswith("encoder."):  # text_projection lies outside
        return module_path
    return f"text_model.{bare}" if _has_text_model(part) else bare


class _HeaderAlphas:
    """Alpha of dotted files: a LoraConfig of peft for each part, in JSON, or nothing, which means alpha = rank."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def scale(self, part: str, module_path: str, rank: int) -> float:
        alpha = self._of(part, module_path)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config.get(f"{part}.use_rslora") else rank)

    def _of(self, part: str, module_path: str) -> float | None:
        patterns = self.config.get(f"{part}.alpha_pattern") or {}
        bare = module_path.removeprefix("text_model.")
        for pattern, alpha in patterns.items():  # peft's rule: the pattern is an end of the name, after a dot
            if re.fullmatch(rf"(.*\.)?({pattern})", module_path) or re.fullmatch(rf"(.*\.)?({pattern})", bare):
                return float(alpha)
        alpha = self.config.get(f"{part}.lora_alpha")
        return None if alpha is None else float(alpha)


def _header_alphas(path: Path, header: Mapping[str, str]) -> _HeaderAlphas:
    try:
        config = json.loads(header.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ModelError(
            f"{path}: the header's lora_adapter_metadata, which holds alpha, is not JSON ({error}). Fetch it again."
        ) from error
    return _HeaderAlphas(config)


def _peft_alphas(path: Path) -> _HeaderAlphas:
    config_path = path.with_name("adapter_config.json")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        return _HeaderAlphas({f"unet.{key}": config.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora")})
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path} is a file of peft's save_pretrained, whose alpha is in {config_path.name} beside it, and that "
            f"cannot be read ({error}). Copy it from where the LoRA was, or write the LoRA with diffusers' "
            "save_lora_weights."
        ) from error


def _such_as(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""
