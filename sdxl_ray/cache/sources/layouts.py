"""What a dataset's path holds: images, tar files or tables; and the layouts of Hugging Face.

a pattern or a file                   data/*.tar, data/{000..099}.tar, captions.csv
a folder                              images; or, where it holds no image, tar files or tables
metadata.csv, metadata.jsonl          beside images: a table of their captions, with a column file_name
save_to_disk of Hugging Face          state.json with data-00000-of-00001.arrow; splits where dataset_dict.json is
a dataset of the Hub, or its clone    train-00000-of-00002.parquet, data/train/..., train/...

Names tell splits: splits.py.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.files import (
    TABLE_SUFFIXES,
    ahead,
    find_files,
    is_image,
    is_pattern,
    kind_of,
    missing,
    names_below,
    not_a_dataset,
    pattern_folder,
    setting_of,
)
from sdxl_ray.cache.sources.splits import check_has_effect, in_split, no_split, of_split, split_folder, split_of
from sdxl_ray.errors import DatasetError
from sdxl_ray.storage import FileEntry

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_Files = list[tuple[str, FileEntry]]


@dataclass(frozen=True)
class Layout:
    """`kind`: folder, webdataset or table. A folder is its `root`, with `entries` where they are listed already.

    `within`: the folder that what tables name must be in; empty: the user named the tables, and answers for them.
    `for_all`: the table is that of all images below `root`.
    """

    kind: str
    root: str
    files: Sequence[tuple[str, FileEntry]] = ()
    entries: Sequence[FileEntry] | None = None
    within: str = ""
    for_all: bool = False


def find_layout(section: DatasetSection) -> Layout:
    """Look just as far as it takes to tell.

    Raises:
        DatasetError: nothing there, nothing that is understood, or another format than dataset.format.
        ConfigError, StorageError: as `storage` raises them.
    """
    path = section.path
    storage.check_address(path)
    if path.startswith("hf://"):
        return _of_hub(section)
    local = storage.local_path(path)
    is_file = storage.status(path) is not None and (local is None or not local.is_dir())
    if is_pattern(path) or is_file:
        return _of_files(section, find_files(section))
    if local is not None and not local.exists():
        raise missing(section)
    return _of_folder(section, path)


def _of_files(section: DatasetSection, files: _Files, *, of_repository: str = "") -> Layout:
    kinds = {kind_of(path) for path, _ in files}
    first = files[0][0]
    if len(files) == 1 and kinds & {"", "folder"} and not is_pattern(section.path):
        raise not_a_dataset(section, first)
    if len(kinds) > 1 or kinds & {"", "folder"}:
        raise DatasetError(
            f"{setting_of(section)}: {section.path} fits files such as {first}, expected only .tar files, or only "
            f"tables ({' '.join(TABLE_SUFFIXES)}). For images, give their folder."
        )
    kind = _agreed(section, kinds.pop())
    return Layout(kind, _root_of(section.path), of_split(section, files, root=of_repository))


def _agreed(section: DatasetSection, kind: str) -> str:
    if section.format not in ("auto", kind):
        raise DatasetError(
            f'{setting_of(section)}: {section.path} is a {kind}, and dataset.format = "{section.format}". '
            'Set it to "auto", or correct the path.'
        )
    return kind


def _root_of(path: str) -> str:
    """The folder that names are relative to."""
    return pattern_folder(path) if is_pattern(path) else path.rpartition("/")[0]


# ---- folders ---------------------------------------------------------------------------------------------------------


def _of_folder(section: DatasetSection, root: str) -> Layout:
    saved = _saved_to_disk(section, root) if section.format != "folder" else None
    if saved is not None:
        return saved
    is_clone = _is_clone(root)
    metadata = _metadata(section, root) if section.format in ("auto", "table") else None
    beside_all = metadata is not None and metadata[0].rpartition("/")[0] in (root, storage.join(root, "data"))
    if metadata is not None and (is_clone or metadata[0].rpartition("/")[0] == root):
        check_has_effect(section, root, has_effect=not beside_all)
        return Layout("table", root, [metadata], within=root, for_all=not is_clone)
    kinds, files, first = _look_around(section, root)
    folder = split_folder(section, root, first, is_clone=is_clone)
    if folder and not is_clone:
        return _of_folder(section.model_copy(update={"split": ""}), folder)
    if metadata is not None:
        if section.format == "auto":
            _refuse_others(section, root, metadata[0])
        check_has_effect(section, root, has_effect=not beside_all)
        return Layout("table", root, [metadata], within=root, for_all=True)
    wanted: str = section.format if section.format != "auto" else "folder" if "folder" in kinds else ""
    if kinds == {"webdataset", "table"} and not wanted:
        raise DatasetError(
            f"{setting_of(section)}: {root} holds tar files and tables. Set dataset.format, or give a pattern such as "
            f"{storage.join(root, '*.tar')}."
        )
    wanted = wanted or next(iter(kinds), "folder")
    if wanted == "folder":
        check_has_effect(section, root, has_effect=folder != "")
        return Layout("folder", folder or root)
    chosen = [(storage.join(root, entry.name), entry) for entry in files if kind_of(entry.name) == wanted]
    if not chosen:
        raise DatasetError(f'{setting_of(section)}: {root} holds no files for dataset.format = "{wanted}".')
    return Layout(wanted, root, of_split(section, chosen, root=root, of_hub=is_clone), within=root)


_FRONT_MATTER = re.compile(rb"---\s*\n(?:.*\n)??(?:dataset_info|configs)\s*:", re.DOTALL)


def _is_clone(root: str) -> bool:
    """Whether the folder was once a dataset of the Hub. A README.md alone does not tell: anybody may write one."""
    if storage.status(storage.join(root, "dataset_infos.json")) is not None:
        return True
    notes = _start_of(storage.join(root, ".gitattributes"))
    if b"filter=lfs" in notes and b"parquet" in notes:
        return True
    card = _start_of(storage.join(root, "README.md"))
    return _FRONT_MATTER.match(card.partition(b"\n---")[0]) is not None


def _start_of(path: str) -> bytes:
    """Up to 1 MiB; nothing where there is no such file. A dataset's card may have thousands of lines of `configs`."""
    return storage.read_bytes(path, 0, 2**20).replace(b"\r\n", b"\n") if storage.status(path) is not None else b""


def _refuse_others(section: DatasetSection, root: str, metadata: str) -> None:
    """
    Raises:
        DatasetError: the table lies in a subfolder, and there are images that are not in this one.
    """
    folder = metadata.removeprefix(storage.join(root, "")).rpartition("/")[0]
    other = folder and next(
        (name for name in names_below(root) if is_image(name) and not name.startswith(f"{folder}/")), ""
    )
    if other:
        raise DatasetError(
            f"{setting_of(section)}: {root} has a table in {folder}/, and images outside of it, such as {other}. Set "
            f'dataset.path to {storage.join(root, folder)}, or dataset.format = "folder" for all images without the '
            "table."
        )


def _look_around(section: DatasetSection, root: str) -> tuple[set[str], list[FileEntry], str]:
    """(kinds of files that there are, tar files and tables, the first image). Ends at that, if it settles the kind."""
    if section.format == "folder":
        return {"folder"}, [], ""
    kinds: set[str] = set()
    files = []
    for name in names_below(root):
        kind = kind_of(name)
        if kind == "folder" and section.format == "auto":
            return {"folder"}, [], name
        if kind in ("webdataset", "table"):
            kinds.add(kind)
            files.append(name)
    files.sort()
    entries = zip(files, ahead(storage.status, (storage.join(root, name) for name in files)), strict=True)
    return kinds, [FileEntry(name, entry.size, entry.mtime_ns) for name, entry in entries if entry is not None], ""


def _metadata(section: DatasetSection, root: str) -> tuple[str, FileEntry] | None:
    """The table beside the images, if there is one with a column file_name."""
    folders = ["", section.split, f"data/{section.split}", "data"] if section.split else ["", "data"]
    for folder, name in itertools.product(dict.fromkeys(folders), _METADATA):
        path = storage.join(root, f"{folder}/{name}" if folder else name)
        entry = storage.status(path)
        if entry is not None and _has_file_names(path):
            return path, entry
    return None


def _has_file_names(path: str) -> bool:
    if path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with storage.reading_errors(path), storage.open_arrow(path) as file:
                return "file_name" in pq.read_schema(file).names
        except pa.ArrowException:
            return False
    with storage.open_buffered(path) as file:
        return b"file_name" in file.readline(2**20)


def _saved_to_disk(section: DatasetSection, root: str) -> Layout | None:
    """What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` of Hugging Face write."""
    splits = storage.join(root, "dataset_dict.json")
    if storage.status(splits) is not None:
        names = _json(splits).get("splits")
        names = [str(name) for name in names] if isinstance(names, list) else []
        if section.split and section.split not in names:
            raise DatasetError(no_split(section, names))
        chosen = [section.split] if section.split else sorted(names)
        files = [file for name in chosen for file in _arrow_files(storage.join(root, name))]
    elif storage.status(storage.join(root, "state.json")) is None:
        return None
    else:
        own = _json(storage.join(root, "state.json")).get("_split")
        check_has_effect(section, root, has_effect=own == section.split)
        files = _arrow_files(root)
    return Layout(_agreed(section, "table"), root, files, within=root)


def _arrow_files(folder: str) -> _Files:
    """In the order of their rows."""
    state = _json(storage.join(folder, "state.json")).get("_data_files")
    files = []
    for item in state if isinstance(state, list) else []:
        path = storage.join(folder, str(item.get("filename") if isinstance(item, dict) else item))
        entry = storage.status(path)
        if entry is None:
            raise DatasetError(f"{path} does not exist, and state.json beside it names it. Copy the folder again.")
        files.append((path, entry))
    return files


def _json(path: str) -> dict[str, object]:
    try:
        found = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist. Copy the folder again.") from None
    except ValueError as error:
        raise DatasetError(f"{path} is no JSON: {error}. Copy the folder again.") from None
    return found if isinstance(found, dict) else {}


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _of_hub(section: DatasetSection) -> Layout:
    """The repository is listed once; its files are read as they are needed."""
    root, pattern = hub_address(section.path, section.revision)
    if pattern:
        located = section.model_copy(update={"path": storage.join(root, pattern)})
        return _of_files(section, find_files(located), of_repository=root)
    files = storage.open_folder(root).list()
    if not files:
        raise DatasetError(
            f"{setting_of(section)}: {root} holds no files. Check its name and dataset.revision; of a dataset that is "
            "not public, set HF_TOKEN on every machine."
        )
    kinds = {kind_of(entry.name) for entry in files} - {""}
    names = {entry.name: entry for entry in files}
    if "folder" in kinds and section.format in ("auto", "table"):
        for name in sorted(names):
            is_metadata = name.rpartition("/")[2] in _METADATA
            if is_metadata and in_split(section, name) and _has_file_names(storage.join(root, name)):
                check_has_effect(section, root, has_effect=split_of(name) != "")
                return Layout("table", root, [(storage.join(root, name), names[name])], within=root)
    order = ("webdataset", "folder", "table") if section.format == "auto" else (section.format,)
    parquet = [entry for entry in files if entry.name.endswith(".parquet")]
    if parquet and section.format in ("auto", "table"):
        chosen, kind = parquet, "table"
    else:
        kind = next((kind for kind in order if kind in kinds), "")
        chosen = [entry for entry in files if kind and kind_of(entry.name) == kind]
    if not chosen:
        raise DatasetError(f"{setting_of(section)}: {root} holds no images, tar files or tables.")
    chosen = [entry for _, entry in of_split(section, [(entry.name, entry) for entry in chosen], of_hub=True)]
    if kind == "folder":
        # Captions and masks lie beside the images; their names need not tell the split.
        folders = {entry.name.rpartition("/")[0] for entry in chosen}
        return Layout("folder", root, entries=[entry for entry in files if entry.name.rpartition("/")[0] in folders])
    return Layout(kind, root, [(storage.join(root, entry.name), entry) for entry in chosen], within=root)


def hub_address(path: str, revision: str) -> tuple[str, str]:
    """(`hf://datasets/org/name@revision/folder`, the pattern below it or empty) of hf://org/name and its longer forms.

    Raises:
        DatasetError: it names no repository.
    """
    rest = path.removeprefix("hf://").removeprefix("datasets/").strip("/")
    parts = rest.split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise DatasetError(f"dataset.path: {path} names no dataset of the Hub, expected hf://org/name.")
    name, _, named = parts[1].partition("@")
    revision = named or revision.replace("/", "%2F")
    root = f"hf://datasets/{parts[0]}/{name}" + (f"@{revision}" if revision else "")
    inner = "/".join(parts[2:])
    if inner and (is_pattern(f"hf://{inner}") or kind_of(inner)):
        return root, inner
    return (storage.join(root, inner) if inner else root), ""
