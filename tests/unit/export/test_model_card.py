"""README.md as the Hub reads it and as a person does."""

from pathlib import Path

import pytest
import yaml

from sdxl_ray.export.metadata import TrainingFacts
from sdxl_ray.export.model_card import SampleImage, write_model_card
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.which import DEFAULT_FORMATS, FORMATS
from sdxl_ray.records import ExportedFile

HUB_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
SPEC = AdapterSpec("lora", 16, 8.0)
FILES = [
    ExportedFile(Path("/export/tabby.safetensors"), "kohya", 2e-7),
    ExportedFile(Path("/export/tabby.diffusers.safetensors"), "diffusers", 1e-7),
]


def card(folder, *, images=(), spec=SPEC, files=FILES, **facts):
    defaults = {"name": "tabby", "base_model": HUB_MODEL, "num_steps": 2000, "trigger_phrase": "sks tabby"}
    text = write_model_card(folder, TrainingFacts(**(defaults | facts)), spec, files, images).read_text()
    _, front_matter, body = text.split("---\n", 2)
    return yaml.safe_load(front_matter), body


def test_front_matter_and_trigger_word(tmp_path):
    front_matter, body = card(tmp_path)
    assert front_matter["base_model"] == HUB_MODEL
    assert front_matter["instance_prompt"] == "sks tabby"
    assert {"lora", "stable-diffusion-xl", "text-to-image"} <= set(front_matter["tags"])
    assert "**Trigger word:** `sks tabby`" in body


def test_each_program_is_told_its_file(tmp_path):
    _, body = card(tmp_path)
    assert "put `tabby.safetensors` into `models/loras`" in body
    assert "<lora:tabby:1>" in body
    assert 'weight_name="tabby.diffusers.safetensors"' in body
    assert "| adapter | lora, rank 16, alpha 8, attention |" in body


def test_a_local_base_model_is_no_link_and_no_path(tmp_path):
    front_matter, body = card(tmp_path, base_model="/secret/place/noob.safetensors")
    assert "base_model" not in front_matter
    assert "noob.safetensors" in body and "secret" not in body
    assert "from_single_file" in body


def test_sample_images_go_along_with_any_prompt(tmp_path):
    (tmp_path / "step_000500.png").write_bytes(b"image")
    prompt = 'a "sks tabby": on a mat\nsecond line'
    front_matter, _ = card(tmp_path / "export", images=[SampleImage(tmp_path / "step_000500.png", prompt)])
    assert front_matter["widget"] == [{"text": prompt, "output": {"url": "images/00.png"}}]
    assert (tmp_path / "export" / "images" / "00.png").read_bytes() == b"image"


def test_v_prediction_is_pointed_out(tmp_path):
    _, body = card(tmp_path, prediction_type="v_prediction")
    assert "choose v-prediction" in body


def files_of(formats):
    return [ExportedFile(Path(f"/export/tabby.{name}"), name, 1e-7) for name in formats]


@pytest.mark.parametrize(
    ("kind", "word", "comfy", "diffusers"),
    [
        ("dora", "A DoRA for SDXL", "kohya-svd", "diffusers"),
        ("loha", "A LoHa for SDXL", "kohya", "kohya-svd"),
        ("lokr", "A LoKr for SDXL", "kohya", "kohya-svd"),
    ],
)
def test_other_kinds_send_each_program_to_a_file_that_it_reads(tmp_path, kind, word, comfy, diffusers):
    spec = AdapterSpec(kind, 16, 8.0, rank_stabilized=True, text_encoder_2_rank=4)
    _, body = card(tmp_path, spec=spec, files=files_of(DEFAULT_FORMATS[kind]))
    assert f"{word}, trained on {HUB_MODEL}" in body
    assert f"put `tabby.{comfy}` into `models/loras`" in body
    assert f'weight_name="tabby.{diffusers}"' in body
    assert f"| adapter | {kind}, rank 16, alpha 8, attention |" in body
    assert "| scale | alpha / sqrt(rank) |" in body
    assert "| text encoders | OpenCLIP bigG lora, rank 4 |" in body


def test_of_a_dora_it_is_told_who_reads_it(tmp_path):
    spec = AdapterSpec("dora", 16, 8.0)
    kohya = ExportedFile(Path("/export/tabby.dora.safetensors"), "kohya", 1e-7, warning="told elsewhere")
    _, body = card(tmp_path, spec=spec, files=[kohya])
    assert "| `tabby.dora.safetensors` | LyCORIS; nearly right in ComfyUI and Forge, wrong in A1111, InvokeAI" in body
    assert "`tabby.dora.safetensors` is the DoRA itself: LyCORIS reads it exactly" in body
    assert "models/Lora" not in body and "told elsewhere" not in body and "load_lora_weights" not in body
    svd = ExportedFile(Path("/export/tabby.safetensors"), "kohya-svd", 1e-2)
    _, body = card(tmp_path, spec=spec, files=[svd, kohya])
    assert "put `tabby.safetensors` into `models/Lora`, write `<lora:tabby:1>`" in body


def test_a_finetune_is_a_checkpoint_and_not_a_lora(tmp_path):
    front_matter, body = card(
        tmp_path, spec=AdapterSpec("full", 16, 16.0), files=files_of(["checkpoint", "diffusers-folder"])
    )
    assert "lora" not in front_matter["tags"]
    assert "A finetune of SDXL" in body and "| trained | the whole U-Net |" in body
    assert "put `tabby.checkpoint` into the folder for checkpoints" in body
    assert 'from_pretrained("tabby.diffusers-folder")' in body
    assert "load_lora_weights" not in body and "models/loras" not in body


def test_how_near_a_stand_in_comes_is_told(tmp_path):
    near = ExportedFile(Path("/export/a"), "kohya-svd", 1e-3, note="off by 1.0 %")
    far = ExportedFile(Path("/export/b"), "kohya-svd", 1e-1, note="off by 9.0 %", warning="off by 9.0 %. Raise it.")
    _, body = card(tmp_path, files=[near, far])
    assert "\noff by 1.0 %\n" in body and "\noff by 9.0 %. Raise it.\n" in body


def test_every_format_is_described(tmp_path):
    _, body = card(tmp_path, files=files_of(FORMATS))
    assert body.count("| 1.0e-07 |") == len(FORMATS)
    for name in FORMATS:
        assert f"| `tabby.{name}` | {name} |" not in body


def test_the_method_is_listed(tmp_path):
    _, body = card(
        tmp_path, error="huber", weighting="min_snr", ema_decay=0.999, zero_terminal_snr=True, quantization="int8"
    )
    for row in (
        "| loss | huber |",
        "| weighting | min_snr |",
        "| moving average | 0.999 |",
        "| zero terminal SNR | yes |",
    ):
        assert row in body
    assert "| quantisation | int8 |" in body
    assert "moving average" not in card(tmp_path)[1]
