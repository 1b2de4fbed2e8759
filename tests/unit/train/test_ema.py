import numpy as np
import pytest
import torch
from torch import nn

from sdxl_ray.train.ema import Ema


def make_masters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


SHAPES = {"a": (3, 5), "b": (7,)}


def train(masters, ema, steps):
    """A random walk, as long as training takes; yields the masters after each step in float64."""
    generator = torch.Generator().manual_seed(steps.start)
    for step in steps:
        with torch.no_grad():
            for master in masters.values():
                master += 0.1 * torch.randn(master.shape, generator=generator)
        ema.update(step)
        yield {name: master.detach().double().numpy() for name, master in masters.items()}


def equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_average_recomputed_in_float64(decay, warmup):
    masters = make_masters()
    ema = Ema(masters, decay, warmup)
    expected = {name: master.detach().double().numpy() for name, master in masters.items()}
    for step, trained in enumerate(train(masters, ema, range(1, 201)), start=1):
        keep = min(decay, (1 + step) / (10 + step)) if warmup else decay
        expected = {name: keep * expected[name] + (1 - keep) * trained[name] for name in SHAPES}
    for name in SHAPES:
        assert ema.shadow[name].dtype == torch.float32
        np.testing.assert_allclose(ema.shadow[name].numpy(), expected[name], rtol=0, atol=1e-6)
        assert np.abs(expected[name] - trained[name]).max() > 1e-3  # it is not simply the masters


def test_the_warm_up_forgets_the_beginning():
    """After 100 steps at 1, an average of decay 0.999 that began at 0 is still near 0; with warm-up it is near 1."""
    masters = {"a": torch.zeros(1)}
    slow, quick = Ema(masters, 0.999, warmup=False), Ema(masters, 0.999, warmup=True)
    masters["a"].fill_(1.0)
    for step in range(1, 101):
        slow.update(step)
        quick.update(step)
    assert slow.shadow["a"].item() == pytest.approx(1 - 0.999**100, rel=1e-4)
    assert quick.shadow["a"].item() > 0.999999
    assert [quick.decay_at(step) for step in (1, 2, 80, 8990, 8991)] == [2 / 11, 3 / 12, 81 / 90, 8991 / 9000, 0.999]


def test_updates_too_small_for_bf16_arrive():
    masters = {"a": torch.ones(4)}
    ema = Ema(masters, 0.9999, warmup=False)
    masters["a"].add_(0.1)
    ema.update(1)
    assert ema.shadow["a"].tolist() == pytest.approx([1 + 1e-5] * 4, abs=1e-7)
    assert ema.shadow["a"][0] > 1


def test_a_restart_goes_on_to_the_bit(tmp_path):
    masters = make_masters()
    ema = Ema(masters, 0.99, True)
    list(train(masters, ema, range(1, 6)))
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    saved = {name: master.detach().clone() for name, master in masters.items()}

    resumed = make_masters(seed=1)
    with torch.no_grad():
        for name in SHAPES:
            resumed[name].copy_(saved[name])
    again = Ema(resumed, 0.99, True)
    assert not equal(again.shadow, ema.shadow)
    again.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert equal(again.shadow, ema.shadow)
    list(train(masters, ema, range(6, 11)))
    list(train(resumed, again, range(6, 11)))
    assert equal(again.shadow, ema.shadow)


def test_the_state_is_a_copy():
    masters = make_masters()
    ema = Ema(masters, 0.9, True)
    state = ema.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    list(train(masters, ema, range(1, 3)))
    assert equal(state, kept)
    assert not equal(ema.shadow, kept)


def test_applied_swaps_the_average_in_and_both_back_to_the_bit():
    masters = make_masters()
    ema = Ema(masters, 0.9, True)
    list(train(masters, ema, range(1, 20)))
    trained = {name: master.detach().clone() for name, master in masters.items()}
    average = ema.state_dict()
    places = {name: master.data_ptr() for name, master in masters.items()}
    with ema.applied(masters):
        assert equal(masters, average)
        assert not equal(masters, trained)
    assert equal(masters, trained)
    assert equal(ema.state_dict(), average)
    assert {name: master.data_ptr() for name, master in masters.items()} == places  # what refers to them still does


def test_applied_swaps_back_after_an_error():
    masters = make_masters()
    ema = Ema(masters, 0.9, True)
    list(train(masters, ema, range(1, 20)))
    trained = {name: master.detach().clone() for name, master in masters.items()}
    with pytest.raises(KeyboardInterrupt), ema.applied(masters):
        raise KeyboardInterrupt
    assert equal(masters, trained)


def test_training_goes_on_as_if_nothing_had_been_applied():
    plain, visited = make_masters(), make_masters()
    averages = Ema(plain, 0.9, True), Ema(visited, 0.9, True)
    for begin in (1, 11):
        list(train(plain, averages[0], range(begin, begin + 10)))
        list(train(visited, averages[1], range(begin, begin + 10)))
        with averages[1].applied(visited):
            pass
    assert equal(plain, visited)
    assert equal(averages[0].shadow, averages[1].shadow)


def test_it_leaves_the_masters_alone():
    masters, alone = make_masters(), make_masters()
    list(train(masters, Ema(masters, 0.9, True), range(1, 5)))
    list(train(alone, Ema(make_masters(), 0.5, False), range(1, 5)))  # an average of something else
    assert equal(masters, alone)
    assert all(master.requires_grad and master.grad is None for master in masters.values())


def test_restart_begins_with_the_masters():
    masters = make_masters()
    ema = Ema(masters, 0.99, False)
    list(train(masters, ema, range(1, 5)))
    assert not equal(ema.shadow, masters)
    ema.restart()
    assert equal(ema.shadow, masters)
