"""Which parameters learn how fast: one group of the optimizer for each factor on the learning rate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sdxl_ray.errors import ConfigError
from sdxl_ray.train.optimizers import ParameterGroup
from sdxl_ray.train.text import PARTS

_WEIGHT = re.compile(r"\.(lora_|hada_|lokr_).*$|\.[^.]*$")  # what comes behind a module's name


@dataclass(frozen=True)
class LearningRates:
    """Factors on the learning rate; those of a parameter are multiplied.

    blocks           (regular expression, factor): the first that is found in the name of a U-Net module counts
    text             by encoder
    lora_plus_ratio  for lora_B; LoRA+, arXiv:2402.12354, section 4
    """

    blocks: Sequence[tuple[str, float]] = ()
    text: Mapping[str, float] | None = None
    lora_plus_ratio: float = 1.0

    def factor(self, name: str) -> float:
        """Of a parameter, by its name in the checkpoint."""
        part = name.partition(".")[0]
        if part in PARTS:
            factor = (self.text or {}).get(part, 1.0)
        else:
            module = _WEIGHT.sub("", name)
            factor = next((scale for pattern, scale in self.blocks if re.search(pattern, module)), 1.0)
        return factor * (self.lora_plus_ratio if ".lora_B." in name else 1.0)


def parameter_groups(masters: Mapping[str, nn.Parameter], rates: LearningRates) -> list[ParameterGroup]:
    """Groups in the order in which their factors first come up; parameters in their own order.

    Raises:
        ConfigError: a pattern is found in no module's name.
    """
    modules = {_WEIGHT.sub("", name) for name in masters if name.partition(".")[0] not in PARTS}
    for pattern, _ in rates.blocks:
        if not any(re.search(pattern, module) for module in modules):
            raise ConfigError(
                f"adapter.blocks: {pattern!r} is found in the name of none of the {len(modules)} modules that are "
                f"trained. Such a name is {min(modules)}."
            )
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, master in masters.items():
        by_factor.setdefault(rates.factor(name), []).append(master)
    return [ParameterGroup(tuple(parameters), factor) for factor, parameters in by_factor.items()]
