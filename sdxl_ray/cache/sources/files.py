"""What all sources need: names that can be printed, stamps, patterns of files, and words for what is wrong."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sdxl_ray import storage
from sdxl_ray.errors import DatasetError
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif", ".heic", ".heif", ".jxl"}
)
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".arrow", ".feather")
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ARCHIVES = (".zip", ".7z", ".rar")
MISSING = "missing"  # the stamp of a file that is not there: it is reported when it is opened
_THREADS = 16  # most of the time they wait for a network
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def setting_of(section: DatasetSection, name: str = "path") -> str:
    """How errors call a setting: dataset.path of cats."""
    return f"dataset.{name} of {section.name}" if section.name else f"dataset.{name}"


def without_masks(section: DatasetSection, where: str, example: str) -> DatasetError:
    """Of `dataset.mask = "file"`, where not one image has one. `example`: what the mask of cat.jpg would be called."""
    return DatasetError(
        f'{setting_of(section, "mask")} is "file", and not one image in {where} has a mask: of cat.jpg it would be '
        f'{example} (dataset.mask_suffix = "{section.mask_suffix}"). Set dataset.mask_suffix, or dataset.mask = "none".'
    )


def not_a_dataset(section: DatasetSection, path: str) -> DatasetError:
    """Of a file that is none of the kinds that are read."""
    if is_image(path):
        return DatasetError(f"{setting_of(section)}: {path} is one image, expected a folder of images.")
    cure = " Write it as .jsonl: one object a line." if path.lower().endswith(".json") else ""
    cure = " Unpack it, and give the folder." if path.lower().endswith(_ARCHIVES) else cure
    return DatasetError(
        f"{setting_of(section)}: {path} is a file of another kind, expected a folder of images, or a file that ends "
        f"in .tar {' '.join(TABLE_SUFFIXES)}.{cure}"
    )


def missing(section: DatasetSection) -> DatasetError:
    """Of a path that is not there."""
    path = section.path
    example = str(type(section).model_fields["path"].default)
    if path == example or path.endswith(f"/{example}"):
        return DatasetError(
            f"{setting_of(section)} is still the example's. Set it to the folder that holds your images."
        )
    is_file = path.lower().endswith((".tar", *PACKED_TARS, *TABLE_SUFFIXES))
    cure = "Check its name." if is_file else "Set it to the folder that holds your images."
    return DatasetError(f"{setting_of(section)}: {path} does not exist. {_not_filled_in(path) or cure}")


def _not_filled_in(path: str) -> str:
    is_variable = "$" in path and not storage.is_uri(path)
    return "Variables such as $HOME are not filled in: write the path out." if is_variable else ""


def printable(name: str) -> str:
    """The name with bytes that are not UTF-8 escaped; they would stop the terminal, Parquet and CSV."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_image(name: str) -> bool:
    """By its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  (a Path per file doubles the time)


def kind_of(name: str) -> str:
    """What a file may be a dataset or a part of one as, by its name: webdataset, table, folder (an image), or ""."""
    lower = name.lower()
    if lower.endswith((".tar", *PACKED_TARS)):
        return "webdataset"
    if lower.endswith(TABLE_SUFFIXES):
        return "table"
    return "folder" if is_image(name) else ""


def level(folder: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies in a folder and is not hidden; of none nothing.

    What cannot be read is left to the listing, which tells of it.
    """
    local = storage.local_path(folder)
    if local is None:
        folders, files = storage.list_level(folder)
        yield from ((name, True) for name in folders if not name.startswith("."))
        yield from ((file.name, False) for file in files if not file.name.startswith("."))
        return
    with contextlib.suppress(OSError), os.scandir(local) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                is_folder = False
                with contextlib.suppress(OSError):  # a link to itself
                    is_folder = entry.is_dir()
                yield entry.name, is_folder


def folder_exists(path: str) -> bool:
    """Of a store: whether anything lies below it."""
    local = storage.local_path(path)
    return local.is_dir() if local is not None else any(map(bool, storage.list_level(path)))


def names_below(root: str) -> Iterator[str]:
    """Names of files, relative to the folder; of hidden ones none. What cannot be read is left to the listing."""
    seen: set[tuple[int, int]] = set()  # folders of this machine, which links may lead to again
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = storage.join(root, folder) if folder else root
        local = storage.local_path(path)
        if local is not None:
            try:
                status = local.stat()
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
        for name, is_folder in level(path):
            if is_folder:
                waiting.append(f"{folder}{name}/")
            else:
                yield f"{folder}{name}"


def stamp_of(entry: FileEntry) -> str:
    """Of a listed file."""
    return f"{entry.size}-{entry.mtime_ns}"


def local_stamps(paths: Sequence[str], missing: str = MISSING) -> Iterator[str]:
    """Size and date of each file. In threads: on a network drive each takes a millisecond of waiting."""

    def look(piece: Sequence[str]) -> list[str]:
        return [_stamp(path, missing) for path in piece]

    for found in ahead(look, [paths[start : start + 256] for start in range(0, len(paths), 256)]):
        yield from found


def _stamp(path: str, missing: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return missing
    return f"{status.st_size}-{status.st_mtime_ns}"


def ahead(function: Callable[[_Item], _Result], items: Iterable[_Item], num: int = _THREADS) -> Iterator[_Result]:
    """`map` that works on up to `num` items at once, in their order; no more results than that wait in memory."""
    waiting = iter(items)
    first = list(itertools.islice(waiting, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    with ThreadPoolExecutor(num) as threads:
        pending: list[Future[_Result]] = []
        try:
            for item in itertools.chain(first, waiting):
                pending.append(threads.submit(function, item))
                if len(pending) >= num:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


# ---- patterns --------------------------------------------------------------------------------------------------------

_PATTERN = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_pattern(path: str) -> bool:
    """Whether it stands for several files; a folder that is really called "[2024] cats" does not."""
    if not storage.is_uri(path):
        return _PATTERN.search(path) is not None and not os.path.lexists(path)
    return _PATTERN.search(storage.split_options(path)[0]) is not None


def pattern_folder(pattern: str) -> str:
    """The folder above the first part of a pattern that is not plain."""
    address, options = storage.split_options(pattern)
    return storage.normalized(re.split(r"[*?\[{]", address)[0].rpartition("/")[0] + options)


def expand_braces(path: str) -> list[str]:
    """`{000..002}` and `{cats,dogs}`, as the shell does."""
    found = _RANGE.search(path)
    if found:
        first, last = int(found[1]), int(found[2])
        width = len(found[1]) if found[1].startswith("0") else 0
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        found = _CHOICE.search(path)
        if not found:
            return [path]
        choices = found[1].split(",")
    head, tail = path[: found.start()], path[found.end() :]
    return [full for choice in choices for full in expand_braces(head + choice + tail)]


def find_files(section: DatasetSection) -> list[tuple[str, FileEntry]]:
    """(path, entry) of the files that a pattern or the name of one file stands for, sorted by path.

    Raises:
        DatasetError: a file that is named does not exist, or a pattern fits none.
    """
    found: dict[str, FileEntry] = {}
    for path in expand_braces(section.path) if is_pattern(section.path) else [section.path]:
        matches = _glob(path) if is_pattern(path) else [(path, storage.status(path))]
        here = {name: entry for name, entry in matches if entry is not None}
        if not here:
            named = (name for name, _ in matches) if is_pattern(section.path) else ()
            folder = next(filter(folder_exists, named), "")
            if folder:
                raise DatasetError(
                    f"{setting_of(section)}: {folder} is a folder, and {section.path} stands for files. Give each "
                    f"folder a [[dataset]] of its own, or write {section.path}/*.jpg."
                )
            if not is_pattern(path):
                raise missing(section.model_copy(update={"path": path}))
            cure = _not_filled_in(path) or "Check the folder and the pattern."
            raise DatasetError(f"{setting_of(section)}: no file fits {path}. {cure}")
        found.update(here)
    return sorted(found.items())


def _glob(pattern: str) -> list[tuple[str, FileEntry | None]]:
    if not storage.is_uri(pattern):
        return [(path, storage.status(path)) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    folder = pattern_folder(pattern)
    fits = _as_expression(pattern.removeprefix(folder + "/"))
    return [
        (storage.join(folder, entry.name), entry)
        for entry in storage.open_folder(folder).list()
        if fits.fullmatch(entry.name)
    ]


def _as_expression(pattern: str) -> re.Pattern[str]:
    """As `glob` reads it: `*` and `?` stay within a folder, `**` does not."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return re.compile(
        "".join(
            signs.get(part) or (part.replace("[!", "[^", 1) if re.fullmatch(r"\[.+\]", part) else re.escape(part))
            for part in parts
        ),
        re.DOTALL,
    )
