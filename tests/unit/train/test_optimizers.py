import io
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_ray.errors import CheckpointError, ConfigError
from sdxl_ray.train.masters import MasterWeights
from sdxl_ray.train.optimizers import (
    OPTIMIZERS,
    ParameterGroup,
    check_optimizer,
    inference_weights,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)

# Besides the names, classes by path: with other state, and with the same interface as a known one.
ALL = (*OPTIMIZERS, "torch.optim.RAdam", "torch.optim.SGD", "schedulefree.SGDScheduleFree")
RATES = {"prodigy": 1.0, "adafactor": 0.5}
OPTIONS = {"torch.optim.SGD": {"momentum": 0.9}, "prodigy": {"d0": 1e-3}}
# 8-bit moments begin at 4096 numbers; one of the parameters is below.
SHAPES = {"a": (80, 64), "b": (8, 4)}


class Run:
    """Masters, an optimizer of theirs, and gradients that depend on the step and on the weights."""

    def __init__(self, name, scales=None, weight_decay=0.01, betas=(0.9, 0.99), epsilon=1e-8, peak=None, **options):
        generator = torch.Generator().manual_seed(0)
        parameters = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
        self.masters = MasterWeights(parameters, torch.float32)
        self.named = self.masters.masters
        self.peak = peak or RATES.get(name, 0.01)
        self.optimizer = make_optimizer(
            name,
            [ParameterGroup((self.named[key],), scale) for key, scale in scales.items()]
            if scales
            else [ParameterGroup(tuple(self.named.values()))],
            learning_rate=self.peak,
            weight_decay=weight_decay,
            betas=betas,
            epsilon=epsilon,
            options=OPTIONS.get(name, {}) | options,
        )

    def steps(self, *numbers):
        for number in numbers:
            self.masters.zero()
            generator = torch.Generator().manual_seed(number)
            for master in self.named.values():
                if master.grad is not None:
                    master.grad += 0.1 * master.detach() + torch.randn(master.shape, generator=generator)
            set_learning_rate(self.optimizer, self.peak / (1 + number))  # a schedule
            self.optimizer.step()
        return self

    def weights(self):
        return {key: master.detach().clone() for key, master in self.named.items()}

    def resumed_by(self, other):
        """What a checkpoint does: the weights and the state go through a file to fresh objects."""
        file = io.BytesIO()
        torch.save({"adapter": self.masters.state_dict(), "optimizer": optimizer_state(self.optimizer)}, file)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        other.masters.load_state_dict(state["adapter"])
        load_optimizer_state(other.optimizer, state["optimizer"])
        return other


def same(mine, theirs):
    return all(torch.equal(mine[key], theirs[key]) for key in SHAPES)


# ---- AdamW, as it was ------------------------------------------------------------------------------------------------


def make_parameters(value=1.0):
    return {"a": nn.Parameter(torch.full((3, 2), value)), "b": nn.Parameter(torch.full((4,), value))}


def make_adamw(masters, **changes):
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8, "options": {}}
    return make_optimizer("adamw", [ParameterGroup(tuple(masters.masters.values()))], **(settings | changes))


def test_optimizer_state_is_float32():
    masters = MasterWeights(make_parameters(), torch.bfloat16)
    optimizer = make_adamw(masters)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert len(moments) == 6
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_adamw_on_masters_is_adamw_on_the_weights():
    """In fp32, masters are the absence of masters."""
    parameters = make_parameters()
    masters = MasterWeights(parameters, torch.float32)
    optimizer = make_adamw(masters, weight_decay=0.1)
    plain = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    expected = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.1)
    for step in range(5):
        masters.zero()
        for ours, theirs in zip(parameters.values(), plain, strict=True):
            gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        masters.accumulate()
        optimizer.step()
        masters.publish()
        expected.step()
    for ours, theirs in zip(parameters.values(), plain, strict=True):
        assert torch.equal(ours, theirs)


# ---- every optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name):
    whole = Run(name).steps(*range(1, 8))
    before = Run(name).steps(1, 2, 3)
    after = before.resumed_by(Run(name)).steps(4, 5, 6, 7)
    assert same(after.weights(), whole.weights())
    # The premise: the state matters, so a run that had lost it would differ.
    forgetful = Run(name)
    forgetful.masters.load_state_dict(before.masters.state_dict())
    assert not same(forgetful.steps(4, 5, 6, 7).weights(), whole.weights())


@pytest.mark.parametrize("name", ALL)
def test_resuming_in_memory_shares_nothing(name):
    before = Run(name).steps(1, 2, 3)
    after = Run(name)
    after.masters.load_state_dict(before.masters.state_dict())
    load_optimizer_state(after.optimizer, optimizer_state(before.optimizer))
    after.steps(4, 5, 6, 7)
    assert same(before.steps(4, 5, 6, 7).weights(), after.weights())


@pytest.mark.parametrize("name", ALL)
def test_resuming_twice_is_resuming_once(name):
    whole = Run(name).steps(*range(1, 8))
    first = Run(name).steps(1, 2).resumed_by(Run(name)).steps(3)
    assert same(first.resumed_by(Run(name)).steps(4, 5, 6, 7).weights(), whole.weights())


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_takes_the_new_configs_settings(name):
    """As if they had been changed in the running optimizer; and each of them makes a difference."""
    plain = Run(name).steps(1, 2, 3).resumed_by(Run(name)).steps(4, 5).weights()
    settings = {"weight_decay": {"weight_decay": 0.5}, "peak": {"peak": 3 * Run(name).peak}}
    group = Run(name).optimizer.param_groups[0]
    if "betas" in group or "beta1" in group:
        settings["betas"] = {"betas": (0.5, 0.6)}
    if "eps" in group and name not in ("adafactor", "muon", "torch.optim.RAdam"):  # a pair, a rounding, not yet
        settings["eps"] = {"epsilon": 0.5}
    for changed in settings.values():
        after = Run(name).steps(1, 2, 3).resumed_by(Run(name, **changed))
        for key, value in Run(name, **changed).optimizer.param_groups[0].items():
            if key in ("lr", "weight_decay", "betas", "beta1", "beta2", "eps"):
                assert after.optimizer.param_groups[0][key] == value, key
        assert not same(after.steps(4, 5).weights(), plain), changed


def test_an_epsilon_that_lies_with_the_moments_is_the_new_configs_too():
    """optimi keeps its square with each parameter, where a checkpoint would bring back the old one."""
    after = Run("stable_adamw", epsilon=1e-8).steps(1, 2).resumed_by(Run("stable_adamw", epsilon=0.25)).steps(3)
    assert [after.optimizer.state[master]["eps_sq"].item() for master in after.named.values()] == [0.0625, 0.0625]


@pytest.mark.parametrize("name", ALL)
def test_the_kinds_of_the_state_survive(name):
    """torch moves and casts what it loads: 8-bit moments, for one, would become fp32."""
    before = Run(name).steps(1, 2, 3)
    after = before.resumed_by(Run(name))

    def kinds(run):
        return [
            {key: (type(value), getattr(value, "dtype", None)) for key, value in run.optimizer.state[master].items()}
            for master in run.named.values()
        ]

    assert kinds(after) == kinds(before)
    if name == "adamw_8bit":
        assert kinds(after)[0]["state1"] == (torch.Tensor, torch.uint8)
        assert kinds(after)[1]["state1"] == (torch.Tensor, torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_what_has_stopped_learning_does_not_move(name):
    run = Run(name, scales={"a": 1.0, "b": 1.0}, weight_decay=0.5).steps(1, 2, 3)
    before = run.weights()
    run.masters.freeze(["b"])
    run.steps(4, 5)
    assert torch.equal(run.named["b"], before["b"])
    assert not torch.equal(run.named["a"], before["a"])

    with inference_weights(run.optimizer):
        frozen = run.named["b"].detach().clone()
    run.steps(6)
    with inference_weights(run.optimizer):
        assert torch.equal(run.named["b"], frozen)

    resumed = run.resumed_by(frozen_run := Run(name, scales={"a": 1.0, "b": 1.0}, weight_decay=0.5))
    frozen_run.masters.freeze(["b"])
    assert same(resumed.steps(7, 8).weights(), run.steps(7, 8).weights())
    assert torch.equal(resumed.named["b"], before["b"])


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_of_a_group_may_find_it_frozen(name):
    run = Run(name, scales={"a": 1.0, "b": 1.0}, weight_decay=0.5)
    before = run.weights()
    run.masters.freeze(["a"])
    run.steps(1, 2)
    assert torch.equal(run.named["a"], before["a"])
    assert not torch.equal(run.named["b"], before["b"])


@pytest.mark.parametrize("name", ALL)
def test_two_groups_of_one_scale_are_one_group(name):
    assert same(Run(name, scales={"a": 1.0, "b": 1.0}).steps(1, 2, 3).weights(), Run(name).steps(1, 2, 3).weights())


@pytest.mark.parametrize("name", [name for name in ALL if name != "prodigy"])
def test_a_scale_is_a_learning_rate(name):
    """Each group goes as if it were alone with its rate."""
    scaled = Run(name, scales={"a": 1.0, "b": 4.0}).steps(1, 2, 3).weights()
    plain, fast = Run(name).steps(1), Run(name, peak=4 * Run(name).peak).steps(1)
    assert torch.equal(Run(name, scales={"a": 1.0, "b": 4.0}).steps(1).named["b"], fast.named["b"])
    assert torch.equal(Run(name, scales={"a": 1.0, "b": 4.0}).steps(1).named["a"], plain.named["a"])
    assert not torch.equal(scaled["b"], plain.steps(2, 3).named["b"])


@pytest.mark.parametrize("name", ALL)
def test_a_scale_of_zero_leaves_the_weights_as_they_are(name):
    run = Run(name, scales={"a": 1.0, "b": 0.0}, weight_decay=0.5)
    before = run.weights()
    run.steps(1, 2, 3)
    assert torch.equal(run.named["b"], before["b"])
    assert not torch.equal(run.named["a"], before["a"])


def test_the_rate_is_set_times_the_scale():
    run = Run("adamw", scales={"a": 0.5, "b": 16.0})
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.005, 0.16]
    set_learning_rate(run.optimizer, 0.25)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.125, 4.0]


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("prodigy", "torch.optim.SGD")])
def test_weight_decay_is_adamws(name):
    """Without a gradient, a step leaves 1 - learning rate x weight_decay of a weight."""
    run = Run(name, weight_decay=0.5, peak=0.125)
    before = run.weights()
    run.masters.zero()
    set_learning_rate(run.optimizer, 0.0625)
    run.optimizer.step()
    for key in SHAPES:
        torch.testing.assert_close(run.named[key].detach(), before[key] * (1 - 0.0625 * 0.5), rtol=1e-6, atol=0)


def test_prodigys_weight_decay_is_adamws_at_the_rate_it_found():
    """b has no gradient, so only decay moves it; a's makes the estimate d."""
    run = Run("prodigy", weight_decay=0.5)
    before = run.weights()
    run.masters.zero()
    run.named["a"].grad += 1.0
    set_learning_rate(run.optimizer, 0.5)
    run.optimizer.step()
    kept = 1 - 1e-3 * 0.5 * 0.5  # d of the first step is d0
    torch.testing.assert_close(run.named["b"].detach(), before["b"] * kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_they_learn(name):
    """Down a quadratic bowl: half of the distance at the least."""
    run = Run(name, weight_decay=0.0, peak={"prodigy": 1.0, "adafactor": 0.3, "muon": 0.3}.get(name, 0.05))
    before = sum(float(master.detach().square().sum()) for master in run.named.values())
    for _ in range(60):
        run.masters.zero()
        for master in run.named.values():
            master.grad += master.detach()
        set_learning_rate(run.optimizer, run.peak)
        run.optimizer.step()
    with inference_weights(run.optimizer):
        after = sum(float(master.detach().square().sum()) for master in run.named.values())
    assert after < before / 4


# ---- the definitions, written out ------------------------------------------------------------------------------------


def gradients_and_start():
    generator = np.random.default_rng(0)
    return generator.normal(size=(5, 80, 64)), generator.normal(size=(80, 64))


def trained_by(name, start, gradients, **settings):
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    arguments = {"weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-6, "options": {}} | settings
    optimizer = make_optimizer(name, [ParameterGroup((parameter,))], learning_rate=0.01, **arguments)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    return parameter.detach().double().numpy()


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("adamw_8bit", 2e-2)])
def test_adamw_in_float64(name, tolerance):
    gradients, weight = gradients_and_start()
    mine = trained_by(name, weight, gradients)
    start, mean, square = weight, 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        weight = weight * (1 - 0.01 * 0.1)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.95**step)) + 1e-6)
        weight = weight - 0.01 * update
    np.testing.assert_allclose(mine, weight, rtol=0, atol=tolerance)
    assert np.abs(mine - weight).mean() < 0.1 * np.abs(mine - start).mean()


def test_lion_in_float64():
    """arXiv:2302.06675, algorithm 2."""
    gradients, weight = gradients_and_start()
    mine = trained_by("lion", weight, gradients)
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        update = np.sign(0.9 * momentum + 0.1 * gradient)
        weight = weight - 0.01 * (update + 0.1 * weight)
        momentum = 0.95 * momentum + 0.05 * gradient
    # A sum within rounding of 0 may take the other sign, which is 2 x 0.01 apart: none of these 25600 is.
    np.testing.assert_allclose(mine, weight, rtol=0, atol=1e-5)


def test_schedule_free_in_float64():
    """arXiv:2405.15682, equations 3 to 5, with AdamW's preconditioner and a constant rate: x is the mean of the z."""
    gradients, start = gradients_and_start()
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = make_optimizer(
        "adamw_schedule_free",
        [ParameterGroup((parameter,))],
        learning_rate=0.01,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-6,
        options={},
    )
    x = z = start
    square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(parameter.detach().double().numpy(), y, rtol=0, atol=1e-5)
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        square = 0.95 * square + 0.05 * gradient**2
        z = z - 0.01 * (gradient / (np.sqrt(square / (1 - 0.95**step)) + 1e-6) + 0.1 * y)
        x = x + (z - x) / step
    with inference_weights(optimizer):
        np.testing.assert_allclose(parameter.detach().double().numpy(), x, rtol=0, atol=1e-5)


# ---- what is evaluated -----------------------------------------------------------------------------------------------

SCHEDULE_FREE = [name for name in ALL if "schedule" in name]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_inside_are_the_averaged_weights_and_outside_nothing_has_happened(name):
    visited, plain = Run(name).steps(1, 2, 3), Run(name).steps(1, 2, 3)
    before, state = visited.weights(), optimizer_state(plain.optimizer)
    with inference_weights(visited.optimizer):
        assert not same(visited.weights(), before)
        inside = visited.weights()
        with inference_weights(visited.optimizer):  # the exporter inside the evaluation: nothing more happens
            assert same(visited.weights(), inside)
        assert same(visited.weights(), inside)
    assert same(visited.weights(), before)
    assert str(optimizer_state(visited.optimizer)) == str(state)
    assert same(visited.steps(4, 5).weights(), plain.steps(4, 5).weights())


def test_their_own_way_back_rounds():
    """Why copies are kept."""
    run = Run("adamw_schedule_free").steps(1, 2, 3)
    before = run.weights()
    run.optimizer.eval()
    run.optimizer.train()
    assert not same(run.weights(), before)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_weights_come_back_after_an_error(name):
    run = Run(name).steps(1, 2, 3)
    before = run.weights()
    with pytest.raises(KeyboardInterrupt), inference_weights(run.optimizer):
        raise KeyboardInterrupt
    assert same(run.weights(), before)
    run.steps(4)


@pytest.mark.parametrize("name", [name for name in ALL if name not in SCHEDULE_FREE])
def test_for_all_others_there_is_nothing_to_do(name):
    run = Run(name).steps(1, 2)
    before, versions = run.weights(), [master._version for master in run.named.values()]
    with inference_weights(run.optimizer):
        assert same(run.weights(), before)
    assert [master._version for master in run.named.values()] == versions


def test_before_the_first_step_both_are_the_same():
    run = Run("adamw_schedule_free")
    before = run.weights()
    with inference_weights(run.optimizer):
        assert same(run.weights(), before)
    assert same(run.weights(), before)


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_optimizer_is_refused():
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(Run("lion").optimizer, optimizer_state(Run("adamw").steps(1).optimizer))
    assert str(caught.value) == (
        "the checkpoint holds the state of torch.AdamW, the config asks for optimi.Lion. Set "
        "optimizer.name back, or start another run with run.name=..."
    )


def test_a_checkpoint_with_other_groups_is_refused():
    saved = optimizer_state(Run("adamw").steps(1).optimizer)
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(Run("adamw", scales={"a": 1.0, "b": 2.0}).optimizer, saved)
    assert str(caught.value) == (
        "the checkpoint's optimizer has groups of [2] parameters, the config makes groups of [1, 1]. Set "
        "adapter.blocks, optimizer.lora_plus_ratio and the text encoders back, or start another run with run.name=..."
    )


def test_a_checkpoint_from_before_there_were_several_is_read():
    before, whole = Run("adamw").steps(1, 2, 3), Run("adamw").steps(1, 2, 3, 4)
    after = Run("adamw")
    after.masters.load_state_dict(before.masters.state_dict())
    load_optimizer_state(after.optimizer, before.optimizer.state_dict())
    assert same(after.steps(4).weights(), whole.weights())


class Hoarder(torch.optim.SGD):
    """A class of somebody else, with a state that torch.load with weights_only would refuse."""

    def step(self, closure=None):
        self.param_groups[0]["seen"] = np.float64(1.0)
        return super().step(closure)


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_saved():
    run = Run(f"{__name__}.Hoarder").steps(1)
    with pytest.raises(CheckpointError) as caught:
        optimizer_state(run.optimizer)
    assert str(caught.value) == (
        f"{__name__}.Hoarder keeps a float64 in its state, which a checkpoint cannot hold. Set optimizer.name to "
        f"another class, such as {', '.join(OPTIMIZERS)}."
    )


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_can_be_made_passes_the_check(name):
    check_optimizer(name, {})
    check_optimizer(name, OPTIONS.get(name, {}))


def test_the_names_are_checked_without_importing_anything_heavy():
    code = (
        "import sys\n"
        "from sdxl_ray.train.optimizers import OPTIMIZERS, check_optimizer\n"
        "for name in OPTIMIZERS: check_optimizer(name, {})\n"
        "print(*sorted(name for name in sys.modules if '.' not in name))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "optimi", "prodigyopt", "schedulefree", "bitsandbytes"}.isdisjoint(loaded)


REFUSED = [
    (
        "adamv",
        {},
        'optimizer.name = "adamv": expected one of adamw, adamw_8bit, lion, stable_adamw, prodigy, adafactor, '
        "adamw_schedule_free, muon, or the dotted path of a class such as torch.optim.RAdam. "
        'Did you mean "adamw"?',
    ),
    (
        "quantum",
        {},
        'optimizer.name = "quantum": expected one of adamw, adamw_8bit, lion, stable_adamw, prodigy, adafactor, '
        "adamw_schedule_free, muon, or the dotted path of a class such as torch.optim.RAdam.",
    ),
    (
        "no_such_package.Sgd",
        {},
        "optimizer.name = \"no_such_package.Sgd\" cannot be imported: No module named 'no_such_package'. Install the "
        "package that has it, or check the path.",
    ),
    (
        "torch.optim.NoSuch",
        {},
        'optimizer.name = "torch.optim.NoSuch": torch.optim has no NoSuch. Its optimizers: ASGD, Adadelta, Adafactor, '
        "Adagrad, Adam, AdamW, Adamax, LBFGS, Muon, NAdam, RAdam, RMSprop, Rprop, SGD, SparseAdam.",
    ),
    (
        "math.NoSuch",
        {},
        'optimizer.name = "math.NoSuch": math has no NoSuch. Its optimizers: none.',
    ),
    (
        "torch.nn.Linear",
        {},
        'optimizer.name = "torch.nn.Linear" is the class torch.nn.modules.linear.Linear; expected a class derived from '
        "torch.optim.Optimizer.",
    ),
    (
        "math.sqrt",
        {},
        'optimizer.name = "math.sqrt" is a builtin_function_or_method; expected a class derived from '
        "torch.optim.Optimizer.",
    ),
    (
        "torch.optim.Optimizer",
        {},
        'optimizer.name = "torch.optim.Optimizer" takes no lr (its arguments: params, defaults), so lr_schedule could '
        f"not set its learning rate. Take another, such as {', '.join(OPTIMIZERS)}.",
    ),
    (
        "torch.optim.LBFGS",
        {},
        'optimizer.name = "torch.optim.LBFGS" evaluates the loss several times in a step (its step needs a closure); '
        f"expected one that steps by one gradient, such as {', '.join(OPTIMIZERS)}.",
    ),
    (
        "muon",
        {"momentun": 0.9, "beta1": 0.9},
        'optimizer.options: momentun, beta1: not an argument of optimizer.name = "muon" (torch.optim.Muon), '
        "which has adjust_lr_fn, eps, momentum, nesterov, ns_coefficients, ns_steps, weight_decay.",
    ),
    (
        "adamw",
        {"lr": 1e-3},
        "optimizer.options.lr: the learning rate is optimizer.learning_rate. Set that instead.",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_what_cannot_be_made_is_refused_by_both(name, options, message):
    with pytest.raises(ConfigError) as caught:
        check_optimizer(name, options)
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        Run(name, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("lion", "optimi", "optimizers"),
        ("stable_adamw", "optimi", "optimizers"),
        ("prodigy", "prodigyopt", "optimizers"),
        ("adamw_schedule_free", "schedulefree", "optimizers"),
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, name, library, extra):
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    cure = f'Run `pip install "sdxl-ray[{extra}]"`.'
    with pytest.raises(ConfigError) as caught:
        check_optimizer(name, {})
    assert str(caught.value) == f'optimizer.name = "{name}" cannot be imported: {library} is not installed. {cure}'
    for refused in (lambda: check_optimizer(name, {"amsgrad": True}), lambda: Run(name)):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value).startswith(f'optimizer.name = "{name}" cannot be imported: ')
        assert str(caught.value).endswith(f". {cure}")


def test_muon_refuses_what_is_no_matrix():
    parameters = tuple(nn.Parameter(torch.zeros(shape)) for shape in [(4, 2), (2, 4), (4,), (4, 2, 3, 3)])
    with pytest.raises(ConfigError) as caught:
        make_optimizer(
            "muon",
            [ParameterGroup(parameters[:3]), ParameterGroup(parameters[3:], 2.0)],
            learning_rate=1e-3,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            epsilon=1e-8,
            options={},
        )
    assert str(caught.value) == (
        'optimizer.name = "muon" trains matrices only, and 2 of 4 parameters have other dimensions. Choose '
        'adapter.kind = "lora" with adapter.targets = "attention" or "all-linear", whose parameters are all '
        'matrices, or set optimizer.name = "adamw".'
    )


def test_prodigy_refuses_several_rates():
    with pytest.raises(ConfigError) as caught:
        Run("prodigy", scales={"a": 1.0, "b": 16.0})
    assert str(caught.value) == (
        'optimizer.name = "prodigy" estimates one learning rate for all parameters, and the config asks for several '
        "(1, 16 times the general one). Set optimizer.lora_plus_ratio = 1, the learning_rate_scale of adapter.blocks "
        "to 1 or 0 and the text encoders' learning_rate to 0, or take another optimizer."
    )


def test_schedule_free_refuses_a_beta_of_zero():
    with pytest.raises(ConfigError) as caught:
        Run("adamw_schedule_free", betas=(0.0, 0.99))
    assert str(caught.value) == (
        'optimizer.name = "adamw_schedule_free" interpolates with optimizer.beta1, which is 0. Set it to 0.9.'
    )


def test_where_nothing_learns_is_refused():
    with pytest.raises(ConfigError) as caught:
        Run("adamw", scales={"a": 0.0, "b": 0.0})
    assert str(caught.value) == (
        "nothing learns: learning_rate_scale is 0 for every trained parameter. Set one above 0 in adapter.blocks."
    )


def test_a_value_that_the_class_refuses_is_a_config_error():
    with pytest.raises(ConfigError) as caught:
        Run("prodigy", d0=-1.0)
    assert str(caught.value) == (
        'optimizer.name = "prodigy" refuses its settings: Invalid d0 value: -1.0. See optimizer.options and the other '
        "settings of [optimizer]."
    )


# ---- what is passed on -----------------------------------------------------------------------------------------------


def test_options_win_over_the_other_settings():
    group = Run("adamw", betas=(0.9, 0.99), weight_decay=0.1, amsgrad=True).optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"], group["amsgrad"]) == ((0.9, 0.99), 0.1, 1e-8, True)
    changes = {"options": {"betas": [0.5, 0.6], "weight_decay": 0.2, "eps": 1e-3}}  # TOML has lists, no pairs
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer(
        "adamw",
        [ParameterGroup((parameter,))],
        learning_rate=1.0,
        weight_decay=0.1,
        betas=(0.9, 0.9),
        epsilon=1e-8,
        **changes,
    )
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.2, 1e-3)


def test_settings_go_where_the_class_has_them():
    settings = {"weight_decay": 0.25, "betas": (0.5, 0.75), "epsilon": 1e-3}
    groups = {name: Run(name, **settings).optimizer.param_groups[0] for name in ALL}
    assert {group["weight_decay"] for group in groups.values()} == {0.25}
    for name in ("adamw", "adamw_8bit", "prodigy", "adamw_schedule_free", "torch.optim.RAdam"):
        assert (groups[name]["betas"], groups[name]["eps"]) == ((0.5, 0.75), 1e-3), name
    for name in ("lion", "stable_adamw"):
        assert (groups[name]["beta1"], groups[name]["beta2"], groups[name]["decouple_lr"]) == (0.5, 0.75, False)
    assert groups["stable_adamw"]["eps"] == groups["muon"]["eps"] == 1e-3
    assert groups["adafactor"]["eps"] == (None, 1e-3)  # its own pair, whatever epsilon is
    assert groups["torch.optim.RAdam"]["decoupled_weight_decay"] is True


def test_prodigy_is_quiet(capfd):
    Run("prodigy").steps(1)
    assert capfd.readouterr().out == ""


def test_a_class_that_takes_any_keyword_is_given_any(monkeypatch):
    class Lenient(torch.optim.SGD):
        def __init__(self, params, lr, **others):
            super().__init__(params, lr=lr, momentum=others["momentum"])

    module = types.ModuleType("lenient")
    module.Lenient = Lenient
    monkeypatch.setitem(sys.modules, "lenient", module)
    check_optimizer("lenient.Lenient", {"momentum": 0.5})
    assert Run("lenient.Lenient", momentum=0.5).optimizer.param_groups[0]["momentum"] == 0.5
