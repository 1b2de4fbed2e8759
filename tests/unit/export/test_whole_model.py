"""Whole models, loaded by diffusers from one file and from a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdxl_ray.errors import ExportError
from sdxl_ray.export.reading_back_whole import read_back_checkpoint, read_back_folder
from sdxl_ray.export.whole_model import BaseModel, Trained, merged, write_checkpoint, write_folder
from sdxl_ray.sdxl.trained import TrainedModule, effective_delta

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def base_folder(tiny_model, tmp_path_factory):
    """The tiny SDXL with a wider text encoder 2: diffusers tells the two apart by their width."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model"))
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
    config.hidden_size, config.projection_dim = 48, 24
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    return folder


def states(pipeline):
    return {part: getattr(pipeline, part).state_dict() for part in PARTS}


def assert_equal(found, expected):
    for part in PARTS:
        assert found[part].keys() == expected[part].keys()
        for name in expected[part]:
            assert torch.equal(found[part][name], expected[part][name]), (part, name)


def lora(*shape, rank=2):
    generator = torch.Generator().manual_seed(0)
    out, into, *kernel = shape
    tensors = {
        "lora_A.weight": torch.randn(rank, into, *kernel, generator=generator),
        "lora_B.weight": torch.randn(out, rank, *(1 for _ in kernel), generator=generator),
    }
    return TrainedModule(kind="lora", tensors=tensors, scale=0.5, rank=rank)


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return StableDiffusionXLPipeline.from_pretrained(base_folder)


def adapters(pipeline):
    """Linear, convolution, and both text encoders."""
    paths = {
        "unet": ("mid_block.attentions.0.proj_in", "down_blocks.1.resnets.0.conv1"),
        "text_encoder": ("encoder.layers.0.mlp.fc1",),
        "text_encoder_2": ("text_model.encoder.layers.1.self_attn.k_proj",),
    }
    return {
        part: {path: lora(*getattr(pipeline, part).get_submodule(path).weight.shape) for path in names}
        for part, names in paths.items()
    }


def with_adapters(pipeline, modules):
    expected = states(pipeline)
    for part, found in modules.items():
        for path, module in found.items():
            weight = expected[part][f"{path}.weight"]
            expected[part] = {**expected[part], f"{path}.weight": weight + effective_delta(module, weight)}
    return expected


def test_a_checkpoint_without_training_is_the_base_model(base_folder, pipeline, tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, merged(BaseModel(str(base_folder)), Trained()), {"modelspec.title": "cat"}, dtype="fp32")

    loaded = StableDiffusionXLPipeline.from_single_file(path, config=str(base_folder), local_files_only=True)
    assert_equal(states(loaded), states(pipeline))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "cat"


def test_a_checkpoint_has_the_adapters_of_all_parts_merged_in(base_folder, pipeline, tmp_path):
    path, base, modules = tmp_path / "model.safetensors", BaseModel(str(base_folder)), adapters(pipeline)
    parts = merged(base, Trained(modules))
    write_checkpoint(path, parts, {}, dtype="fp32")

    loaded = StableDiffusionXLPipeline.from_single_file(path, config=str(base_folder), local_files_only=True)
    assert_equal(states(loaded), with_adapters(pipeline, modules))
    unet, vae = dict(pipeline.unet.config), dict(pipeline.vae.config)
    read_back_checkpoint(path, parts, dtype="fp32", unet_config=unet, vae_config=vae)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_trained_unet_takes_the_bases_place_in_the_dtype_that_is_asked_for(base_folder, pipeline, tmp_path, dtype):
    path, kind = tmp_path / "model.safetensors", {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    trained = {name: tensor + 0.01 for name, tensor in pipeline.unet.state_dict().items()}
    write_checkpoint(path, merged(BaseModel(str(base_folder)), Trained({}, trained)), {}, dtype=dtype)

    loaded = StableDiffusionXLPipeline.from_single_file(
        path, config=str(base_folder), local_files_only=True, torch_dtype=kind
    )
    expected = states(pipeline) | {"unet": trained}
    assert_equal(states(loaded), {part: {n: t.to(kind) for n, t in state.items()} for part, state in expected.items()})


def test_a_model_that_predicts_v_says_so_to_comfyui(base_folder, tmp_path):
    parts = merged(BaseModel(str(base_folder)), Trained())
    marks = {}
    for name, says in {"e": {}, "v": {"prediction_type": "v_prediction"}, "z": {"zero_terminal_snr": True}}.items():
        says = {"prediction_type": "v_prediction", **says} if name == "z" else says
        write_checkpoint(tmp_path / name, parts, {}, dtype="fp32", **says)
        marks[name] = {key for key in load_file(tmp_path / name) if "." not in key}
    assert marks == {"e": set(), "v": {"v_pred"}, "z": {"v_pred", "ztsnr"}}


def test_a_folder_is_loaded_by_from_pretrained(base_folder, pipeline, tmp_path):
    folder, base, modules = tmp_path / "model", BaseModel(str(base_folder)), adapters(pipeline)
    del modules["text_encoder_2"]
    trained = Trained(modules)
    parts = merged(base, trained)
    write_folder(folder, base, parts, trained, {}, dtype="fp32", prediction_type="v_prediction", zero_terminal_snr=True)

    loaded = StableDiffusionXLPipeline.from_pretrained(folder)
    assert_equal(states(loaded), with_adapters(pipeline, modules))
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.rescale_betas_zero_snr and loaded.scheduler.config.timestep_spacing == "trailing"
    assert loaded.tokenizer("a red cat").input_ids == pipeline.tokenizer("a red cat").input_ids
    read_back_folder(folder, parts, dtype="fp32", changed=modules)


def test_only_what_was_trained_gets_the_dtype_and_half_precision_bases_stay_as_they_are(base_folder, tmp_path):
    """A base with nothing but fp16 weights, as many people download it."""
    half = Path(shutil.copytree(base_folder, tmp_path / "half"))
    for part, stem in (
        dict.fromkeys(PARTS[:2], "diffusion_pytorch_model").items() | dict.fromkeys(PARTS[2:], "model").items()
    ):
        file = half / part / f"{stem}.safetensors"
        save_file(
            {n: t.half() for n, t in load_file(file).items()},
            half / part / f"{stem}.fp16.safetensors",
            {"format": "pt"},
        )
        file.unlink()
    base = BaseModel(str(half))
    trained = Trained({"unet": {"mid_block.attentions.0.proj_in": lora(48, 48)}})
    write_folder(tmp_path / "out", base, merged(base, trained), trained, {}, dtype="bf16")

    loaded = {part: next((tmp_path / "out" / part).glob("*.safetensors")) for part in PARTS}
    assert all(".fp16" not in path.name for path in loaded.values())
    dtypes = {part: {tensor.dtype for tensor in load_file(path).values()} for part, path in loaded.items()}
    assert dtypes == {"unet": {torch.bfloat16}} | {part: {torch.float16} for part in PARTS[1:]}
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")


def test_an_fp8_base_is_read(base_folder, tmp_path):
    small = Path(shutil.copytree(base_folder, tmp_path / "fp8"))
    file = small / "unet" / "diffusion_pytorch_model.safetensors"
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(rounded, file, {"format": "pt"})
    base, name = BaseModel(str(small)), "mid_block.attentions.0.proj_in"
    trained = Trained({"unet": {name: lora(48, 48)}})
    parts = merged(base, trained)
    write_folder(tmp_path / "out", base, parts, trained, {}, dtype="fp32")

    found = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    weight = rounded[f"{name}.weight"].float()
    assert torch.equal(found[f"{name}.weight"], weight + effective_delta(lora(48, 48), weight))
    assert torch.equal(found["conv_in.weight"], rounded["conv_in.weight"].float())
    read_back_folder(tmp_path / "out", parts, dtype="fp32", changed=("unet",))


def test_a_base_without_a_word_about_empty_prompts_and_one_that_cannot_be_read(base_folder, tmp_path):
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    index = other / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    assert BaseModel(str(other)).zeros_for_empty_prompt()
    index.unlink()
    assert BaseModel(str(other)).zeros_for_empty_prompt()
    index.write_text("{")
    with pytest.raises(ExportError, match=r"model_index.json is not JSON .*Copy it again from the model's source"):
        BaseModel(str(other)).zeros_for_empty_prompt()


def test_something_that_is_not_in_the_base_is_refused(base_folder):
    base = BaseModel(str(base_folder))
    with pytest.raises(ExportError, match=r"unet: mid_block.attn was trained and is not in .*model.path"):
        merged(base, Trained({"unet": {"mid_block.attn": lora(48, 48)}}))
    with pytest.raises(ExportError, match=r"different weights: \d+ are in one only, such as"):
        merged(base, Trained({}, {"conv_in.weight": torch.ones(1)}))


def test_a_checkpoint_that_differs_in_one_number_is_refused(base_folder, pipeline, tmp_path):
    path, parts = tmp_path / "model.safetensors", merged(BaseModel(str(base_folder)), Trained())
    write_checkpoint(path, parts, {}, dtype="fp32")
    configs = {"unet_config": dict(pipeline.unet.config), "vae_config": dict(pipeline.vae.config)}

    tensors = load_file(path)
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    tensors[key] = tensors[key].clone()
    tensors[key][50] += 1e-6
    save_file(tensors, path)
    with pytest.raises(
        ExportError, match=r"0 are missing or too many and 1 differ, such as text_model.encoder.layers.1.*k_proj.bias"
    ):
        read_back_checkpoint(path, parts, dtype="fp32", **configs)

    del tensors["model.diffusion_model.out.0.weight"]
    save_file(tensors, path)
    with pytest.raises(
        ExportError, match=r"of unet, 1 are missing or too many and 0 differ, such as conv_norm_out.weight"
    ):
        read_back_checkpoint(path, parts, dtype="fp32", **configs)


def test_a_folder_without_a_part_is_refused(base_folder, tmp_path):
    base = BaseModel(str(base_folder))
    parts = merged(base, Trained())
    write_folder(tmp_path / "out", base, parts, Trained(), {}, dtype="fp32")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    (tmp_path / "out" / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(ExportError, match=r"out: cannot be read back .*tokenizer_2"):
        read_back_folder(tmp_path / "out", parts, dtype="fp32", changed=())
