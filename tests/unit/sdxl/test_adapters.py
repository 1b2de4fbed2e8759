import pytest
import torch

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.sdxl.adapters import (
    adapter_disabled,
    adapter_parameters,
    adapter_state_dict,
    attach_adapter,
    detach_adapter,
    load_adapter_state_dict,
)
from sdxl_ray.sdxl.components import load_unet, unet_weight_shapes
from sdxl_ray.sdxl.conditioning import predict
from sdxl_ray.sdxl.targets import count_adapter_parameters, target_modules

PRESETS = ("attention", "all-linear")


def randomise(unet, seed: int = 7) -> None:
    """lora_B away from zero, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(unet).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_a_fresh_adapter_changes_nothing_and_trains_alone(unet, inputs):
    expected = predict(unet, **inputs)
    attach_adapter(unet, rank=4, alpha=4)
    assert torch.equal(predict(unet, **inputs), expected)
    trainable = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter_parameters(unet).values()}
    assert {parameter.dtype for parameter in adapter_parameters(unet).values()} == {torch.float32}
    assert unet.config.cross_attention_dim == 64


def test_names_are_sorted_and_free_of_the_adapter_name(unet):
    attach_adapter(unet, rank=4, alpha=4)
    names = list(adapter_parameters(unet))
    assert names == sorted(names)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)


def test_same_seed_same_start_without_touching_the_global_state(tiny_model):
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        unet = load_unet(tiny_model, dtype=torch.float32)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        attach_adapter(unet, rank=4, alpha=4, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(adapter_state_dict(unet))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_module_starts_alike_whatever_else_is_adapted(tiny_model):
    states = []
    for targets in PRESETS:
        unet = load_unet(tiny_model, dtype=torch.float32)
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


def test_the_delta_is_alpha_over_rank_times_b_a(tiny_model, inputs):
    unet = load_unet(tiny_model, dtype=torch.float32)
    attach_adapter(unet, rank=4, alpha=8, targets="all-linear")
    randomise(unet)
    adapted = predict(unet, **inputs)
    merged = load_unet(tiny_model, dtype=torch.float32)
    state = adapter_state_dict(unet)
    with torch.no_grad():
        for name in (name for name in state if "lora_A" in name):
            delta = 8 / 4 * state[name.replace("lora_A", "lora_B")] @ state[name]
            merged.get_submodule(name.removesuffix(".lora_A.weight")).weight += delta
    torch.testing.assert_close(adapted, predict(merged, **inputs), rtol=1e-3, atol=1e-4)


def test_state_round_trip_into_another_seed(tiny_model, inputs):
    unet, other = (load_unet(tiny_model, dtype=torch.float32) for _ in range(2))
    attach_adapter(unet, rank=4, alpha=4)
    randomise(unet)
    attach_adapter(other, rank=4, alpha=4, seed=1)
    state = adapter_state_dict(unet)
    load_adapter_state_dict(other, state)
    assert torch.equal(predict(unet, **inputs), predict(other, **inputs))
    randomise(unet, seed=8)
    assert torch.equal(
        adapter_state_dict(other)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"],
        state["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"],
    )  # a copy


def test_a_state_that_does_not_fit_is_refused_whole(unet):
    attach_adapter(unet, rank=4, alpha=4)
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
    attach_adapter(unet, rank=4, alpha=4)
    with pytest.raises(CheckpointError, match=rf"; and {len(adapter_parameters(unet)) - 5} more"):
        load_adapter_state_dict(unet, {})


def test_disabled_is_the_base_and_gradients_stay_wanted(unet, inputs):
    base = predict(unet, **inputs)
    attach_adapter(unet, rank=4, alpha=4)
    randomise(unet)
    adapted = predict(unet, **inputs)
    with adapter_disabled(unet), torch.no_grad():
        assert torch.equal(predict(unet, **inputs), base)
        assert all(parameter.requires_grad for parameter in adapter_parameters(unet).values())
    assert torch.equal(predict(unet, **inputs), adapted)
    assert not torch.allclose(adapted, base)


def test_detached_is_as_loaded_and_can_be_adapted_again(tiny_model, unet, inputs):
    attach_adapter(unet, rank=4, alpha=4)
    randomise(unet)
    detach_adapter(unet)
    loaded = load_unet(tiny_model, dtype=torch.float32)
    assert list(unet.state_dict()) == list(loaded.state_dict())
    assert torch.equal(predict(unet, **inputs), predict(loaded, **inputs))
    attach_adapter(unet, rank=2, alpha=2)
    assert next(iter(adapter_parameters(unet).values())).shape[0] == 2


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_base_trains_without_autocast(tiny_model, inputs, adapter_dtype):
    unet = load_unet(tiny_model, dtype=torch.bfloat16)
    attach_adapter(unet, rank=4, alpha=4)
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.to(adapter_dtype)
    prediction = predict(unet, **inputs)
    prediction.float().square().mean().backward()
    assert prediction.dtype == torch.bfloat16
    gradients = [p.grad for name, p in adapter_parameters(unet).items() if "lora_B" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert {gradient.dtype for gradient in gradients} == {adapter_dtype}


@pytest.mark.parametrize("targets", [*PRESETS, r"mid_block\..*\.to_k", ("conv1", "to_v"), ["conv_in"]])
def test_the_count_is_what_gets_attached(tiny_model, unet, targets):
    modules, parameters = count_adapter_parameters(unet_weight_shapes(tiny_model), 3, targets)
    attach_adapter(unet, rank=3, alpha=3, targets=targets)
    attached = adapter_parameters(unet)
    assert modules == len(attached) / 2
    assert parameters == sum(parameter.numel() for parameter in attached.values())


def test_nothing_matched_says_what_names_look_like(unet):
    with pytest.raises(ConfigError) as error:
        attach_adapter(unet, rank=4, alpha=4, targets="atention")
    message = str(error.value)
    assert message.startswith(
        "adapter.targets 'atention' matches no module of the U-Net. Give a preset (attention, all"
    )
    assert "a name looks like down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lokr"}, "adapter.kind 'lokr' is unknown. Known: lora."),
        ({"rank": 0}, "adapter.rank is 0, expected 1 or more"),
        ({"targets": []}, "targets is empty"),
        ({"targets": "to_q("}, "neither a preset (attention, all-linear) nor a regular expression"),
        ({"targets": ["norm1"]}, "adapter.targets ['norm1'] cannot be adapted"),
    ],
)
def test_refusals(unet, settings, message):
    with pytest.raises(ConfigError) as error:
        attach_adapter(unet, **{"rank": 4, "alpha": 4, **settings})
    assert message in str(error.value)


def test_a_second_adapter_is_refused(unet):
    attach_adapter(unet, rank=4, alpha=4)
    with pytest.raises(ConfigError, match="already has an adapter"):
        attach_adapter(unet, rank=4, alpha=4)


def test_presets_and_custom_targets():
    assert target_modules("attention") == ["to_q", "to_k", "to_v", "to_out.0"]
    assert target_modules(r".*\.to_q") == r".*\.to_q"
    assert target_modules(("to_q",)) == ["to_q"]


def test_dropout_only_in_training(unet, inputs):
    attach_adapter(unet, rank=4, alpha=4, dropout=0.5)
    randomise(unet)
    unet.eval()
    assert torch.equal(predict(unet, **inputs), predict(unet, **inputs))
    unet.train()
    assert not torch.equal(predict(unet, **inputs), predict(unet, **inputs))
