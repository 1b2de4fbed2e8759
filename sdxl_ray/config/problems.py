"""What is wrong with settings, in a person's words: the value given, and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w
from pydantic import ValidationError

from sdxl_ray.config.keys import did_you_mean, known_keys, unit_of, without_number
from sdxl_ray.config.methods import BlockRule
from sdxl_ray.config.schema import SearchSpace
from sdxl_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one setting."""

    key: str  # dotted path, datasets counted: dataset.2.repeats
    text: str
    given: Any = None


def explain_all(error: ValidationError) -> list[Problem]:
    """pydantic's errors in our words."""
    items = error.errors(include_url=False)
    around = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    # A list whose items are wrong is too short as well, says pydantic.
    return [_explain(item) for item in items if item["type"] != "too_short" or item["loc"] not in around]


def _explain(item: Any) -> Problem:
    """One pydantic error in our words: the value given and what was expected."""
    location = list(item["loc"])
    if location[0] == "dataset" and len(location) > 1:
        location[1] = str(location[1] + 1)
    key = ".".join(str(part) for part in location if not isinstance(part, int))  # positions in lists say little
    given, context = item["input"], item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden" if key.startswith("sweep.parameters."):
            return Problem(key, f"unknown key; known: {', '.join(SearchSpace.model_fields)}")
        case "extra_forbidden" if key.startswith("adapter.blocks."):
            return Problem(key, f"unknown key; known: {', '.join(BlockRule.model_fields)}")
        case "extra_forbidden":
            return Problem(key, f"unknown key.{did_you_mean(without_number(key), known_keys())}")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {
                "greater_than": "above",
                "greater_than_equal": "at least",
                "less_than": "below",
                "less_than_equal": "at most",
            }[item["type"]]
            limit = next(iter(context.values()))
            text = f"must be {words} {limit if isinstance(limit, int) else f'{limit:g}'}{unit_of(key)}"
        case "multiple_of":
            text = f"must be a multiple of {context['multiple_of']}{unit_of(key)}"
        case "literal_error":
            text = f"must be one of {context['expected'].replace(' or ', ', ')}"
            close = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", context["expected"]), n=1)
            if close:
                text += f'. Did you mean "{close[0]}"?'
        case "int_type" | "int_from_float":
            text = f"must be a whole number{unit_of(key)}"
        case "float_type":
            text = f"must be a number{unit_of(key)}, without quotes"
        case "finite_number":
            text = f"must be a finite number{unit_of(key)}"
        case "bool_type":
            text = "must be true or false"
        case "string_type":
            text = "must be text in quotes"
        case "tuple_type" | "missing" | "too_long" if key.endswith(".caption_replace"):
            text = "must be a list of pairs: [['pattern', 'replacement']]"
        case "tuple_type" | "model_type" if re.fullmatch(r"dataset(\.\d+)?", key):
            text = "must be a section: [[dataset]]"
        case "tuple_type":
            text = 'must be a list, such as ["one", "two"]'
        case "missing" | "too_long":  # only pairs have a fixed length: [low, high] of a sweep
            text = "must be a list of two numbers: [low, high]"
        case "string_too_short" if context["min_length"] > 1:
            text = f"must have at least {context['min_length']} characters"
        case "too_short" | "string_too_short":
            text = "must not be empty"
        case "value_error":
            text = str(context["error"])
        case "model_type" | "dict_type":
            text = f"must be a section: [{key}]"
        case _:
            text = item["msg"]
    return Problem(key, text, given)


def as_error(problems: Sequence[Problem], place: Callable[[str, int], str], title: str) -> ConfigError:
    """All of them as one error, each with its place.

    Args:
        place: called with a key and the number of datasets that have the same problem: it is told once.
    """
    plain = [(without_number(problem.key), repr(problem.given), problem.text) for problem in problems]
    lines = []
    for problem, alike in zip(problems, plain, strict=True):
        given = f" = {_toml_value(problem.given)}" if _is_plain(problem.given) else ""
        lines.append(f"{place(problem.key, plain.count(alike))}{given}: {problem.text}")
    lines = list(dict.fromkeys(lines))
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{title}: {len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _toml_value(value: Any) -> str:
    shown = tomli_w.dumps({"v": value}).partition("= ")[2].strip()
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://***@", shown)  # an address may hold a key, and logs are read by others
