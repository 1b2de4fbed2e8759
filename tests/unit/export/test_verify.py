"""Export as a whole, and files that must not pass."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_ray.export.verify as verify
from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import write_diffusers, write_kohya
from sdxl_ray.export.probe import make_probe, probe_models, probe_output
from sdxl_ray.export.reading_back import num_weights, read_back_by_definition, read_back_by_diffusers
from sdxl_ray.export.spec import AdapterSpec
from sdxl_ray.export.verify import export_adapter
from sdxl_ray.export.which import FORMATS_OF
from sdxl_ray.export.whole_model import BaseModel
from sdxl_ray.sdxl.adapters import adapter_state_dict as trained_state
from sdxl_ray.sdxl.adapters import attach_adapter, detach_adapter, load_adapter_state_dict
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

    assert [(file.format, file.path.name) for file in files] == [(name, NAMES[name]) for name in FORMATS_OF[kind]]
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
    assert far.note.startswith(
        "cat.kohya-svd.safetensors is the nearest plain LoRA of rank 2: its weight change is off by "
    )
    assert far.warning == f"{far.note} Raise export.svd_rank to come nearer, or use a program that reads dora files."
    assert 0.001 < far.relative_error < 1.0

    spec, _, _ = train(kind="dora", strength=0.2)
    (near,) = export(spec, formats=["kohya-svd"], svd_rank=10_000, metadata={"ss_network_module": "lycoris.kohya"})
    assert near.warning == "" and near.relative_error < 1e-4
    with safe_open(near.path, framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"


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
    job = verify._Job(models, parts, reference, spec, {}, "fp32", torch.float32, 16, None, {}, {})
    return verify._checked(job, path, parts, read_back(path, models, parts))


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

    monkeypatch.setattr(verify, "write_kohya", with_another_alpha)
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
