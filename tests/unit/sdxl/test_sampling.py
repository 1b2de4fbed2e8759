import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from sdxl_ray.errors import ConfigError
from sdxl_ray.sdxl.adapters import attach_adapter
from sdxl_ray.sdxl.components import load_scheduler_config, load_unet
from sdxl_ray.sdxl.sampling import draw_images, initial_noise, side_by_side


@pytest.fixture
def settings(tiny_model, vae, inputs):
    """Everything but the U-Net, for two prompts of 64x48 pixels."""
    return {
        "vae": vae,
        "scheduler_config": load_scheduler_config(tiny_model),
        "prompt_embeds": inputs["prompt_embeds"],
        "pooled_prompt_embeds": inputs["pooled_prompt_embeds"],
        "negative_prompt_embeds": torch.zeros(2, 77, 64),
        "negative_pooled_prompt_embeds": torch.zeros(2, 32),
        "height_width": (64, 48),
        "num_steps": 3,
        "seeds": [11, 12],
    }


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_equal_to_the_whole_pipeline_of_diffusers(unet, settings, pipeline, guidance_scale):
    ours = draw_images(unet, **settings, guidance_scale=guidance_scale)
    expected = pipeline(
        **{name: tensor for name, tensor in settings.items() if "embeds" in name},
        height=64,
        width=48,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        latents=torch.cat([initial_noise(seed, (64, 48)) for seed in (11, 12)]),
    ).images
    assert [image.size for image in ours] == [(48, 64), (48, 64)]  # Pillow says (width, height)
    assert np.abs(pixels(ours).astype(int) - pixels(expected)).max() <= 1


def test_an_image_is_the_same_alone_and_again_but_not_for_another_seed(unet, settings):
    both = pixels(draw_images(unet, **settings))
    second = {name: value[1:] for name, value in settings.items() if "embeds" in name}
    alone = pixels(draw_images(unet, **{**settings, **second, "seeds": [12]}))
    assert (alone[0] == both[1]).all()
    other = pixels(draw_images(unet, **{**settings, **second, "seeds": [13]}))
    assert (other[0] != both[1]).any()


def test_noise_depends_on_the_seed_alone():
    torch.manual_seed(0)
    first = initial_noise(5, (64, 48))
    torch.manual_seed(1)
    assert torch.equal(first, initial_noise(5, (64, 48)))
    assert first.shape == (1, 4, 8, 6)
    assert not torch.equal(first, initial_noise(6, (64, 48)))


def test_modes_of_the_unet_are_restored_and_dropout_is_off(unet, settings):
    attach_adapter(unet, rank=2, alpha=2, dropout=0.5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    unet.train()
    unet.mid_block.eval()
    before = [module.training for module in unet.modules()]
    first, again = (pixels(draw_images(unet, **settings)) for _ in range(2))
    assert (first == again).all()
    assert [module.training for module in unet.modules()] == before


def test_v_prediction_steps_from_the_end_of_the_schedule(unet, settings):
    seen = []
    unet.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].item()))
    epsilon = pixels(draw_images(unet, **settings, prediction_type="epsilon"))
    assert seen[0] == 667  # "leading", as in the model's config
    seen.clear()
    velocity = pixels(draw_images(unet, **settings, prediction_type="v_prediction"))
    assert seen[0] == 999
    assert (epsilon != velocity).any()


def test_bf16_unet_is_told_exact_sizes(tiny_model, settings):
    unet = load_unet(tiny_model, dtype=torch.bfloat16)
    seen = []
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    draw_images(unet, **{**settings, "num_steps": 1}, original_hw=(1365, 1023))
    assert seen[0] == [1365, 1023, 0, 0, 64, 48] * 2  # negative and positive


def test_no_prompts_no_images(unet, settings):
    none = {name: value[:0] for name, value in settings.items() if "embeds" in name}
    assert draw_images(unet, **{**settings, **none, "seeds": []}) == []


def test_refusals(unet, settings):
    with pytest.raises(ConfigError, match=r"image size 60x48 .* multiples of 8"):
        draw_images(unet, **{**settings, "height_width": (60, 48)})
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts"):
        draw_images(unet, **{**settings, "seeds": [1]})


def test_the_sheet_holds_every_image_whole_with_its_titles():
    rows = [[Image.new("RGB", (96, 64), colour) for colour in pair] for pair in (("red", "lime"), ("blue", "yellow"))]
    sheet = side_by_side(rows, ["base", "with LoRA"], ["a cat", "a very long prompt about a house, " * 6])
    found = sheet.getcolors(maxcolors=100_000)
    counts = {colour: count for count, colour in found}
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        assert counts[colour] == 96 * 64
    blank = side_by_side(rows, ["", ""], ["", ""])
    assert sheet.height > blank.height
    header = sheet.crop((0, 0, sheet.width, 20))
    assert ImageChops.invert(header).getbbox() is not None


def test_sheets_take_rows_of_other_sizes_and_odd_characters():
    rows = [
        [Image.new("RGB", (32, 96), "red")],
        [Image.new("RGB", (96, 32), "lime"), Image.new("RGB", (96, 32), "blue")],
    ]
    sheet = side_by_side(rows, ["base", "LoRA"], ["猫", "Wärme"])
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=100_000)}
    assert counts[(255, 0, 0)] == counts[(0, 255, 0)] == counts[(0, 0, 255)] == 32 * 96
