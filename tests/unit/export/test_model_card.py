"""README.md as the Hub reads it and as a person does."""

from pathlib import Path

import yaml

from sdxl_ray.export.formats import AdapterSpec
from sdxl_ray.export.metadata import TrainingFacts
from sdxl_ray.export.model_card import SampleImage, write_model_card
from sdxl_ray.records import ExportedFile

HUB_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
SPEC = AdapterSpec("lora", 16, 8.0)
FILES = [
    ExportedFile(Path("/export/tabby.safetensors"), "kohya", 2e-7),
    ExportedFile(Path("/export/tabby.diffusers.safetensors"), "diffusers", 1e-7),
]


def card(folder, *, images=(), **facts):
    defaults = {"name": "tabby", "base_model": HUB_MODEL, "num_steps": 2000, "trigger_phrase": "sks tabby"}
    text = write_model_card(folder, TrainingFacts(**(defaults | facts)), SPEC, FILES, images).read_text()
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
