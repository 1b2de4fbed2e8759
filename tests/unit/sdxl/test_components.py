import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ray.errors import ModelError
from sdxl_ray.sdxl import hub
from sdxl_ray.sdxl.components import (
    fingerprint,
    load_scheduler_config,
    load_text_encoders,
    load_unet,
    load_vae,
    objective_warning,
    read_part_config,
    resolve_model,
    text_fingerprint,
    unet_identity,
    unet_weight_shapes,
    vae_fingerprint,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(path: str) -> str:
    with pytest.raises(ModelError) as error:
        resolve_model(path)
    return str(error.value)


def test_folder_becomes_absolute(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert resolve_model("model") == resolve_model("./model") == str(model.resolve())


def test_builtin(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-sdxl-v1").symlink_to(tiny_model)
    monkeypatch.setenv("SDXL_RAY_HOME", str(tmp_path))
    assert load_scheduler_config(resolve_model("builtin:tiny"))["prediction_type"] == "epsilon"


def test_hub_id_is_returned_unchanged():
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    assert resolve_model(name) == name


def test_all_missing_parts_are_listed(model):
    (model / "vae" / WEIGHTS).unlink()
    (model / "tokenizer_2" / "merges.txt").unlink()
    shutil.rmtree(model / "text_encoder_2")
    message = refusal(str(model))
    assert (
        "Missing: vae/diffusion_pytorch_model.safetensors, text_encoder_2/config.json, "
        "text_encoder_2/model.safetensors, tokenizer_2/vocab.json with tokenizer_2/merges.txt."
    ) in message
    assert "Expected model_index.json and the folders unet, vae, text_encoder" in message
    assert f"hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir {model}" in message


def test_another_pipeline_is_named(model):
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    shutil.rmtree(model / "tokenizer_2")
    assert "is not a complete SDXL (model_index.json says StableDiffusionPipeline)" in refusal(str(model))


def test_inpainting_unet_is_refused(model):
    config = read_part_config(str(model), "unet") | {"in_channels": 9}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert "has addition_embed_type 'text_time' and 9 input channels, expected 'text_time' and 4" in refusal(str(model))


def test_pickled_weights_are_refused_with_the_conversion(model):
    (model / "unet" / WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(str(model))
    assert "unet/diffusion_pytorch_model.bin is a pickle, which can run code when read" in message
    assert f"P.from_pretrained('{model}').save_pretrained('{model}-safetensors')" in message


def test_a_missing_shard_is_named(model):
    split_unet(model)
    (model / "unet" / "part-2.safetensors").unlink()
    assert "Missing: unet/part-2.safetensors." in refusal(str(model))


@pytest.mark.parametrize("path", ["/nowhere/sdxl", "./sdxl", "~/no-such-sdxl"])
def test_a_path_that_is_not_there(path):
    message = refusal(path)
    assert message.startswith(f"there is no folder {path} (looked at /")
    assert "builtin:tiny" in message


def test_a_path_below_an_existing_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("models/sdxl").startswith("there is no folder models/sdxl")


def test_a_single_file_is_refused_with_the_conversion():
    message = refusal("models/juggernaut.safetensors")
    assert "P.from_single_file('models/juggernaut.safetensors').save_pretrained('models/juggernaut')" in message


@pytest.mark.parametrize("name", ["sdxl", "a/b/c", "owner/na me", ""])
def test_neither_folder_nor_hub_id(name):
    assert refusal(name).startswith(f"{name!r} is neither a folder nor a Hub id.")


def test_hub_without_network_gives_cause_and_cures(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        load_unet("owner/not-in-the-cache", dtype=torch.float32, revision="main")
    message = str(error.value)
    assert message.startswith(
        "owner/not-in-the-cache@main cannot be fetched from the Hub and is not in the local cache"
    )
    for cure in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "hf auth login", "hf download owner/not-in-the-cache --local-dir"):
        assert cure in message


def test_a_hub_id_loads_as_its_folder_does(tiny_model, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(model, *, revision, allow_patterns, ignore_patterns):
        asked.append((model, revision, *allow_patterns))
        return tiny_model

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    here = load_vae(tiny_model, dtype=torch.float32).state_dict()
    there = load_vae("owner/model", dtype=torch.float32, revision="v1").state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here)
    patterns = ("vae/*.json", "model_index.json", "vae/diffusion_pytorch_model*.safetensors")
    assert asked == [("owner/model", "v1", *patterns)]
    assert text_fingerprint("owner/model") == text_fingerprint(tiny_model)


def test_modules_are_frozen_and_in_the_dtype_asked_for(tiny_model):
    encoders = load_text_encoders(tiny_model, dtype=torch.bfloat16)
    for module in (
        load_unet(tiny_model, dtype=torch.bfloat16),
        load_vae(tiny_model, dtype=torch.bfloat16),
        encoders.text_encoder,
        encoders.text_encoder_2,
    ):
        assert not module.training
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}


def test_loaded_weights_are_the_files_own(tiny_model):
    unet = load_unet(tiny_model, dtype=torch.float32).state_dict()
    file = load_file(Path(tiny_model) / "unet" / WEIGHTS)
    assert unet.keys() == file.keys()
    assert all(torch.equal(unet[name], file[name]) for name in file)


def test_a_folder_with_fp16_files_alone_needs_no_asking(model):
    for part in ("unet", "vae"):
        (model / part / WEIGHTS).rename(model / part / "diffusion_pytorch_model.fp16.safetensors")
    for part in ("text_encoder", "text_encoder_2"):
        (model / part / "model.safetensors").rename(model / part / "model.fp16.safetensors")
    assert resolve_model(str(model)) == str(model.resolve())
    assert load_unet(str(model), dtype=torch.float32).config.in_channels == 4
    assert load_text_encoders(str(model), dtype=torch.float32).text_encoder_2.config.projection_dim == 32


def test_the_two_tokenizers_pad_as_in_sdxl(tiny_model):
    encoders = load_text_encoders(tiny_model, dtype=torch.float32)
    assert encoders.tokenizer.pad_token_id == encoders.tokenizer.eos_token_id
    assert encoders.tokenizer_2.pad_token_id == 0
    assert encoders.tokenizer.model_max_length == encoders.tokenizer_2.model_max_length == 77


def test_damaged_weights_name_the_folder(model):
    (model / "vae" / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"model/vae cannot be loaded as AutoencoderKL"):
        load_vae(str(model), dtype=torch.float32)


def test_fingerprint_follows_content_not_place(tiny_model, model):
    moved = str(model)
    assert len(fingerprint(moved, "vae")) == 16
    assert fingerprint(moved, "vae") == fingerprint(tiny_model, "vae")
    assert text_fingerprint(moved) == text_fingerprint(tiny_model)
    config = read_part_config(moved, "vae")
    (model / "vae" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}))
    assert fingerprint(moved, "vae") == fingerprint(tiny_model, "vae")
    (model / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert fingerprint(moved, "vae") != fingerprint(tiny_model, "vae")


def test_fingerprint_sees_one_changed_weight_and_one_changed_merge(tiny_model, model):
    file = model / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert fingerprint(str(model), "vae") != fingerprint(tiny_model, "vae")
    merges = model / "tokenizer" / "merges.txt"
    merges.write_text(merges.read_text() + "x x\n")
    assert text_fingerprint(str(model)) != text_fingerprint(tiny_model)


def test_vae_fingerprint_depends_on_the_dtype(tiny_model):
    assert vae_fingerprint(tiny_model, torch.bfloat16) == vae_fingerprint(tiny_model, "bfloat16")
    assert vae_fingerprint(tiny_model, torch.bfloat16) != vae_fingerprint(tiny_model, torch.float32)


def split_unet(model: Path) -> None:
    """The U-Net's weights as two shards with an index."""
    tensors = load_file(model / "unet" / WEIGHTS)
    (model / "unet" / WEIGHTS).unlink()
    weight_map = {}
    for number, names in ((1, sorted(tensors)[::2]), (2, sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, model / "unet" / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"part-{number}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_weight_shapes_are_the_state_dicts(tiny_model, model, unet):
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert unet_weight_shapes(tiny_model) == expected
    split_unet(model)
    assert unet_weight_shapes(str(model)) == expected


def test_weight_shapes_of_a_hub_model_come_from_its_header(tiny_model, model, monkeypatch):
    (model / "unet" / WEIGHTS).unlink()  # only the config was fetched
    monkeypatch.setattr(hub, "_fetch", lambda *_: model)
    monkeypatch.setattr(hub, "remote_header_shapes", lambda _model, _revision, file: {file: (1, 2)})
    assert unet_weight_shapes("owner/model") == {f"unet/{WEIGHTS}": (1, 2)}


def test_weight_shapes_of_a_variant(model, monkeypatch):
    """A folder with both: the variant is what is loaded, so it is what is counted."""
    save_file({"x": torch.zeros(3, 5)}, model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert unet_weight_shapes(str(model), variant="fp16") == {"x": (3, 5)}
    assert "x" not in unet_weight_shapes(str(model))
    monkeypatch.setattr(hub, "_fetch", lambda *_: model)
    monkeypatch.setattr(hub, "remote_header_shapes", lambda _model, _revision, file: {file: (1, 2)})
    (model / "unet" / WEIGHTS).unlink()
    assert unet_weight_shapes("owner/model", variant="fp16") == {"x": (3, 5)}


def test_identity_of_the_unet_follows_its_bytes(tiny_model, model):
    expected = unet_identity(tiny_model)
    assert unet_identity(str(model)) == expected  # a copy
    (model / "vae" / "config.json").write_text("{}")
    assert unet_identity(str(model)) == expected  # another part
    path = model / "unet" / WEIGHTS
    tensors = load_file(path)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, path)
    assert unet_identity(str(model)) != expected
    save_file(tensors, model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert unet_identity(str(model), variant="fp16") != unet_identity(str(model))
    with pytest.raises(ModelError, match="cannot be read"):
        unet_identity(str(model), variant="ema")


def test_identity_of_a_hub_model_is_its_commit_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert unet_identity("owner/model") == "owner/model@main"
    assert unet_identity("owner/model", revision="v2", variant="fp16") == "owner/model@v2 fp16"
    (tmp_path / "models--owner--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("a" * 40)
    assert unet_identity("owner/model") == "owner/model@" + "a" * 40


@pytest.mark.parametrize(
    ("objective", "scheduler_config", "said"),
    [
        ("epsilon", {"prediction_type": "epsilon"}, ""),
        ("epsilon", {}, ""),
        ("v_prediction", {"prediction_type": "v_prediction"}, ""),
        ("epsilon", {"prediction_type": "v_prediction"}, 'Set loss.objective = "v_prediction"'),
        ("v_prediction", {}, 'the scheduler of model.path says "epsilon"'),
    ],
)
def test_an_objective_that_is_not_the_models(objective, scheduler_config, said):
    warning = objective_warning(objective, scheduler_config)
    assert said in warning
    assert bool(warning) == bool(said)


def test_an_unknown_part_names_the_known_ones(tiny_model):
    with pytest.raises(ModelError, match=r"an SDXL has no part 'refiner'. Its parts: unet, vae, "):
        fingerprint(tiny_model, "refiner")


def test_reading_a_model_needs_no_torch(tiny_model):
    code = (
        "import sys; from sdxl_ray.sdxl import components as c; m = c.resolve_model(sys.argv[1]); "
        "c.text_fingerprint(m); c.vae_fingerprint(m, 'float32'); c.unet_weight_shapes(m); "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_model], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
