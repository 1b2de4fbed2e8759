"""Images from a run, a checkpoint or any SDXL LoRA file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray.config.load import load_config
from sdxl_ray.errors import InputError, ModelError, storage_errors
from sdxl_ray.run_folder import (
    ADAPTER_FILE,
    AVERAGE_FILE,
    CONFIG_FILE,
    EXPORT_FOLDER,
    START_FILE,
    find_checkpoint,
    is_in_checkpoints,
)

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


# Of each kind the exported file that diffusers reads as it was trained; of the others the checkpoint is drawn with.
_READ_BY_DIFFUSERS = {"lora": "{}.safetensors", "dora": "{}.diffusers.safetensors"}


@dataclass(frozen=True)
class Source:
    """What to draw with: a base model and, on top of it, a LoRA file or the adapter of a checkpoint."""

    model: str
    revision: str = ""
    variant: str = ""
    dtype: str = "bf16"
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    height_width: tuple[int, int] = (1024, 1024)
    lora_file: Path | None = None
    checkpoint: Path | None = None
    adapters: dict[str, dict[str, Any]] | None = None  # arguments of `attach_adapter` by part, for a checkpoint
    use_average: bool = True  # a checkpoint's average, where it has one


def find_source(path: str | Path, *, step: int | None = None, model: str = "") -> Source:
    """Tell a run's folder, a checkpoint's folder and a LoRA file apart.

    Args:
        step: of a run's checkpoint; None: the exported LoRA, or the last checkpoint where there is none yet.
        model: base model; needed for a LoRA file that was not trained on SDXL base.

    Raises:
        InputError: it is none of them.
        CheckpointError: the run has no such checkpoint, or it is not complete.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return Source(model=model or DEFAULT_MODEL, lora_file=path)
    run_folder = path.parent.parent if is_in_checkpoints(path) else path
    if not (run_folder / CONFIG_FILE).exists():
        raise InputError(f"{path}: expected a run's folder (with config.toml), one of its checkpoints, or a LoRA file.")
    config = load_config(run_folder / CONFIG_FILE)
    common: dict[str, Any] = {
        "model": model or config.model.path,
        "revision": config.model.revision,
        "variant": config.model.variant,
        "dtype": config.model.dtype,
        "prediction_type": config.loss.objective,
        "zero_terminal_snr": config.loss.zero_terminal_snr,
        "height_width": (config.validation.height, config.validation.width),
    }
    exported = run_folder / EXPORT_FOLDER / _READ_BY_DIFFUSERS.get(config.adapter.kind, "").format(config.run.name)
    if path == run_folder and step is None and exported.is_file():
        return Source(**common, lora_file=exported)
    _, checkpoint = find_checkpoint(path, step)
    adapters = {
        part: section.arguments(config.run.seed)
        for part, section in (
            ("unet", config.adapter),
            ("text_encoder", config.text_encoder),
            ("text_encoder_2", config.text_encoder_2),
        )
        if section.rank
    }
    return Source(**common, checkpoint=checkpoint, adapters=adapters, use_average=config.ema.export)


def generate_images(
    source: str | Path | Source,
    prompts: Sequence[str],
    *,
    out: str | Path,
    step: int | None = None,
    model: str = "",
    negative_prompt: str = "",
    height_width: tuple[int, int] | None = None,
    num_steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 0,
    lora_scale: float = 1.0,
    compare: bool = False,
) -> list[Path]:
    """Draw each prompt and write PNG files into `out`.

    Args:
        source: a run, a checkpoint or a LoRA file; see `find_source`.
        lora_scale: strength of the LoRA.
        compare: also draw without the LoRA, and lay both side by side in comparison.png.

    Raises:
        InputError: nothing to draw with, or no prompt.
        CheckpointError: no such checkpoint.
    """
    if not prompts:
        raise InputError('no prompt given: -p "a photo of ..."')
    from sdxl_ray.sdxl.sampling import file_stem, side_by_side

    found = source if isinstance(source, Source) else find_source(source, step=step, model=model)
    drawing = _Drawing(found, lora_scale)
    size = height_width or found.height_width
    arguments = (prompts, negative_prompt, size, num_steps, guidance_scale, seed)
    images = drawing.draw(*arguments)
    out = Path(out)
    paths = [out / f"{number:02d}_{file_stem(prompt)}.png" for number, prompt in enumerate(prompts)]
    to_save = dict(zip(paths, images, strict=True))
    if compare:
        with drawing.base_model():
            base = drawing.draw(*arguments)
        rows = [list(pair) for pair in zip(base, images, strict=True)]
        to_save[out / "comparison.png"] = side_by_side(rows, ["base model", "with the LoRA"], list(prompts))
    with storage_errors("saving images", out, "Free some space or choose another --out."):
        out.mkdir(parents=True, exist_ok=True)
        for path, image in to_save.items():
            image.save(path)
    return list(to_save)


class _Drawing:
    """The loaded model with the LoRA on it."""

    def __init__(self, source: Source, lora_scale: float) -> None:
        from sdxl_ray.sdxl.components import (
            load_scheduler_config,
            load_text_encoders,
            load_unet,
            load_vae,
            resolve_model,
        )
        from sdxl_ray.sdxl.devices import DTYPES, best_device

        self.source, self.device = source, best_device()
        model = resolve_model(source.model)
        where: dict[str, Any] = {
            "device": self.device,
            "revision": source.revision or None,
            "variant": source.variant or None,
        }
        dtype = DTYPES[source.dtype]
        self.unet = load_unet(model, dtype=dtype, **where)
        self.encoders = load_text_encoders(model, dtype=dtype, **where)
        self.vae = load_vae(model, dtype=DTYPES["fp32"], **where)
        self.scheduler_config = load_scheduler_config(model, revision=source.revision or None)
        if source.zero_terminal_snr:
            self.scheduler_config = {**self.scheduler_config, "rescale_betas_zero_snr": True}
        if source.lora_file is not None:
            self._load_file(source.lora_file, lora_scale)
        elif source.checkpoint is not None:
            self._load_checkpoint(source.checkpoint, source.adapters or {}, lora_scale)

    def draw(
        self,
        prompts: Sequence[str],
        negative: str,
        height_width: tuple[int, int],
        num_steps: int,
        guidance: float,
        seed: int,
    ) -> list[Image.Image]:
        import torch

        from sdxl_ray.sdxl.sampling import draw_images
        from sdxl_ray.sdxl.text import encode_prompts

        prompt_embeds, pooled, _ = encode_prompts(self.encoders, list(prompts))
        negative_embeds, negative_pooled, _ = encode_prompts(self.encoders, [negative])
        if not negative:  # SDXL's own empty prompt
            negative_embeds, negative_pooled = torch.zeros_like(negative_embeds), torch.zeros_like(negative_pooled)
        return draw_images(
            self.unet,
            self.vae,
            self.scheduler_config,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative_embeds.expand_as(prompt_embeds),
            negative_pooled_prompt_embeds=negative_pooled.expand_as(pooled),
            height_width=height_width,
            num_steps=num_steps,
            guidance_scale=guidance,
            seeds=[seed + number for number in range(len(prompts))],
            prediction_type=self.source.prediction_type,
        )

    @contextlib.contextmanager
    def base_model(self) -> Iterator[None]:
        """Without the LoRA inside, also in the text encoders: LoRAs of other trainers often have a part there."""
        from sdxl_ray.sdxl.adapters import adapter_disabled

        with (
            adapter_disabled(self.unet),
            adapter_disabled(self.encoders.text_encoder),
            adapter_disabled(self.encoders.text_encoder_2),
        ):
            yield

    def _load_file(self, path: Path, scale: float) -> None:
        """Through the same call that diffusers' users make; it also reads a LoRA's text encoder part."""
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.encoders.text_encoder,
            text_encoder_2=self.encoders.text_encoder_2,
            tokenizer=self.encoders.tokenizer,
            tokenizer_2=self.encoders.tokenizer_2,
            unet=self.unet,
            scheduler=EulerDiscreteScheduler.from_config(self.scheduler_config),
        )
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
            pipeline.set_adapters(["lora"], [scale])
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{path} does not fit {self.source.model}: {error}. Is it an SDXL LoRA? Its base model goes to --model."
            ) from error

    def _load_checkpoint(self, checkpoint: Path, adapters: dict[str, dict[str, Any]], scale: float) -> None:
        from safetensors.torch import load_file

        from sdxl_ray.sdxl.adapters import (
            attach_adapter,
            load_adapter_state_dict,
            load_start_state_dict,
            scale_adapter,
        )
        from sdxl_ray.sdxl.full import train_everything

        average = checkpoint / AVERAGE_FILE
        state = load_file(average if self.source.use_average and average.exists() else checkpoint / ADAPTER_FILE)
        for part, arguments in adapters.items():
            if arguments["kind"] == "full":
                if scale != 1.0:
                    raise InputError(
                        f"{checkpoint} holds a whole U-Net, which has no strength. Leave the LoRA's scale at 1."
                    )
                train_everything(self.unet)
                load_adapter_state_dict(self.unet, state)
                continue
            module = self.unet if part == "unet" else getattr(self.encoders, part)
            attach_adapter(module, **arguments)
            load_adapter_state_dict(module, _of_part(state, part))
            if part == "unet" and (checkpoint / START_FILE).exists():
                load_start_state_dict(module, load_file(checkpoint / START_FILE))
            if scale != 1.0:
                scale_adapter(module, scale)


def _of_part(state: dict[str, Any], part: str) -> dict[str, Any]:
    """The tensors of one part of a checkpoint: those of text encoders have its name in front."""
    if part != "unet":
        return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
    return {name: value for name, value in state.items() if not name.startswith(("text_encoder.", "text_encoder_2."))}
