import ast
import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

import sdxl_ray

PUBLIC = [
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


def test_the_public_names_are_these():
    """A change here is a change for users: note it in CHANGELOG.md."""
    assert sdxl_ray.__all__ == PUBLIC
    assert sorted(sdxl_ray._HOMES) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_can_be_imported_and_comes_from_its_home(name):
    """Before `sweep`, `SweepResult` has imported the package `sdxl_ray.sweeps`: it must not hide the function."""
    namespace = {}
    exec(f"from sdxl_ray import {name}", namespace)
    assert namespace[name] is getattr(importlib.import_module(sdxl_ray._HOMES[name]), name)
    assert namespace[name].__doc__


def test_type_checkers_see_the_same_homes():
    """The lazy table and the imports under TYPE_CHECKING say the same."""
    tree = ast.parse(Path(sdxl_ray.__file__).read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sdxl_ray.")
        for alias in node.names
    }
    assert homes == sdxl_ray._HOMES


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'sdxl_ray' has no attribute 'fitt'"):
        sdxl_ray.fitt  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert sdxl_ray.__version__ == version("sdxl-ray")
