"""Splits, which the names of files and folders tell.

    of the Hub, or a clone      every name: train-00000-of-00002.parquet, data/train/cat.jpg, cats_train.csv
    a folder of one's own       train-00000-of-00002.parquet; train/ and validation/ where nothing lies beside them
    a pattern                   the same, where it fits files of that split

The rules of the Hub: huggingface.co/docs/hub/datasets-file-names-and-splits. A folder of one's own may be called
"train" beside others that are meant as well, so "train", which dataset.split is unless it is set, chooses there only
where it is plain. Any other split was asked for: where it chooses nothing that is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.files import folder_exists, kind_of, level, names_below, setting_of
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
_UNLESS_SET = "train"


def split_of(name: str) -> str:
    """The split that a file's name or folders tell: "train" of train-00000-of-00002.parquet; empty where none does."""
    shard = _of_shard(name)
    if shard:
        return shard
    for part in name.split("/"):
        for word in re.split(r"[-._ 0-9]+", part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return ""


def _of_shard(name: str) -> str:
    shard = _SHARD.search(name)
    return _canonical(shard[1]) if shard else ""


def _canonical(split: str) -> str:
    return _SPLITS.get(split.lower(), split)


def in_split(section: DatasetSection, name: str) -> bool:
    """Whether a file belongs to dataset.split, or to none."""
    return not section.split or split_of(name) in ("", _canonical(section.split))


# ---- files -----------------------------------------------------------------------------------------------------------


def of_split(
    section: DatasetSection,
    files: Sequence[tuple[str, FileEntry]],
    *,
    root: str = "",
    of_hub: bool = False,
) -> list[tuple[str, FileEntry]]:
    """Those of dataset.split, of (path, entry); all of them where no name tells one.

    Args:
        root: what the paths begin with and tells nothing: a clone may lie below a folder called "dev".
        of_hub: every part of a name tells, and what tells no split is left out beside what does. Otherwise a pattern
            may be of another split than "train", where dataset.split is not set.

    Raises:
        DatasetError: there are other splits only, or the split that is set chooses nothing.
    """
    if not section.split:
        return list(files)
    prefix = f"{storage.split_options(root)[0].rstrip('/')}/" if root else ""
    by_name = split_of if of_hub or section.path.startswith("hf://") else _of_shard

    def tell(path: str) -> str:
        return by_name(path.removeprefix(prefix))

    wanted = _canonical(section.split)
    told = {tell(path) for path, _ in files}
    others = sorted(told - {""})
    if wanted in told:
        kept = [file for file in files if tell(file[0]) in ((wanted,) if of_hub else (wanted, ""))]
        if not section.path.startswith("hf://") and not of_hub:
            _note_others(section, f"{len(files) - len(kept)} of {len(files)} files", len(files) - len(kept))
        return kept
    if others and (of_hub or _is_set(section)):
        raise DatasetError(no_split(section, others))
    check_has_effect(section, section.path, has_effect=False)
    return list(files)


def no_split(section: DatasetSection, names: Sequence[str]) -> str:
    """The text of an error."""
    return (
        f'{setting_of(section)}: {section.path} has no split "{section.split}". '
        f"It has {', '.join(names) or 'none'}. Set dataset.split."
    )


def check_has_effect(section: DatasetSection, where: str, has_effect: bool) -> None:
    """
    Raises:
        DatasetError: dataset.split is set, and chooses nothing.
    """
    if _is_set(section) and not has_effect:
        raise DatasetError(
            f'{setting_of(section, "split")} is "{section.split}", and nothing in {where} tells which images that is: '
            f"no folder {section.split}/ and no file such as {section.split}-00000-of-00002.parquet. Give the path of "
            "these images, or take dataset.split out."
        )


def _is_set(section: DatasetSection) -> bool:
    return section.split not in ("", _UNLESS_SET)


def _note_others(section: DatasetSection, what: str, num: int) -> None:
    """Unless the split is set: then it is what was asked for."""
    if num and not _is_set(section):
        warnings.warn(
            f'{section.path}: {what} are left out, since they are not of dataset.split = "{section.split}"; '
            'dataset.split = "" takes all',
            stacklevel=2,
        )


# ---- folders ---------------------------------------------------------------------------------------------------------


def split_folder(section: DatasetSection, root: str, image: str, *, is_clone: bool) -> str:
    """The folder below `root` that holds just dataset.split: train/, data/train/; empty: there is none, or nothing else
    is in `root`.

    Args:
        image: the name of one below `root`, if one is known.

    Raises:
        DatasetError: there are folders of other splits only.
    """
    if not section.split or (section.format == "folder" and not _is_set(section)):
        return ""
    if image and "/" not in image and not is_clone and not _is_set(section):
        return ""  # known without listing cloud storage again
    data = storage.join(root, "data")
    if is_clone:
        folders = [storage.join(parent, section.split) for parent in (root, data)]
        return next(filter(folder_exists, folders), "")
    found = _chosen(section, root)
    if found or (not _is_set(section) and _holds_other_data(root)):
        return found
    return _chosen(section, data)


def _chosen(section: DatasetSection, parent: str) -> str:
    wanted = _canonical(section.split)
    splits: dict[str, str] = {}  # split -> folder
    others = []
    for name, is_folder in level(parent):
        split = _SPLITS.get(name.lower(), name if name == section.split else "") if is_folder else ""
        if split:
            splits[split] = name if splits.get(split) != section.split else section.split
        elif not is_folder and kind_of(name):
            if not _is_set(section):
                return ""  # at the first one: there may be millions
        elif is_folder:
            others.append(name)
    if wanted not in splits:
        if _is_set(section) and splits:
            raise DatasetError(no_split(section, sorted(splits)))
        return ""
    if not _is_set(section):
        if len(splits) < 2 or any(_holds_data(storage.join(parent, name)) for name in others):
            return ""
        left_out = [f"{folder}/" for split, folder in sorted(splits.items()) if split != wanted]
        _note_others(section, f"the files in {', '.join(left_out)}", len(left_out))
    return storage.join(parent, splits[wanted])


def _holds_other_data(root: str) -> bool:
    """Whether there is something to train on beside `data/`."""
    return any(
        _holds_data(storage.join(root, name)) if is_folder else bool(kind_of(name))
        for name, is_folder in level(root)
        if (name, is_folder) != ("data", True)
    )


def _holds_data(folder: str) -> bool:
    return any(kind_of(name) for name in names_below(folder))
