"""`check` refuses what a worker would refuse."""

import pytest
import torch
from safetensors.torch import save_file

from sdxl_ray.config.load import with_overrides
from sdxl_ray.errors import ConfigError, InputError
from sdxl_ray.export.formats import write_kohya
from sdxl_ray.sdxl.adapters import attach_adapter, trained_modules
from sdxl_ray.sdxl.components import load_unet
from sdxl_ray.train.rehearsal import needs_rehearsal, rehearse


@pytest.fixture(scope="module")
def lora_of_rank_4(tiny_model, tmp_path_factory):
    unet = load_unet(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    attach_adapter(unet, rank=4, alpha=4.0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("lora") / "four.safetensors"
    write_kohya(path, {"unet": trained_modules(unet)}, {}, layers_per_block=unet.config.layers_per_block)
    return str(path)


@pytest.mark.parametrize("changes", [
    {}, {"adapter.init": "pissa"}, {"optimizer.name": "muon"}, {"optimizer.name": "torch.optim.RAdam"},
    {"adapter.kind": "full", "adapter.rank": 16, "adapter.alpha": 0.0, "optimizer.name": "torch.optim.RAdam"},
    {"cache.text": "online", "text_encoder.rank": 2, "text_encoder_2.rank": 2, "optimizer.name": "muon"},
])  # fmt: skip
def test_what_can_be_trained_passes(config, tiny_model, changes):
    config = with_overrides(config, changes)
    assert needs_rehearsal(config) == bool(changes)
    rehearse(config, tiny_model)


def test_a_lora_to_go_on_from_has_to_fit(config, tiny_model, lora_of_rank_4, tmp_path):
    start = {"adapter.start_from": lora_of_rank_4}
    rehearse(with_overrides(config, {**start, "adapter.rank": 4}), tiny_model)
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        rehearse(with_overrides(config, {**start, "adapter.rank": 2}), tiny_model)
    with pytest.raises(ConfigError, match=r"adapter\.targets"):
        rehearse(with_overrides(config, {**start, "adapter.rank": 4, "adapter.targets": ["to_q"]}), tiny_model)
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors"):
        rehearse(with_overrides(config, {"adapter.start_from": str(tmp_path / "other.safetensors")}), tiny_model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.init": "pissa", "adapter.rank": 1000}, "adapter.rank"),
        ({"optimizer.name": "muon", "adapter.targets": [r".*conv1"]}, "optimizer.name"),
        ({"optimizer.name": "muon", "adapter.targets": ["nothing"]}, "adapter.targets"),
        ({"adapter.blocks": {"nowhere": {"rank": 4}}}, "adapter.blocks"),
        (
            {
                "adapter.kind": "full",
                "adapter.rank": 16,
                "adapter.alpha": 0.0,
                "adapter.blocks": {"nowhere": {"learning_rate_scale": 0.1}},
            },
            "adapter.blocks",
        ),
        ({"adapter.blocks": {"": {"learning_rate_scale": 0.0}}}, "nothing learns"),
        ({"optimizer.name": "adamw_schedule_free", "optimizer.beta1": 0.0}, "adamw_schedule_free"),
        ({"optimizer.options": {"betas": [1.5, 0.9]}}, "adamw"),
        ({"optimizer.options": {"fused": True, "foreach": True}}, "adamw"),
        ({"optimizer.name": "torch.optim.SparseAdam"}, "cannot take a step with these settings"),
    ],
)
def test_what_the_shapes_make_impossible(config, tiny_model, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        rehearse(with_overrides(config, changes), tiny_model)
