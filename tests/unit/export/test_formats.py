"""The two kinds of files, as the programs that read them see them."""

import json

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import write_diffusers, write_kohya
from sdxl_ray.export.probe import probe_models, relative_error
from sdxl_ray.sdxl.trained import TrainedModule

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
TEXT = ("text_encoder", "text_encoder_2")


def one(rank=4, scale=2.0, kind="lora", out=5, **more):
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        "lora_A.weight": torch.randn(rank, 6, generator=generator),
        "lora_B.weight": torch.randn(out, rank, generator=generator),
    }
    return TrainedModule(kind=kind, tensors={**tensors, **more}, scale=scale, rank=rank)


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("text", [(), TEXT], ids=["unet", "with text encoders"])
@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_a_pipeline_that_loads_the_file_is_the_trained_model(pipeline, models, train, strip, tmp_path, write, text):
    _, parts, trained = train(rank=4, alpha=8.0, text=text, targets="attention")
    strip()
    used = {part: models[part] for part in trained}
    untrained = probe_models(used)
    write(tmp_path / "cat.safetensors", parts, {})

    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    loaded = probe_models(used)

    for part in trained:
        difference = (untrained[part] - trained[part]).abs().max() / trained[part].abs().max()
        assert difference > 0.01, f"the adapter of {part} does nothing: nothing is tested"
        assert relative_error({part: loaded[part]}, {part: trained[part]}) < 1e-4


@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_ranks_and_scales_that_differ_between_modules_are_read_right(pipeline, train, strip, tmp_path, write):
    """By diffusers, also where kohya's alpha of attention modules is not read."""
    from sdxl_ray.sdxl.adapters import BlockRule

    rules = (BlockRule("mid_block", 2, 7.0), BlockRule("up_blocks.0", 6, 3.0), BlockRule("to_out", 3, None))
    _, parts, trained = train(
        targets=("attn1.to_q", "attn2.to_out.0"), blocks=rules, text=TEXT[:1], rank_stabilized=True
    )
    assert len({(module.rank, module.scale) for module in parts["unet"].values()}) >= 4
    strip()
    write(tmp_path / "cat.safetensors", parts, {})

    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    found = probe_models({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    assert relative_error(found, trained) < 1e-4


def test_a_dora_in_diffusers_own_format_is_read_exactly(pipeline, train, strip, tmp_path):
    _, parts, trained = train(kind="dora", text=TEXT)
    strip()
    write_diffusers(tmp_path / "cat.safetensors", parts, {})

    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    found = probe_models({part: getattr(pipeline, part) for part in trained})
    assert relative_error(found, trained) < 1e-5
    layer = pipeline.unet.get_submodule(PATH)
    (name,) = layer.lora_magnitude_vector
    read = layer.lora_magnitude_vector[name].weight
    assert torch.equal(read, parts["unet"][PATH].tensors["lora_magnitude_vector.weight"])


def test_kohya_folds_the_scale_into_lora_up(tmp_path):
    module = one(rank=4, scale=1.5)
    write_kohya(tmp_path / "cat.safetensors", {"unet": {PATH: module}}, {"ss_network_alpha": "6.0"})

    file = load_file(tmp_path / "cat.safetensors")
    assert file[f"{STEM}.alpha"].item() == 4.0
    assert file[f"{STEM}.alpha"].shape == () and file[f"{STEM}.alpha"].is_floating_point()
    assert torch.equal(file[f"{STEM}.lora_down.weight"], module.tensors["lora_A.weight"])
    assert torch.equal(file[f"{STEM}.lora_up.weight"], 1.5 * module.tensors["lora_B.weight"])
    assert header(tmp_path / "cat.safetensors")["ss_network_alpha"] == "4.0"
    assert header(tmp_path / "cat.safetensors")["ss_network_dim"] == "4"


def test_kohya_keeps_one_alpha_when_ranks_differ(tmp_path):
    other = one(rank=2)
    parts = {"unet": {PATH: one(rank=4), PATH.replace("to_q", "to_k"): other}}
    write_kohya(tmp_path / "cat.safetensors", parts, {})

    file = load_file(tmp_path / "cat.safetensors")
    assert {value.item() for key, value in file.items() if key.endswith(".alpha")} == {4.0}
    stem = STEM.replace("to_q", "to_k")
    as_read = file[f"{stem}.lora_up.weight"] @ file[f"{stem}.lora_down.weight"] * (4.0 / 2)
    torch.testing.assert_close(as_read, other.tensors["lora_B.weight"] @ other.tensors["lora_A.weight"] * 2.0)


def test_text_encoders_have_the_names_that_other_programs_know(train, tmp_path):
    """With `text_model` whatever this transformers calls them; field notes, gotcha 4."""
    _, parts, _ = train(text=TEXT)
    write_kohya(tmp_path / "k", parts, {})
    write_diffusers(tmp_path / "d", parts, {})

    kohya, dotted = load_file(tmp_path / "k"), load_file(tmp_path / "d")
    for number, part in enumerate(TEXT, start=1):
        assert f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in kohya
        assert f"lora_te{number}_text_model_encoder_layers_1_mlp_fc1.lora_up.weight" in kohya
        assert f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in dotted
    assert all(key.startswith(("lora_unet_", "lora_te1_", "lora_te2_")) for key in kohya)
    config = json.loads(header(tmp_path / "d")["lora_adapter_metadata"])
    # without: peft matches ends, which fits a CLIP with text_model and one without
    assert "encoder.layers.0.self_attn.q_proj" in config["text_encoder.target_modules"]
    assert config["text_encoder_2.r"] == 2 and config["text_encoder_2.lora_alpha"] == 6.0


def test_diffusers_header_is_a_part_of_what_diffusers_would_write(unet, train, strip, tmp_path):
    _, parts, _ = train(rank=4, alpha=8.0)
    strip()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    theirs = _collate_lora_metadata({"unet": unet})["unet_lora_adapter_metadata"]
    write_diffusers(tmp_path / "cat.safetensors", parts, {})

    ours = json.loads(header(tmp_path / "cat.safetensors")["lora_adapter_metadata"])
    assert ours["unet.r"] == 4 and ours["unet.lora_alpha"] == 8.0
    assert {key.removeprefix("unet.") for key in ours} <= theirs.keys()
    expected = {f"unet.{path}.{leaf}" for path, module in parts["unet"].items() for leaf in module.tensors}
    assert load_file(tmp_path / "cat.safetensors").keys() == expected


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_kind_the_format_cannot_hold_is_refused_before_writing(tmp_path, kind):
    with pytest.raises(
        ExportError, match=rf"diffusers format holds lora or dora of the unet.*these are of kind {kind}"
    ):
        write_diffusers(tmp_path / "cat.safetensors", {"unet": {PATH: one(kind=kind)}}, {})
    with pytest.raises(ExportError, match=rf"kohya format holds lora of the text_encoder.*these are of kind {kind}"):
        write_kohya(tmp_path / "cat.safetensors", {"text_encoder": {"encoder.layers.0.mlp.fc1": one(kind=kind)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_two_kinds_in_one_model_are_refused(tmp_path):
    dora = one(kind="dora", **{"lora_magnitude_vector.weight": torch.ones(5)})
    with pytest.raises(ExportError, match="one kind for all modules; these are of kind dora, lora"):
        write_kohya(tmp_path / "cat.safetensors", {"unet": {PATH: one(), PATH.replace("to_q", "to_k"): dora}}, {})


def test_half_a_module_and_nothing_are_refused(tmp_path):
    half = TrainedModule(kind="lora", tensors={"lora_A.weight": torch.ones(4, 6)}, scale=1.0, rank=4)
    with pytest.raises(ExportError, match=rf"{PATH} is no whole lora: expected lora_A.weight, lora_B.weight, found"):
        write_kohya(tmp_path / "cat.safetensors", {"unet": {PATH: half}}, {})
    with pytest.raises(ExportError, match="there are none to write"):
        write_kohya(tmp_path / "cat.safetensors", {"unet": {}}, {})
    with pytest.raises(ExportError, match="'vae' is none of these"):
        write_diffusers(tmp_path / "cat.safetensors", {"vae": {PATH: one()}}, {})
