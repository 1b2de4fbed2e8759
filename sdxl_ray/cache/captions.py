"""Give each image its captions: from the text file beside it, its file name, or one prompt for all.

An image never gets another image's caption: where one text file could belong to two images, that is an error.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdxl_ray.errors import DatasetError


class UnreadableCaption(Exception):
    """A caption file that is no UTF-8 text; the image is skipped and listed with this reason."""


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """`sources` are tried in order; `trigger_word` is put before captions that lack it."""

    sources: tuple[str, ...] = ("textfile",)
    instance_prompt: str = ""
    trigger_word: str = ""


def attach_captions(paths: Sequence[str], rules: CaptionRules) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(captions of each image, reason for each image that is skipped).

    Raises:
        DatasetError: two images share one caption file; or images have no caption at all.
    """
    exists = _listed(paths) if "textfile" in rules.sources else os.path.exists
    if "textfile" in rules.sources:
        _refuse_shared_files(paths, exists)

    def find(piece: Sequence[str]) -> list[tuple[str, ...] | UnreadableCaption]:
        return [_captions_or_problem(path, rules, exists) for path in piece]

    captions: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    without: list[str] = []
    # In threads: on a network drive each file takes a millisecond of waiting. Many files a task: a task costs as much
    # as reading a file of a local disk.
    pieces = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:
        results = [found for piece in threads.map(find, pieces) for found in piece]
    for path, found in zip(paths, results, strict=True):
        if isinstance(found, UnreadableCaption):
            skipped[path] = str(found)
        elif found:
            captions[path] = found
        else:
            without.append(path)
    if without:
        raise DatasetError(_no_caption_text(without, len(paths), rules))
    return captions, skipped


def _captions_or_problem(
    path: str, rules: CaptionRules, exists: Callable[[str], bool]
) -> tuple[str, ...] | UnreadableCaption:
    try:
        return find_captions(path, rules, exists)
    except UnreadableCaption as error:
        return error


def find_captions(path: str, rules: CaptionRules, exists: Callable[[str], bool] = os.path.exists) -> tuple[str, ...]:
    """The captions of one image, from the first source that has any; empty if none has.

    Raises:
        UnreadableCaption: its text file is no UTF-8, or cannot be read.
    """
    for source in rules.sources:
        if source == "textfile":
            found = _from_text_file(path, exists)
        elif source == "filename":
            found = (Path(path).stem.replace("_", " ").replace("-", " ").strip(),)
        else:
            found = (rules.instance_prompt,)
        if any(found):
            return tuple(_with_trigger(caption, rules.trigger_word) for caption in found)
    return ()


def caption_file(path: str, exists: Callable[[str], bool] = os.path.exists) -> str | None:
    """`cat.jpg.txt` if it exists, else `cat.txt` if it exists."""
    for candidate in (f"{path}.txt", f"{os.path.splitext(path)[0]}.txt"):  # noqa: PTH122  (called for every image)
        if exists(candidate):
            return candidate
    return None


def _listed(paths: Iterable[str]) -> Callable[[str], bool]:
    """`os.path.exists` for text files beside these images, from one listing of each folder."""
    names = {folder: _text_files(folder) for folder in {os.path.dirname(path) for path in paths}}  # noqa: PTH120

    def exists(path: str) -> bool:
        folder, name = os.path.split(path)
        return name in names[folder]

    return exists


def _text_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            # A link counts if it leads somewhere, as for `os.path.exists`.
            return {
                entry.name
                for entry in entries
                if entry.name.endswith(".txt") and (not entry.is_symlink() or os.path.exists(entry.path))  # noqa: PTH110
            }
    except OSError:  # deleted while we look
        return set()


def _from_text_file(path: str, exists: Callable[[str], bool]) -> tuple[str, ...]:
    file = caption_file(path, exists)
    if file is None:
        return ()
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")  # Windows editors put a byte order mark in front
    except UnicodeDecodeError as error:
        name = Path(file).name
        raise UnreadableCaption(
            f"caption file {name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}. "
            f"If it is Latin-1: iconv -f latin1 -t utf-8 {name}"
        ) from None
    except OSError as error:
        raise UnreadableCaption(f"caption file {Path(file).name} cannot be read: {error.strerror}") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _with_trigger(caption: str, trigger_word: str) -> str:
    # As a word of its own: a trigger "art" is not in "party".
    if not trigger_word or re.search(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger_word}, {caption}"


def _refuse_shared_files(paths: Sequence[str], exists: Callable[[str], bool]) -> None:
    images_of: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        file = caption_file(path, exists)
        if file is not None:
            images_of[file].append(path)
    shared = [(file, images) for file, images in images_of.items() if len(images) > 1]
    if not shared:
        return
    shown = "\n".join(
        f"  {file} could belong to {' or '.join(Path(image).name for image in images)}" for file, images in shared[:10]
    )
    more = f"\n  and {len(shared) - 10} more" if len(shared) > 10 else ""
    raise DatasetError(
        f"{len(shared)} caption files could belong to several images:\n{shown}{more}\n"
        'Name each after its whole image file ("cat.jpg.txt"), or remove the second image.'
    )


def _no_caption_text(without: Sequence[str], num_images: int, rules: CaptionRules) -> str:
    first = "\n".join(f"  {path}" for path in without[:5])
    more = f"\n  and {len(without) - 5} more" if len(without) > 5 else ""
    example = Path(without[0])
    return (
        f"{len(without)} of {num_images} images have no caption:\n{first}{more}\n"
        f"Expected {example.with_suffix('.txt').name} or {example.name}.txt beside {example.name} "
        f"with at least one line (dataset.captions = {list(rules.sources)}). Write them, or add another source: "
        'dataset.captions = ["textfile", "filename"], or "instance_prompt" with dataset.instance_prompt.'
    )
