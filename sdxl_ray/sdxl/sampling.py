"""Images from the U-Net and embeddings, and the labelled sheet that compares them."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl.conditioning import unet_dtype
from sdxl_ray.sdxl.quiet import quiet_libraries
from sdxl_ray.sdxl.vae import decode_latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image, ImageDraw, ImageFont

_VAE_SCALE_FACTOR = 8


@torch.no_grad()
def draw_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler_config: dict[str, Any],
    *,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    negative_pooled_prompt_embeds: Tensor,
    height_width: tuple[int, int],
    num_steps: int = 25,
    guidance_scale: float = 5.0,
    seeds: Sequence[int],
    prediction_type: str | None = None,
    original_hw: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """One image per prompt and seed, by diffusers' StableDiffusionXLPipeline and its Euler scheduler.

    The first noise follows from the seed alone, drawn on the CPU, so that devices and runs can be compared. Images are
    drawn one after the other: each is the same whatever else is asked for, and memory is that of one.

    Args:
        unet: bare (not wrapped by DDP), with or without an adapter; its train/eval modes are restored.
        scheduler_config: the model's own (`load_scheduler_config`); its spacing and betas are kept.
        prompt_embeds, negative_prompt_embeds: (B, 77, 2048); the pooled ones (B, 1280).
        height_width: size of the images in pixels, multiples of 8.
        guidance_scale: weight of classifier-free guidance; 1.0 leaves the negative prompts out.
        seeds: B integers, not negative.
        prediction_type: what the U-Net was trained to predict, "epsilon" or "v_prediction"; None = as in the config.
        original_hw: the size the model is told the image had before cropping; None = `height_width`.

    Raises:
        ConfigError: a size that is no multiple of 8, or another number of seeds than prompts.
    """
    from PIL import Image

    height, width = height_width
    if height < 1 or width < 1 or height % _VAE_SCALE_FACTOR or width % _VAE_SCALE_FACTOR:
        raise ConfigError(f"image size {height}x{width} (height x width): both must be multiples of 8, such as 1024.")
    if len(seeds) != len(prompt_embeds):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompt_embeds)} prompts: give one seed per prompt.")
    pipeline = _pipeline(unet, scheduler_config, prediction_type)
    dtype, device = unet_dtype(unet), unet.conv_in.weight.device
    images = []
    with _eval_mode(unet):
        for row, seed in enumerate(seeds):
            latents = pipeline(
                prompt_embeds=prompt_embeds[row : row + 1].to(device, dtype),
                pooled_prompt_embeds=pooled_prompt_embeds[row : row + 1].to(device, dtype),
                negative_prompt_embeds=negative_prompt_embeds[row : row + 1].to(device, dtype),
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds[row : row + 1].to(device, dtype),
                height=height,
                width=width,
                original_size=original_hw or height_width,
                target_size=height_width,
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                latents=initial_noise(seed, height_width).to(device, dtype),
                output_type="latent",
            ).images
            images.append(Image.fromarray(decode_latents(vae, latents)[0].cpu().numpy()))
    return images


def initial_noise(seed: int, height_width: tuple[int, int]) -> Tensor:
    """(1, 4, h, w) float32 standard normal noise that depends on the seed and the size alone."""
    # numpy's Philox and not torch's generator, whose numbers differ between CPU and CUDA
    generator = np.random.Generator(np.random.Philox(key=seed))
    shape = (1, 4, height_width[0] // _VAE_SCALE_FACTOR, height_width[1] // _VAE_SCALE_FACTOR)
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _pipeline(
    unet: UNet2DConditionModel, scheduler_config: dict[str, Any], prediction_type: str | None
) -> StableDiffusionXLPipeline:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    quiet_libraries()
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    is_v = (prediction_type or scheduler_config.get("prediction_type")) == "v_prediction"
    if is_v or scheduler_config.get("rescale_betas_zero_snr"):
        # A v model is usually trained to the end of a schedule with zero terminal SNR, which "leading" steps never
        # reach: arXiv:2305.08891, section 3.3.
        changes["timestep_spacing"] = "trailing"
    pipeline = StableDiffusionXLPipeline(
        vae=None,  # decoded by ours; without it the pipeline runs on the U-Net's device
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config({**scheduler_config, **changes}),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline makes time ids in the embeddings' dtype, and bf16 would turn 1365 px into 1368; training keeps fp32.
    in_embeds_dtype = pipeline._get_add_time_ids
    pipeline._get_add_time_ids = lambda *sizes, dtype, **rest: in_embeds_dtype(*sizes, dtype=torch.float32, **rest)
    return pipeline


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval inside (an adapter's dropout off); afterwards each submodule as it was."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def file_stem(prompt: str) -> str:
    """The first words of a prompt, fit for a file name on every system."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40] or "empty"


def side_by_side(
    rows: Sequence[Sequence[Image.Image]], column_titles: Sequence[str], row_titles: Sequence[str]
) -> Image.Image:
    """A labelled comparison sheet: a column per title ("base", "with LoRA"), a row per prompt with the prompt above it.

    Images may differ in size; each row is as high as its highest image.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell = max((image.width for row in rows for image in row), default=256)
    text_size = max(11, cell // 28)
    font = ImageFont.load_default(size=text_size)
    gap, line = text_size // 2, int(text_size * 1.4)
    num_columns = max([len(column_titles), *(len(row) for row in rows)])
    sheet_width = gap + num_columns * (cell + gap)
    # The default font is about half as wide as high.
    titles = [textwrap.wrap(title, max(8, 2 * (sheet_width - 2 * gap) // text_size)) for title in row_titles]
    heights = [max((image.height for image in row), default=0) for row in rows]
    total = (
        gap + line + sum(len(title) * line + height + 2 * gap for title, height in zip(titles, heights, strict=True))
    )

    sheet = Image.new("RGB", (sheet_width, total), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        _write(draw, (gap + column * (cell + gap), gap), title, font)
    top = gap + line
    for row, title_lines, height in zip(rows, titles, heights, strict=True):
        for text in title_lines:
            _write(draw, (gap, top), text, font)
            top += line
        for column, image in enumerate(row):
            sheet.paste(image, (gap + column * (cell + gap), top + gap // 2))
        top += height + 2 * gap
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, left_top: tuple[int, int], text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    try:
        draw.text(left_top, text, fill="black", font=font)
    except UnicodeEncodeError:  # Pillow without FreeType has a Latin-1 bitmap font only
        draw.text(left_top, text.encode("latin-1", "replace").decode("latin-1"), fill="black", font=font)
