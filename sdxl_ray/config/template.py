"""Text generated from the schema: the file that `sdxl-ray init` writes, and docs/configuration.md."""

from __future__ import annotations

import re
import textwrap
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdxl_ray.config.keys import section_of
from sdxl_ray.config.schema import Config

# What differs from the defaults, by the memory of the GPU. The estimates behind them: docs/numerics.md.
PRESETS: dict[str, dict[str, Any]] = {
    "8gb": {"train.micro_batch_size": 1, "train.accumulation": 4, "train.gradient_checkpointing": "full"},
    "16gb": {"train.micro_batch_size": 4, "train.gradient_checkpointing": "transformer"},
    "24gb": {"train.micro_batch_size": 8, "train.gradient_checkpointing": "transformer"},
    "80gb": {"train.micro_batch_size": 12},
    "cpu": {
        "model.dtype": "bf16",
        "dataset.resolution": 512,
        "train.micro_batch_size": 1,
        "train.accumulation": 4,
        "train.gradient_checkpointing": "transformer",
        "train.duration": "100 steps",
        "train.log_every": 1,
        "eval.every": "50 steps",
        "checkpoint.every": "50 steps",
        "cluster.accelerator": "cpu",
        "validation.height": 512,
        "validation.width": 512,
    },
}
PRESET_NOTES = {
    "8gb": "a GPU with 8 GB",
    "16gb": "a GPU with 16 GB",
    "24gb": "a GPU with 24 GB",
    "80gb": "a GPU with 80 GB",
    "cpu": "no GPU: slow, for trying things out",
}

DATASETS_IN_SHORT = """\
Each has its own sizes, captions, `repeats` and `weight`; their images are mixed in proportion to their numbers. A
single one may also be written `[dataset]`. Among several:

- `role = "eval"` gives the images for the eval loss; then nothing is held out of the others (`eval.holdout`).
- `role = "regularization"` is trained on like the others; its `weight`, below 1 as a rule, says how much it counts.
- `start` and `end` let a dataset come or go during the run. At least one takes part from the first step.
- The same folder can be there twice, with other settings. What is encoded alike is encoded once.

On the command line `dataset.repeats=2` is set in every dataset, `dataset.cats.repeats=2` in the one called "cats",
`dataset.2.repeats=2` in the second. A dataset without a `name` is called by the last part of its `path`.
[configs/datasets.toml](../configs/datasets.toml) is an example.
"""


def render_template(*, file_name: str = "my.toml", preset: str = "24gb") -> str:
    """A commented TOML file that is valid as it stands, every setting at its default or the preset's value."""
    changes = PRESETS[preset]
    blocks = [
        f"# Settings of sdxl-ray, for {PRESET_NOTES[preset]}. Set dataset.path, then:\n"
        f"#   sdxl-ray check {file_name}      what would happen, before it costs anything\n"
        f"#   sdxl-ray train {file_name}      caches what is missing, then trains and exports\n"
        "# Every setting can also be given on the command line: optimizer.learning_rate=2e-4\n"
        '# A line such as "#name = value" is a setting that few need, at its default: remove the "#" to change it.'
    ]
    blocks += [_render_section(section, field, changes) for section, field in Config.model_fields.items()]
    return "\n\n".join(blocks) + "\n"


def _render_section(section: str, field: FieldInfo, changes: dict[str, Any]) -> str:
    """The settings that most people look at, then the others under their headings, commented out: `#name = value`."""
    model = _model(field)
    lines = [f"# {line}" for line in _wrap(model.__doc__ or "")]
    lines.append(_header(section, field))
    more: dict[str, list[str]] = {}
    for name, setting in model.model_fields.items():
        heading = "" if f"{section}.{name}" in changes else _more(setting)
        value = changes.get(f"{section}.{name}", _plain(setting.default))
        target = more.setdefault(heading, []) if heading else lines
        target += [f"# {line}" for line in _wrap(_describe(setting))]
        target.append(f"{'#' if heading else ''}{name} = {_toml(value)}")
    for heading, of_heading in more.items():
        lines += ["", f"# ---- {section}: {heading}", *of_heading]
    return "\n".join(lines)


def render_reference() -> str:
    """docs/configuration.md: a table for each section."""
    parts = [
        "# Settings\n",
        "Generated from `sdxl_ray/config/schema.py` by `python scripts/make_docs.py`; a test fails when it is stale.\n",
        'Durations carry their unit: `"2000 steps"`, `"10 epochs"`. Relative paths start at the current folder. '
        "On the command line, any setting is `key.path=value`.\n",
    ]
    for section, field in Config.model_fields.items():
        model = _model(field)
        parts.append(f"## {_header(section, field)}\n\n{(model.__doc__ or '').strip()}\n")
        if section == "dataset":
            parts.append(DATASETS_IN_SHORT)
        rows = ["| setting | default | range, unit | meaning |", "|---|---|---|---|"]
        for name, setting in model.model_fields.items():
            limits = ", ".join(filter(None, (_limits(setting), _unit(setting))))
            description = re.sub(r"([|*])", r"\\\1", setting.description or "")
            rows.append(f"| `{name}` | `{_toml(_plain(setting.default))}` | {limits} | {description} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _model(field: FieldInfo) -> type[BaseModel]:
    model = section_of(field)
    assert model is not None, field
    return model


def _header(section: str, field: FieldInfo) -> str:
    """`[[dataset]]` may be there several times."""
    return f"[{section}]" if field.annotation is _model(field) else f"[[{section}]]"


def _describe(setting: FieldInfo) -> str:
    explained = all(choice in (setting.description or "") for choice in _literals(setting.annotation))
    limits = "" if _literals(setting.annotation) and explained else _limits(setting)
    extra = "; ".join(filter(None, (_unit(setting), limits)))
    return f"{setting.description}{f' [{extra}]' if extra else ''}"


def _unit(setting: FieldInfo) -> str:
    extra = setting.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _more(setting: FieldInfo) -> str:
    extra = setting.json_schema_extra
    return str(extra.get("more", "")) if isinstance(extra, dict) else ""


def _limits(setting: FieldInfo) -> str:
    choices = _literals(setting.annotation)
    if choices:
        return ", ".join(choices)
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "multiple of"}
    found = []
    for limit in setting.metadata:
        for name, word in words.items():
            value = getattr(limit, name, None)
            if value is not None:
                found.append(f"{word} {value}")
    return ", ".join(found)


def _literals(annotation: Any) -> list[str]:
    """The choices of Literal[...], also inside tuple[Literal[...], ...]."""
    args = get_args(annotation)
    if args and all(isinstance(arg, str) for arg in args):
        return [str(arg) for arg in args]
    return [choice for arg in args for choice in _literals(arg)]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel | dict):
        return {}
    if isinstance(value, tuple):
        items = [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
        return items[0] if len(items) == 1 and isinstance(items[0], int) else items  # resolution = 1024
    return value if isinstance(value, str | int | float | bool) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return "{}" if value == {} else tomli_w.dumps({"v": value}).partition("= ")[2].strip()


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width=110, break_on_hyphens=False)
