"""Images from finished runs and files. .venv/bin/pytest tests/unit/test_generate.py"""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from sdxl_ray import generate
from sdxl_ray.config.load import dump_config
from sdxl_ray.errors import CheckpointError, InputError
from sdxl_ray.generate import Source, find_source, generate_images
from tests.tiny import ListReporter, make_training, train

SIZE = (64, 64)


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    """A run's folder with the checkpoints of steps 4 and, not complete, 6."""
    config, index_path = tiny_cache
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(config))
    train(make_training(config, index_path), ListReporter(folder=folder / "checkpoints"))
    shutil.copytree(folder / "checkpoints" / "step_000004", folder / "checkpoints" / "step_000006")
    (folder / "checkpoints" / "step_000006" / "state.json").unlink()
    shutil.copytree(folder / "checkpoints" / "step_000004", folder / "checkpoints" / "step_foo")
    return folder


def test_a_run_without_an_export_gives_its_last_complete_checkpoint(run):
    found = find_source(run)
    assert found.checkpoint == run / "checkpoints" / "step_000004"
    assert find_source(run, step=4) == find_source(found.checkpoint) == found


def test_what_is_not_complete_is_refused(run):
    for path, step in ((run, 6), (run / "checkpoints" / "step_000006", None), (run / "checkpoints" / "step_foo", None)):
        with pytest.raises(CheckpointError, match=r"Found: step_000004\."):
            find_source(path, step=step)
    with pytest.raises(InputError, match="expected a run's folder"):
        find_source(run / "nothing")


def images(paths):
    return [np.asarray(Image.open(path)) for path in paths]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("sdxl_ray.sdxl.devices.best_device", lambda: torch.device("cpu"))


def test_a_checkpoint_is_drawn_beside_the_base_model(run, tmp_path):
    image, sheet = generate_images(run, ["a cat"], out=tmp_path / "lora", height_width=SIZE, num_steps=1, compare=True)
    base = generate._Drawing(Source(model=find_source(run).model, dtype="fp32"), 1.0)
    expected = np.asarray(base.draw(["a cat"], "", SIZE, 1, 5.0, 0)[0])
    assert sheet.name == "comparison.png"
    assert (images([image])[0] != expected).any()


def lora_file(model, folder):
    """A LoRA with parts in the U-Net and in both text encoders, as kohya's and diffusers' scripts make them."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    states = {}
    for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj"]), ("text_encoder_2", ["q_proj"])):
        module = getattr(pipeline, name)
        module.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
        states[name] = get_peft_model_state_dict(module)
    StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        text_encoder_2_lora_layers=states["text_encoder_2"],
    )
    return folder / "pytorch_lora_weights.safetensors"


def test_the_base_model_has_no_lora_in_its_text_encoders_either(tiny_model, tmp_path):
    torch.manual_seed(0)
    source = Source(model=tiny_model, dtype="fp32", lora_file=lora_file(tiny_model, tmp_path))
    arguments = (["a cat"], "", SIZE, 1, 5.0, 0)
    untouched = np.asarray(generate._Drawing(Source(model=tiny_model, dtype="fp32"), 1.0).draw(*arguments)[0])
    drawing = generate._Drawing(source, 1.0)
    with_lora = np.asarray(drawing.draw(*arguments)[0])
    with drawing.base_model():
        base = np.asarray(drawing.draw(*arguments)[0])
    assert (base == untouched).all()
    assert (with_lora != untouched).any()
    assert (np.asarray(drawing.draw(*arguments)[0]) == with_lora).all()
    # the text encoders' part alone makes a difference, so the first assertion is about it too
    from sdxl_ray.sdxl.adapters import adapter_disabled

    with adapter_disabled(drawing.unet):
        assert (np.asarray(drawing.draw(*arguments)[0]) != untouched).any()
