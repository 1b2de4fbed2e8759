"""Safetensors files: what the library reads, equal bytes, whole or not at all."""

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from sdxl_ray.errors import ExportError, StorageError
from sdxl_ray.export.tensor_file import LazyTensor, lazy, read_lazily, write_tensors

TENSORS = {
    "b.lora_up.weight": torch.randn(3, 5),
    "a.weight": torch.randn(2, 3, 1, 1),
    "b.alpha": torch.tensor(4.0),
    "ids": torch.arange(5),
    "empty": torch.empty(0),
}


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_tensor_part_is_the_librarys_own(tmp_path):
    """Layout and order are safetensors', so hashes of the tensor part agree with files of other trainers."""
    path = tmp_path / "a.safetensors"
    mixed = {
        **TENSORS,
        "h": torch.randn(4).half(),
        "g": torch.randn(4).bfloat16(),
        "u": torch.ones(3, dtype=torch.uint8),
        "i": torch.ones(3, dtype=torch.int8),
        "e4": torch.randn(4).to(torch.float8_e4m3fn),
        "e5": torch.randn(4).to(torch.float8_e5m2),
    }
    write_tensors(path, mixed, {"x": "y"}, None)

    ours, theirs = path.read_bytes(), save(mixed, {"x": "y"})
    assert ours[8 + int.from_bytes(ours[:8], "little") :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    read = load_file(path)
    assert read.keys() == mixed.keys()
    assert all(torch.equal(read[name], mixed[name]) and read[name].dtype == mixed[name].dtype for name in mixed)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtype_is_that_of_the_weights_and_never_of_alpha_magnitudes_or_ids(tmp_path, dtype, expected):
    path = tmp_path / "a.safetensors"
    write_tensors(
        path, {**TENSORS, "b.dora_scale": torch.ones(3, 1), "c.lora_magnitude_vector": torch.ones(3)}, {}, dtype
    )

    read = load_file(path)
    assert read["b.lora_up.weight"].dtype == read["a.weight"].dtype == expected
    assert torch.equal(read["a.weight"], TENSORS["a.weight"].to(expected))
    for name in ("b.alpha", "b.dora_scale", "c.lora_magnitude_vector"):
        assert read[name].dtype == torch.float32
    assert torch.equal(read["ids"], TENSORS["ids"])


def test_the_same_content_gives_the_same_bytes(tmp_path):
    metadata = {f"ss_{number}": "é" for number in range(30)}
    write_tensors(tmp_path / "a", TENSORS, metadata, "fp32")
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())), "fp32")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_that_are_views_are_written(tmp_path):
    view = torch.randn(4, 6).T[1:, ::2]
    write_tensors(tmp_path / "a", {"v": view}, {}, "fp32")
    assert torch.equal(load_file(tmp_path / "a")["v"], view)


def test_a_lazy_tensor_is_made_once_when_it_is_its_turn_and_has_to_have_its_shape(tmp_path):
    made = []
    tensors = {
        name: LazyTensor((2,), torch.float32, lambda name=name: (made.append(name), torch.ones(2))[1]) for name in "ba"
    }
    write_tensors(tmp_path / "a", tensors, {}, "fp32")
    assert made == ["a", "b"]
    with pytest.raises(ValueError, match=r"announced with shape \(3,\) and made with \(2,\)"):
        write_tensors(tmp_path / "a", {"a": LazyTensor((3,), torch.float32, lambda: torch.ones(2))}, {}, "fp32")


def test_what_is_read_lazily_is_what_was_written(tmp_path):
    write_tensors(tmp_path / "a", {name: lazy(tensor) for name, tensor in TENSORS.items()}, {}, None)
    read = read_lazily(tmp_path / "a")
    for name, tensor in TENSORS.items():
        assert read[name].shape == tuple(tensor.shape) and read[name].dtype == tensor.dtype
        assert torch.equal(read[name].make(), tensor)


def test_a_type_without_plain_numbers_is_named(tmp_path):
    save_file({"a.weight": torch.ones(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ExportError, match=r"a.safetensors: 'a.weight' is stored as F8_E8M0; the export reads I64, .*Set model.path to"
    ):
        read_lazily(tmp_path / "a.safetensors")


def test_hashes_are_those_that_browsers_compute_from_the_file(tmp_path):
    path = tmp_path / "cat.safetensors"
    tensors = {"a": torch.randn(300, 1200), "b": torch.randn(1500, 300)}
    write_tensors(path, tensors, {"ss_steps": "7", "modelspec.title": "cat"}, "fp32")

    content = path.read_bytes()
    tensor_part = content[8 + int.from_bytes(content[:8], "little") :]
    found = header(path)
    assert found["sshs_model_hash"] == hashlib.sha256(tensor_part).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    # kohya's: 64 KiB from 1 MiB on in a file that has the ss_ metadata only
    ss_only = save(load_file(path), {"ss_steps": "7"})
    assert found["sshs_legacy_hash"] == hashlib.sha256(ss_only[0x100000:0x110000]).hexdigest()[:8]


def test_no_legacy_hash_of_nothing(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, {}, "fp32")
    assert "sshs_legacy_hash" not in header(tmp_path / "a")
    assert json.loads(json.dumps(header(tmp_path / "a")))["format"] == "pt"


def test_a_full_disk_leaves_the_older_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"the last export")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left on the device while writing the LoRA.*sdxl-ray export"):
        write_tensors(path, TENSORS, {}, "fp32")
    assert path.read_bytes() == b"the last export"
    assert list(tmp_path.iterdir()) == [path]
