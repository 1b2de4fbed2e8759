"""What datasets are called where nobody gave them a name."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence

_PATTERN = re.compile(r"[*?\[{]")
_OPTIONS = re.compile(r"\?\w+=[^/]*")  # of a connection: s3://bucket/cats?region=eu-central-1
_FILE_SUFFIX = re.compile(r"\.(tar(\.\w+)?|tgz|parquet|csv|tsv|json|jsonl|ndjson|arrow|feather)$", re.IGNORECASE)


def name_of(path: str) -> str:
    """The last part of a dataset's path, without the ending of a file; of a pattern, the folder above it.

    `/data/cats` and `/data/cats/*.tar` are both "cats". Empty where the path has no name of its own, such as "/".
    """
    scheme, _, rest = path.removeprefix("builtin:").rpartition("://")
    if scheme:
        rest = _OPTIONS.sub("", rest)
    pattern = _PATTERN.search(rest)
    if pattern and (scheme or not os.path.lexists(rest)):
        above, slash, _ = rest[: pattern.start()].rpartition("/")
        rest = above if slash else "."  # a folder may be called "[2024] cats"
    if not scheme and rest.rstrip("/").rpartition("/")[2] in (".", ".."):
        rest = os.path.abspath(rest)  # noqa: PTH100  (a Path keeps "..")
    last = rest.rstrip("/").rpartition("/")[2]
    if scheme:
        last = last.partition("@")[0]  # hf://datasets/org/name@revision, abfs://container@account
    last = _FILE_SUFFIX.sub("", last).replace("\\", "_").replace("\0", "").strip()
    return "" if last == "~" else last


def fill_names(given: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The names given, and for the empty ones the names of their paths; with -2, -3 where one is taken."""
    taken = {name for name in given if name}
    names = []
    for name, path in zip(given, paths, strict=True):
        if not name:
            base = name_of(path) or "dataset"
            choices = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
            name = next(choice for choice in choices if choice not in taken)
            taken.add(name)
        names.append(name)
    return names
