"""TOML and overrides in, a checked `Config` out; or one `ConfigError` that lists every problem.

(1) `tomllib` reads the file      (2) `_apply` lays `key.path=value` over it  (3) pydantic checks types and ranges
(4) `contradictions` checks pairs (5) `_check_sweep` tries every swept value  (6) `resolve_paths` makes paths absolute
                                                                               and fills in the datasets' names
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from sdxl_ray.config.contradictions import SHARED_BY_TRIALS, contradictions
from sdxl_ray.config.elsewhere import DOCUMENT
from sdxl_ray.config.keys import (
    did_you_mean,
    exact_line_of,
    field_of,
    find_datasets,
    known_keys,
    label,
    line_of,
    locate_keys,
    names_of_tables,
    without_number,
)
from sdxl_ray.config.names import fill_names, name_of
from sdxl_ray.config.problems import Problem, as_error, explain_all
from sdxl_ray.config.schema import Config
from sdxl_ray.errors import ConfigError
from sdxl_ray.storage import local_path

BUILTIN_PHOTOGRAPHS = Path(__file__).parent.parent / "demo" / "photographs"

# Where Ray unpacks `--working-dir` on each node; it deletes the folder some time after the job.
_RAY_JOB_FOLDER = "runtime_resources/working_dir_files"


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
        is_json = text.lstrip()[:1] in ("{", "[") and path.suffix.lower() == ".json"
        hint = f". It is JSON, as other trainers have it: {DOCUMENT} says what their settings are called here" * is_json
        raise ConfigError(f"{path}: is not valid TOML: {error}{hint}") from None
    applied: dict[str, str] = {}
    problems = _apply(raw, overrides, applied)
    names = names_of_tables(raw.get("dataset", [{}]))
    lines = locate_keys(text)

    def place(key: str, num_alike: int) -> str:
        typed = applied.get(key)
        of_all = typed == without_number(key) != key  # dataset.repeats for dataset.2.repeats
        if typed and (not of_all or num_alike >= len(names)):
            return f"on the command line: {typed}"
        line = line_of(key, lines)
        where = f"{path}:{line}" if line else str(path)
        if any(f"{key}.".startswith(f"{given}.") for given in applied):
            where = "on the command line"
        elif exact_line_of(key, lines) is None and any(given.startswith(f"{key}.") for given in applied):
            where = "on the command line"  # a section that only the command line names
        return f"{where}: {label(key, names)}"

    config = _check(raw, problems, place, title=str(path))
    if not config.run.name:
        config = _replace(config, {"run.name": path.stem.strip()})
    return resolve_paths(config)


def config_from_dict(raw: Mapping[str, Any], *, name: str = "run") -> Config:
    """A `Config` from nested dictionaries, checked like a file. For notebooks and tests."""
    names = names_of_tables(raw.get("dataset", [{}]))
    config = _check(dict(raw), [], lambda key, _: f"given: {label(key, names)}", title="the settings")
    if not config.run.name:
        config = _replace(config, {"run.name": name})
    return resolve_paths(config)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The same settings with some values replaced and everything checked again; how sweep trials are made.

    Keys are those of the command line: `dataset.repeats` is set in every dataset, `dataset.cats.repeats` in one.

    Raises:
        ConfigError: an unknown key, a value out of range, or one that contradicts another setting.
    """
    changed = _replace(config, overrides)
    paths = [dataset.path for dataset in changed.dataset]
    changed = _with_datasets(changed, paths, fill_names([dataset.name for dataset in changed.dataset], paths))
    found = contradictions(changed)
    if found:
        names = [dataset.name for dataset in changed.dataset]
        raise ConfigError("; ".join(f"{label(key, names)}: {text}" for key, text in found))
    return changed


def dump_config(config: Config) -> str:
    """TOML that `load_config` reads back to an equal `Config`."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def resolve_paths(config: Config) -> Config:
    """Absolute paths, and a name for each dataset.

    Ray's workers start in a folder of their own, where a relative path means something else. Cloud addresses stay as
    they are. Inside `ray job submit --working-dir`, relative places for results are resolved against $SDXL_RAY_HOME or
    ~/sdxl-ray instead of the job's folder, which Ray deletes after the job.
    """
    here = Path.cwd()
    results = results_root(here)
    changes = {
        key: _absolute(path, results, key)
        for key, path in (
            ("run.output", config.run.output),
            ("cache.path", config.cache.path),
            ("cache.local_path", config.cache.local_path),
        )
    }
    model = config.model.path
    if not model.startswith("builtin:") and (model.startswith((".", "~", "/", "file://")) or (here / model).exists()):
        changes["model.path"] = _absolute(model, here, "model.path")
    if config.adapter.start_from:
        changes["adapter.start_from"] = _absolute(config.adapter.start_from, here, "adapter.start_from")
    given = [dataset.name for dataset in config.dataset]
    paths = [
        str(BUILTIN_PHOTOGRAPHS)
        if dataset.path == "builtin:photographs"
        else _absolute(dataset.path, here, label(f"dataset.{number}.path", given))
        for number, dataset in enumerate(config.dataset, start=1)
    ]
    return _with_datasets(_replace(config, changes), paths, fill_names(given, paths))


def _with_datasets(config: Config, paths: Sequence[str], names: Sequence[str]) -> Config:
    datasets = [
        dataset.model_copy(update={"path": path, "name": name})
        for dataset, path, name in zip(config.dataset, paths, names, strict=True)
    ]
    return config.model_copy(update={"dataset": tuple(datasets)})


def results_root(here: Path) -> Path:
    """What relative output paths start from."""
    if _RAY_JOB_FOLDER in here.as_posix():
        return Path(os.environ.get("SDXL_RAY_HOME") or "~/sdxl-ray").expanduser()
    return here


def _apply(raw: dict[str, Any], overrides: Iterable[str], applied: dict[str, str]) -> list[Problem]:
    """Lay the overrides over `raw`, in place; their keys go into `applied`, with what was typed."""
    problems = []
    names = names_of_tables(raw.get("dataset", [{}]))  # the file's: an override of a path renames nothing
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f'"{override}": expected KEY=VALUE, such as optimizer.learning_rate=2e-4')
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word needs no quotes on the command line
        field = field_of(key)
        if field is not None and field.annotation is str and not isinstance(value, str):
            value = text  # run.name=2025-01-31 and run.name=42 are names
        applied[key] = key
        try:
            for exact_key, node, last in _nodes(raw, key, names):
                applied[exact_key] = key
                node[last] = value
        except ValueError as error:
            problems.append(Problem(key, str(error)))
        if key == "dataset":
            names = names_of_tables(value)
    return problems


def _nodes(raw: dict[str, Any], key: str, names: Sequence[str]) -> list[tuple[str, dict[str, Any], str]]:
    """(key with its dataset counted, table, key in it) of each place in `raw` that a key means; tables are made.

    Raises:
        ValueError: what the key means is no table, or no dataset.
    """
    section, _, _ = key.partition(".")
    if section == "dataset" and key != "dataset":
        tables = raw.setdefault("dataset", [{}])
        if isinstance(tables, dict):
            tables = raw["dataset"] = [tables]
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ValueError("dataset is a value, not a section")
        rows, name = find_datasets(key, names)
        return [(f"dataset.{row + 1}.{name}", tables[row], name) for row in rows]
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{parent} is a value, not a section")
        node = child
    return [(key, node, last)]


def _check(raw: dict[str, Any], problems: list[Problem], place: Callable[[str, int], str], *, title: str) -> Config:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += explain_all(error)
        raise as_error(problems, place, title) from None
    problems += [Problem(key, text) for key, text in contradictions(config)]
    problems += _check_sweep(config)
    if problems:
        raise as_error(problems, place, title)
    return config


def _check_sweep(config: Config) -> list[Problem]:
    """Every value that a sweep may try is tried on the schema now, not in trial 37."""
    problems = []
    known = known_keys()
    known_already = contradictions(config)
    names = fill_names([dataset.name for dataset in config.dataset], [dataset.path for dataset in config.dataset])
    for key, space in config.sweep.parameters.items():
        if key.partition(".")[0] in SHARED_BY_TRIALS:
            continue  # a contradiction already
        if key not in known:
            problems.append(Problem(f"sweep.parameters.{key}", f"no such setting.{did_you_mean(key, known)}"))
            continue
        for value in space.values:
            try:
                changed = _replace(config, {key: value})
                # What contradicts already without the sweep is reported once, not for every value.
                new = [found for found in contradictions(changed) if found not in known_already]
                if new:
                    raise ConfigError("; ".join(f"{label(where, names)}: {text}" for where, text in new))
            except ConfigError as error:
                problems.append(Problem(f"sweep.parameters.{key}", f"cannot try {value!r}: {error}"))
    return problems


def _replace(config: Config, changes: Mapping[str, Any]) -> Config:
    raw = config.model_dump(mode="json")
    known = known_keys()
    paths = [dataset.path for dataset in config.dataset]
    names = fill_names([dataset.name for dataset in config.dataset], paths)
    for key, value in changes.items():
        try:
            nodes = _nodes(raw, key, names)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
        for exact_key, node, last in nodes:
            plain = without_number(exact_key)
            if plain not in known:
                raise ConfigError(f"{key}: unknown key.{did_you_mean(plain, known)}")
            if plain == "dataset.path" and node["name"] == name_of(node["path"]):
                node["name"] = ""  # nobody gave it one: it goes with the path
            node[last] = value
    try:
        return Config.model_validate(_without_none(raw))
    except ValidationError as error:
        explained = [f"{label(problem.key, names)}: {problem.text}" for problem in explain_all(error)]
        raise ConfigError("; ".join(dict.fromkeys(explained))) from None


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items() if value is not None}
    return [_without_none(item) for item in node] if isinstance(node, list) else node


def _absolute(path: str, base: Path, key: str) -> str:
    local = local_path(path)
    if local is None:
        return path
    path = str(local)  # also of file:///data/cats
    try:
        return str((base / Path(path).expanduser()).absolute())
    except RuntimeError:  # "~somebody"
        raise ConfigError(f'{key} = "{path}": there is no such user. Write the whole path.') from None
