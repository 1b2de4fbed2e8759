"""Who may import whom, and where the heavy libraries may be imported: read from the source.

All imports count, also those inside functions and under TYPE_CHECKING. A new module needs a row here.
"""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sdxl_ray"

# From top to bottom. A module sees only rows below its own; row-mates never see each other.
ROWS = [
    {"__main__"},
    {"cli"},
    {"check", "doctor", "demo"},
    {"sweeps"},
    {"train"},
    {"cache", "export", "generate", "report"},
    {"connection"},
    {"config", "diffusion", "sdxl", "tracking"},
    {"records", "run_folder", "storage"},
    {"errors"},
]

# Library -> the modules that may import it.
HOMES = {
    "ray": [
        "cache.pipeline",
        "cache.jobs.lost_shards",
        "cache.jobs.ray_jobs",
        "cache.jobs.ray_rows",
        "cache.jobs.room",
        "cache.jobs.waves",
        "train.launch",
        "train.watching",
        "train.worker",
        "sweeps.*",
        "doctor.cluster",
        "connection",
    ],
    "peft": ["sdxl.adapter_layers"],
    "optimum": ["sdxl.quantize"],
    "wandb": ["tracking.trackers"],
    "huggingface_hub": [
        "storage.clouds",
        "sdxl.components",
        "sdxl.hub",
        "sdxl.fingerprint",
        "export.hub",
        "doctor.inputs",
    ],
}


def modules():
    """Dotted name inside the package -> its source file; `sdxl_ray/__init__.py`, the table of contents, is exempt."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True) if name != "__init__"}


MODULES = modules()


def imported(source, module):
    """Full dotted names that a module's source imports, wherever in it: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def row_of(part):
    (row,) = [number for number, row in enumerate(ROWS) if part in row]
    return row


def violations(source, module):
    """What a module of this name may not import."""
    found = []
    part = module.partition(".")[0]
    for name in imported(source, module):
        library, _, inside = name.partition(".")
        if library in HOMES and not any(fnmatch(module, home) for home in HOMES[library]):
            found.append(f"{module} imports {library}")
        other = inside.partition(".")[0]
        # `import sdxl_ray` and `from sdxl_ray import __version__` are free
        if library == "sdxl_ray" and other not in ("", "__version__", part) and row_of(part) >= row_of(other):
            found.append(f"{module} imports {name}")
    return found


def test_every_module_has_a_row():
    assert {module.partition(".")[0] for module in MODULES} - set().union(*ROWS) == set()


def test_there_is_no_row_without_a_module():
    for row in ROWS:
        assert row & {module.partition(".")[0] for module in MODULES}, row


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below(module):
    assert violations(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cache.scan", "import sdxl_ray.train.loop"),
        ("cache.scan", "from sdxl_ray import train"),
        ("cache.scan", "def f():\n    from sdxl_ray.export.formats import x"),
        ("config.load", "if TYPE_CHECKING:\n    from sdxl_ray.sdxl.text import x"),
        ("errors", "from sdxl_ray.records import Batch"),
        ("train.loop", "import ray.train"),
        ("train.loop", "def f():\n    from ray import data"),
        ("train.loop", "import peft"),
        ("train.loop", "from huggingface_hub import snapshot_download"),
        ("train.loop", "import wandb as w"),
    ],
)
def test_the_test_finds_what_is_forbidden(module, source):
    assert len(violations(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.loop", "from sdxl_ray.train.state import x\nimport sdxl_ray.cache.shards\nimport raycluster, torch"),
        ("sweeps.tuner", "from ray import tune"),
        ("cache.scan", "import sdxl_ray\nfrom sdxl_ray import __version__\nfrom sdxl_ray.config.schema import Config"),
    ],
)
def test_the_test_lets_pass_what_is_allowed(module, source):
    assert violations(source, module) == []


def test_the_command_line_starts_without_the_heavy_libraries():
    """`sdxl-ray --help` must answer at once."""
    code = "import sys, sdxl_ray.cli; print(*sorted(name for name in sys.modules if '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    heavy = {"torch", "ray", "diffusers", "transformers", "peft", "safetensors", "numpy", "pyarrow", "PIL"}
    assert heavy.isdisjoint(loaded)
