"""Training the U-Net itself, without an adapter beside it."""

from __future__ import annotations

from torch import nn

from sdxl_ray.errors import ConfigError


def train_everything(unet: nn.Module) -> None:
    """Every weight of the U-Net is trained; `adapter_parameters` then returns them all, by their own names.

    The weights themselves stay in the dtype they were loaded in: the fp32 masters are the optimizer's.

    Raises:
        ConfigError: there are quantised weights, or an adapter.
    """
    for name, parameter in unet.named_parameters():
        if ".base_layer." in name:
            raise ConfigError('adapter.kind = "full" trains the U-Net itself, and this one has an adapter already.')
        if not parameter.is_floating_point() or type(parameter).__module__.startswith("optimum.quanto"):
            raise ConfigError(
                f'adapter.kind = "full" cannot train quantised weights, and {name} is one. '
                'Set model.quantize = "none", or train an adapter.'
            )
    unet.requires_grad_(True)


def trains_everything(module: nn.Module) -> bool:
    """Whether `train_everything` was called on it."""
    return all(parameter.requires_grad for parameter in module.parameters())
