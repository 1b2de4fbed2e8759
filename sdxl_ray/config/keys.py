"""Dotted keys: which there are, where they stand in a file, which datasets they mean, how people are told.

`dataset.2.repeats` is a setting of the second [[dataset]]; `dataset.cats.repeats` of the one called "cats";
`dataset.repeats` of all of them, and of the only one where there is one. Inside, datasets are always counted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdxl_ray.config.elsewhere import our_name
from sdxl_ray.config.names import fill_names
from sdxl_ray.config.schema import Config, DatasetSection

_KEY_PART = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_KEY = rf"({_KEY_PART}(?:\s*\.\s*{_KEY_PART})*)"
_HEADER = re.compile(rf"\s*(\[\[?)\s*{_KEY}\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*{_KEY}\s*=")
_NUMBERED = re.compile(r"^dataset\.(\d+)(?=\.|$)")

_ONE_EACH = ("path", "name")  # what two datasets cannot share


# ---- which there are -------------------------------------------------------------------------------------------------


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field of `Config` holds, one or any number of times."""
    annotation = field.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, leaves only."""
    keys = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        keys += known_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def field_of(key: str) -> FieldInfo | None:
    """The schema's entry for a dotted key; the number or the name of a dataset plays no part."""
    section, *parts = key.split(".")
    if section == "dataset":
        parts = parts[-1:]
    field = Config.model_fields.get(section)
    for part in parts:
        model = section_of(field) if field else None
        field = model.model_fields.get(part) if model else None
    return field


def unit_of(key: str) -> str:
    """ " (pixels)", or nothing: what error texts append."""
    field = field_of(key)
    extra = field.json_schema_extra if field else None
    unit = extra.get("unit", "") if isinstance(extra, dict) else ""
    return f" ({unit})" if unit else ""


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """What another trainer calls so; or else the nearest known key: of the same section, a section, of any section."""
    section, dot, leaf = key.rpartition(".")
    sections = dict.fromkeys(candidate.partition(".")[0] for candidate in known)
    by_leaf: dict[str, str] = {}
    for candidate in sorted(known, key=lambda name: name.startswith("text_encoder")):  # the U-Net's come first
        by_leaf.setdefault(candidate.rpartition(".")[2], candidate)
    of_section = {name.rpartition(".")[2]: name for name in known if name.startswith(f"{section}.")} if dot else {}
    ours = our_name(leaf)
    found = of_section.get(ours.rpartition(".")[2], ours)  # text_encoder.lr is that of the text encoder
    if found not in {*known, *sections} or (of_section and found not in of_section.values()):
        found = (
            _nearest(leaf, of_section, 0.7)
            or (found if found in known else "")
            or ("" if dot else _nearest(key, {name: name for name in sections}, 0.8))
            or _nearest(leaf, by_leaf, 0.75)
            or ("" if dot else _nearest(key, {name: name for name in sections}, 0.6))
        )
    return f" Did you mean {found}?" if found else ""


def _nearest(name: str, among: Mapping[str, str], cutoff: float) -> str:
    close = difflib.get_close_matches(name, among, n=1, cutoff=cutoff)
    return among[close[0]] if close else ""


# ---- where they stand ------------------------------------------------------------------------------------------------


def locate_keys(text: str) -> dict[str, int]:
    """Dotted key -> line number. `tomllib` keeps no positions; this reads headers and `key =` at line starts.

    The n-th `[[dataset]]` is `dataset.n`; a `[dataset]` is `dataset`.
    """
    lines: dict[str, int] = {}
    num_tables: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        header = _HEADER.match(line)
        if header:
            table = _plain_key(header[2])
            lines.setdefault(table, number)
            if header[1] == "[[":
                num_tables[table] = num_tables.get(table, 0) + 1
            first, dot, rest = table.partition(".")
            if first in num_tables:  # [dataset.x] after [[dataset]] is part of the last one
                table = f"{first}.{num_tables[first]}{dot}{rest}"
                lines.setdefault(table, number)
            continue
        assignment = _ASSIGNMENT.match(line)
        if assignment:
            key = _plain_key(assignment[1])
            lines[f"{table}.{key}" if table else key] = number
    return lines


def line_of(key: str, lines: Mapping[str, int]) -> int | None:
    """Of the key, or of the nearest section around it."""
    while key:
        found = exact_line_of(key, lines)
        if found is not None:
            return found
        key = key.rpartition(".")[0]
    return None


def exact_line_of(key: str, lines: Mapping[str, int]) -> int | None:
    """Of the key itself; a `[dataset]` is the first."""
    return lines.get(key) or lines.get(re.sub(r"^dataset\.1\b", "dataset", key))


def _plain_key(key: str) -> str:
    return re.sub(r"\s*\.\s*", ".", re.sub(r"[\"']", "", key)).strip()


# ---- which datasets are meant ----------------------------------------------------------------------------------------


def names_of_tables(tables: Any) -> list[str]:
    """The names of the `[[dataset]]` tables of a file, filled in; nothing has been checked yet."""
    if isinstance(tables, dict):
        tables = [tables]
    if not isinstance(tables, list | tuple):
        return []
    plain = [table if isinstance(table, dict) else {} for table in tables]
    default = DatasetSection.model_fields["path"].default
    given = [name if isinstance(name := table.get("name"), str) else "" for table in plain]
    paths = [path if isinstance(path := table.get("path", default), str) else "" for table in plain]
    return fill_names(given, paths)


def find_datasets(key: str, names: Sequence[str]) -> tuple[list[int], str]:
    """(rows in `names`, setting) that a key means: `dataset.repeats` all, `dataset.cats.repeats`, `dataset.2.repeats`.

    Raises:
        ValueError: with the problem: no such dataset, or a setting that cannot be the same in all of them.
    """
    _, _, within = key.partition(".")
    name, _, setting = within.rpartition(".")
    name = name.strip("\"'")
    if not name:
        if setting in _ONE_EACH and len(names) > 1:
            raise ValueError(
                f"which of the {len(names)} datasets? Write dataset.{names[0]}.{setting}, or dataset.1.{setting}."
            )
        return list(range(len(names))), setting
    if name in names:
        return [list(names).index(name)], setting
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return [int(name) - 1], setting
    close = difflib.get_close_matches(name, names, n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    counted = "is 1" if len(names) == 1 else f"are 1 to {len(names)}"
    raise ValueError(f'no dataset is called "{name}".{hint} There {counted}: {", ".join(names)}')


# ---- how people are told ---------------------------------------------------------------------------------------------


def label(key: str, names: Sequence[str]) -> str:
    """`dataset.2.repeats` as "dataset 2 (cats): dataset.repeats"; where there is one dataset, as "dataset.repeats"."""
    numbered = _NUMBERED.match(key)
    if numbered is None:
        return key
    plain = f"dataset{key[numbered.end() :]}"
    number = int(numbered[1])
    if len(names) < 2:
        return plain
    name = f" ({names[number - 1]})" if number <= len(names) else ""
    return f"dataset {number}{name}" + (f": {plain}" if plain != "dataset" else "")


def without_number(key: str) -> str:
    """`dataset.2.repeats` as it stands in the schema: `dataset.repeats`."""
    return _NUMBERED.sub("dataset", key, count=1)
