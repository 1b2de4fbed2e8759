import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_ray.errors import ModelError
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.tiny import builtin_model, write_tiny_sdxl
from sdxl_ray.sdxl.vae import decode_latents, encode_posterior


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_same_seed_gives_the_same_bytes_whatever_the_global_state(tiny_model, tmp_path):
    torch.manual_seed(99)
    expected_next = torch.random.get_rng_state()
    again = write_tiny_sdxl(tmp_path / "again")
    assert digests(again) == digests(Path(tiny_model))
    assert torch.equal(torch.random.get_rng_state(), expected_next)
    other = write_tiny_sdxl(tmp_path / "other", seed=1)
    assert digests(other).keys() == digests(again).keys()
    assert digests(other) != digests(again)


def test_small_complete_and_nothing_left_beside_it(tiny_model):
    folder = Path(tiny_model)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8_000_000
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_complete_model_is_left_as_it_is(tiny_model):
    index = Path(tiny_model) / "model_index.json"
    before = index.stat().st_mtime_ns
    assert write_tiny_sdxl(Path(tiny_model)) == Path(tiny_model)
    assert index.stat().st_mtime_ns == before


def test_a_half_copied_model_is_made_again(tmp_path):
    folder = tmp_path / "half"
    (folder / "unet").mkdir(parents=True)
    write_tiny_sdxl(folder)
    assert (folder / "model_index.json").is_file()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    code = (
        "import sys, pathlib; from sdxl_ray.sdxl.tiny import builtin_model as b; b('tiny', pathlib.Path(sys.argv[1]))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-sdxl-v1"]


def test_builtin_model_lies_below_sdxl_ray_home(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-sdxl-v1").symlink_to(tiny_model)
    monkeypatch.setenv("SDXL_RAY_HOME", str(tmp_path))
    assert builtin_model("tiny") == tmp_path / "models" / "tiny-sdxl-v1"


def test_unknown_builtin_names_the_known_ones():
    with pytest.raises(ModelError) as error:
        builtin_model("huge")
    assert str(error.value) == ("there is no built-in model 'huge'. Known: builtin:tiny. Or give a folder or a Hub id.")


def test_numbers_have_the_scale_of_a_trained_model(unet, vae, inputs):
    prediction = predict(unet, **inputs)
    assert 0.1 < prediction.std() < 1.5
    pixel_values = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_posterior(vae, pixel_values)
    assert 0.1 < mean.std() < 2
    assert 0.01 < std.mean() < mean.std()
    images = decode_latents(vae, mean).float()
    assert (images.std(dim=(1, 2)) > 25).all()  # of 255: no plain grey


def test_prompts_change_the_prediction(unet, encoders, inputs):
    from sdxl_ray.sdxl.text import encode_prompts

    embeds, pooled, _ = encode_prompts(encoders, ["a photo of a tabby cat", "a tall red tower"])
    told = predict(unet, **{**inputs, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    swapped = predict(unet, **{**inputs, "prompt_embeds": embeds.flip(0), "pooled_prompt_embeds": pooled})
    assert (told - swapped).std() > 0.01
