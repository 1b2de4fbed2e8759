import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.sdxl.adapters import (
    ADAPTER_KINDS,
    BlockRule,
    adapter_disabled,
    adapter_parameters,
    adapter_state_dict,
    attach_adapter,
    base_weight,
    detach_adapter,
    load_adapter_state_dict,
    load_start_state_dict,
    scale_adapter,
    start_from,
    start_state_dict,
    trained_modules,
)
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.components import load_text_encoders, load_unet
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.trained import effective_delta

# linear layers with and without bias, kernels of 3 and of 1, a stride of 2
SOME = (
    r"mid_block.*\.(to_q|to_out\.0|proj_in|conv1)|down_blocks\.1\.resnets\.0\..*|down_blocks\.0\.downsamplers\.0\.conv"
)
METHODS = {
    **{kind: {"kind": kind, "targets": SOME} for kind in ADAPTER_KINDS},
    **{init: {"init": init, "targets": SOME} for init in ("pissa", "olora")},
}
SUBTRACTED = ("pissa", "olora")  # equal to the base up to rounding: a product is added and taken off again


@pytest.fixture(scope="module")
def loaded(tiny_model):
    """As it was loaded: not to be changed."""
    return load_unet(tiny_model, dtype=torch.float32)


@pytest.fixture
def unet(loaded):
    """A copy of one's own, to be adapted."""
    return copy.deepcopy(loaded)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


def one_layer(**arguments) -> tuple[nn.Module, torch.Tensor]:
    """A linear layer (out 18, in 12) with an adapter of rank 3, and an input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 18)), torch.randn(5, 12)
    attach_adapter(model, **{"rank": 3, "alpha": 6.0, **arguments, "targets": ["0"]})
    return model, x


def randomise(unet, seed: int = 7) -> None:
    """lora_B away from zero, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(unet).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_a_fresh_adapter_changes_nothing_and_trains_alone(unet, inputs, method):
    expected = predict(unet, **inputs)
    attach_adapter(unet, rank=4, alpha=4, **METHODS[method])
    if method in SUBTRACTED:
        torch.testing.assert_close(predict(unet, **inputs), expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(predict(unet, **inputs), expected)
    trainable = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter_parameters(unet).values()}
    assert {parameter.dtype for parameter in adapter_parameters(unet).values()} == {torch.float32}
    assert unet.config.cross_attention_dim == 64


def test_names_are_sorted_and_free_of_the_adapter_name(unet, method):
    attach_adapter(unet, rank=4, alpha=4, **METHODS[method])
    names = list(adapter_parameters(unet))
    assert names == sorted(names)
    first = {"loha": "hada_w1_a", "lokr": "lokr_w1"}.get(method, "lora_A.weight")
    assert f"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.{first}" in names
    assert not any("default" in name or "base_layer" in name or "start" in name for name in names)


def test_same_seed_same_start_without_touching_the_global_state(loaded, method):
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        unet = copy.deepcopy(loaded)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        attach_adapter(unet, rank=4, alpha=4, seed=seed, **METHODS[method])
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(adapter_state_dict(unet))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    same = all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert same == (method in SUBTRACTED)  # these follow from the base alone


def test_a_module_starts_alike_whatever_else_is_adapted(loaded):
    states = []
    for targets in ("attention", "all-linear"):
        unet = copy.deepcopy(loaded)
        attach_adapter(unet, rank=4, alpha=4, targets=targets)
        states.append(adapter_state_dict(unet))
    attention, everything = states
    assert len(attention) < len(everything)
    assert all(torch.equal(attention[name], everything[name]) for name in attention)


def test_start_has_the_spread_of_the_reference(unet):
    attach_adapter(unet, rank=16, alpha=16)
    start = adapter_state_dict(unet)["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"]
    assert start.abs().max() <= 48**-0.5
    assert start.std() == pytest.approx(48**-0.5 / 3**0.5, rel=0.1)


def test_the_start_is_that_of_the_reference_drawn_for_each_name(unet):
    """Uniform in ±1/√fan_in, from a generator whose seed is made of the run's and the parameter's name."""
    attach_adapter(unet, rank=4, alpha=4, seed=5, targets="conv1")
    name = "mid_block.resnets.0.conv1.lora_A.weight"
    digest = hashlib.sha256(f"5/{name}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:16], 16) >> 1)
    bound = (48 * 9) ** -0.5
    expected = torch.empty(4, 48, 3, 3).uniform_(-bound, bound, generator=generator)
    torch.testing.assert_close(adapter_state_dict(unet)[name], expected, rtol=1e-6, atol=0)


def test_gaussian_is_normal_with_one_over_rank(unet, inputs):
    expected = predict(unet, **inputs)
    attach_adapter(unet, rank=16, alpha=16, init="gaussian", kind="dora")
    assert torch.equal(predict(unet, **inputs), expected)
    state = adapter_state_dict(unet)
    drawn = torch.cat([value.flatten() for name, value in state.items() if "lora_A" in name])
    assert drawn.std() == pytest.approx(1 / 16, rel=0.02)
    assert drawn.abs().max() > 3 / 16  # no uniform distribution of this width gets there


def test_products_start_as_in_lycoris(unet):
    attach_adapter(unet, rank=4, alpha=4, kind="loha")
    state = adapter_state_dict(unet)
    for leaf, std in (("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_a", 0.0), ("hada_w2_b", 1.0)):
        drawn = torch.cat([value.flatten() for name, value in state.items() if name.endswith(leaf)])
        assert drawn.std() == pytest.approx(std, rel=0.05)
    detach_adapter(unet)
    attach_adapter(unet, rank=1, alpha=1, kind="lokr")
    state = adapter_state_dict(unet)
    for leaf, zero in (("lokr_w1", False), ("lokr_w2_a", False), ("lokr_w2_b", True)):
        drawn = [value for name, value in state.items() if name.endswith(leaf)]
        assert drawn and all((value == 0).all() == zero for value in drawn)


def test_blocks_have_their_rank_and_scale(unet):
    blocks = [BlockRule("mid_block", rank=8), BlockRule(r"down_blocks\.1", 2, 6.0), BlockRule("up_blocks", rank=0)]
    attach_adapter(unet, rank=4, alpha=4, blocks=blocks)
    told = {path: (module.rank, module.scale) for path, module in trained_modules(unet).items()}
    by_block = {
        block: {value for path, value in told.items() if path.startswith(block)}
        for block in ("mid_block", "down_blocks.1", "down_blocks.2", "up_blocks")
    }
    assert by_block == {
        "mid_block": {(8, 1.0)},
        "down_blocks.1": {(2, 3.0)},
        "down_blocks.2": {(4, 1.0)},
        "up_blocks": set(),
    }


# ---- pissa and olora -------------------------------------------------------------------------------------------------


def principal(init: str, weight: np.ndarray, rank: int) -> np.ndarray:
    """What the adapter begins as, by numpy in float64."""
    if init == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]
    q, r = np.linalg.qr(weight)
    return q[:, :rank] @ r[:rank]


@pytest.mark.parametrize("init", SUBTRACTED)
def test_they_begin_with_a_part_of_the_base_and_leave_it_alone(loaded, unet, init):
    attach_adapter(unet, rank=4, alpha=8, init=init, targets=SOME)
    state, start = adapter_state_dict(unet), start_state_dict(unet)
    assert list(state) == sorted(start)
    for path in (
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
    ):
        bare = loaded.get_submodule(path).weight
        assert torch.equal(base_weight(unet.get_submodule(path)), bare)
        a, b = (state[f"{path}.lora_{side}.weight"].flatten(1) for side in "AB")
        product = (8 / 4 if init == "pissa" else 1) * (b @ a)
        expected = principal(init, bare.double().numpy().reshape(len(bare), -1), 4)
        torch.testing.assert_close(product, torch.tensor(expected).float(), rtol=1e-3, atol=1e-4)
        assert torch.equal(start[f"{path}.lora_A.weight"], state[f"{path}.lora_A.weight"])
        assert torch.equal(start[f"{path}.lora_B.weight"], -state[f"{path}.lora_B.weight"])
    assert not any(p.requires_grad for name, p in unet.named_parameters() if ".start." in name)


def test_the_cheap_svd_of_a_large_weight_is_as_good_as_the_whole_one():
    """No product of this rank comes nearer to the weight than the cut SVD (Eckart and Young)."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 320, generator=generator))[0] for size in (320, 400))
    values = torch.arange(1, 321) ** -0.3  # falls slowly, as a trained weight's
    model = nn.Sequential(nn.Linear(400, 320))
    weight = left * values @ right.T
    model[0].weight.data = weight
    attach_adapter(model, rank=8, alpha=8, init="pissa", targets=["0"])
    a, b = (adapter_state_dict(model)[f"0.lora_{side}.weight"] for side in "AB")
    assert (weight - b @ a).norm() <= 1.001 * values[8:].norm()


@pytest.mark.parametrize("init", SUBTRACTED)
def test_signs_are_settled(init):
    """A turned weight has the same right factors: the SVD of -W is -U S V, or U S -V, as the library likes."""
    models = [one_layer(init=init)[0] for _ in range(2)]
    bare = base_weight(models[0][0])
    detach_adapter(models[1])
    models[1][0].weight.data = -bare
    attach_adapter(models[1], rank=3, alpha=6.0, init=init, targets=["0"])
    (a, b), (a_turned, b_turned) = ([adapter_state_dict(m)[f"0.lora_{side}.weight"] for side in "AB"] for m in models)
    torch.testing.assert_close(-b @ a, b_turned @ a_turned)
    if init == "pissa":
        assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()
        assert (b_turned.gather(0, b_turned.abs().argmax(dim=0, keepdim=True)) > 0).all()
    else:
        assert ((b.T @ bare[:, :3]).diagonal() > 0).all()
        assert ((b_turned.T @ -bare[:, :3]).diagonal() > 0).all()


@pytest.mark.parametrize("init", SUBTRACTED)
def test_in_bf16_the_trained_half_begins_exactly_as_the_frozen_one(loaded, init):
    unet = copy.deepcopy(loaded).to(torch.bfloat16)
    attach_adapter(unet, rank=4, alpha=4, **METHODS[init])
    state, start = adapter_state_dict(unet), start_state_dict(unet)
    assert {p.dtype for name, p in unet.named_parameters() if ".start." in name} == {torch.bfloat16}
    assert all(torch.equal(value, start[name] if "lora_A" in name else -start[name]) for name, value in state.items())
    path, told = next(iter(trained_modules(unet).items()))
    assert effective_delta(told, base_weight(unet.get_submodule(path))).abs().max() < 1e-6


def test_a_saved_start_can_be_put_back(inputs, loaded):
    """For a base in another dtype, whose singular directions are others."""
    trained, other = copy.deepcopy(loaded).to(torch.bfloat16), copy.deepcopy(loaded)
    for unet in (trained, other):
        attach_adapter(unet, rank=4, alpha=4, **METHODS["pissa"])
    state, start = adapter_state_dict(trained), start_state_dict(trained)
    assert not all(torch.equal(value, start[name]) for name, value in start_state_dict(other).items())
    load_adapter_state_dict(other, state)
    load_start_state_dict(other, start)
    with adapter_disabled(other):
        base = predict(other, **inputs)
    torch.testing.assert_close(predict(other, **inputs), base, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="does not fit the attached one in"):
        load_start_state_dict(other, {})


# ---- state, and the base beneath -------------------------------------------------------------------------------------


def test_the_delta_is_alpha_over_rank_times_b_a(loaded, inputs):
    unet = copy.deepcopy(loaded)
    attach_adapter(unet, rank=4, alpha=8, targets="all-linear")
    randomise(unet)
    adapted = predict(unet, **inputs)
    merged = copy.deepcopy(loaded)
    state = adapter_state_dict(unet)
    with torch.no_grad():
        for name in (name for name in state if "lora_A" in name):
            delta = 8 / 4 * state[name.replace("lora_A", "lora_B")] @ state[name]
            merged.get_submodule(name.removesuffix(".lora_A.weight")).weight += delta
    torch.testing.assert_close(adapted, predict(merged, **inputs), rtol=1e-3, atol=1e-4)


def test_state_round_trip_into_another_seed(loaded, inputs, method):
    unet, other = (copy.deepcopy(loaded) for _ in range(2))
    attach_adapter(unet, rank=4, alpha=4, **METHODS[method])
    randomise(unet)
    attach_adapter(other, rank=4, alpha=4, seed=1, **METHODS[method])
    state = adapter_state_dict(unet)
    load_adapter_state_dict(other, state)
    assert torch.equal(predict(unet, **inputs), predict(other, **inputs))
    randomise(unet, seed=8)
    name = next(iter(state))
    assert torch.equal(adapter_state_dict(other)[name], state[name])  # a copy


def test_a_state_that_does_not_fit_is_refused_whole(unet):
    attach_adapter(unet, rank=4, alpha=4, targets=SOME)
    before = adapter_state_dict(unet)
    names = list(before)
    wrong = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    del wrong[names[0]]
    wrong["elsewhere.lora_A.weight"] = torch.zeros(1)
    wrong[names[1]] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError) as error:
        load_adapter_state_dict(unet, wrong)
    message = str(error.value)
    assert "does not fit the attached one in 3 places" in message
    assert f"missing {names[0]}; unexpected elsewhere.lora_A.weight; {names[1]} has shape (3, 3), expected " in message
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state_dict(unet).items())


def test_a_long_list_of_differences_is_cut(unet):
    attach_adapter(unet, rank=4, alpha=4, targets=SOME)
    with pytest.raises(CheckpointError, match=rf"; and {len(adapter_parameters(unet)) - 5} more"):
        load_adapter_state_dict(unet, {})


def test_disabled_is_the_base_and_gradients_stay_wanted(unet, inputs, method):
    base = predict(unet, **inputs)
    attach_adapter(unet, rank=4, alpha=4, **METHODS[method])
    randomise(unet)
    adapted = predict(unet, **inputs)
    with adapter_disabled(unet), torch.no_grad():
        assert torch.equal(predict(unet, **inputs), base)
        assert all(parameter.requires_grad for parameter in adapter_parameters(unet).values())
    assert torch.equal(predict(unet, **inputs), adapted)
    assert not torch.allclose(adapted, base)


def test_without_an_adapter_there_is_nothing_to_disable(unet, inputs):
    base = predict(unet, **inputs)
    with adapter_disabled(unet):
        assert torch.equal(predict(unet, **inputs), base)


def test_detached_is_as_loaded_and_can_be_adapted_again(loaded, unet, inputs, method):
    attach_adapter(unet, rank=4, alpha=4, **METHODS[method])
    randomise(unet)
    detach_adapter(unet)
    assert list(unet.state_dict()) == list(loaded.state_dict())
    assert torch.equal(predict(unet, **inputs), predict(loaded, **inputs))
    assert trained_modules(unet) == {}
    attach_adapter(unet, rank=2, alpha=2)
    assert next(iter(adapter_parameters(unet).values())).shape[0] == 2


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_strength_scales_what_is_added_to_the_weight(method, strength):
    model, x = one_layer(**METHODS[method])
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    with adapter_disabled(model):
        base = model(x)
    added = model(x) - base
    scale_adapter(model, strength)
    assert added.abs().max() > 1e-3
    torch.testing.assert_close(model(x), base + strength * added, rtol=1e-4, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(unet, inputs) -> dict[str, torch.Tensor]:
    prediction = predict(unet, **inputs)
    prediction.float().square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in adapter_parameters(unet).items()}
    unet.zero_grad()
    return found


def test_in_bf16_with_checkpointing_gradients_are_the_same(loaded, inputs, method):
    """As in training: the model computes with bf16 copies of fp32 masters."""
    unet = copy.deepcopy(loaded).to(torch.bfloat16)
    attach_adapter(unet, rank=2, alpha=2, **METHODS[method])
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    unet.train()
    plain = gradients(unet, inputs)
    set_gradient_checkpointing(unet, "full")
    again = gradients(unet, inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.bfloat16 for gradient in plain.values())
    moves = {"lora": "lora_B", "dora": "lora_B", "loha": "hada_w2_a", "lokr": "lokr_w2"}.get(method, "lora_")
    assert all(plain[name].any() for name in plain if moves in name and not name.endswith("lokr_w2_a"))


def test_gradients_are_those_of_the_update_written_out(method):
    """What one SGD step would do, against autograd through the formula instead of through peft's layers."""
    if method == "dora":
        pytest.skip("the norm is held constant in its gradient (section 4.3 of the paper)")
    model, x = one_layer(**METHODS[method])
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model(x).square().sum().backward()
    (told,) = trained_modules(model).values()
    factors = told.tensors
    if method in SUBTRACTED:  # told in other factors of the same product: here those that are trained, and the frozen
        both = adapter_state_dict(model), start_state_dict(model)
        factors = {
            leaf: torch.cat([half[f"0.{leaf}"] for half in both], dim=int("lora_B" in leaf)) for leaf in told.tensors
        }
    leaves = {name: value.clone().requires_grad_() for name, value in factors.items()}
    weight = base_weight(model[0]) + effective_delta(
        type(told)(told.kind, leaves, told.scale, told.rank), base_weight(model[0])
    )
    nn.functional.linear(x, weight, model[0].base_layer.bias).square().sum().backward()
    for name, parameter in adapter_parameters(model).items():
        expected = leaves[name.removeprefix("0.")].grad
        if method in SUBTRACTED:  # the frozen half stands behind the trained one
            expected = expected[:3] if "lora_A" in name else expected[:, :3]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_base_trains_without_autocast(loaded, inputs, adapter_dtype):
    unet = copy.deepcopy(loaded).to(torch.bfloat16)
    attach_adapter(unet, rank=4, alpha=4, targets=SOME)
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.to(adapter_dtype)
    prediction = predict(unet, **inputs)
    prediction.float().square().mean().backward()
    assert prediction.dtype == torch.bfloat16
    gradients = [p.grad for name, p in adapter_parameters(unet).items() if "lora_B" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert {gradient.dtype for gradient in gradients} == {adapter_dtype}


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_dropout_only_in_training(unet, inputs, kind):
    attach_adapter(unet, kind=kind, rank=4, alpha=4, dropout=0.5, targets=SOME)
    randomise(unet)
    unet.eval()
    assert torch.equal(predict(unet, **inputs), predict(unet, **inputs))
    unet.train()
    assert not torch.equal(predict(unet, **inputs), predict(unet, **inputs))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dropout_zeroes_inputs_of_the_adapter(kind):
    """One input at a time: what the adapter adds is its column of the update over 1 - share, or nothing."""
    model, _ = one_layer(kind=kind, dropout=0.25)
    randomise(model)
    x = torch.eye(12).repeat(400, 1)
    (told,) = trained_modules(model).values()
    column = effective_delta(told, base_weight(model[0])).T.repeat(400, 1)
    with adapter_disabled(model):
        base = model(x)
    torch.manual_seed(1)
    added = model.train()(x) - base
    dropped = (added == 0).all(dim=1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(added[~dropped], column[~dropped] / 0.75, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_training_without_dropout_draws_nothing(unet, inputs, kind):
    """peft's own LoHa and LoKr ask the global generator for each module."""
    attach_adapter(unet, kind=kind, rank=4, alpha=4, targets=SOME)
    unet.train()
    before = torch.random.get_rng_state()
    predict(unet, **inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_on_quantised_layers(method):
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(6, 4)).requires_grad_(False)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    x = torch.randn(2, 8, 5, 6)
    base, weights = model(x), [layer.weight.dequantize() for layer in model]
    attach_adapter(model, **{"rank": 2, "alpha": 4.0, **METHODS[method], "targets": ["0", "1", "2"]})
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter -= 0.01 * parameter.grad
    adapted, told = model(x), trained_modules(model)
    assert (adapted - base).abs().max() > 1e-4
    deltas = [effective_delta(told[str(number)], base_weight(model[number])) for number in range(3)]
    assert all(torch.equal(base_weight(model[number]), weights[number]) for number in range(3))
    detach_adapter(model)
    assert torch.equal(model(x), base)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(6, 4))
    with torch.no_grad():
        for layer, quantised, weight, delta in zip(plain, model, weights, deltas, strict=True):
            layer.weight.copy_(weight + delta)
            layer.bias.copy_(quantised.bias)
    torch.testing.assert_close(plain(x), adapted, rtol=1e-4, atol=1e-4)


# ---- beginning with a LoRA -------------------------------------------------------------------------------------------


def lora_of(shapes: dict[str, tuple[int, ...]], rank: int, scale: float = 0.5):
    generator = torch.Generator().manual_seed(4)
    return {
        path: (
            0.3 * torch.randn(rank, *shape[1:], generator=generator),
            0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator),
            scale,
        )
        for path, shape in shapes.items()
    }


SHAPES = {"0": (18, 12), "1": (6, 18)}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_start_from_a_lora_adds_what_it_added(kind, rank):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 6)), torch.randn(5, 12)
    weights = [layer.weight.detach().clone() for layer in model]
    attach_adapter(model, kind=kind, rank=3, alpha=6.0, targets=["0", "1"])
    fresh = adapter_state_dict(model)
    given = lora_of({"0": SHAPES["0"]}, rank)
    start_from(model, given)
    down, up, scale = given["0"]
    weights[0] += scale * (up @ down)
    expected = nn.functional.linear(x, weights[0], model[0].base_layer.bias)
    expected = nn.functional.linear(expected, weights[1], model[1].base_layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    state = adapter_state_dict(model)
    assert torch.equal(state["0.lora_A.weight"][rank:], fresh["0.lora_A.weight"][rank:])
    assert not state["0.lora_B.weight"][:, rank:].any()
    assert all(torch.equal(state[name], fresh[name]) for name in state if name.startswith("1."))
    assert torch.equal(state["0.lora_A.weight"][:rank], down)


@pytest.mark.parametrize("flat", [False, True])
def test_start_from_a_lora_of_a_convolution(flat):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 6, 6)
    weight = model[0].weight.detach().clone()
    attach_adapter(model, rank=3, alpha=6.0, targets=["0"])
    down, up, scale = lora_of({"0": (8, 4, 3, 3)}, 2)["0"]
    start_from(model, {"0": (down, up.flatten(1) if flat else up, scale)})
    product = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    expected = nn.functional.conv2d(x, weight + scale * product, model[0].base_layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, lora_of({"0": SHAPES["0"], "7": (4, 4)}, 2), "in 1 of 2 modules: 7 is not adapted. Raise adapter.rank"),
        ({}, lora_of({"0": SHAPES["0"]}, 4), "in 1 of 1 modules: 0 has rank 4, more than 3. Raise adapter.rank to"),
        ({}, lora_of({"0": (12, 18)}, 2), "0 is of (12, 2) and (2, 18), expected (18, 3) and (3, 12)"),
        ({}, {}, "in 0 of 0 modules: it is empty"),
        ({"kind": "loha"}, lora_of(SHAPES, 2), 'reads a LoRA and needs adapter.kind = "lora" or "dora"'),
        ({"init": "pissa"}, lora_of(SHAPES, 2), 'Set adapter.init = "default"'),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_whole(settings, given, message):
    model, _ = one_layer(**settings)
    before = adapter_state_dict(model)
    with pytest.raises(ConfigError) as error:
        start_from(model, given)
    assert "adapter.start_from" in str(error.value) and message in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in adapter_state_dict(model).items())


def test_start_from_needs_an_adapter(unet):
    with pytest.raises(ConfigError, match=r"adapter\.start_from needs an adapter"):
        start_from(unet, {})


def test_what_a_lora_has_for_the_layer_that_is_not_read_is_left_out(tiny_model):
    """kohya's files have all layers of encoder 1."""
    encoder = load_text_encoders(tiny_model, dtype=torch.float32).text_encoder
    attach_adapter(encoder, rank=2, alpha=2.0)
    names = [f"encoder.layers.{number}.self_attn.q_proj" for number in range(3)]
    start_from(encoder, lora_of(dict.fromkeys(names, (32, 32)), 2))
    assert adapter_parameters(encoder)[f"{names[1]}.lora_B.weight"].any()
    assert f"{names[2]}.lora_B.weight" not in adapter_parameters(encoder)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_matched_says_what_names_look_like(unet):
    with pytest.raises(ConfigError) as error:
        attach_adapter(unet, rank=4, alpha=4, targets="atention")
    message = str(error.value)
    assert message.startswith(
        "adapter.targets 'atention' matches no module of the model. Give a preset (attention, all"
    )
    assert "a name looks like down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "locon"}, "adapter.kind 'locon' is unknown. Known: lora, dora, loha, lokr."),
        ({"init": "loftq"}, "adapter.init 'loftq' is unknown. Known: default, gaussian, pissa, olora."),
        ({"rank": 0}, "adapter.rank is 0, expected 1 or more"),
        ({"targets": []}, "targets is empty"),
        ({"targets": "to_q("}, "neither a preset (attention, all-linear, all-linear+conv), nor the end of a module's"),
        ({"targets": ["norm1"]}, "adapter.targets ['norm1'] cannot be adapted: down_blocks.0.resnets.0"),
        ({"targets": ["norm1"]}, ".norm1 is a GroupNorm. Linear and convolution layers can be, such as to_q and conv1"),
        (
            {"kind": "dora", "init": "pissa"},
            'adapter.init = "pissa" does not go with adapter.kind = "dora", which knows default, gaussian. '
            'Set adapter.init = "default", or adapter.kind = "lora".',
        ),
        (
            {"kind": "loha", "init": "gaussian"},
            'adapter.init = "gaussian" does not go with adapter.kind = "loha", which knows default. '
            'Set adapter.init = "default".',
        ),
        ({"init": "olora", "dropout": 0.1}, "does not go with adapter.dropout = 0.1: the adapter begins as the"),
        (
            {"init": "pissa", "rank": 64},
            'adapter.init = "pissa" needs ranks up to 32 in down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q,'
            " whose weight is 32 x 32, and it has 64. Lower adapter.rank",
        ),
        ({"blocks": [BlockRule("middle", 2)]}, "adapter.blocks: 'middle' is found in the name of none of the 176 "),
    ],
)
def test_refusals(unet, settings, message):
    with pytest.raises(ConfigError) as error:
        attach_adapter(unet, **{"rank": 4, "alpha": 4, **settings})
    assert message in str(error.value)
    assert not adapter_parameters(unet)


def test_a_second_adapter_is_refused(unet):
    attach_adapter(unet, rank=4, alpha=4, targets=SOME)
    with pytest.raises(ConfigError, match="already has an adapter"):
        attach_adapter(unet, rank=4, alpha=4, targets=SOME)
