import pytest
import torch

from sdxl_ray.records import MicroConditioning
from sdxl_ray.sdxl.adapters import attach_adapter
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.sdxl.conditioning import add_time_ids, predict, unet_dtype, zero_prompts


def test_time_ids_equal_diffusers(pipeline):
    ours = add_time_ids(
        [MicroConditioning((1365, 1023), (12, 340), (1216, 832)), MicroConditioning((5, 6), (7, 8), (9, 10))]
    )
    expected = pipeline._get_add_time_ids((1365, 1023), (12, 340), (1216, 832), torch.float32, 32)
    assert ours.shape == (2, 6)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[:1], expected)


def test_predict_equals_a_plain_call(unet, inputs):
    expected = unet(
        inputs["noisy_latents"],
        inputs["timesteps"],
        encoder_hidden_states=inputs["prompt_embeds"],
        added_cond_kwargs={"text_embeds": inputs["pooled_prompt_embeds"], "time_ids": inputs["add_time_ids"]},
    ).sample
    assert torch.equal(predict(unet, **inputs), expected)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_bf16_unet_sees_exact_sizes_and_timesteps(tiny_model, inputs, with_adapter):
    """Trap: diffusers' script casts time ids to the weights' dtype, and bf16 makes 1368 of 1365."""
    unet = load_unet(tiny_model, dtype=torch.bfloat16)
    if with_adapter:
        attach_adapter(unet, rank=2, alpha=2)
    seen = {}
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.update(time_ids=args[0]))
    unet.time_proj.register_forward_pre_hook(lambda _, args: seen.update(timesteps=args[0]))
    prediction = predict(unet, **{**inputs, "timesteps": torch.tensor([999, 257])})
    assert unet_dtype(unet) == prediction.dtype == torch.bfloat16
    assert seen["time_ids"].tolist() == [1365, 1023, 0, 170, 64, 48] * 2
    assert seen["timesteps"].tolist() == [999, 257]


def test_size_reaches_the_prediction(unet, inputs):
    other = add_time_ids([MicroConditioning((64, 48), (0, 0), (64, 48))] * 2)
    assert not torch.allclose(predict(unet, **inputs), predict(unet, **{**inputs, "add_time_ids": other}))


def test_dropped_captions_are_zero_and_the_others_untouched(inputs):
    embeds, pooled = inputs["prompt_embeds"], inputs["pooled_prompt_embeds"]
    embeds[1, 0, 0] = torch.inf
    dropped_embeds, dropped_pooled = zero_prompts(embeds, pooled, torch.tensor([False, True]))
    assert torch.equal(dropped_embeds[0], embeds[0])
    assert torch.equal(dropped_pooled[0], pooled[0])
    assert dropped_embeds[1].count_nonzero() == dropped_pooled[1].count_nonzero() == 0


def test_no_dropout_is_the_identity(inputs):
    embeds, pooled = zero_prompts(
        inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], torch.zeros(2, dtype=torch.bool)
    )
    assert torch.equal(embeds, inputs["prompt_embeds"])
    assert torch.equal(pooled, inputs["pooled_prompt_embeds"])
