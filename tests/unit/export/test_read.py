"""LoRA files of this and other trainers, read to go on from."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdxl_ray.errors import ModelError
from sdxl_ray.export.formats import write_diffusers, write_kohya
from sdxl_ray.export.names import sgm_path
from sdxl_ray.export.read import read_lora
from sdxl_ray.sdxl.adapters import BlockRule, attach_adapter, start_from, trained_modules
from sdxl_ray.sdxl.trained import effective_delta

TEXT = ("text_encoder", "text_encoder_2")
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
EVERYTHING = (
    *("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("linear_1", "linear_2", "downsamplers.0.conv", "upsamplers.0.conv"),
)


def assert_read(path, models, parts):
    """Each module's update, and nothing else."""
    read = read_lora(path, unet_config=models["unet"].config)
    assert read.keys() == parts.keys()
    for part, modules in parts.items():
        assert read[part].keys() == modules.keys()
        for module_path, module in modules.items():
            down, up, scale = read[part][module_path]
            expected = effective_delta(module, models[part].get_submodule(module_path).weight.detach())
            found = scale * (up.float().flatten(1) @ down.float().flatten(1)).reshape(expected.shape)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_our_own_files_give_back_what_was_trained(models, train, strip, tmp_path, write):
    rules = (BlockRule("mid_block", 2, 7.0), BlockRule("up_blocks.0", 6, None))
    _, parts, _ = train(targets=EVERYTHING, blocks=rules, text=TEXT, rank_stabilized=True)
    strip()
    write(tmp_path / "cat.safetensors", parts, {})
    assert_read(tmp_path / "cat.safetensors", models, parts)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("old_names", [False, True])
def test_files_that_diffusers_writes(models, tmp_path, old_names, use_rslora):
    """`save_lora_weights` with peft's names, and with the names that diffusers' own scripts convert to."""
    targets = {"unet": ["to_q", "to_out.0"], "text_encoder": ["q_proj", "out_proj"], "text_encoder_2": ["k_proj"]}
    for part, model in models.items():
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, target_modules=targets[part]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    states = {part: get_peft_model_state_dict(model, adapter_name="default") for part, model in models.items()}
    written = {part: convert_state_dict_to_diffusers(state) if old_names else state for part, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=written["unet"],
        text_encoder_lora_layers=written["text_encoder"],
        text_encoder_2_lora_layers=written["text_encoder_2"],
        **_collate_lora_metadata(models),
    )
    read = read_lora(tmp_path / "pytorch_lora_weights.safetensors", unet_config=models["unet"].config)
    assert read.keys() == states.keys()
    for part, state in states.items():
        assert {f"{path}.lora_A.weight" for path in read[part]} == {name for name in state if "lora_A" in name}
        for module_path, (down, up, scale) in read[part].items():
            assert torch.equal(down, state[f"{module_path}.lora_A.weight"])
            assert torch.equal(up, state[f"{module_path}.lora_B.weight"])
            assert scale == pytest.approx(models[part].get_submodule(module_path).scaling["default"])


def test_without_alpha_it_is_the_rank(models, train, strip, tmp_path):
    _, parts, _ = train(rank=4, alpha=4.0)
    strip()
    write_diffusers(tmp_path / "d.safetensors", parts, {})
    save_file(load_file(tmp_path / "d.safetensors"), tmp_path / "bare.safetensors")
    assert_read(tmp_path / "bare.safetensors", models, parts)

    write_kohya(tmp_path / "k.safetensors", parts, {})
    bare = {key: tensor for key, tensor in load_file(tmp_path / "k.safetensors").items() if not key.endswith("alpha")}
    save_file(bare, tmp_path / "bare.safetensors")
    assert_read(tmp_path / "bare.safetensors", models, parts)


def test_kohya_files_in_diffusers_words_and_with_their_own_alphas(models, tmp_path):
    """OneTrainer's legacy format; alpha differs from the rank and from module to module."""
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    stem = "lora_unet_" + PATH.replace(".", "_")
    text = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj"
    pair = {"lora_down.weight": down, "lora_up.weight": up}
    tensors = {f"{name}.{end}": value.clone() for name in (stem, text) for end, value in pair.items()}
    save_file(
        {**tensors, f"{stem}.alpha": torch.tensor(1.0), f"{text}.alpha": torch.tensor(6)}, tmp_path / "a.safetensors"
    )

    read = read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config)
    assert read["unet"][PATH][2] == 0.5
    (module_path,) = read["text_encoder"]
    assert module_path in dict(models["text_encoder"].named_modules()) and module_path.endswith(
        "layers.1.self_attn.out_proj"
    )
    assert read["text_encoder"][module_path][2] == 3.0


def test_the_oldest_dotted_names(models, tmp_path):
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    owner = f"unet.{PATH.removesuffix('.to_q')}.processor"
    text = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    tensors = {
        f"{owner}.to_out_lora.down.weight": down,
        f"{owner}.to_out_lora.up.weight": up,
        f"{text}.to_k_lora.down.weight": down,
        f"{text}.to_k_lora.up.weight": up,
        f"{text}.q_proj.lora_linear_layer.down.weight": down,
        f"{text}.q_proj.lora_linear_layer.up.weight": up,
    }
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config)
    assert read["unet"].keys() == {PATH.replace("to_q", "to_out.0")}
    assert {name.rpartition(".")[2] for name in read["text_encoder_2"]} == {"k_proj", "q_proj"}
    assert read["text_encoder_2"].keys() <= dict(models["text_encoder_2"].named_modules()).keys()


def test_training_begins_as_the_file(models, train, strip, tmp_path):
    _, parts, _ = train(rank=4, alpha=8.0, text=TEXT)
    strip()
    write_kohya(tmp_path / "cat.safetensors", parts, {})
    for part, modules in read_lora(tmp_path / "cat.safetensors", unet_config=models["unet"].config).items():
        attach_adapter(models[part], rank=6, alpha=3.0, targets="all-linear")
        start_from(models[part], modules)
        now = trained_modules(models[part])
        for module_path, module in parts[part].items():
            base = torch.zeros(models[part].get_submodule(module_path).weight.shape)
            begun, trained = (effective_delta(one, base) for one in (now[module_path], module))
            torch.testing.assert_close(begun, trained, rtol=1e-5, atol=1e-6)


def test_modules_without_an_update_are_left_out(models, tmp_path):
    """Kohya's files have such for the last layer of text encoder 1, which no adapter of ours touches."""
    stem = "lora_te1_text_model_encoder_layers_2_mlp_fc1"
    other = stem.replace("layers_2", "layers_0")
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 32) for name in (stem, other)}
    tensors |= {f"{stem}.lora_up.weight": torch.zeros(128, 2), f"{other}.lora_up.weight": torch.ones(128, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config)
    assert [name.split("layers.")[1] for name in read["text_encoder"]] == ["0.mlp.fc1"]


def test_a_module_that_has_only_an_alpha_is_left_out(models, tmp_path):
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{stem}.lora_down.weight": torch.randn(2, 32), f"{stem}.lora_up.weight": torch.ones(128, 2)}
    save_file({**pair, f"{STEM}.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config).keys() == {"text_encoder"}


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")])
def test_comfyuis_own_names(models, train, strip, tmp_path, ends):
    """Those of the model in memory, with a prefix: comfy/lora.py, "generic lora format without any weird key names"."""
    _, parts, _ = train(targets=EVERYTHING, text=TEXT)
    strip()
    tensors = {}
    for part, modules in parts.items():
        for module_path, module in modules.items():
            bare = module_path.removeprefix("text_model.")
            name = {
                "unet": "diffusion_model." + (sgm_path(module_path, layers_per_block=2) if part == "unet" else ""),
                "text_encoder": f"text_encoders.clip_l.transformer.text_model.{bare}",
                "text_encoder_2": f"text_encoders.clip_g.transformer.text_model.{bare}",
            }[part]
            tensors[f"{name}.{ends[0]}.weight"] = module.tensors["lora_A.weight"]
            tensors[f"{name}.{ends[1]}.weight"] = module.tensors["lora_B.weight"]
            tensors[f"{name}.alpha"] = torch.tensor(module.scale * module.rank)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_read(tmp_path / "a.safetensors", models, parts)


def test_pefts_own_files_of_a_unet(models, tmp_path):
    unet = copy.deepcopy(models["unet"])
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], alpha_pattern={"attn2.to_q": 10})
    peft_model = get_peft_model(unet, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = get_peft_model_state_dict(peft_model)
    peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    read = read_lora(path, unet_config=models["unet"].config)
    assert len(read["unet"]) == len(state) // 2
    for module_path, (down, up, scale) in read["unet"].items():
        assert torch.equal(down, state[f"base_model.model.{module_path}.lora_A.weight"])
        assert torch.equal(up, state[f"base_model.model.{module_path}.lora_B.weight"])
        assert scale == (2.5 if "attn2" in module_path else 1.5)

    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"whose alpha is in adapter_config.json beside it.*save_lora_weights"):
        read_lora(path, unet_config=models["unet"].config)


def test_forms_that_cannot_be_read_are_named(models, tmp_path):
    path, config = tmp_path / "a.safetensors", models["unet"].config
    save_file({"base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 32)}, path)
    with pytest.raises(ModelError, match=r"peft's save_pretrained .*which of SDXL's text encoders.*save_lora_weights"):
        read_lora(path, unet_config=config)
    save_file({f"{STEM}.lora_down.weight": torch.ones(2, 32), "bundle_emb.cat.clip_l": torch.ones(1, 8)}, path)
    with pytest.raises(ModelError, match=r"OneTrainer with embeddings.*'bundle_emb.cat.clip_l'.*Bundle Embeddings off"):
        read_lora(path, unet_config=config)


STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{STEM}.dora_scale", "a DoRA"),
        (f"unet.{PATH}.lora_magnitude_vector", "a DoRA"),
        (f"{STEM}.hada_w1_a", "a LoHa"),
        (f"{STEM}.lokr_w1", "a LoKr"),
        (f"{STEM}.lora_mid.weight", "a LoCon with a Tucker core"),
        (f"{STEM}.oft_blocks", "an OFT"),
        (f"{STEM}.boft_blocks", "a BOFT"),
        (f"{STEM}.diff", "a full difference of weights"),
    ],
)
def test_other_kinds_are_refused_by_name(models, tmp_path, key, kind):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ModelError, match=rf"holds {kind} \('.*'\), and adapter.start_from takes a plain LoRA.*kohya-svd"
    ):
        read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config)


def test_unknown_names_are_refused_and_counted(models, tmp_path):
    tensors = {
        f"{STEM}.lora_down.weight": torch.ones(2, 32),
        f"{STEM}.lora_up.weight": torch.ones(32, 2),
        "transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 8),
        "unet.down_blocks.7.attentions.0.proj_in.lora_A.weight": torch.ones(2, 8),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as refusal:
        read_lora(tmp_path / "a.safetensors", unet_config=models["unet"].config)
    message = str(refusal.value)
    assert (
        "of 4 tensors, 1 have names that mean nothing here (such as transformer.blocks.0.attn.to_q.lora_A.weight)"
        in message
    )
    assert "1 modules are not in the model (such as unet.down_blocks.7.attentions.0.proj_in)" in message
    assert "Set adapter.start_from to another file" in message


def test_half_a_module_a_broken_header_and_no_file_at_all(models, tmp_path):
    path = tmp_path / "a.safetensors"
    config = models["unet"].config
    save_file({f"{STEM}.lora_down.weight": torch.ones(2, 32)}, path)
    with pytest.raises(ModelError, match=rf"unet.{PATH} is not whole: expected a down .* found.*'down': \(2, 32\)"):
        read_lora(path, unet_config=config)
    save_file({f"unet.{PATH}.lora_A.weight": torch.ones(2, 32)}, path, {"lora_adapter_metadata": "{r: 4"})
    with pytest.raises(ModelError, match="lora_adapter_metadata, which holds alpha, is not JSON"):
        read_lora(path, unet_config=config)
    path.write_bytes(json.dumps({}).encode())
    with pytest.raises(ModelError, match="cannot be read as a safetensors file"):
        read_lora(path, unet_config=config)
    with pytest.raises(ModelError, match="cannot be read as a safetensors file"):
        read_lora(tmp_path / "missing.safetensors", unet_config=config)
