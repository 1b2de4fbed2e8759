import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl.adapters import adapter_disabled, adapter_parameters, attach_adapter
from sdxl_ray.sdxl.architecture import TEXT_ENCODER_2_CONFIG, build_unet
from sdxl_ray.sdxl.checkpointing import set_gradient_checkpointing
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.sdxl.conditioning import predict, unet_dtype
from sdxl_ray.sdxl.quantize import QUANTIZATIONS, QuantizedConv2d, QuantizedLinear, quantize_frozen, stored_bytes


def frozen(layer, dtype=torch.float32):
    """A model of one layer whose name nothing keeps."""
    return nn.Sequential(layer).to(dtype).requires_grad_(False)


def reference(weight, kind):
    """The nearest of the levels that the module's docstring promises, for each weight by itself, in plain Python."""
    result = []
    for row in weight.flatten(1).tolist():
        if kind == "int4":
            groups = [row[start : start + 64] for start in range(0, len(row), 64)]
            low = [[min(group)] * len(group) for group in groups]
            step = [[(max(group) - min(group)) / 15] * len(group) for group in groups]
            low, step = list(itertools.chain(*low)), list(itertools.chain(*step))
            result.append([a + s * round((w - a) / s) for w, a, s in zip(row, low, step, strict=True)])
        elif kind == "int8":
            step = max(map(abs, row)) / 127
            result.append([step * round(w / step) for w in row])
        else:
            scale = max(map(abs, row)) / 448
            result.append([scale * nearest_e4m3(w / scale) for w in row])
    return torch.tensor(result).view_as(weight)


E4M3 = sorted(
    {mantissa / 8 * 2.0**-6 for mantissa in range(8)}
    | {(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)} - {480.0}
)


def nearest_e4m3(number):
    return min(E4M3, key=lambda level: abs(level - abs(number))) * (1 if number >= 0 else -1)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize(("layer", "sizes"), [(nn.Linear, (128, 6)), (nn.Conv2d, (64, 5, 3)), (nn.Linear, (24, 4))])
def test_weights_go_to_the_nearest_level(layer, sizes, kind):
    torch.manual_seed(0)
    model = frozen(layer(*sizes))
    before = model[0].weight.clone()
    quantize_frozen(model, kind)
    after = model[0].weight.dequantize()
    assert after.shape == before.shape
    expected = reference(before, kind)
    # a weight half-way between two levels may go to either: fp32 here, float64 in the reference
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6 * float(before.abs().max()))
    error = float((after - before).norm() / before.norm())
    assert {"int8": 1e-3, "fp8": 1e-2, "int4": 2e-2}[kind] < error < {"int8": 7e-3, "fp8": 4e-2, "int4": 0.1}[kind]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_rows_of_equal_weights_survive(kind, value):
    model = frozen(nn.Linear(64, 4))
    model[0].weight.fill_(value)
    quantize_frozen(model, kind)
    torch.testing.assert_close(model[0].weight.dequantize(), torch.full((4, 64), value))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_input_gradients_are_those_of_the_unpacked_weights(kind, dtype):
    for layer, shape in (
        (nn.Linear(64, 8), (2, 5, 64)),
        (nn.Linear(64, 8, bias=False), (3, 64)),
        (nn.Conv2d(64, 8, 3, stride=2, padding=1), (2, 64, 6, 5)),
        (nn.Conv2d(64, 8, 1, bias=False), (1, 64, 3, 3)),
    ):
        model = frozen(layer, dtype)
        plain = frozen(
            type(layer)(**{name: getattr(layer, name) for name in geometry(layer)}, bias=layer.bias is not None), dtype
        )
        quantize_frozen(model, kind)
        plain.load_state_dict({"0.weight": model[0].weight.dequantize()}, strict=False)
        if layer.bias is not None:
            plain[0].bias.copy_(layer.bias)
        outputs, gradients = [], []
        for module in (model, plain):
            inputs = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype).requires_grad_()
            outputs.append(module(inputs))
            outputs[-1].float().square().sum().backward()
            gradients.append(inputs.grad)
        assert outputs[0].dtype == gradients[0].dtype == dtype
        assert torch.equal(*outputs)
        torch.testing.assert_close(*gradients)


def geometry(layer):
    if isinstance(layer, nn.Linear):
        return "in_features", "out_features"
    return "in_channels", "out_channels", "kernel_size", "stride", "padding"


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_trains_on_a_quantised_unet(tiny_model, inputs, kind, dtype):
    unet = load_unet(tiny_model, dtype=dtype)
    exact = predict(unet, **inputs).detach().float()
    quantize_frozen(unet, kind)
    assert unet_dtype(unet) == dtype
    base = predict(unet, **inputs).detach().float()
    error = float((base - exact).norm() / exact.norm())
    assert 1e-4 < error < {"int8": 0.02, "fp8": 0.1, "int4": 0.2}[kind]

    attach_adapter(unet, kind="lora", rank=4, alpha=4.0)
    parameters = adapter_parameters(unet)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype)
    packed = {name: module.weight.dequantize() for name, module in unet.named_modules() if is_quantized(module)}
    assert torch.equal(predict(unet, **inputs).float(), base)  # lora_B is zero
    losses = []
    for _ in range(6):
        loss = predict(unet, **inputs).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.3 * parameter.grad
                parameter.grad = None
    assert min(losses[3:]) < losses[0]
    with adapter_disabled(unet), torch.no_grad():
        assert torch.equal(predict(unet, **inputs).float(), base)
    assert all(
        torch.equal(module.weight.dequantize(), packed[name]) for name, module in unet.named_modules() if name in packed
    )
    assert not any(p.requires_grad for p in unet.parameters() if not any(p is q for q in parameters.values()))


def is_quantized(module):
    return isinstance(module, QuantizedLinear | QuantizedConv2d)


def held_bytes(unet, inputs):
    """Of all that the backward pass will need besides weights, packed or not."""
    weights = {part.untyped_storage()._cdata for parameter in unet.parameters() for part in parts(parameter)}
    held, alive = {}, []

    def keep(tensor):
        for part in parts(tensor):
            alive.append(part)
            if part.untyped_storage()._cdata not in weights:
                held[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(unet, **inputs)
    return sum(held.values())


def parts(tensor):
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("targets", ["attention", ["conv1", "to_q"]])
def test_the_backward_pass_keeps_no_unpacked_weight_and_no_more_activations(tiny_model, inputs, kind, targets):
    held = {}
    for quantize in (None, kind):
        unet = load_unet(tiny_model, dtype=torch.bfloat16)
        if quantize:
            quantize_frozen(unet, quantize)
        attach_adapter(unet, kind="lora", rank=4, alpha=4.0, targets=targets)
        for parameter in adapter_parameters(unet).values():
            parameter.data = parameter.data.bfloat16()
        held[quantize] = held_bytes(unet, inputs)
    assert held[kind] <= held[None]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_checkpointing_changes_no_gradient(unet, inputs, kind):
    quantize_frozen(unet, kind)
    attach_adapter(unet, kind="lora", rank=4, alpha=4.0)
    gradients = []
    for mode in ("none", 3, "full"):
        set_gradient_checkpointing(unet, mode)
        unet.zero_grad()
        predict(unet, **inputs).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(unet).values()]))
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_what_stays_and_what_does_not(unet):
    norms = {name for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)}
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    done = quantize_frozen(unet, "int8")
    assert {name for name, module in unet.named_modules() if is_quantized(module)} == set(done.quantized)
    kept = set(done.kept)
    assert kept >= {"conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"}
    assert {name.rpartition(".")[2] for name in kept} == {
        "conv_in", "conv_out", "linear_1", "linear_2", "time_emb_proj"
    }  # fmt: skip
    assert any(name.endswith("conv_shortcut") for name in done.quantized)
    assert any(name.endswith("transformer_blocks.0.ff.net.0.proj") for name in done.quantized)
    for name in norms | kept:
        assert torch.equal(unet.get_submodule(name).weight, before[f"{name}.weight"])
    assert list(before) == [name for name, _ in unet.named_parameters()]  # names and order
    quantized = sum(before[f"{name}.weight"].numel() for name in done.quantized)
    rows = sum(before[f"{name}.weight"].shape[0] for name in done.quantized)
    assert done.bytes_before - done.bytes_after == quantized * 3 - rows * 4  # fp32: 4 bytes become 1, and a scale a row
    assert str(done) == "291 layers in int8, 23 as they were: 0.01 GiB became 0.00"


def test_the_full_size_unet_by_its_shapes():
    """2.54 of its 2.57 billion weights: on meta, so that nothing is allocated."""
    done = quantize_frozen(build_unet(dtype=torch.bfloat16, device="meta"), "int8")
    assert len(done.quantized) == 771
    assert len(done.kept) == 23
    assert done.bytes_before == 2 * 2_567_463_684
    assert done.bytes_after / 2**30 == pytest.approx(2.42, abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_sdxl_on_int8_weights_takes_at_most_six_and_a_half_gib(tmp_path):
    """At 512², all activations kept; measured after loading, in a process of its own."""
    path = tmp_path / "step.json"
    script = Path(__file__).parents[3] / "scripts" / "bench_memory.py"
    command = [
        sys.executable,
        str(script),
        "step",
        "--quantize",
        "int8",
        "--checkpointing",
        "none",
        "--json",
        str(path),
    ]
    done = subprocess.run([*command, "--max-rss-gib", "6.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["peak_rss_gib"] <= 6.5
    assert row["peak_rss_loading_gib"] <= 5.6  # the bf16 weights' 4.8, the libraries' 0.4, and one layer
    assert all(0.5 < loss < 2 for loss in row["losses"])


def test_text_encoders_keep_embeddings_and_the_projection():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2_CONFIG))
    encoder.to(torch.bfloat16).requires_grad_(False)
    done = quantize_frozen(encoder, "int8", setting="model.quantize_text_encoder_2")
    assert done.kept == ("text_projection",)
    assert len(done.quantized) == 32 * 6
    assert 0.70 < done.bytes_after / 2**30 < 0.72


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_text_encoders_say_nearly_the_same(encoders, tiny_model, kind):
    from sdxl_ray.sdxl.components import load_text_encoders

    ids = torch.arange(77)[None] % 300
    exact = encoders.text_encoder_2(ids, output_hidden_states=True)
    encoder = load_text_encoders(tiny_model, dtype=torch.float32).text_encoder_2
    quantize_frozen(encoder, kind, setting="model.quantize_text_encoder_2")
    rounded = encoder(ids, output_hidden_states=True)
    error = float((rounded.hidden_states[-2] - exact.hidden_states[-2]).norm() / exact.hidden_states[-2].norm())
    assert 1e-4 < error < 0.15
    assert torch.equal(rounded.hidden_states[0], exact.hidden_states[0])  # embeddings


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantised_layers_class_computes_with_plain_weights_too(kind):
    """peft makes the factors of an adapter, when a file is read back, of the base layer's class."""
    layers = nn.Sequential(nn.Conv2d(64, 8, 3), nn.Linear(64, 8)).requires_grad_(False).bfloat16()
    quantize_frozen(layers, kind)
    for layer, plain, shape in ((layers[0], nn.Conv2d(4, 8, 3), (1, 4, 6, 6)), (layers[1], nn.Linear(4, 8), (1, 4))):
        arguments = (4, 8, 3) if isinstance(plain, nn.Conv2d) else (4, 8)
        made = type(layer)(*arguments).bfloat16()
        made.load_state_dict(plain.bfloat16().state_dict())
        inputs = torch.randn(shape, dtype=torch.bfloat16)
        assert torch.equal(made(inputs), plain(inputs))


def test_four_bits_leave_rows_alone_that_do_not_fall_into_groups():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(96, 4), nn.Linear(40, 4), nn.Conv2d(16, 4, 3)).requires_grad_(
        False
    )
    done = quantize_frozen(model, "int4")
    assert done.quantized == ("0", "2")
    assert done.kept == ("1", "3")


def test_rounding_may_happen_on_another_device(unet):
    quantize_frozen(unet, "int8", device="meta")
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}


def test_moving_to_the_device_it_is_on_changes_nothing(unet, inputs):
    quantize_frozen(unet, "int8")
    before = predict(unet, **inputs)
    assert torch.equal(predict(unet.to("cpu"), **inputs), before)


def test_a_weight_is_freed_when_its_layer_is_done():
    """Never two whole models: what is alive grows by one layer only."""
    import weakref

    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]).requires_grad_(False)
    alive = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    counts = []

    class Watched(str):
        """A kind that looks around whenever it is compared, which each layer does."""

        def __eq__(self, other):
            counts.append(sum(reference() is not None for reference in alive))
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    quantize_frozen(model, Watched("int8"))
    assert sorted(set(counts), reverse=True) == [5, 4, 3, 2, 1]
    assert not any(reference() for reference in alive)


def test_an_unknown_kind_names_the_known_ones(unet):
    with pytest.raises(ConfigError) as error:
        quantize_frozen(unet, "int3", setting="model.quantize_text_encoder")
    assert str(error.value) == 'model.quantize_text_encoder = "int3" is unknown. Known: none, int8, int4, fp8.'


def test_what_is_trained_cannot_be_quantised(unet):
    attach_adapter(unet, kind="lora", rank=4, alpha=4.0)
    with pytest.raises(ConfigError, match=r'model.quantize = "int8" is for frozen weights, but .*lora_.* are trained'):
        quantize_frozen(unet, "int8")


def test_nothing_left_to_quantise(unet):
    quantize_frozen(unet, "int8")
    with pytest.raises(ConfigError, match="finds nothing to quantise in UNet2DConditionModel: 23 linear layers and"):
        quantize_frozen(unet, "int8")


def test_without_the_library_the_error_says_what_to_install(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(ConfigError, match=r'model.quantize = "fp8" needs optimum-quanto [\s\S]*pip install'):
        quantize_frozen(unet, "fp8")


def test_tied_weights_count_once():
    layer = nn.Linear(4, 4, bias=False)
    assert stored_bytes(nn.ModuleList([layer, layer])) == 64
