"""Names, ranks and counts. The counts are compared with what `attach_adapter` really attaches."""

import pytest
import torch

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl import architecture
from sdxl_ray.sdxl.adapters import ADAPTER_KINDS, adapter_parameters, attach_adapter, detach_adapter
from sdxl_ray.sdxl.components import unet_weight_shapes
from sdxl_ray.sdxl.full import train_everything
from sdxl_ray.sdxl.targets import (
    TARGETS,
    BlockRule,
    Width,
    block_of,
    count_adapter_parameters,
    kronecker_split,
    match_targets,
    module_widths,
    unread_prefix,
)
from sdxl_ray.sdxl.tiny import unet_config

# SDXL's and the tiny one's names and shapes, without weights
FULL_SIZE, TINY = (
    architecture.build_unet(dtype=torch.bfloat16, device="meta", config=config)
    for config in (architecture.UNET_CONFIG, unet_config())
)

NAMES = ["down_blocks.1.attn1.to_q", "down_blocks.1.attn1.to_k", "mid_block.attn1.to_q", "mid_block.conv1"]


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def attached(unet, **arguments) -> dict[str, int]:
    """Parameter -> its size, of what is really attached."""
    attach_adapter(unet, **arguments)
    sizes = {name: parameter.numel() for name, parameter in adapter_parameters(unet).items()}
    detach_adapter(unet)
    return sizes


def modules_of(names) -> set[str]:
    return {name.split(".lora_")[0].split(".hada_")[0].split(".lokr_")[0] for name in names}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", NAMES[:3]),
        (("attention",), NAMES[:3]),
        (("to_q", "conv1"), [NAMES[0], NAMES[2], NAMES[3]]),
        (("to_q",), [NAMES[0], NAMES[2]]),  # an end, not a regex for whole names
        ("attn1.to_k", [NAMES[1]]),
        ((NAMES[3],), [NAMES[3]]),
        ((r"mid_block\..*",), NAMES[2:]),
        (r".*\.to_[qk]", NAMES[:3]),
        (r"mid_block", []),  # a regex is for the whole name
        ("o_q", []),
    ],
)
def test_what_targets_mean(targets, expected):
    assert match_targets(targets, NAMES) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "adapter.targets is empty. Give a preset (attention, all-linear, all-linear+conv)"),
        ("to_q(", "adapter.targets 'to_q(' is neither a preset (attention, all-linear, all-linear+conv), nor the end"),
        (("to_q", "to_w"), "no linear or convolution layer has a name that ends in to_w. Several targets are ends"),
        (("attention", "conv1"), "a name that ends in attention. Several targets are ends of names, such as to_q"),
    ],
)
def test_targets_that_mean_nothing(targets, message):
    with pytest.raises(ConfigError) as error:
        match_targets(targets, NAMES)
    assert message in str(error.value)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_is_found_counts():
    assert block_of("mid_block.attn1.to_q", ["block", "mid_block"]) == 0
    assert block_of("mid_block.attn1.to_q", [r"to_k$", "^mid"]) == 1
    assert block_of("mid_block.attn1.to_q", ["^attn1"]) is None


def test_blocks_have_their_own_rank_and_alpha():
    blocks = [BlockRule("to_k", rank=0), BlockRule("conv", 2, 6.0), BlockRule("mid_block", rank=8)]
    expected = {NAMES[0]: Width(4, 4.0), NAMES[3]: Width(2, 6.0), NAMES[2]: Width(8, 8.0)}
    assert module_widths(NAMES, rank=4, alpha=4.0, blocks=blocks) == expected


@pytest.mark.parametrize(
    ("alpha", "block_alpha", "expected"),
    [(4.0, None, 8.0), (4.0, 0, 8.0), (4.0, 2.0, 2.0), (1.0, None, 1.0), (1.0, 0, 8.0), (1.0, 2.0, 2.0)],
)
def test_the_alpha_of_a_block(alpha, block_alpha, expected):
    widths = module_widths(NAMES, rank=4, alpha=alpha, blocks=[BlockRule("mid", 8, block_alpha)])
    assert widths[NAMES[2]] == Width(8, expected)
    assert widths[NAMES[0]] == Width(4, alpha)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            [BlockRule("middle", 8)],
            "adapter.blocks: 'middle' is found in the name of none of the 4 modules that adapter.targets selects. Such "
            "a name is down_blocks.1.attn1.to_q; a pattern is a part of it, such as down_blocks.1.",
        ),
        ([BlockRule("mid(", 8)], "adapter.blocks: 'mid(' is no regular expression (missing ), unterminated"),
        ([BlockRule("block", 0)], "adapter.blocks gives rank 0 to all 4 modules that adapter.targets selects"),
    ],
)
def test_blocks_that_mean_nothing(blocks, message):
    with pytest.raises(ConfigError) as error:
        module_widths(NAMES, rank=4, alpha=4.0, blocks=blocks)
    assert message in str(error.value)


def test_a_pattern_behind_a_wider_one_is_no_mistake():
    blocks = [BlockRule("mid_block", 8), BlockRule("mid_block.conv1", 2)]
    assert module_widths(NAMES, rank=4, alpha=4.0, blocks=blocks)[NAMES[3]].rank == 8


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets", "modules", "parameters"),
    [
        ("lora", "attention", 560, 23_224_320),
        ("lora", "all-linear", 722, 42_557_440),
        ("lora", "all-linear+conv", 788, 49_187_840),
        ("dora", "attention", 560, 23_889_920),
        ("full", "attention", 1050, 2_567_463_684),
    ],
)
def test_of_sdxl_at_rank_16(kind, targets, modules, parameters):
    """The figures of docs/training-methods.md: 788 are 722, 49 convolutions and 17 time projections."""
    assert count_adapter_parameters(shapes_of(FULL_SIZE), 16, targets, kind=kind) == (modules, parameters)


def test_788_of_sdxl_are_attached():
    arguments = {"kind": "lokr", "blocks": [BlockRule("mid_block", 4)]}
    sizes = attached(FULL_SIZE, rank=16, alpha=16.0, targets=("all-linear+conv",), **arguments)
    counted = count_adapter_parameters(shapes_of(FULL_SIZE), 16, "all-linear+conv", **arguments)
    assert counted == (788, sum(sizes.values()))
    assert len(modules_of(sizes)) == 788


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *(("lora", targets) for targets in [*TARGETS, r"mid_block\..*\.to_k", ("conv1", "to_v"), ["conv_in"]]),
        *((kind, "all-linear+conv") for kind in ADAPTER_KINDS if kind != "lora"),
    ],
)
def test_the_count_is_what_gets_attached(kind, targets):
    sizes = attached(TINY, kind=kind, rank=3, alpha=3, targets=targets)
    counted = count_adapter_parameters(shapes_of(TINY), 3, targets, kind=kind)
    assert counted == (len(modules_of(sizes)), sum(sizes.values()))


@pytest.mark.parametrize(("rank", "factor"), [(1, -1), (2, 4), (16, 2), (64, -1), (2, 0), (2, 7)])
def test_the_count_of_kronecker_factors(rank, factor):
    blocks = [BlockRule(r"down_blocks\.2", 5), BlockRule("up_blocks", 0)]
    arguments = {
        "kind": "lokr",
        "targets": ("conv1", "conv_shortcut", "proj_in", "to_k"),
        "factor": factor,
        "blocks": blocks,
    }
    sizes = attached(TINY, rank=rank, alpha=1.0, **arguments)
    counted = count_adapter_parameters(shapes_of(TINY), rank, **arguments)
    assert counted == (len(modules_of(sizes)), sum(sizes.values()))


def test_the_shapes_of_a_file_count_the_same(tiny_model):
    from_file = unet_weight_shapes(tiny_model)
    for kind in ("lora", "full"):
        assert count_adapter_parameters(from_file, 3, "all-linear", kind=kind) == count_adapter_parameters(
            shapes_of(TINY), 3, "all-linear", kind=kind
        )


def test_the_count_of_full_training(unet):
    train_everything(unet)
    _, parameters = count_adapter_parameters(shapes_of(unet), 3, "attention", kind="full")
    assert parameters == sum(parameter.numel() for parameter in adapter_parameters(unet).values())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_the_count_of_a_text_encoder(encoders, part, targets):
    encoder = getattr(encoders, part)
    shapes = shapes_of(encoder)
    sizes = attached(encoder, rank=4, alpha=4.0, targets=targets)
    layers = 2 if part == "text_encoder" else 3  # the tiny encoders have three; encoder 1's last is not read
    assert len(modules_of(sizes)) == layers * (4 if targets == "attention" else 6)
    assert count_adapter_parameters(shapes, 4, targets) == (len(modules_of(sizes)), sum(sizes.values()))


def test_which_layer_is_never_read():
    layers = [f"encoder.layers.{number}.mlp.fc1" for number in range(12)]
    assert unread_prefix(layers) == "encoder.layers.11."
    assert unread_prefix([f"text_model.{name}" for name in layers]) == "text_model.encoder.layers.11."
    assert unread_prefix([*(f"text_model.{name}" for name in layers), "text_projection"]) is None
    assert unread_prefix(NAMES) is None


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [
        (320, -1, (16, 20)),
        (1280, -1, (32, 40)),
        (10240, -1, (80, 128)),
        (127, -1, (1, 127)),
        (64, -1, (8, 8)),
        (320, 8, (8, 40)),
        (320, 7, (5, 64)),
        (320, 64, (64, 5)),  # the factor itself, where it divides
        (6, 100, (2, 3)),
        (6, 0, (1, 6)),
    ],
)
def test_kronecker_splits(dimension, factor, expected):
    """The first three as LyCORIS' documentation and peft's docstring give them, the others by hand."""
    assert kronecker_split(dimension, factor) == expected
