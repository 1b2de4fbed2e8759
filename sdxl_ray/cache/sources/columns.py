"""Columns that the settings ask for and that are nowhere: a name misspelt would change training without a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sdxl_ray.cache.sources.files import setting_of
from sdxl_ray.errors import DatasetError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_NUM_SHOWN = 30


class AskedFor:
    """The columns that must be somewhere in a dataset, of what `see` is told.

    Of the settings' defaults only those that a mask or a point of interest needs.
    """

    def __init__(self, section: DatasetSection, *, mask_in_column: bool) -> None:
        self._section = section
        self._seen: dict[str, None] = {}
        settings: dict[str, Sequence[str]] = {
            "caption_columns": _not_default(section, "caption_columns") if "column" in section.captions else (),
            "size_columns": _not_default(section, "size_columns"),
            "focus_columns": section.focus_columns if section.crop == "focus" else (),
            "mask_column": (section.mask_column,) if section.mask == "file" and mask_in_column else (),
        }
        self._columns = [(setting, column) for setting, columns in settings.items() for column in columns]

    def see(self, names: Iterable[str]) -> bool:
        """Of a table or a row. Whether all have been seen now."""
        self._seen.update(dict.fromkeys(names))
        return all(column in self._seen for _, column in self._columns)

    def check(self, files: Sequence[str]) -> None:
        """After all `files` have been seen.

        Raises:
            DatasetError: a column is in none of them.
        """
        problems = [self._problem(setting, column) for setting, column in self._columns if column not in self._seen]
        if problems:
            where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
            names = [*self._seen]
            shown = ", ".join(names[:_NUM_SHOWN]) + (f" and {len(names) - _NUM_SHOWN} more" * (len(names) > _NUM_SHOWN))
            raise DatasetError("\n".join([*problems, f"{where}: has {shown or 'none'}."]))

    def _problem(self, setting: str, column: str) -> str:
        need = {"mask_column": ' for dataset.mask = "file"', "focus_columns": ' for dataset.crop = "focus"'}
        close = difflib.get_close_matches(column, self._seen, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        return f'{setting_of(self._section, setting)}: there is no column "{column}"{need.get(setting, "")}.{hint}'


def _not_default(section: DatasetSection, name: str) -> list[str]:
    default = type(section).model_fields[name].default
    return [column for column in getattr(section, name) if column not in default]
