"""README.md beside the exported files: what it draws, how to use it, how it was made.

The front matter is what the Hub reads to show a LoRA with its base model, trigger word and gallery:
huggingface.co/docs/hub/model-cards and .../hub/model-cards-widgets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_ray.errors import storage_errors
from sdxl_ray.export.metadata import TrainingFacts, public_name
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.which import DORA_IN_KOHYA
from sdxl_ray.records import ExportedFile


@dataclass(frozen=True, slots=True)
class SampleImage:
    """An image the LoRA drew, and the prompt it was asked for."""

    path: Path
    prompt: str


def write_model_card(
    folder: Path,
    facts: TrainingFacts,
    spec: AdapterSpec,
    files: Sequence[ExportedFile],
    sample_images: Sequence[SampleImage] = (),
) -> Path:
    """The path of the README.md. Sample images are copied to `folder/images`: the folder can be uploaded as it is."""
    readme = folder / "README.md"
    with storage_errors(
        "writing the model card", readme, "Free some space or choose another folder; the LoRA itself is done."
    ):
        folder.mkdir(parents=True, exist_ok=True)
        gallery = []
        for number, image in enumerate(sample_images):
            url = f"images/{number:02d}{image.path.suffix}"
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(image.path, folder / url)
            gallery.append((url, image.prompt))
        sections = [
            _front_matter(facts, spec, gallery),
            _introduction(facts, spec),
            _usage(facts, spec, files),
            _training(facts, spec),
        ]
        partial = readme.with_name(".README.md.partial")
        partial.write_text("\n".join(sections), encoding="utf-8")
        partial.replace(readme)
    return readme


def _front_matter(facts: TrainingFacts, spec: AdapterSpec, gallery: Sequence[tuple[str, str]]) -> str:
    """YAML, each string in JSON's quotes, which YAML shares: prompts may hold colons, quotes and line ends."""
    kind = [] if spec.kind == "full" else ["lora"]  # the Hub's word for every adapter
    tags = ["text-to-image", "stable-diffusion-xl", "stable-diffusion-xl-diffusers", *kind, "diffusers", *facts.tags]
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    if _is_hub_id(facts.base_model):  # the Hub links it; the name of a local file would be a dead link
        lines.append(f"base_model: {_quoted(facts.base_model)}")
    if facts.license:
        lines.append(f"license: {_quoted(facts.license)}")
    if facts.trigger_phrase:
        lines.append(f"instance_prompt: {_quoted(facts.trigger_phrase)}")
    lines += ["tags:", *(f"  - {_quoted(tag)}" for tag in dict.fromkeys(tags))]
    if gallery:
        lines.append("widget:")
        for url, prompt in gallery:
            lines += [f"  - text: {_quoted(prompt)}", "    output:", f"      url: {_quoted(url)}"]
    return "\n".join([*lines, "---", ""])


def _introduction(facts: TrainingFacts, spec: AdapterSpec) -> str:
    paragraphs = [
        f"# {facts.name}",
        facts.description or f"{_CALLED[spec.kind]} SDXL, trained on {public_name(facts.base_model)}.",
    ]
    if facts.trigger_phrase:
        paragraphs.append(f"**Trigger word:** `{facts.trigger_phrase}`")
    if facts.prediction_type == "v_prediction":
        paragraphs.append(
            "The base model predicts **v**: choose v-prediction in the sampler, or images come out as noise."
        )
    paragraphs.append("<Gallery />\n")
    return "\n\n".join(paragraphs)


def _usage(facts: TrainingFacts, spec: AdapterSpec, files: Sequence[ExportedFile]) -> str:
    read_by = {**_READ_BY, **_READ_BY_KIND.get(spec.kind, {})}
    rows = [
        f"| `{file.path.name}` | {read_by.get(file.format, file.format)} | {file.relative_error:.1e} |"
        for file in files
    ]
    told = [file for file in files if not (spec.kind == "dora" and file.format == "kohya")]  # in words of its own below
    notes = [note for file in told if (note := file.warning or file.note)]
    names = {file.format: file.path.name for file in files}
    kohya, dora = names.get("kohya"), None
    if spec.kind == "dora":
        kohya, dora = names.get("kohya-svd"), kohya
    diffusers_reads = ("diffusers", "kohya", "kohya-svd") if spec.kind == "lora" else ("diffusers", "kohya-svd")
    for_diffusers = next((names[format_name] for format_name in diffusers_reads if format_name in names), None)
    table = ["## Use", "", "| file | for | difference from the trained model |", "|---|---|---|", *rows, ""]
    for note in notes:
        table += [note, ""]
    if "checkpoint" in names:
        table += [f"**ComfyUI, A1111, Forge**: put `{names['checkpoint']}` into the folder for checkpoints.", ""]
    if "diffusers-folder" in names:
        table += [
            "```python",
            "from diffusers import StableDiffusionXLPipeline",
            "",
            f"pipe = StableDiffusionXLPipeline.from_pretrained({_quoted(names['diffusers-folder'])})",
            "```",
            "",
        ]
    if kohya:
        table += [
            f"**ComfyUI**: put `{kohya}` into `models/loras`, add a *Load LoRA* node.",
            "",
            f"**A1111, Forge**: put `{kohya}` into `models/Lora`, write `<lora:{Path(kohya).stem}:1>` in the prompt.",
            "",
        ]
    if dora:
        table += [f"`{dora}` is the DoRA itself: {DORA_IN_KOHYA}.", ""]
    if for_diffusers:
        base = facts.base_model if _is_hub_id(facts.base_model) else "path/to/" + public_name(facts.base_model)
        single_file = base.endswith((".safetensors", ".ckpt"))
        prompt = facts.trigger_phrase or "a photo"
        table += [
            "```python",
            "import torch",
            "from diffusers import StableDiffusionXLPipeline",
            "",
            f"load = StableDiffusionXLPipeline.{'from_single_file' if single_file else 'from_pretrained'}",
            f'pipe = load({_quoted(base)}, torch_dtype=torch.bfloat16).to("cuda")',
            f'pipe.load_lora_weights(".", weight_name={_quoted(for_diffusers)})  # or this repository\'s id',
            f'pipe({_quoted(prompt)}).images[0].save("image.png")',
            "```",
            "",
        ]
    return "\n".join(table)


def _training(facts: TrainingFacts, spec: AdapterSpec) -> str:
    height, width = facts.resolution_hw
    targets = spec.targets if isinstance(spec.targets, str) else ", ".join(spec.targets)
    settings = {
        "base model": public_name(facts.base_model),
        "trained": "the whole U-Net" if spec.kind == "full" else None,
        "adapter": None if spec.kind == "full" else f"{spec.kind}, rank {spec.rank}, alpha {spec.alpha:g}, {targets}",
        "scale": "alpha / sqrt(rank)" if spec.rank_stabilized else None,
        "text encoders": _text_encoders(spec),
        "prediction": facts.prediction_type,
        "resolution": f"{width}×{height}" + (f", {len(facts.buckets)} buckets" if len(facts.buckets) > 1 else ""),
        "images": facts.num_images or None,
        "steps": facts.num_steps,
        "epochs": facts.num_epochs,
        "batch size": facts.global_batch_size,
        "learning rate": None if facts.learning_rate is None else f"{facts.learning_rate:g}",
        "learning rate of text encoders": ", ".join(f"{rate:g}" for rate in facts.text_encoder_learning_rates) or None,
        "schedule": facts.lr_schedule,
        "optimizer": facts.optimizer,
        "precision": facts.mixed_precision,
        "quantisation": facts.quantization,
        "moving average": facts.ema_decay,
        "loss": facts.error,
        "weighting": facts.weighting,
        "min-SNR gamma": facts.min_snr_gamma,
        "zero terminal SNR": "yes" if facts.zero_terminal_snr else None,
        "noise offset": facts.noise_offset,
        "multi-resolution noise": facts.multires_noise_discount,
        "input perturbation": facts.input_perturbation,
        "caption dropout": facts.caption_dropout,
        "seed": facts.seed,
        "trained with": f"sdxl-ray {facts.trainer_version}" if facts.trainer_version else "sdxl-ray",
    }
    rows = [f"| {name} | {value} |" for name, value in settings.items() if value is not None]
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows, ""])


def _text_encoders(spec: AdapterSpec) -> str | None:
    ranks = {"CLIP-L": spec.text_encoder_rank, "OpenCLIP bigG": spec.text_encoder_2_rank}
    return ", ".join(f"{name} lora, rank {rank}" for name, rank in ranks.items() if rank) or None


_READ_BY = {
    "kohya": "ComfyUI, A1111, Forge, InvokeAI, diffusers",
    "diffusers": "diffusers, peft",
    "kohya-svd": "ComfyUI, A1111, Forge, InvokeAI, diffusers: a plain LoRA that comes nearest",
    "checkpoint": "ComfyUI, A1111, Forge, InvokeAI, diffusers (from_single_file): the whole model",
    "diffusers-folder": "diffusers (from_pretrained): the whole model",
}
_READ_BY_KIND = {
    "dora": {"kohya": "LyCORIS; nearly right in ComfyUI and Forge, wrong in A1111, InvokeAI and diffusers"},
    "loha": {"kohya": "ComfyUI, A1111, Forge, InvokeAI, LyCORIS; not diffusers"},
    "lokr": {"kohya": "ComfyUI, A1111, Forge, InvokeAI, LyCORIS; not diffusers"},
}
_CALLED = {
    "lora": "A LoRA for",
    "dora": "A DoRA for",
    "loha": "A LoHa for",
    "lokr": "A LoKr for",
    "full": "A finetune of",
}


def _is_hub_id(model: str) -> bool:
    return "/" in model and public_name(model) == model


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
