import pytest
import torch
from torch import nn

from sdxl_ray.errors import ConfigError
from sdxl_ray.train.groups import LearningRates, parameter_groups

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{UNET}.lora_A.weight", 0.5),
        (f"{UNET}.lora_B.weight", 8.0),  # a block's factor and LoRA+'s are multiplied
        ("mid_block.attentions.0.proj_in.lora_A.weight", 3.0),
        ("mid_block.attentions.0.proj_in.hada_w1_a", 3.0),
        ("up_blocks.0.resnets.0.conv1.lora_A.weight", 1.0),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight", 0.1),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight", 1.6),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", 1.0),
        ("mid_block.resnets.0.conv1.weight", 3.0),  # full: no adapter's leaf behind the module
    ],
)
def test_factors_are_multiplied(name, expected):
    rates = LearningRates(
        blocks=[("attn1", 0.5), (r"mid_block", 3.0), ("down_blocks", 7.0)],
        text={"text_encoder": 0.1},
        lora_plus_ratio=16.0,
    )
    assert rates.factor(name) == pytest.approx(expected)


def test_a_pattern_sees_the_modules_name_and_not_the_weights():
    assert LearningRates(blocks=[("to_q$", 0.5)]).factor(f"{UNET}.lora_A.weight") == 0.5
    assert LearningRates(blocks=[("lora_B", 0.5)]).factor(f"{UNET}.lora_B.weight") == 1.0


def test_a_pattern_that_no_module_has_is_refused():
    masters = {f"{UNET}.lora_A.weight": nn.Parameter(torch.zeros(1))}
    with pytest.raises(ConfigError, match=r"'mid_blocks' is found in the name of none of the 1 modules"):
        parameter_groups(masters, LearningRates(blocks=[("mid_blocks", 0.5)]))


def test_nothing_set_is_one_group_in_the_masters_order():
    masters = {f"{UNET}.lora_{leaf}.weight": nn.Parameter(torch.zeros(1)) for leaf in "AB"}
    (group,) = parameter_groups(masters, LearningRates())
    assert group.learning_rate_scale == 1.0
    assert [id(parameter) for parameter in group.parameters] == [id(master) for master in masters.values()]


def test_one_group_for_each_factor():
    masters = {
        f"{UNET}.{number}.lora_{leaf}.weight": nn.Parameter(torch.zeros(1)) for number in (0, 1) for leaf in "AB"
    }
    groups = parameter_groups(masters, LearningRates(lora_plus_ratio=4.0))
    assert [(group.learning_rate_scale, len(group.parameters)) for group in groups] == [(1.0, 2), (4.0, 2)]
