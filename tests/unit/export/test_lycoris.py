"""DoRA, LoHa and LoKr in kohya files, read by a second reader that is written here from LyCORIS's definitions."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdxl_ray.errors import ExportError
from sdxl_ray.export.formats import write_kohya
from sdxl_ray.export.lycoris import lycoris_tensors, read_delta
from sdxl_ray.sdxl.trained import TrainedModule, effective_delta

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OUT, IN, RANK, SCALE = 12, 8, 3, 0.7
SHAPES = {"linear": (OUT, IN), "1x1": (OUT, IN, 1, 1), "3x3": (OUT, IN, 3, 3)}


def random(*shape, seed=itertools.count()):
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(seed)))


def trained(kind, form, shape):
    kernel = shape[2:]
    width = IN * int(np.prod(kernel, dtype=int))
    if kind in ("lora", "dora"):
        tensors = {"lora_A.weight": random(RANK, IN, *kernel), "lora_B.weight": random(OUT, RANK, *(1 for _ in kernel))}
        if kind == "dora":
            magnitude = 1 + random(OUT).abs()
            tensors["lora_magnitude_vector.weight"] = magnitude.reshape(1, OUT, 1, 1) if kernel else magnitude
    elif kind == "loha" and form == "tucker":
        tensors = {f"hada_w{n}_{end}": random(RANK, size) for n in (1, 2) for end, size in (("a", OUT), ("b", IN))}
        tensors |= {f"hada_t{n}": random(RANK, RANK, *kernel) for n in (1, 2)}
    elif kind == "loha":
        tensors = {f"hada_w{n}_a": random(OUT, RANK) for n in (1, 2)} | {
            f"hada_w{n}_b": random(RANK, width) for n in (1, 2)
        }
    else:  # lokr: OUT = 3 * 4, IN = 2 * 4
        first = {"lokr_w1": random(3, 2)}
        if form == "both":
            first = {"lokr_w1_a": random(3, RANK), "lokr_w1_b": random(RANK, 2)}
        second = {"lokr_w2_a": random(4, RANK), "lokr_w2_b": random(RANK, width // 2)}
        if form == "whole":
            second = {"lokr_w2": random(4, 4, *kernel)}
        elif form == "tucker":
            second = {
                "lokr_w2_a": random(RANK, 4),
                "lokr_w2_b": random(RANK, 4),
                "lokr_t2": random(RANK, RANK, *kernel),
            }
        tensors = first | second
    return TrainedModule(kind=kind, tensors=tensors, scale=SCALE, rank=RANK)


def by_definition(file, base):
    """The merged weight in float64, element by element where a formula has indices."""
    file = {key: np.asarray(tensor, dtype=np.float64) for key, tensor in file.items()}
    base = np.asarray(base, dtype=np.float64)
    kernel = base.shape[2:]

    def tucker(core, left, right):  # (i, j, k, l), (i, out), (j, in)
        found = np.zeros((left.shape[1], right.shape[1], *core.shape[2:]))
        for i, j in itertools.product(range(core.shape[0]), range(core.shape[1])):
            found += left[i][:, None, None, None] * right[j][None, :, None, None] * core[i, j][None, None]
        return found

    def kron(first, second):  # second (out2, in2, ...)
        rows, columns = first.shape
        found = np.zeros((rows * second.shape[0], columns * second.shape[1], *second.shape[2:]))
        for i, j in itertools.product(range(rows), range(columns)):
            place = (
                slice(i * second.shape[0], (i + 1) * second.shape[0]),
                slice(j * second.shape[1], (j + 1) * second.shape[1]),
            )
            found[place] = first[i, j] * second
        return found

    if "lora_up.weight" in file:
        rank = file["lora_down.weight"].shape[0]
        product = np.einsum(
            "or,rn->on", file["lora_up.weight"].reshape(-1, rank), file["lora_down.weight"].reshape(rank, -1)
        )
    elif "hada_t1" in file:
        rank = file["hada_w1_b"].shape[0]
        product = tucker(file["hada_t1"], file["hada_w1_a"], file["hada_w1_b"]) * tucker(
            file["hada_t2"], file["hada_w2_a"], file["hada_w2_b"]
        )
    elif "hada_w1_a" in file:
        rank = file["hada_w1_b"].shape[0]
        product = (file["hada_w1_a"] @ file["hada_w1_b"]) * (file["hada_w2_a"] @ file["hada_w2_b"])
    else:
        rank = next((file[key].shape[0] for key in ("lokr_w2_b", "lokr_w1_b") if key in file), None)
        first = file.get("lokr_w1")
        first = file["lokr_w1_a"] @ file["lokr_w1_b"] if first is None else first
        if "lokr_w2" in file:
            second = file["lokr_w2"]
        elif "lokr_t2" in file:
            second = tucker(file["lokr_t2"], file["lokr_w2_a"], file["lokr_w2_b"])
        else:
            second = (file["lokr_w2_a"] @ file["lokr_w2_b"]).reshape(4, 4, *kernel)
        product = kron(first, second)
    # LyCORIS: with two whole factors there is no rank to divide by, and the scale is 1 whatever alpha says
    scale = 1.0 if rank is None else file["alpha"] / rank
    weight = base + scale * product.reshape(base.shape)
    if "dora_scale" in file:  # weight_decompose with wd_on_out
        norm = np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(axis=1))
        weight = weight * (file["dora_scale"] / norm.reshape(file["dora_scale"].shape))
    return weight


CASES = [
    (kind, form, shape)
    for kind, forms in {
        "lora": ("",),
        "dora": ("",),
        "loha": ("", "tucker"),
        "lokr": ("", "both", "whole", "tucker"),
    }.items()
    for form in forms
    for shape in SHAPES
    if form != "tucker" or shape == "3x3"
]


@pytest.mark.parametrize(("kind", "form", "shape"), CASES)
def test_another_reader_gets_the_trained_weight(tmp_path, kind, form, shape):
    base = random(*SHAPES[shape])
    module = trained(kind, form, SHAPES[shape])
    write_kohya(tmp_path / "a.safetensors", {"unet": {PATH: module}}, {})

    file = {key.removeprefix(f"{STEM}."): tensor for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    merged = by_definition(file, base)
    if (kind, form) == ("lokr", "tucker"):  # not what our adapters are made of
        expected = base + read_delta(file, base)
    else:
        expected = base + effective_delta(module, base)
    np.testing.assert_allclose(merged, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))
    # and the reader that verifies exports agrees with the one above
    np.testing.assert_allclose(
        base + read_delta(file, base), merged, rtol=2e-6, atol=2e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize(("kind", "form"), [("loha", ""), ("lokr", ""), ("lokr", "whole"), ("lokr", "both")])
def test_a_reader_without_alpha_gets_the_same(kind, form):
    module = trained(kind, form, SHAPES["linear"])
    file = lycoris_tensors(module)
    base = torch.zeros(OUT, IN)
    assert file["alpha"].item() == RANK and file["alpha"].shape == () and file["alpha"].is_floating_point()
    with_alpha = read_delta(file, base)
    del file["alpha"]
    assert torch.equal(read_delta(file, base), with_alpha)


def test_names_and_shapes_are_lycoris_own(tmp_path):
    """Recorded from lycoris-lora 4.1.3: `weight_list` of its modules."""
    names = set()
    for kind, form, shape in CASES:
        write_kohya(tmp_path / "a", {"unet": {PATH: trained(kind, form, SHAPES[shape])}}, {})
        names |= {key.split(".", 1)[1] for key in load_file(tmp_path / "a")}
    lora = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
    lokr = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    assert names == lora | loha | lokr


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", (OUT, 1)), ("1x1", (OUT, 1, 1, 1)), ("3x3", (OUT, 1, 1, 1))]
)
def test_dora_scale_is_one_number_per_output_row(tmp_path, shape, expected):
    write_kohya(tmp_path / "a", {"unet": {PATH: trained("dora", "", SHAPES[shape])}}, {}, dtype="bf16")
    scale = load_file(tmp_path / "a")[f"{STEM}.dora_scale"]
    assert scale.shape == expected
    assert scale.dtype == torch.float32


def test_foreign_tensors_are_refused():
    module = trained("lokr", "", SHAPES["linear"])
    with pytest.raises(ExportError, match=r"not the tensors of a loha: .*found lokr_w1"):
        lycoris_tensors(TrainedModule(kind="loha", tensors=module.tensors, scale=1.0, rank=RANK))
