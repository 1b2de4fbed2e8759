"""Splits of Hugging Face's datasets, which the names of files and folders tell.

The rules: huggingface.co/docs/hub/datasets-file-names-and-splits
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sdxl_ray.cache.sources.files import setting_of
from sdxl_ray.errors import DatasetError
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_SHARD = re.compile(r"(?:^|/)([\w.]+)-\d{5}-of-\d{5}[^/]*$")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str:
    """The split that a file's name or folders tell: "train" of train-00000-of-00002.parquet; empty where none does."""
    shard = _SHARD.search(name)
    if shard:
        return _SPLITS.get(shard[1], shard[1])
    for part in name.split("/"):
        for word in re.split(r"[-._ 0-9]+", part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return ""


def in_split(section: DatasetSection, name: str) -> bool:
    """Whether a file belongs to dataset.split, or to none."""
    return not section.split or split_of(name) in ("", _SPLITS.get(section.split, section.split))


def of_split(section: DatasetSection, files: Iterable[FileEntry]) -> list[FileEntry]:
    """Those of dataset.split; all of them where no name tells one.

    Raises:
        DatasetError: there are other splits.
    """
    files = list(files)
    wanted = _SPLITS.get(section.split, section.split)
    splits = {split_of(entry.name) for entry in files}
    if not wanted or splits <= {""}:
        return files
    if wanted not in splits:
        raise DatasetError(no_split(section, sorted(splits - {""})))
    return [entry for entry in files if split_of(entry.name) == wanted]


def no_split(section: DatasetSection, names: Sequence[str]) -> str:
    """The text of an error."""
    return (
        f'{setting_of(section)}: {section.path} has no split "{section.split}". '
        f"It has {', '.join(names) or 'none'}. Set dataset.split."
    )
