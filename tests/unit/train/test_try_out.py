import pytest
import torch

from sdxl_ray.config.load import dump_config, with_overrides
from sdxl_ray.errors import ConfigError
from sdxl_ray.train.try_out import _Trial, find_micro_batch_size, from_earlier_run, with_batch_size

AUTO = {"train.micro_batch_size": "auto", "train.global_batch_size": 12, "train.num_workers": 2}


def test_accumulation_keeps_the_global_batch(config):
    auto = with_overrides(config, {**AUTO, "train.accumulation": 1})
    for fits, expected in ((100, (6, 1)), (5, (3, 2)), (1, (1, 6))):
        train = with_batch_size(auto, fits).train
        assert (train.micro_batch_size, train.accumulation) == expected
        assert with_batch_size(auto, fits).global_batch_size == 12
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 12 cannot be shared evenly by 5 workers"):
        with_batch_size(with_overrides(auto, {"train.num_workers": 5}), 1)


def test_a_resumed_run_takes_the_micro_batch_it_began_with_and_keeps_the_global_batch(config, tmp_path):
    auto = with_overrides(config, {**AUTO, "train.accumulation": 1})
    (tmp_path / "config.toml").write_text(dump_config(with_batch_size(auto, 3)))
    assert from_earlier_run(auto, tmp_path) == with_batch_size(auto, 3)
    alone = from_earlier_run(with_overrides(auto, {"train.num_workers": 1}), tmp_path)
    assert (alone.train.micro_batch_size, alone.train.accumulation, alone.global_batch_size) == (3, 4, 12)
    with pytest.raises(ConfigError, match=r"in micro-batches of 3, .* to a multiple of 9"):
        from_earlier_run(with_overrides(auto, {"train.num_workers": 3}), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_try(config):
    with pytest.raises(ConfigError, match='"auto" tries out what fits on a GPU, and there is none here'):
        find_micro_batch_size(with_overrides(config, {**AUTO, "train.accumulation": 1}))


@pytest.mark.parametrize("changes", [{}, {"cache.text": "online", "text_encoder.rank": 2}])
def test_a_try_is_a_whole_step_and_one_that_failed_half_way_leaves_nothing_behind(config, changes):
    """On the CPU: what fits is asked of a GPU, the step itself runs anywhere."""
    auto = with_overrides(config, {**AUTO, **changes, "train.accumulation": 1})
    trial = _Trial(auto, torch.device("cpu"))
    before = trial.state.masters.state_dict()
    some = next(iter(trial.state.masters.parameters.values()))
    some.grad = torch.full_like(some, torch.nan)
    trial.step(3)
    after = trial.state.masters.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
