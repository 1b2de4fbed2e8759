"""A small SDXL with random weights: every part of the real one, in 8 MB, with training steps of a fraction of a second.

It stands in for SDXL in the tests, the demo and `sdxl-ray doctor` (`builtin:tiny`). What it draws means nothing, but
its layout on disk, its module names and its conditioning are those of stabilityai/stable-diffusion-xl-base-1.0:

    tokenizer      pads with <|endoftext|>         text_encoder     CLIPTextModel
    tokenizer_2    pads with "!" (id 0)            text_encoder_2   CLIPTextModelWithProjection, the pooled vector
    vae            factor 8, 4 channels, 0.13025   unet             3 levels, text_time conditioning
    scheduler      Euler, scaled_linear 0.00085-0.012, epsilon
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from sdxl_ray.errors import ModelError, storage_errors
from sdxl_ray.sdxl.files import model_index
from sdxl_ray.sdxl.quiet import quiet_libraries

BUILTIN_MODELS = ("tiny",)

_HIDDEN = 32  # width of each text encoder; the U-Net sees both, 64
_TIME_EMBED = 8  # channels per time id; SDXL has 256

# Words of ordinary captions: each becomes about one token, so that a caption of 20 words is far from the limit of 77.
_WORDS = """
a about above across after against all along among an and animal another architecture around art artistic as at autumn
background bear beautiful behind below beside between bicycle big bird black blue blurred blurry boat bottle bowl boy
branches breed bricks bridge bright brown building by camera candid car cat centre child city clear close cloud clouds
cloudy coat coffee cold color colorful colour composition cup curtain dark day deep detail detailed digital distance
dog door dress drawing dusk each early eating evening eyes face facing field film fire fish floor flower flowers focus
food for forest foreground from front fruit full fur galaxies galaxy garden girl glass golden grass gravel gray green
grey ground hair hand hands hat head high highly hill holding horse house illustration image in indoors inside into is
isolated its jacket kitchen lake landscape large lamp lawn leaves left lens light lighting lights line lit little long
looking low man many map mask medium metal middle mirror monochrome moon morning mountain mountains near night ocean
of old on one open orange outdoors outside over painting paper park pattern paving pencil people person photo
photograph photographer photography pink plain plane plant plate pose portrait purple quality rain red resting
reflection retina right river road rock rocket roof room round sand scene sea seated setting shadow shallow sharp
shirt shore shot show showing shuttle side silver sitting sketch sky sleeping small smiling smoke snow soft space
spring square standing star stars stone street striped studio style suit summer sun sunlight sunny sunset surface
table tabby tail tall texture the three through tiles to top tower train tree trees tripod two under up vertical view
village vintage wall watching water wave wearing weathered whiskers white wide wild wind window winter with woman wood
wooden yellow young
"""

# Chosen once by experiment (seed 0) so that random weights behave like trained ones in scale: the U-Net's output and
# the latents have a standard deviation between 0.1 and 1, the posterior's own is about a tenth of that, and decoded
# images use the grey range. Constants rather than a measurement at run time: the bytes must not depend on the machine.
_TOKEN_GAIN = 25.0  # transformers draws them with std 0.02, too faint for the cross-attention to notice the caption
_UNET_OUT_GAIN = 2.0
_VAE_MEAN_GAIN = 32.0
_VAE_LOGVAR_BIAS = -1.0
_VAE_DECODE_GAIN = 3.0


def builtin_model(name: str, cache_root: Path | None = None) -> Path:
    """The folder of a built-in model, made on first use.

    It lies below `cache_root`, by default $SDXL_RAY_HOME or ~/.cache/sdxl-ray. Several processes may ask at once.

    Raises:
        ModelError: `name` is not a built-in model.
    """
    if name not in BUILTIN_MODELS:
        known = ", ".join(f"builtin:{known}" for known in BUILTIN_MODELS)
        raise ModelError(f"there is no built-in model {name!r}. Known: {known}. Or give a folder or a Hub id.")
    root = cache_root or Path(os.environ.get("SDXL_RAY_HOME") or Path.home() / ".cache" / "sdxl-ray")
    return write_tiny_sdxl(Path(root).expanduser() / "models" / "tiny-sdxl-v1")


def write_tiny_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """Write the small SDXL to `folder` in the diffusers layout; return `folder`. One seed gives the same bytes.

    It is written beside `folder` and renamed, so a half-written model is never seen; a complete one is left as it is.

    Raises:
        StorageError: the disk is full, read-only or not ours.
    """
    folder = Path(folder)
    if _is_complete(folder):
        return folder
    with storage_errors("writing the tiny SDXL", folder, "Set SDXL_RAY_HOME to a folder with 10 MB of room."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_parts(unfinished, seed)
            for path in [unfinished, *unfinished.rglob("*")]:
                # mkdtemp and safetensors write for the owner alone, which shuts out the other users of a shared cache
                path.chmod(0o755 if path.is_dir() else 0o644)
            if folder.exists() and not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)  # left by something that did not go through the rename
            try:
                unfinished.rename(folder)
            except OSError:
                if not _is_complete(folder):  # otherwise another process was quicker, with the same bytes
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    return all(
        (folder / file).is_file()
        for file in (
            "model_index.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
            "tokenizer/vocab.json",
            "tokenizer_2/vocab.json",
            "scheduler/scheduler_config.json",
        )
    )


def _write_parts(folder: Path, seed: int) -> None:
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    quiet_libraries()
    vocabulary, merges = _train_vocabulary(_WORDS.split())
    _write_tokenizer(folder / "tokenizer", vocabulary, merges, pad_token="<|endoftext|>")
    _write_tokenizer(folder / "tokenizer_2", vocabulary, merges, pad_token="!")

    # eos_token_id 2 although <|endoftext|> has another id: SDXL's own configs say so, and transformers then takes the
    # pooled vector at the highest id (modeling_clip.py, PR #24773).
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_HIDDEN,
        intermediate_size=4 * _HIDDEN,
        projection_dim=_HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(clip)
        text_encoder_2 = CLIPTextModelWithProjection(type(clip)(**{**clip.to_dict(), "hidden_act": "gelu"}))
        vae = AutoencoderKL(**vae_config())
        unet = UNet2DConditionModel(**unet_config())
    with torch.no_grad():
        for encoder in (text_encoder, text_encoder_2):
            embedding: Any = encoder.get_input_embeddings()
            embedding.weight.mul_(_TOKEN_GAIN)
        unet.conv_out.weight.mul_(_UNET_OUT_GAIN)
        vae.quant_conv.weight[:4].mul_(_VAE_MEAN_GAIN)
        vae.quant_conv.bias[4:].fill_(_VAE_LOGVAR_BIAS)
        vae.decoder.conv_out.weight.mul_(_VAE_DECODE_GAIN)
    text_encoder.save_pretrained(folder / "text_encoder")
    text_encoder_2.save_pretrained(folder / "text_encoder_2")
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="leading",
    ).save_pretrained(folder / "scheduler")
    # Written last: whoever looks for it finds a whole model.
    _write_json(folder / "model_index.json", model_index("EulerDiscreteScheduler", zeros_for_empty_prompt=True))


def unet_config() -> dict[str, Any]:
    """SDXL's own config with narrow levels; `attention_head_dim` is the number of heads, a name diffusers kept."""
    return {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 2],
        "attention_head_dim": [1, 2, 3],
        "norm_num_groups": 8,
        "cross_attention_dim": 2 * _HIDDEN,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_EMBED,
        "projection_class_embeddings_input_dim": 6 * _TIME_EMBED + _HIDDEN,
    }


def vae_config() -> dict[str, Any]:
    """Of the AutoencoderKL."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
        "sample_size": 128,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def _train_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level BPE, learnt from `words`: bytes, bytes that end a word, merges, then the two special tokens.

    Most frequent pair first, ties in alphabetical order, until each word is one token (Sennrich, arXiv:1508.07909).
    """
    alphabet = _byte_alphabet()
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        pieces = [_merge(piece, left, right) for piece in pieces]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # two merges can give one token
    return {token: token_id for token_id, token in enumerate(tokens)}, merges


def _merge(piece: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(piece):
        if piece[position : position + 2] == [left, right]:
            merged.append(left + right)
            position += 2
        else:
            merged.append(piece[position])
            position += 1
    return merged


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes, in CLIP's order: "!" is the first.

    Source: `bytes_to_unicode` of GPT-2's encoder, github.com/openai/gpt-2.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + position) for position in range(others)]


def _write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, pad_token: str
) -> None:
    """The four files of SDXL's tokenizers."""
    folder.mkdir()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
