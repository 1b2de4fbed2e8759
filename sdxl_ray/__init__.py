"""From a folder of images to an SDXL LoRA, on Ray: cache, train, sweep.

>>> from sdxl_ray import fit, load_config
>>> result = fit(load_config("my.toml"))
>>> result.exports[0].path
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

# Where it is installed, peft imports it in every process, and it warns that it misses a package for 4-bit inference.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from sdxl_ray.cache.pipeline import CacheResult, build_cache
    from sdxl_ray.config.load import config_from_dict, load_config
    from sdxl_ray.config.schema import Config
    from sdxl_ray.connection import connect
    from sdxl_ray.errors import SdxlRayError
    from sdxl_ray.generate import generate_images
    from sdxl_ray.sweeps.tuner import SweepResult, sweep
    from sdxl_ray.train.launch import FitResult, export_lora, fit

__version__ = "0.1.0"

_HOMES = {
    "Config": "sdxl_ray.config.schema",
    "load_config": "sdxl_ray.config.load",
    "config_from_dict": "sdxl_ray.config.load",
    "connect": "sdxl_ray.connection",
    "SdxlRayError": "sdxl_ray.errors",
    "build_cache": "sdxl_ray.cache.pipeline",
    "CacheResult": "sdxl_ray.cache.pipeline",
    "fit": "sdxl_ray.train.launch",
    "FitResult": "sdxl_ray.train.launch",
    "export_lora": "sdxl_ray.train.launch",
    "generate_images": "sdxl_ray.generate",
    "sweep": "sdxl_ray.sweeps.tuner",
    "SweepResult": "sdxl_ray.sweeps.tuner",
}

# A literal list, so that type checkers see the same names as `_HOMES`; a test holds them equal.
__all__ = [
    "CacheResult",
    "Config",
    "FitResult",
    "SdxlRayError",
    "SweepResult",
    "build_cache",
    "config_from_dict",
    "connect",
    "export_lora",
    "fit",
    "generate_images",
    "load_config",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `sdxl-ray --help` must not wait for torch and Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sdxl_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
