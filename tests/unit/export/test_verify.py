"""Export as a whole, and files that must not pass."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_ray.export.verify as verify
from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import AdapterSpec, write_diffusers, write_kohya
from sdxl_ray.export.verify import export_adapter, make_probe, probe_output, verify_file
from sdxl_ray.sdxl.adapters import attach_adapter, detach_adapter, load_adapter_state_dict
from sdxl_ray.sdxl.targets import TARGETS

# every layer with a weight matrix, convolutions and embeddings included
EVERYTHING = (
    *TARGETS["all-linear"],
    *("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("linear_1", "linear_2", "downsamplers.0.conv", "upsamplers.0.conv"),
)


def rewrite(path, change):
    """The file again, with `change(tensors, metadata)` done to it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def check(path, unet, trained):
    spec, state, reference = trained
    return verify_file(path, unet, reference, make_probe(unet), state=state, spec=spec, tolerance=1e-4)


@pytest.fixture
def trained(unet, train):
    spec, state, reference = train()
    detach_adapter(unet)
    return spec, state, reference


@pytest.mark.parametrize("targets", ["attention", "all-linear", EVERYTHING], ids=["attention", "linear", "everything"])
def test_export_writes_both_files_and_leaves_the_unet_bare(unet, train, tmp_path, targets):
    bare = probe_output(unet, make_probe(unet))
    spec, _, _ = train(targets=targets)

    files = export_adapter(unet, folder=tmp_path / "export", name="cat", spec=spec, metadata={})

    assert [(file.path.name, file.format) for file in files] == [
        ("cat.safetensors", "kohya"),
        ("cat.diffusers.safetensors", "diffusers"),
    ]
    assert all(file.relative_error < 1e-4 for file in files)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "cat.diffusers.safetensors",
        "cat.safetensors",
    ]
    assert torch.equal(probe_output(unet, make_probe(unet)), bare)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_export_in_half_precision_passes_too(unet, train, tmp_path, dtype):
    spec, _, _ = train()
    files = export_adapter(unet, folder=tmp_path, name="cat", spec=spec, metadata={}, dtype=dtype)
    assert all(0 < file.relative_error < 1e-2 for file in files)


def test_a_bf16_unet_gives_the_same_answer_within_its_rounding(unet, train, tmp_path):
    half = copy.deepcopy(unet).to(torch.bfloat16)
    attach_adapter(half, rank=4, alpha=8.0, targets="all-linear")
    spec, state, _ = train(targets="all-linear")
    load_adapter_state_dict(half, state)

    files = export_adapter(half, folder=tmp_path, name="cat", spec=spec, metadata={})

    assert all(file.relative_error < 5e-2 for file in files)
    assert torch.equal(
        load_file(files[1].path)["unet.mid_block.attentions.0.proj_in.lora_B.weight"],
        state["mid_block.attentions.0.proj_in.lora_B.weight"],
    ), "the masters were rounded on the way"


def test_an_adapter_that_learned_nothing_can_be_exported(unet, tmp_path):
    attach_adapter(unet, rank=4, alpha=8.0)
    files = export_adapter(unet, folder=tmp_path, name="cat", spec=AdapterSpec("lora", 4, 8.0), metadata={})
    assert [file.relative_error for file in files] == [0.0, 0.0]


def test_an_unknown_format_is_refused_while_the_adapter_is_still_there(unet, train, tmp_path):
    spec, _, reference = train()
    with pytest.raises(ExportError, match=r"'comfy'\. Known: kohya, diffusers"):
        export_adapter(unet, folder=tmp_path, name="cat", spec=spec, metadata={}, formats=["comfy"])
    assert torch.equal(probe_output(unet, make_probe(unet)), reference)


def test_wrong_alpha_is_found_in_a_kohya_file(unet, trained, tmp_path):
    path = tmp_path / "cat.safetensors"
    write_kohya(path, trained[1], trained[0], {})
    assert check(path, unet, trained) < 1e-4

    def halve_alpha(tensors, _):
        tensors.update({key: tensor / 2 for key, tensor in tensors.items() if key.endswith(".alpha")})

    rewrite(path, halve_alpha)
    with pytest.raises(ExportError) as refusal:
        check(path, unet, trained)
    num = len(trained[1])
    assert "cat.safetensors does not give back the trained LoRA" in str(refusal.value)
    assert "allowed 1e-04" in str(refusal.value)
    assert "Of the weight change: 5.0e-01" in str(refusal.value)
    assert f"Weights: {num} trained, {num} in the file, {num} read by diffusers" in str(refusal.value)
    assert "`sdxl-ray export`" in str(refusal.value)


def test_lost_alpha_is_found_in_a_diffusers_file(unet, trained, tmp_path):
    path = tmp_path / "cat.safetensors"
    write_diffusers(path, trained[1], trained[0], {})
    assert check(path, unet, trained) < 1e-4

    rewrite(path, lambda _, metadata: metadata.pop("lora_adapter_metadata"))
    with pytest.raises(ExportError, match=r"Of the weight change: 5\.0e-01"):
        check(path, unet, trained)


def test_an_error_below_the_rounding_of_a_bf16_unet_is_found_in_the_weights(unet, train, tmp_path):
    spec, state, reference = train(strength=1e-5)
    detach_adapter(unet)
    write_kohya(tmp_path / "cat.safetensors", state, AdapterSpec("lora", 4, 9.0), {})
    with pytest.raises(ExportError, match=r"Of the weight change: 1\.[23]e-01"):
        verify_file(
            tmp_path / "cat.safetensors", unet, reference, make_probe(unet), state=state, spec=spec, tolerance=5e-2
        )


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_missing_modules_are_found_and_counted(unet, trained, tmp_path, write):
    path = tmp_path / "cat.safetensors"
    write(path, trained[1], trained[0], {})

    def drop_a_block(tensors, metadata):
        for key in [key for key in tensors if "mid" in key]:
            del tensors[key]

    rewrite(path, drop_a_block)
    num, num_mid = len(trained[1]), sum("mid_block" in key for key in trained[1])
    assert num_mid > 0
    with pytest.raises(ExportError, match=f"Weights: {num} trained, {num - num_mid} in the file, {num - num_mid} read"):
        check(path, unet, trained)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_name_that_diffusers_skips_is_found(unet, trained, tmp_path):
    path = tmp_path / "cat.safetensors"
    write_diffusers(path, trained[1], trained[0], {})

    def misname(tensors, _):
        for key in [key for key in tensors if "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in key]:
            tensors[key.replace("unet.", "u_net.")] = tensors.pop(key)

    rewrite(path, misname)
    num = len(trained[1])
    with pytest.raises(ExportError, match=f"Weights: {num} trained, {num} in the file, {num - 2} read by diffusers"):
        check(path, unet, trained)


def test_an_unreadable_file_names_its_reader(unet, trained, tmp_path):
    path = tmp_path / "cat.safetensors"
    write_kohya(path, trained[1], trained[0], {})
    rewrite(path, lambda tensors, _: tensors.pop(next(key for key in tensors if "lora_up" in key)))
    with pytest.raises(ExportError, match=r"cat.safetensors: diffusers cannot read the LoRA back \(KeyError"):
        check(path, unet, trained)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"cat\.safetensors: diffusers cannot read the LoRA back"):
        check(path, unet, trained)
    assert not hasattr(unet, "peft_config")


def test_a_refused_export_is_kept_under_a_name_nobody_loads(unet, train, tmp_path, monkeypatch):
    (tmp_path / "cat.safetensors").write_bytes(b"the last good export")
    spec, _, _ = train()

    def with_another_alpha(path, state, spec, metadata, **options):
        write_kohya(path, state, AdapterSpec(spec.kind, spec.rank, 2 * spec.alpha), metadata, **options)

    monkeypatch.setitem(verify.WRITERS, "kohya", with_another_alpha)
    with pytest.raises(ExportError, match=r"kept as .*cat.safetensors.rejected"):
        export_adapter(unet, folder=tmp_path, name="cat", spec=spec, metadata={})

    assert (tmp_path / "cat.safetensors").read_bytes() == b"the last good export"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.safetensors", "cat.safetensors.rejected"]


def test_the_probe_is_the_same_every_time_and_fits_the_unet(unet):
    first, second = make_probe(unet), make_probe(unet)
    assert torch.equal(first.noisy_latents, second.noisy_latents)
    assert torch.equal(first.prompt_embeds, second.prompt_embeds)
    assert torch.equal(probe_output(unet, first), probe_output(unet, second))
    assert probe_output(unet, first).shape == first.noisy_latents.shape


def test_both_headers_carry_the_metadata(unet, train, tmp_path):
    spec, _, _ = train()
    files = export_adapter(
        unet, folder=tmp_path, name="cat", spec=spec, metadata={"ss_steps": "7", "modelspec.title": "cat"}
    )
    for exported in files:
        with safe_open(exported.path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["ss_steps"] == "7" and metadata["modelspec.title"] == "cat" and metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8.0
