"""The optimizer by name: made from what its class takes, stepped at a rate from outside, saved and resumed to the bit.

The heavy libraries are imported in the functions, so that `check_optimizer` answers at once for the names below.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import importlib.util
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at the same rate."""

    parameters: tuple[nn.Parameter, ...]
    learning_rate_scale: float = 1.0  # times the learning rate; 0: they stay as they are


@dataclass(frozen=True)
class _Known:
    """Where an optimizer is, and what of it differs from its own defaults."""

    path: str
    extra: str = ""  # of this package: what `pip install` has to name
    options: Mapping[str, Any] = field(default_factory=dict)


_KNOWN = {
    "adamw": _Known("torch.optim.AdamW"),  # arXiv:1711.05101
    "adamw_8bit": _Known("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),  # arXiv:2110.02861
    # decouple_lr = False: they shrink a weight by learning rate * weight_decay in a step, as AdamW does, so the setting
    # means the same for all. True would leave the peak learning rate out: 0.01 would then be a hundredth in every step.
    "lion": _Known("optimi.Lion", "optimizers", {"decouple_lr": False}),  # arXiv:2302.06675
    "stable_adamw": _Known("optimi.StableAdamW", "optimizers", {"decouple_lr": False}),  # arXiv:2304.13013
    # Its estimate would otherwise be divided by the small rates of the warm-up, which runs have by default.
    "prodigy": _Known("prodigyopt.Prodigy", "optimizers", {"safeguard_warmup": True}),  # arXiv:2306.06101
    "adafactor": _Known("torch.optim.Adafactor"),  # arXiv:1804.04235
    # Its own warm-up would come on top of the schedule's.
    "adamw_schedule_free": _Known(  # arXiv:2405.15682
        "schedulefree.AdamWScheduleFree", "optimizers", {"warmup_steps": 0}
    ),
    "muon": _Known("torch.optim.Muon"),  # arXiv:2502.16982
}
OPTIMIZERS = tuple(_KNOWN)

# What optimi keeps in its groups although it is made from its arguments: the config's, not the checkpoint's.
_FROM_SETTINGS = {"params", "learning_rate_scale", "lr", "beta1", "beta2", "beta3"}


def make_optimizer(
    name: str,
    groups: Sequence[ParameterGroup],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer for fp32 masters, in training mode. AdamW is fused into one kernel on CUDA.

    A class gets `weight_decay`, `betas` and `eps` where its signature has them in this form: Adafactor's eps is a pair
    of other meaning, so it keeps its own. Classes that can do either take decoupled weight decay.

    Args:
        name: one of OPTIMIZERS, or the dotted path of a torch.optim.Optimizer class.
        options: more keyword arguments of the class; they win over the other settings.

    Raises:
        ConfigError: no such optimizer, a library that is missing, an option it does not have or refuses, parameters
            or groups that it cannot train.
    """
    optimizer_class: Any = _load(name)
    known = _arguments(optimizer_class, name)
    _check_options(name, options, optimizer_class)
    groups = [group for group in groups if group.learning_rate_scale > 0 and group.parameters]
    if not groups:
        raise ConfigError(
            "nothing learns: learning_rate_scale is 0 for every trained parameter. Set one above 0 in adapter.blocks."
        )
    parameters = [parameter for group in groups for parameter in group.parameters]

    settings: dict[str, Any] = {}
    if "weight_decay" in known:
        settings["weight_decay"] = weight_decay
        if "decoupled_weight_decay" in known:
            settings["decoupled_weight_decay"] = True
    if "betas" in known and _is_pair(known["betas"].default):
        settings["betas"] = betas
    if "eps" in known and isinstance(known["eps"].default, int | float):
        settings["eps"] = epsilon
    if name == "adamw":
        settings["fused"] = True if parameters[0].device.type == "cuda" else None
    if name in ("lion", "stable_adamw") and "foreach" not in options:
        # Decided here, because optimi decides in its first step, and a resumed one has that step behind it.
        settings["triton"] = parameters[0].device.type == "cuda" and importlib.util.find_spec("triton") is not None
    settings |= _KNOWN[name].options if name in _KNOWN else {}
    settings |= {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    _check_fit(name, groups, parameters, settings)

    described = [
        {
            "params": list(group.parameters),
            "lr": learning_rate * group.learning_rate_scale,
            "learning_rate_scale": group.learning_rate_scale,
        }
        for group in groups
    ]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # prodigy prints how it decays
            optimizer: torch.optim.Optimizer = optimizer_class(described, lr=learning_rate, **settings)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f'optimizer.name = "{name}" refuses its settings: {error}. See optimizer.options and the other settings of '
            "[optimizer]."
        ) from error
    _set_mode(optimizer, training=True)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step: `rate` times each group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_scale"]


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """What `make_optimizer` would refuse whatever the parameters are. A built-in name without options imports nothing.

    Raises:
        ConfigError: no such optimizer, a library that is missing, an option it does not have.
    """
    if name in _KNOWN and not options:
        library = _KNOWN[name].path.partition(".")[0]
        if importlib.util.find_spec(library) is None:
            raise _missing(name, f"{library} is not installed")
        return
    _check_options(name, options, _load(name))


# ---- resuming --------------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a resumed run needs, for torch.save and torch.load with weights_only. Not inside `inference_weights`.

    It is the moments, and of each group what the optimizer counts and estimates: prodigy's d, schedule-free's weights.

    The tensors are the optimizer's own, not copies.

    Raises:
        CheckpointError: the class keeps something that cannot be read back.
    """
    whole = optimizer.state_dict()
    state = {
        "class": _identity(optimizer),
        "state": whole["state"],
        "param_groups": [{"params": group["params"]} | _progress(optimizer, group) for group in whole["param_groups"]],
    }
    strange = _strange(state)
    if strange:
        raise CheckpointError(
            f"{_path(type(optimizer))} keeps a {strange} in its state, which a checkpoint cannot hold. Set "
            f"optimizer.name to another class, such as {', '.join(OPTIMIZERS)}."
        )
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from `optimizer_state`, to the bit.

    What the config says (learning rate, weight decay, betas, eps, options) and what the device says (fused, foreach)
    stay as they are in `optimizer`.

    Raises:
        CheckpointError: the state is another optimizer's or other parameters'.
    """
    found, expected = state.get("class"), _identity(optimizer)
    if found not in (None, expected):  # None: from before there were several
        raise CheckpointError(
            f"the checkpoint holds the state of {found}, the config asks for {expected}. Set optimizer.name back, or "
            "start another run with run.name=..."
        )
    saved, fresh = state["param_groups"], optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, fresh)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the checkpoint's optimizer has groups of {sizes[0]} parameters, the config makes groups of {sizes[1]}. "
            "Set adapter.blocks, optimizer.lora_plus_ratio and the text encoders back, or start another run with "
            "run.name=..."
        )
    groups = [new | _progress(optimizer, old) for new, old in zip(fresh, saved, strict=True)]
    # A copy, because torch takes over tensors that already have the right type and place.
    optimizer.load_state_dict(copy.deepcopy({"state": state["state"], "param_groups": groups}))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "eps_sq" in optimizer.state.get(parameter, {}):  # optimi's StableAdamW keeps epsilon with the moments
                optimizer.state[parameter]["eps_sq"].fill_(group["eps"] ** 2)


def _progress(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer itself writes into a group while it runs: all that is no argument of its class."""
    arguments = inspect.signature(type(optimizer)).parameters
    return {key: value for key, value in group.items() if key not in arguments and key not in _FROM_SETTINGS}


def _strange(value: Any) -> str:
    """The type of the first thing in there that torch.load with weights_only would refuse; empty if there is none."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return "" if type(value) in (type(None), bool, int, float, str) else type(value).__name__
    if isinstance(value, torch.Tensor):
        return ""
    if isinstance(value, Mapping):
        return next(filter(None, map(_strange, [*value.keys(), *value.values()])), "")
    if type(value) in (list, tuple):
        return next(filter(None, map(_strange, value)), "")
    return type(value).__name__


# ---- schedule-free ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inference_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters hold what is to be evaluated and exported; afterwards what they held before, to the bit.

    Schedule-free optimizers (those with `train` and `eval`) compute gradients at y and are evaluated at the average x.
    Their own way back from x to y rounds, so y is kept: this takes the memory of the parameters once more. For all
    others it does nothing. Rounded copies of the parameters have to be told (`MasterWeights.publish`), inside and again
    afterwards.
    """
    import torch

    training = [group.get("train_mode", False) for group in optimizer.param_groups]
    if not _has_modes(optimizer) or not any(training):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    _set_mode(optimizer, training=False)
    try:
        yield
    finally:
        _set_mode(optimizer, training=True)
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def _has_modes(optimizer: torch.optim.Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _set_mode(optimizer: Any, *, training: bool) -> None:
    if _has_modes(optimizer):
        optimizer.train() if training else optimizer.eval()


# ---- finding the class, and what it takes ----------------------------------------------------------------------------


def _load(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name or a dotted path."""
    import torch

    path = _KNOWN[name].path if name in _KNOWN else name
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        raise ConfigError(
            f'optimizer.name = "{name}": expected one of {", ".join(OPTIMIZERS)}, or the dotted path of a class such '
            "as torch.optim.RAdam." + (f' Did you mean "{close[0]}"?' if close else "")
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise _missing(name, str(error)) from error
    found = getattr(module, class_name, None)
    if found is None:
        offered = [
            key for key, value in vars(module).items() if _is_optimizer(value) and value is not torch.optim.Optimizer
        ]
        raise ConfigError(
            f'optimizer.name = "{name}": {module_name} has no {class_name}. Its optimizers: '
            f"{', '.join(sorted(offered)) or 'none'}."
        )
    if not _is_optimizer(found):
        raise ConfigError(
            f'optimizer.name = "{name}" is {_describe(found)}; expected a class derived from torch.optim.Optimizer.'
        )
    _arguments(found, name)
    return found


def _is_pair(default: Any) -> bool:
    return isinstance(default, tuple) and len(default) == 2


def _is_optimizer(found: Any) -> bool:
    import torch

    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


def _describe(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {_path(found)}"
    return f"a {type(found).__name__}"


def _path(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _identity(optimizer: torch.optim.Optimizer) -> str:
    """Library and class; where in the library it lies may change from one version to the next."""
    found = type(optimizer)
    return f"{found.__module__.partition('.')[0]}.{found.__qualname__}"


def _missing(name: str, reason: str) -> ConfigError:
    extra = _KNOWN[name].extra if name in _KNOWN else ""
    cure = f'Run `pip install "sdxl-ray[{extra}]"`.' if extra else "Install the package that has it, or check the path."
    return ConfigError(f'optimizer.name = "{name}" cannot be imported: {reason}. {cure}')


def _arguments(optimizer_class: type[torch.optim.Optimizer], name: str) -> dict[str, inspect.Parameter]:
    """The keyword arguments of the class by name, without the parameters and the learning rate."""
    arguments = dict(inspect.signature(optimizer_class).parameters)
    if arguments.pop("lr", None) is None:
        raise ConfigError(
            f'optimizer.name = "{name}" takes no lr (its arguments: {", ".join(arguments)}), so lr_schedule could not '
            f"set its learning rate. Take another, such as {', '.join(OPTIMIZERS)}."
        )
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f'optimizer.name = "{name}" evaluates the loss several times in a step (its step needs a closure); '
            f"expected one that steps by one gradient, such as {', '.join(OPTIMIZERS)}."
        )
    arguments.pop(next(iter(arguments)))  # the parameters, whatever their name
    return arguments


def _check_options(name: str, options: Mapping[str, Any], optimizer_class: type[torch.optim.Optimizer]) -> None:
    known = _arguments(optimizer_class, name)
    if "lr" in options:
        raise ConfigError("optimizer.options.lr: the learning rate is optimizer.learning_rate. Set that instead.")
    if any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in known.values()):
        return
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(
            f'optimizer.options: {", ".join(unknown)}: not an argument of optimizer.name = "{name}" '
            f"({_path(optimizer_class)}), which has {', '.join(sorted(known))}."
        )


def _check_fit(
    name: str, groups: Sequence[ParameterGroup], parameters: Sequence[nn.Parameter], settings: Mapping[str, Any]
) -> None:
    """What a class says late, or in words that name no setting."""
    if _KNOWN.get(name, _Known(name)).path == "torch.optim.Muon":
        others = sum(parameter.ndim != 2 for parameter in parameters)
        if others:
            raise ConfigError(
                f'optimizer.name = "{name}" trains matrices only, and {others} of {len(parameters)} parameters have '
                'other dimensions. Choose adapter.kind = "lora" with adapter.targets = "attention" or "all-linear", '
                'whose parameters are all matrices, or set optimizer.name = "adamw".'
            )
    if name == "prodigy" and len({group.learning_rate_scale for group in groups}) > 1:
        scales = ", ".join(f"{scale:g}" for scale in sorted({group.learning_rate_scale for group in groups}))
        raise ConfigError(
            f'optimizer.name = "prodigy" estimates one learning rate for all parameters, and the config asks for '
            f"several ({scales} times the general one). Set optimizer.lora_plus_ratio = 1, the learning_rate_scale of "
            "adapter.blocks to 1 or 0 and the text encoders' learning_rate to 0, or take another optimizer."
        )
    if name == "adamw_schedule_free" and settings["betas"][0] == 0:
        raise ConfigError(
            'optimizer.name = "adamw_schedule_free" interpolates with optimizer.beta1, which is 0. Set it to 0.9.'
        )
