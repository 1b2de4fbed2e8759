"""Export as a whole, and files that must not pass."""

import copy
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_ray.export.exporters as exporters
import sdxl_ray.export.reading_back as reading_back
from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import kohya_stem, write_diffusers, write_kohya
from sdxl_ray.export.probe import make_probe, probe_models, probe_output
from sdxl_ray.export.reading_back import num_weights, read_back_by_definition, read_back_by_diffusers
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.verify import export_adapter, file_name
from sdxl_ray.export.which import DEFAULT_FORMATS, FORMATS, FORMATS_OF
from sdxl_ray.export.whole_model import BaseModel
from sdxl_ray.sdxl.adapters import BlockRule, attach_adapter, detach_adapter, load_adapter_state_dict
from sdxl_ray.sdxl.adapters import adapter_state_dict as trained_state
from sdxl_ray.sdxl.quantize import quantize_frozen

TEXT = ("text_encoder", "text_encoder_2")
FEW = ("attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")  # as `train`
NAMES = {
    "kohya": "cat.safetensors",
    "diffusers": "cat.diffusers.safetensors",
    "kohya-svd": "cat.kohya-svd.safetensors",
    "checkpoint": "cat.checkpoint.safetensors",
    "diffusers-folder": "cat.diffusers-folder",
}


def rewrite(path, change):
    """The file again, with `change(tensors, metadata)` done to it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def export(models, tmp_path, tiny_model):
    """`export(spec, formats=("kohya",))` into tmp_path; also the encoders are offered, trained or not."""

    def call(spec, **options):
        encoders = {part: models[part] for part in TEXT}
        options = {"metadata": {}, "base": BaseModel(tiny_model), "text_encoders": encoders, **options}
        return export_adapter(models["unet"], folder=tmp_path, name="cat", spec=spec, **options)

    return call


@pytest.mark.parametrize(
    ("kind", "targets", "text"),
    [
        ("lora", (*FEW, "resnets.0.conv1", "conv_shortcut", "upsamplers.0.conv"), TEXT),
        ("dora", (*FEW, "resnets.0.conv1", "conv_shortcut"), TEXT[:1]),
        ("loha", (*FEW, "resnets.0.conv1", "conv_shortcut"), TEXT[1:]),
        ("lokr", (*FEW, "resnets.0.conv1", "conv_shortcut"), ()),
    ],
)
def test_each_kind_in_each_of_its_formats(models, train, export, tmp_path, kind, targets, text):
    bare = probe_models(models)
    spec, _, _ = train(kind=kind, targets=targets, text=text)

    files = export(spec, formats=FORMATS_OF[kind], svd_rank=16)

    names = {**NAMES, **({"kohya": "cat.dora.safetensors", "kohya-svd": "cat.safetensors"} if kind == "dora" else {})}
    assert [(file.format, file.path.name) for file in files] == [(name, names[name]) for name in FORMATS_OF[kind]]
    assert all(file.relative_error < 1e-5 for file in files if file.format != "kohya-svd")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.path.name for file in files)
    after = probe_models(models)
    assert all(torch.equal(after[part], bare[part]) for part in bare), "a model was not left bare"


def test_what_is_written_for_the_unet_and_both_encoders_draws_as_trained(pipeline, train, export, models, tiny_model):
    """A whole pipeline of a user: base model, then `load_lora_weights`."""
    spec, _, trained = train(text=TEXT)
    file, _ = export(spec)
    user = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    user.load_lora_weights(file.path.parent, weight_name=file.path.name)
    found = probe_models({part: getattr(user, part) for part in trained})
    for part, answer in trained.items():
        torch.testing.assert_close(found[part], answer, rtol=1e-4, atol=1e-4 * float(answer.abs().max()))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_export_in_half_precision_passes_too(train, export, kind, dtype):
    spec, _, _ = train(kind=kind)
    files = export(spec, dtype=dtype)
    assert all(0 < file.relative_error < 1e-2 for file in files)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_bf16_unet_gives_the_same_answer_within_its_rounding(unet, train, tmp_path, tiny_model, kind):
    half = copy.deepcopy(unet).to(torch.bfloat16)
    attach_adapter(half, kind=kind, rank=4, alpha=8.0, targets=FEW)
    spec, _, _ = train(kind=kind)
    load_adapter_state_dict(half, trained_state(unet))

    formats = [name for name in FORMATS_OF[kind] if name != "kohya-svd"]
    files = export_adapter(
        half, folder=tmp_path, name="cat", spec=spec, metadata={}, formats=formats, base=BaseModel(tiny_model)
    )
    assert all(file.relative_error < 5e-2 for file in files)


def test_masters_are_written_and_not_their_rounded_copies(unet, train, tmp_path):
    half = copy.deepcopy(unet).to(torch.bfloat16)
    attach_adapter(half, rank=4, alpha=8.0, targets=FEW)
    spec, parts, _ = train()
    load_adapter_state_dict(half, trained_state(unet))
    (file,) = export_adapter(half, folder=tmp_path, name="cat", spec=spec, metadata={}, formats=["diffusers"])
    path = next(iter(parts["unet"]))
    expected = parts["unet"][path].tensors["lora_B.weight"]
    assert torch.equal(load_file(file.path)[f"unet.{path}.lora_B.weight"], expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_a_quantised_unet(unet, train, tmp_path, tiny_model, kind):
    """Its adapter was trained on the rounded base; the weights, at least, can be compared."""
    small = copy.deepcopy(unet)
    quantize_frozen(small, "int8")
    attach_adapter(small, kind=kind, rank=4, alpha=8.0, targets=FEW)
    spec, _, _ = train(kind=kind)
    state = trained_state(unet)
    if kind == "dora":
        state |= {name: tensor for name, tensor in trained_state(small).items() if "magnitude" in name}
    load_adapter_state_dict(small, state)
    formats = ["kohya", "kohya-svd"]
    files = export_adapter(small, folder=tmp_path, name="cat", spec=spec, metadata={}, formats=formats)
    assert files[0].relative_error < 1e-4


def test_pissa_goes_out_as_a_lora_of_twice_the_rank(unet, export, tmp_path):
    attach_adapter(unet, rank=3, alpha=3.0, init="pissa", targets=FEW)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    (file,) = export(AdapterSpec("lora", 3, 3.0), formats=["kohya"])
    assert {t.shape[0] for key, t in load_file(file.path).items() if "lora_down" in key} == {6}
    assert file.relative_error < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_that_learned_nothing_can_be_exported(unet, export, kind):
    attach_adapter(unet, kind=kind, rank=4, alpha=8.0, targets=("mid_block.attentions.0.proj_in", "conv_in"))
    files = export(AdapterSpec(kind, 4, 8.0), formats=FORMATS_OF[kind][:-1])
    assert all(file.relative_error < 1e-5 for file in files)


def test_a_fully_trained_unet(models, train, export, pipeline, tiny_model):
    """Its own weights, the encoders' LoRAs merged in."""
    train(text=TEXT[:1])
    detach_adapter(models["unet"])
    masters = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in models["unet"].state_dict().items()}
    models["unet"].load_state_dict(masters)
    trained = probe_models({part: models[part] for part in ("unet", "text_encoder")})

    checkpoint, folder = export(
        AdapterSpec("full", 16, 16.0), formats=["checkpoint", "diffusers-folder"], unet_weights=masters
    )

    assert checkpoint.relative_error < 1e-5 and folder.relative_error < 1e-5
    user = StableDiffusionXLPipeline.from_pretrained(folder.path)
    assert torch.equal(user.unet.state_dict()["conv_norm_out.weight"], masters["conv_norm_out.weight"])
    torch.testing.assert_close(probe_models({"unet": user.unet})["unet"], trained["unet"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        user.text_encoder.state_dict()["encoder.layers.0.mlp.fc1.weight"],
        StableDiffusionXLPipeline.from_pretrained(tiny_model).text_encoder.state_dict()[
            "encoder.layers.0.mlp.fc1.weight"
        ],
    )


def test_masters_of_a_part_of_the_unet_are_refused(export):
    with pytest.raises(ExportError, match=r"of the U-Net's \d+ weights are not among those that were trained, such as"):
        export(AdapterSpec("full", 16, 16.0), formats=["checkpoint"], unet_weights={"conv_in.bias": torch.ones(1)})


def test_a_base_with_zero_terminal_snr_keeps_saying_so(train, export, tiny_model, tmp_path_factory):
    base = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model"))
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "rescale_betas_zero_snr": True}))
    spec, _, _ = train()
    options = {"formats": ["checkpoint"], "prediction_type": "v_prediction"}
    (file,) = export(spec, base=BaseModel(str(base)), **options)
    assert {"v_pred", "ztsnr"} <= load_file(file.path).keys()


def test_the_nearest_lora_says_how_near_it_is(train, export, tmp_path):
    spec, _, _ = train(kind="dora", strength=0.2)
    (far,) = export(spec, formats=["kohya-svd"], svd_rank=2)
    assert far.note.startswith("cat.safetensors is the nearest plain LoRA of rank 2: its weight change is off by ")
    assert far.warning == f"{far.note} Raise export.svd_rank to come nearer, or use a program that reads dora files."
    assert 0.001 < far.relative_error < 1.0

    spec, _, _ = train(kind="dora", strength=0.2)
    (near,) = export(spec, formats=["kohya-svd"], svd_rank=10_000, metadata={"ss_network_module": "lycoris.kohya"})
    assert near.warning == "" and near.relative_error < 1e-4
    with safe_open(near.path, framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"


def test_the_plain_name_is_that_of_a_file_that_every_program_reads(train, export, tmp_path):
    for kind in FORMATS_OF:
        names = [file_name("cat", format_name, kind) for format_name in FORMATS]
        assert len(set(names)) == len(names)
        if kind != "full":
            assert file_name("cat", DEFAULT_FORMATS[kind][0], kind) == "cat.safetensors"
    spec, _, _ = train(kind="dora")
    (file,) = export(spec, formats=["kohya"])  # also alone it does not take the plain name
    assert file.path.name == "cat.dora.safetensors"
    assert file.warning == (
        "cat.dora.safetensors is a DoRA: LyCORIS reads it exactly, ComfyUI and Forge nearly (they divide by the norm "
        "of the base weight); A1111, InvokeAI and diffusers read it wrongly, without an error. For these, take the "
        "file of the format kohya-svd."
    )
    spec, _, _ = train(kind="loha")
    assert export(spec, formats=["kohya"])[0].warning == ""


def test_the_stand_in_has_four_times_the_largest_rank(train, export):
    rules = (BlockRule("mid_block", 5, None),)
    spec, _, _ = train(kind="dora", rank=2, blocks=rules)
    (file,) = export(spec, formats=["kohya-svd"])
    assert max(t.shape[0] for key, t in load_file(file.path).items() if "lora_down" in key) == 20
    assert "nearest plain LoRA of rank 20" in file.note


def test_plain_loras_of_no_higher_rank_go_into_the_stand_in_as_they_are(models, train, export):
    spec, parts, _ = train(rank=2, alpha=2.0, blocks=(BlockRule("mid_block", 5, 5.0),))
    (whole,) = export(spec, formats=["kohya-svd"])
    assert whole.note == "cat.kohya-svd.safetensors holds the trained LoRA as it is." and whole.warning == ""
    stems = {path: kohya_stem("unet", path, layers_per_block=2) for path in parts["unet"]}
    tensors = load_file(whole.path)
    for path, module in parts["unet"].items():
        assert torch.equal(tensors[f"{stems[path]}.lora_down.weight"], module.tensors["lora_A.weight"])

    attach_adapter(models["unet"], kind="dora", rank=2, alpha=2.0, targets=FEW)
    (untrained,) = export(AdapterSpec("dora", 2, 2.0), formats=["kohya-svd"])
    assert "nearest plain LoRA of rank 8: its weight change is off by 0.0%" in untrained.note

    spec, parts, _ = train(rank=2, alpha=2.0, blocks=(BlockRule("mid_block", 5, 5.0),))
    (smaller,) = export(spec, formats=["kohya-svd"], svd_rank=3)
    tensors = load_file(smaller.path)
    ranks = {module.rank: tensors[f"{stems[path]}.lora_down.weight"].shape[0] for path, module in parts["unet"].items()}
    assert ranks == {2: 2, 5: 3}
    assert "nearest plain LoRA of rank 3" in smaller.note


@pytest.mark.parametrize("says", [True, False])
def test_the_folder_says_what_an_empty_prompt_is(train, export, tiny_model, tmp_path_factory, says):
    base = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "model"))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": says}))
    for zeros in (True, False):
        spec, _, _ = train()
        (file,) = export(spec, base=BaseModel(str(base)), formats=["diffusers-folder"], empty_prompt_is_zeros=zeros)
        found = json.loads((file.path / "model_index.json").read_text())["force_zeros_for_empty_prompt"]
        assert found is (says and zeros)


@pytest.mark.parametrize("format_name", ["kohya", "checkpoint"])
def test_weights_are_replaced_in_place_and_come_back(models, unet, train, export, monkeypatch, format_name):
    """No second copy on the device: while the model is asked, its parameters are the same, with other values."""
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in unet.named_parameters()}
    spec, parts, _ = train(kind="loha")
    changed = []

    def look(asked):
        now = {name.replace(".base_layer", ""): parameter for name, parameter in unet.named_parameters()}
        if now.keys() == before.keys():  # without the adapter
            assert all(now[name] is parameter for name, (parameter, _) in before.items())
            changed.extend(name for name, (parameter, value) in before.items() if not torch.equal(parameter, value))
        return probe_models(asked)

    for module in (exporters, reading_back):
        monkeypatch.setattr(module, "probe_models", look)
    export(spec, formats=[format_name])
    assert sorted(changed) == sorted(f"{path}.weight" for path in parts["unet"])
    assert all(torch.equal(parameter, value) for parameter, value in before.values())


def test_of_a_quantised_model_no_merged_weight_is_kept(unet, train, tmp_path, monkeypatch):
    small = copy.deepcopy(unet)
    quantize_frozen(small, "int8")
    _, parts, _ = train(kind="loha", targets=("to_q",))
    detach_adapter(unet)
    write_kohya(tmp_path / "cat.safetensors", parts, {})
    shapes = {tuple(unet.get_submodule(path).weight.shape) for path in parts["unet"]}

    def count():
        gc.collect()
        return sum(type(one) is torch.Tensor and tuple(one.shape) in shapes for one in gc.get_objects())

    counts = [count()]
    worst = reading_back._worst
    monkeypatch.setattr(reading_back, "_worst", lambda errors: (counts.append(count()), worst(errors))[1])
    read = read_back_by_definition(tmp_path / "cat.safetensors", {"unet": small}, parts)
    assert read.answers == {} and read.delta_error < 1e-5
    assert len(parts["unet"]) > 6 and counts[1] - counts[0] <= 3  # of the last module


@pytest.mark.parametrize("format_name", ["diffusers", "checkpoint"])
def test_a_failure_of_torch_while_reading_back_names_the_file(train, export, tmp_path, monkeypatch, format_name):
    spec, _, _ = train()

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for module in (exporters, reading_back):
        monkeypatch.setattr(module, "probe_models", full)
    with pytest.raises(
        ExportError,
        match=rf"cat.{format_name}.safetensors could not be verified: OutOfMemoryError while it was written and read "
        r"back \(CUDA out of memory\)\. .*safe in the last checkpoint.*kept as .*rejected",
    ):
        export(spec, formats=[format_name])


@pytest.mark.parametrize(
    ("kind", "format_name", "reason"),
    [
        ("lora", "comfy", r"'comfy'\. Known: kohya, diffusers"),
        ("loha", "diffusers", "diffusers cannot read a LoHa"),
        ("full", "kohya", "trains the U-Net itself"),
    ],
)
def test_what_cannot_be_is_refused_while_the_adapter_is_still_there(
    unet, train, export, tmp_path, kind, format_name, reason
):
    train()
    reference = probe_output(unet, make_probe(unet))
    with pytest.raises(ExportError, match=reason):
        export(AdapterSpec(kind, 4, 8.0), formats=[format_name])
    assert torch.equal(probe_output(unet, make_probe(unet)), reference)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_needs_the_base(train, export):
    spec, _, _ = train()
    with pytest.raises(ExportError, match="checkpoint needs the base model's files"):
        export(spec, formats=["checkpoint"], base=None)


def checked(path, models, trained, read_back):
    """What `export_adapter` does with a file, by itself."""
    spec, parts, reference = trained
    job = exporters.Job(models, parts, reference, spec, {}, "fp32", torch.float32, 16, None, {}, {})
    return exporters._checked(job, path, parts, read_back(path, models, parts))


@pytest.fixture
def bare(models, train, strip):
    """`bare(kind="dora")`: a trained adapter, taken off."""

    def take_off(**options):
        trained = train(**options)
        strip()
        return {part: models[part] for part in trained[1]}, trained

    return take_off


def test_wrong_alpha_is_found_in_a_kohya_file(bare, tmp_path):
    models, trained = bare()
    path = tmp_path / "cat.safetensors"
    write_kohya(path, trained[1], {})
    assert checked(path, models, trained, read_back_by_diffusers) < 1e-4

    def halve_alpha(tensors, _):
        tensors.update({key: tensor / 2 for key, tensor in tensors.items() if key.endswith(".alpha")})

    rewrite(path, halve_alpha)
    with pytest.raises(ExportError) as refusal:
        checked(path, models, trained, read_back_by_diffusers)
    num = 2 * len(trained[1]["unet"])
    assert "cat.safetensors does not give back the trained LoRA" in str(refusal.value)
    assert "allowed 1e-04" in str(refusal.value)
    assert "Of the weight change: 5.0e-01" in str(refusal.value)
    assert f"Weights: {num} trained, {num} in the file, {num} read." in str(refusal.value)
    assert "`sdxl-ray export`" in str(refusal.value)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_a_wrong_number_is_found_in_files_of_other_kinds(bare, tmp_path, kind):
    models, trained = bare(kind=kind)
    path = tmp_path / "cat.safetensors"
    write_kohya(path, trained[1], {})
    assert checked(path, models, trained, read_back_by_definition) < 1e-4

    def change(tensors, _):
        key = next(key for key in tensors if key.endswith((".dora_scale", ".hada_w2_b", ".lokr_w1")))
        tensors[key] = 1.1 * tensors[key]

    rewrite(path, change)
    with pytest.raises(ExportError, match="does not give back the trained LoRA"):
        checked(path, models, trained, read_back_by_definition)


def test_lost_alpha_is_found_in_a_diffusers_file(bare, tmp_path):
    models, trained = bare(text=TEXT[:1])
    path = tmp_path / "cat.safetensors"
    write_diffusers(path, trained[1], {})
    assert checked(path, models, trained, read_back_by_diffusers) < 1e-4

    def forget_the_encoders(_, metadata):
        config = json.loads(metadata["lora_adapter_metadata"])
        config["text_encoder.lora_alpha"] /= 2
        metadata["lora_adapter_metadata"] = json.dumps(config)

    rewrite(path, forget_the_encoders)
    with pytest.raises(ExportError, match=r"Of the weight change: 5\.0e-01 in text_encoder\."):
        checked(path, models, trained, read_back_by_diffusers)
    rewrite(path, lambda _, metadata: metadata.pop("lora_adapter_metadata"))
    with pytest.raises(ExportError, match=r"Of the weight change: [56]\.\de-01"):
        checked(path, models, trained, read_back_by_diffusers)


def test_an_error_below_the_rounding_of_a_bf16_unet_is_found_in_the_weights(bare, tmp_path):
    models, trained = bare(strength=1e-5)
    write_kohya(tmp_path / "cat.safetensors", trained[1], {})

    def more(tensors, _):
        tensors.update({key: 1.125 * tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")})

    rewrite(tmp_path / "cat.safetensors", more)
    with pytest.raises(ExportError, match=r"Of the weight change: 1\.[23]e-01"):
        checked(tmp_path / "cat.safetensors", models, trained, read_back_by_diffusers)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_missing_modules_are_found_and_counted(bare, tmp_path):
    models, trained = bare(text=TEXT[1:])
    path = tmp_path / "cat.safetensors"
    for write, marks, read_back in (
        (write_kohya, ("middle", "lora_te2"), read_back_by_diffusers),
        (write_diffusers, ("text_encoder_2",), read_back_by_diffusers),
        (write_kohya, ("middle",), read_back_by_definition),
    ):
        for mark in marks:
            write(path, trained[1], {})
            num = num_weights(path)

            def drop(tensors, _, mark=mark):
                for key in [key for key in tensors if mark in key]:
                    del tensors[key]

            rewrite(path, drop)
            left = num_weights(path)
            assert left < num
            with pytest.raises(ExportError, match=f"Weights: {num} trained, {left} in the file, {left} read"):
                checked(path, models, trained, read_back)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_name_that_diffusers_skips_is_found(bare, tmp_path):
    models, trained = bare()
    path = tmp_path / "cat.safetensors"
    write_diffusers(path, trained[1], {})

    def misname(tensors, _):
        for key in [key for key in tensors if "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in key]:
            tensors[key.replace("unet.", "u_net.")] = tensors.pop(key)

    rewrite(path, misname)
    num = 2 * len(trained[1]["unet"])
    with pytest.raises(ExportError, match=f"Weights: {num} trained, {num} in the file, {num - 2} read"):
        checked(path, models, trained, read_back_by_diffusers)


def test_an_unreadable_file_names_its_reader(bare, tmp_path):
    models, trained = bare()
    path = tmp_path / "cat.safetensors"
    write_kohya(path, trained[1], {})
    rewrite(path, lambda tensors, _: tensors.pop(next(key for key in tensors if "lora_up" in key)))
    with pytest.raises(ExportError, match=r"cat.safetensors: diffusers cannot read the LoRA back \(KeyError"):
        checked(path, models, trained, read_back_by_diffusers)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"cat\.safetensors: diffusers cannot read the LoRA back"):
        checked(path, models, trained, read_back_by_diffusers)
    assert not hasattr(models["unet"], "peft_config")


def test_a_refused_export_is_kept_under_a_name_nobody_loads(train, export, tmp_path, monkeypatch):
    (tmp_path / "cat.safetensors").write_bytes(b"the last good export")
    spec, _, _ = train()

    def with_another_alpha(path, parts, metadata, **options):
        write_kohya(path, parts, metadata, **options)
        rewrite(path, lambda tensors, _: tensors.update({k: 2 * t for k, t in tensors.items() if k.endswith("alpha")}))

    monkeypatch.setattr(exporters, "write_kohya", with_another_alpha)
    with pytest.raises(ExportError, match=r"cat.safetensors does not give back.*kept as .*cat.safetensors.rejected"):
        export(spec, formats=["kohya"])

    assert (tmp_path / "cat.safetensors").read_bytes() == b"the last good export"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.safetensors", "cat.safetensors.rejected"]


def test_an_older_folder_is_replaced(train, export, tmp_path):
    (tmp_path / "cat.diffusers-folder" / "unet").mkdir(parents=True)
    (tmp_path / "cat.diffusers-folder" / "old.txt").write_text("old")
    spec, _, _ = train()
    (file,) = export(spec, formats=["diffusers-folder"])
    assert not (file.path / "old.txt").exists() and (file.path / "model_index.json").exists()


def test_the_probe_is_the_same_every_time_and_fits_the_unet(unet):
    first, second = make_probe(unet), make_probe(unet)
    assert torch.equal(first.noisy_latents, second.noisy_latents)
    assert torch.equal(first.prompt_embeds, second.prompt_embeds)
    assert torch.equal(probe_output(unet, first), probe_output(unet, second))
    assert probe_output(unet, first).shape == first.noisy_latents.shape


def test_both_headers_carry_the_metadata(train, export):
    spec, _, _ = train()
    for exported in export(spec, metadata={"ss_steps": "7", "modelspec.title": "cat"}):
        with safe_open(exported.path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["ss_steps"] == "7" and metadata["modelspec.title"] == "cat" and metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8.0


def test_a_whole_model_says_that_it_is_one(train, export):
    spec, _, _ = train()
    said = {"ss_network_module": "networks.lora", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    (exported,) = export(spec, formats=["checkpoint"], metadata=said)
    with safe_open(exported.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert not any(key.startswith("ss_") for key in metadata)
