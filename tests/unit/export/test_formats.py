"""The two files, as the programs that read them see them."""

import errno
import hashlib
import json
import os

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors import safe_open
from safetensors.torch import load_file, save

from sdxl_ray.errors import ExportError, StorageError
from sdxl_ray.export.formats import AdapterSpec, write_diffusers, write_kohya
from sdxl_ray.export.verify import make_probe, probe_output

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def one_module(rank=4, module_path=PATH):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module_path}.lora_A.weight": torch.randn(rank, 6, generator=generator),
        f"{module_path}.lora_B.weight": torch.randn(5, rank, generator=generator),
    }


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_a_pipeline_that_loads_the_file_is_the_trained_model(pipeline, train, tmp_path, write, targets):
    spec, state, trained = train(rank=4, alpha=8.0, targets=targets)
    pipeline.unet.unload_lora()
    untrained = probe_output(pipeline.unet, make_probe(pipeline.unet))
    write(tmp_path / "cat.safetensors", state, spec, {})

    pipeline.load_lora_weights(tmp_path, weight_name="cat.safetensors")
    loaded = probe_output(pipeline.unet, make_probe(pipeline.unet))

    assert (untrained - trained).abs().max() > 0.01 * trained.abs().max(), "the adapter does nothing: nothing is tested"
    assert (loaded - trained).abs().max() < 1e-4 * trained.abs().max()


def test_kohya_folds_the_scale_into_lora_up(tmp_path):
    state = one_module(rank=4)
    write_kohya(tmp_path / "cat.safetensors", state, AdapterSpec("lora", 4, 6.0), {"ss_network_alpha": "6.0"})

    file = load_file(tmp_path / "cat.safetensors")
    assert file[f"{STEM}.alpha"].item() == 4.0
    assert file[f"{STEM}.alpha"].shape == () and file[f"{STEM}.alpha"].is_floating_point()
    assert torch.equal(file[f"{STEM}.lora_down.weight"], state[f"{PATH}.lora_A.weight"])
    assert torch.equal(file[f"{STEM}.lora_up.weight"], 1.5 * state[f"{PATH}.lora_B.weight"])
    assert header(tmp_path / "cat.safetensors")["ss_network_alpha"] == "4.0"


def test_kohya_keeps_one_alpha_when_ranks_differ(tmp_path):
    other = PATH.replace("to_q", "to_k")
    state = one_module(rank=4) | one_module(rank=2, module_path=other)
    write_kohya(tmp_path / "cat.safetensors", state, AdapterSpec("lora", 4, 8.0), {})

    file = load_file(tmp_path / "cat.safetensors")
    assert {value.item() for key, value in file.items() if key.endswith(".alpha")} == {4.0}
    stem = STEM.replace("to_q", "to_k")
    as_read = file[f"{stem}.lora_up.weight"] @ file[f"{stem}.lora_down.weight"] * (4.0 / 2)
    trained = state[f"{other}.lora_B.weight"] @ state[f"{other}.lora_A.weight"] * 2.0
    torch.testing.assert_close(as_read, trained)


def test_diffusers_header_is_a_part_of_what_diffusers_would_write(unet, train, tmp_path):
    spec, state, _ = train(rank=4, alpha=8.0)
    theirs = _collate_lora_metadata({"unet": unet})["unet_lora_adapter_metadata"]
    write_diffusers(tmp_path / "cat.safetensors", state, spec, {})

    ours = json.loads(header(tmp_path / "cat.safetensors")["lora_adapter_metadata"])
    assert ours["unet.r"] == theirs["r"] == 4
    assert ours["unet.lora_alpha"] == theirs["lora_alpha"] == 8.0
    assert {key.removeprefix("unet.") for key in ours} <= theirs.keys()
    assert load_file(tmp_path / "cat.safetensors").keys() == {f"unet.{key}" for key in state}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtype_is_that_of_the_weights_and_never_of_alpha(tmp_path, dtype, expected):
    write_kohya(tmp_path / "cat.safetensors", one_module(), AdapterSpec("lora", 4, 8.0), {}, dtype=dtype)

    file = load_file(tmp_path / "cat.safetensors")
    assert file[f"{STEM}.lora_up.weight"].dtype == expected
    assert file[f"{STEM}.alpha"].dtype == torch.float32


def test_tensors_that_are_views_are_written(tmp_path):
    state = {key: tensor.T.contiguous().T for key, tensor in one_module().items()}
    write_diffusers(tmp_path / "cat.safetensors", state, AdapterSpec("lora", 4, 8.0), {})

    assert torch.equal(
        load_file(tmp_path / "cat.safetensors")[f"unet.{PATH}.lora_A.weight"], state[f"{PATH}.lora_A.weight"]
    )


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    metadata = {f"ss_{number}": "é" for number in range(30)}
    for name in ("a", "b"):
        write_kohya(tmp_path / name, one_module(), AdapterSpec("lora", 4, 8.0), metadata)
        metadata = dict(reversed(metadata.items()))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_hashes_are_those_that_browsers_compute_from_the_file(tmp_path):
    path = tmp_path / "cat.safetensors"
    state = {f"{PATH}.lora_A.weight": torch.randn(300, 1200), f"{PATH}.lora_B.weight": torch.randn(1500, 300)}
    write_kohya(path, state, AdapterSpec("lora", 300, 8.0), {"ss_steps": "7", "modelspec.title": "cat"})

    content = path.read_bytes()
    tensor_part = content[8 + int.from_bytes(content[:8], "little") :]
    found = header(path)
    assert found["sshs_model_hash"] == hashlib.sha256(tensor_part).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    # kohya's: 64 KiB from 1 MiB on in a file that has the ss_ metadata only
    ss_only = save(load_file(path), {"ss_steps": "7"})
    assert found["sshs_legacy_hash"] == hashlib.sha256(ss_only[0x100000:0x110000]).hexdigest()[:8]


def test_no_legacy_hash_of_nothing(tmp_path):
    write_kohya(tmp_path / "cat.safetensors", one_module(), AdapterSpec("lora", 4, 8.0), {})
    assert "sshs_legacy_hash" not in header(tmp_path / "cat.safetensors")


@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
@pytest.mark.parametrize("kind", ["dora", "lokr", "full"])
def test_a_kind_the_format_cannot_hold_is_refused_before_writing(tmp_path, write, kind):
    with pytest.raises(ExportError, match=f"holds an adapter of kind 'lora', this one is '{kind}'"):
        write(tmp_path / "cat.safetensors", one_module(), AdapterSpec(kind, 4, 8.0), {})
    assert list(tmp_path.iterdir()) == []


def test_half_a_module_is_refused(tmp_path):
    state = one_module()
    del state[f"{PATH}.lora_B.weight"]
    with pytest.raises(ExportError, match=rf"found 1 lora_A, 0 lora_B .*{PATH}"):
        write_kohya(tmp_path / "cat.safetensors", state, AdapterSpec("lora", 4, 8.0), {})


def test_a_full_disk_leaves_the_older_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"the last export")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left on the device while writing the LoRA.*sdxl-ray export"):
        write_kohya(path, one_module(), AdapterSpec("lora", 4, 8.0), {})
    assert path.read_bytes() == b"the last export"
    assert list(tmp_path.iterdir()) == [path]
