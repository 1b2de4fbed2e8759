"""TOML and overrides in, a checked `Config` out; or one `ConfigError` that lists every problem.

(1) `tomllib` reads the file      (2) `_apply` lays `key.path=value` over it  (3) pydantic checks types and ranges
(4) `contradictions` checks pairs (5) `_check_sweep` tries every swept value  (6) `resolve_paths` makes paths absolute
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdxl_ray.config.schema import Config, SearchSpace, contradictions
from sdxl_ray.errors import ConfigError

BUILTIN_PHOTOGRAPHS = Path(__file__).parent.parent / "demo" / "photographs"

# Where Ray unpacks `--working-dir` on each node; it deletes the folder some time after the job.
_RAY_JOB_FOLDER = "runtime_resources/working_dir_files"

_KEY_PART = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_KEY = rf"({_KEY_PART}(?:\s*\.\s*{_KEY_PART})*)"
_HEADER = re.compile(rf"\s*\[\[?\s*{_KEY}\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*{_KEY}\s*=")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one setting."""

    key: str  # dotted path
    text: str
    given: Any = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read settings from a TOML file, lay `key.path=value` overrides over them, check everything.

    Raises:
        ConfigError: with every problem found, each with its place, the value given and what was expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark in front
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. `sdxl-ray init {path}` writes one to start from.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a TOML file of settings.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    applied: set[str] = set()
    problems = _apply(raw, overrides, applied)
    lines = locate_keys(text)

    def place(key: str) -> str:
        line = _line_of(key, lines)
        if any(key == given or key.startswith(f"{given}.") for given in applied):
            return "on the command line"
        if key not in lines and any(given.startswith(f"{key}.") for given in applied):
            return "on the command line"  # a section that only the command line names
        return f"{path}:{line}" if line else str(path)

    config = _check(raw, problems, place, title=str(path))
    if not config.run.name:
        config = _replace(config, {"run.name": path.stem.strip()})
    return resolve_paths(config)


def config_from_dict(raw: Mapping[str, Any], *, name: str = "run") -> Config:
    """A `Config` from nested dictionaries, checked like a file. For notebooks and tests."""
    config = _check(dict(raw), [], lambda key: "given", title="the settings")
    if not config.run.name:
        config = _replace(config, {"run.name": name})
    return resolve_paths(config)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The same settings with some values replaced and everything checked again; how sweep trials are made.

    Raises:
        ConfigError: an unknown key, a value out of range, or one that contradicts another setting.
    """
    changed = _replace(config, overrides)
    found = contradictions(changed)
    if found:
        raise ConfigError("; ".join(f"{key}: {text}" for key, text in found))
    return changed


def dump_config(config: Config) -> str:
    """TOML that `load_config` reads back to an equal `Config`."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def resolve_paths(config: Config) -> Config:
    """Absolute paths: Ray's workers start in a folder of their own, where a relative path means something else.

    Inside `ray job submit --working-dir`, relative places for results are resolved against $SDXL_RAY_HOME or
    ~/sdxl-ray instead of the job's folder, which Ray deletes after the job.
    """
    here = Path.cwd()
    results = results_root(here)
    dataset = config.dataset.path
    changes = {
        "run.output": _absolute(config.run.output, results, "run.output"),
        "cache.path": _absolute(config.cache.path, results, "cache.path"),
        "dataset.path": str(BUILTIN_PHOTOGRAPHS)
        if dataset == "builtin:photographs"
        else _absolute(dataset, here, "dataset.path"),
    }
    model = config.model.path
    if not model.startswith("builtin:") and (model.startswith((".", "~", "/")) or (here / model).exists()):
        changes["model.path"] = _absolute(model, here, "model.path")
    return _replace(config, changes)


def results_root(here: Path) -> Path:
    """What relative output paths start from."""
    if _RAY_JOB_FOLDER in here.as_posix():
        return Path(os.environ.get("SDXL_RAY_HOME") or "~/sdxl-ray").expanduser()
    return here


def locate_keys(text: str) -> dict[str, int]:
    """Dotted key -> line number. `tomllib` keeps no positions; this reads headers and `key =` at line starts."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        header = _HEADER.match(line)
        if header:
            table = _plain_key(header[1])
            lines.setdefault(table, number)
            continue
        assignment = _ASSIGNMENT.match(line)
        if assignment:
            key = _plain_key(assignment[1])
            lines[f"{table}.{key}" if table else key] = number
    return lines


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, leaves only."""
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _plain_key(key: str) -> str:
    return re.sub(r"\s*\.\s*", ".", re.sub(r"[\"']", "", key)).strip()


def _line_of(key: str, lines: Mapping[str, int]) -> int | None:
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return None


def _apply(raw: dict[str, Any], overrides: Iterable[str], applied: set[str]) -> list[Problem]:
    """Lay the overrides over `raw`, in place; their keys go into `applied`."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f'"{override}": expected KEY=VALUE, such as optimizer.learning_rate=2e-4')
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word needs no quotes on the command line
        field = _field(key)
        if field is not None and field.annotation is str and not isinstance(value, str):
            value = text  # run.name=2025-01-31 and run.name=42 are names
        applied.add(key)
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                problems.append(Problem(key, f"{parent} is a value, not a section"))
                break
            node = child
        else:
            node[last] = value
    return problems


def _check(raw: dict[str, Any], problems: list[Problem], place: Any, *, title: str) -> Config:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors(include_url=False)]
        raise _as_error(problems, place, title) from None
    problems += [Problem(key, text) for key, text in contradictions(config)]
    problems += _check_sweep(config)
    if problems:
        raise _as_error(problems, place, title)
    return config


def _check_sweep(config: Config) -> list[Problem]:
    """Every value that a sweep may try is tried on the schema now, not in trial 37."""
    problems = []
    known = known_keys()
    known_already = contradictions(config)
    for key, space in config.sweep.parameters.items():
        if key not in known:
            problems.append(Problem(f"sweep.parameters.{key}", f"no such setting.{_did_you_mean(key, known)}"))
            continue
        for value in space.values:
            try:
                changed = _replace(config, {key: value})
                # What contradicts already without the sweep is reported once, not for every value.
                new = [found for found in contradictions(changed) if found not in known_already]
                if new:
                    raise ConfigError("; ".join(f"{where}: {text}" for where, text in new))
            except ConfigError as error:
                problems.append(Problem(f"sweep.parameters.{key}", f"cannot try {value!r}: {error}"))
    return problems


def _replace(config: Config, changes: Mapping[str, Any]) -> Config:
    raw = config.model_dump(mode="json")
    known = known_keys()
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(f"{key}: unknown key.{_did_you_mean(key, known)}")
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[last] = value
    try:
        return Config.model_validate(_without_none(raw))
    except ValidationError as error:
        explained = [_explain(item) for item in error.errors(include_url=False)]
        raise ConfigError("; ".join(f"{problem.key}: {problem.text}" for problem in explained)) from None


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items() if value is not None}
    return node


def _explain(item: Any) -> Problem:
    """One pydantic error in our words: the value given and what was expected."""
    key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
    given, context = item["input"], item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden" if key.startswith("sweep.parameters."):
            return Problem(key, f"unknown key; known: {', '.join(SearchSpace.model_fields)}")
        case "extra_forbidden":
            return Problem(key, f"unknown key.{_did_you_mean(key, known_keys())}")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {
                "greater_than": "above",
                "greater_than_equal": "at least",
                "less_than": "below",
                "less_than_equal": "at most",
            }[item["type"]]
            limit = next(iter(context.values()))
            text = f"must be {words} {limit if isinstance(limit, int) else f'{limit:g}'}{_unit_of(key)}"
        case "multiple_of":
            text = f"must be a multiple of {context['multiple_of']}{_unit_of(key)}"
        case "literal_error":
            text = f"must be one of {context['expected'].replace(' or ', ', ')}"
            close = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", context["expected"]), n=1)
            if close:
                text += f'. Did you mean "{close[0]}"?'
        case "int_type" | "int_from_float":
            text = f"must be a whole number{_unit_of(key)}"
        case "float_type":
            text = f"must be a number{_unit_of(key)}, without quotes"
        case "finite_number":
            text = f"must be a finite number{_unit_of(key)}"
        case "bool_type":
            text = "must be true or false"
        case "string_type":
            text = "must be text in quotes"
        case "tuple_type":
            text = 'must be a list, such as ["one", "two"]'
        case "missing" | "too_long":  # only pairs have a fixed length: [low, high] of a sweep
            text = "must be a list of two numbers: [low, high]"
        case "too_short" | "string_too_short":
            text = "must not be empty"
        case "value_error":
            text = str(context["error"])
        case "model_type" | "dict_type":
            text = f"must be a section: [{key}]"
        case _:
            text = item["msg"]
    return Problem(key, text, given)


def _as_error(problems: Sequence[Problem], place: Any, title: str) -> ConfigError:
    lines = []
    for problem in problems:
        given = f" = {_toml_value(problem.given)}" if _is_plain(problem.given) else ""
        lines.append(f"{place(problem.key)}: {problem.key}{given}: {problem.text}")
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{title}: {len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines))


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    """Nearest known key, by its whole path or, when that is far off, by its last part."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:
        by_leaf = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)]
    if not close:
        sections = {candidate.partition(".")[0] for candidate in known}
        close = difflib.get_close_matches(key, sections, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _field(key: str) -> FieldInfo | None:
    """The schema's entry for a dotted key."""
    model: Any = Config
    field = None
    for part in key.split("."):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return None
        model = field.annotation
    return field


def _unit_of(key: str) -> str:
    field = _field(key)
    extra = field.json_schema_extra if field else None
    unit = extra.get("unit", "") if isinstance(extra, dict) else ""
    return f" ({unit})" if unit else ""


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _toml_value(value: Any) -> str:
    return tomli_w.dumps({"v": value}).partition("= ")[2].strip()


def _absolute(path: str, base: Path, key: str) -> str:
    try:
        return str((base / Path(path).expanduser()).absolute())
    except RuntimeError:  # "~somebody"
        raise ConfigError(f'{key} = "{path}": there is no such user. Write the whole path.') from None
