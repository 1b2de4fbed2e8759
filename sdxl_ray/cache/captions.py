"""The base captions of each image: read, cleaned, replaced. caption_variants.py shuffles and decorates them.

    a source ─▶ cleaned ─▶ caption_replace ─▶ trimmed

An image never gets another image's caption: its source says which text file is its own, and everything here keeps the
order of the images.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from sdxl_ray.cache.caption_files import MAX_BYTES, CaptionFiles, UnreadableCaption, is_elsewhere, too_large
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.cache.text_memo import TextMemo
    from sdxl_ray.config.schema import DatasetSection

_THREADS = 32

# What no caption has and a model should not be told: control characters, among them NUL and the ends of lines, line
# and paragraph separators, and halves of surrogate pairs, which cannot be written as UTF-8.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_LINE_END = re.compile("\r\n|\r|\n")  # `splitlines` would also cut at U+2028 and others that scraped text is full of
NO_CAPTION = 'has no caption, and dataset.captions says "skip"'  # why an image is left out by choice


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """The caption settings of one dataset as plain values; each is explained in `DatasetSection`."""

    dataset: str = ""  # its name, for reports
    sources: tuple[str, ...] = ("textfile", "column")
    columns: tuple[str, ...] = ("caption", "text")
    instance_prompt: str = ""
    extension: str = ".txt"
    lines: Literal["alternatives", "whole"] = "alternatives"
    replace: tuple[tuple[str, str], ...] = ()
    trigger_word: str = ""
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    variants: int = 1

    @classmethod
    def of(cls, section: DatasetSection) -> CaptionRules:
        return cls(
            dataset=section.name,
            sources=section.captions,
            columns=section.caption_columns,
            instance_prompt=section.instance_prompt,
            extension=section.caption_extension,
            lines=section.caption_lines,
            replace=section.caption_replace,
            trigger_word=section.trigger_word,
            prefix=section.caption_prefix,
            suffix=section.caption_suffix,
            separator=section.tag_separator,
            shuffle_tags=section.shuffle_tags,
            keep_tags=section.keep_tags,
            tag_dropout=section.tag_dropout,
            variants=section.caption_variants,
        )

    @property
    def skips(self) -> bool:
        """Whether an image without a caption is left out."""
        return "skip" in self.sources

    @property
    def varies(self) -> bool:
        """Whether a caption has more than one variant."""
        return self.shuffle_tags or self.tag_dropout > 0


# ---- base captions ---------------------------------------------------------------------------------------------------


class Captions(NamedTuple):
    """What an image has. Neither texts nor a problem: it simply has none, and is left out where the rules say so
    (`skips`), else see `no_captions_error`.
    """

    texts: tuple[str, ...]  # base captions
    source: str = ""  # which of `CaptionRules.sources` they are from; empty where there are none
    problem: str = ""  # why they cannot be read, so that the image is skipped


def read_captions(listed: Sequence[Listed], rules: CaptionRules, memo: TextMemo | None = None) -> list[Captions]:
    """Those of each image.

    Args:
        memo: what earlier runs have read of caption files in cloud storage.

    Raises:
        StorageError: cloud storage does not let us read. That is no matter of single images.
    """
    files = CaptionFiles(listed, memo)
    if "textfile" not in rules.sources or not any(image.text_file for image in listed):
        found = [_captions_or_problem(image, rules, files) for image in listed]
    else:
        # In threads: on a network drive each file takes a millisecond of waiting, in cloud storage fifty. Many files a
        # task, where there are many: a task costs as much as reading a file of a local disk.
        in_store = any(is_elsewhere(image.text_file) for image in listed)
        num_threads = _THREADS if in_store else min(_THREADS, 4 * (os.cpu_count() or 1))
        size = max(1, min(256, len(listed) // num_threads))
        pieces = [listed[start : start + size] for start in range(0, len(listed), size)]

        def read(piece: Sequence[Listed]) -> list[Captions]:
            return [_captions_or_problem(image, rules, files) for image in piece]

        with ThreadPoolExecutor(num_threads) as threads:
            found = [item for piece in threads.map(read, pieces) for item in piece]
    files.remember()
    return found


def _captions_or_problem(image: Listed, rules: CaptionRules, files: CaptionFiles) -> Captions:
    try:
        return _find(image, rules, files)
    except UnreadableCaption as error:
        return Captions((), problem=str(error))


def _find(image: Listed, rules: CaptionRules, files: CaptionFiles) -> Captions:
    """The base captions of one image, from the first source that has any; none if none has. The source "empty" has "".

    Raises:
        UnreadableCaption: the text is not UTF-8 (or UTF-16 that says so), too large, or cannot be read.
    """
    for source in rules.sources:
        if source == "empty":
            return Captions(("",), source)
        captions = _unique(filter(None, (_clean(text, rules.replace) for text in _texts(source, image, rules, files))))
        if captions:
            return Captions(captions, source)
    return Captions((), "")


def _texts(source: str, image: Listed, rules: CaptionRules, files: CaptionFiles) -> Iterable[str]:
    if source == "textfile":
        text = files.read(image.text_file) if image.text_file else ""
        return [text] if rules.lines == "whole" else _LINE_END.split(text)
    if source == "column":
        if any(len(text) > MAX_BYTES for text in image.texts):
            raise UnreadableCaption(too_large("its caption", max(map(len, image.texts))))
        return image.texts
    if source == "filename":
        return (PurePosixPath(image.path).stem.replace("_", " ").replace("-", " "),)
    return (rules.instance_prompt,) if source == "instance_prompt" else ()


def _clean(text: str, replace: tuple[tuple[str, str], ...]) -> str:
    text = _NO_TEXT.sub(" ", text).strip()
    for pattern, replacement in _compiled(replace):
        text = pattern.sub(replacement, text)
    return text.strip()


@functools.cache
def _compiled(replace: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in replace)


def _unique(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(captions))


def several_captions_note(num: int, num_images: int, rules: CaptionRules, given: Mapping[str, int]) -> str:
    """For `num` of `num_images` images that have more than one caption; `given`: how many captions each source gave."""
    cures = []
    if given.get("textfile") and rules.lines == "alternatives":
        cures.append('the lines of a caption file are one caption, set dataset.caption_lines = "whole"')
    if given.get("column"):
        cures.append('a list is one caption, set dataset.caption_lists = "tags"')
    text = f"{num} of {num_images} images have several captions, of which each epoch draws one"
    return f"{text}; if {'; if '.join(cures)}" if cures else text


# ---- images without --------------------------------------------------------------------------------------------------


def no_captions_error(
    without: Sequence[Listed], num_without: int, num_images: int, rules: CaptionRules
) -> DatasetError:
    """For `num_without` of `num_images` images that have no caption; `without` are the first of them, at least one.

    Not with the sources "empty" and "skip", which leave none without.
    """
    shown = "\n".join(f"  {image.path}" for image in without[:5])
    more = f"\n  and {num_without - min(5, len(without))} more" if num_without > min(5, len(without)) else ""
    example = PurePosixPath(without[0].path)
    is_tar = without[0].address.startswith("tar:")
    columns = without[0].columns
    in_tables = "the .json" if is_tar else "a column" if columns else "a column (of a WebDataset: in the .json)"
    there_are = f", and there are {', '.join(columns[:30])} (dataset.caption_columns)" if columns else ""
    in_table = bool(columns) and not is_tar  # beside its rows, or what they name, no caption file is looked for
    texts = {
        "textfile": f"{example.stem}{rules.extension} or {example.name}{rules.extension} beside {example.name} with at "
        "least one line",
        "column": f"a text in {in_tables} called {' or '.join(rules.columns)}{there_are}",
        "filename": "a file name with letters",
        "instance_prompt": "dataset.instance_prompt, which is empty",
    }
    expected = [texts[source] for source in rules.sources if not (in_table and source == "textfile")]
    others = [
        text
        for source, text in (
            *((("column", '"column"'),) if columns else ()),
            ("filename", '"filename"'),
            ("instance_prompt", '"instance_prompt" with dataset.instance_prompt'),
        )
        if source not in rules.sources
    ]
    others += ['"empty" (no words)', '"skip" (leave these images out)']
    emptied = " Or dataset.caption_replace has left nothing of them." if rules.replace else ""
    return DatasetError(
        f'{num_without} of {num_images} images of dataset "{rules.dataset}" have no caption:\n{shown}{more}\n'
        f"Expected {'; or '.join(expected) or 'a caption'} (dataset.captions = {json.dumps(list(rules.sources))})."
        f"{emptied}{_beside(without, rules)} Write them, or add another source to dataset.captions: "
        f"{', or '.join(others)}."
    )


# How files of captions end; those of latents (.npz), of notes (.json) and others do not.
_TEXT_SUFFIX = re.compile(r"\.(txt|text|\w*cap|\w*captions?|\w*tags?|prompts?|desc|description)", re.IGNORECASE)
_MASK = re.compile(r".([-_.]mask\w*\.\w+)", re.IGNORECASE)  # OneTrainer: cat-masklabel.png


def _beside(without: Sequence[Listed], rules: CaptionRules) -> str:
    """What may be a caption file under another name, or a table of captions; and images that may be none."""
    return "".join(
        (
            _other_files(without, rules) if "textfile" in rules.sources else "",
            _tables(without),
            _masks(without),
        )
    )


def _other_files(without: Sequence[Listed], rules: CaptionRules) -> str:
    notes = ""
    for image in without:
        own = {name: _ending(name, PurePosixPath(image.path)) for name in image.beside if "/" not in name}
        extensions = dict.fromkeys(
            ending
            for name, ending in own.items()
            if _TEXT_SUFFIX.fullmatch(PurePosixPath(name).suffix) and ending.lower() != rules.extension.lower()
        )
        if extensions:
            files = [name for name, ending in own.items() if ending in extensions]
            extension = " or ".join(f'"{ending}"' for ending in extensions)
            return (
                f" Beside {PurePosixPath(image.path).name} there is {', '.join(files)}: if that is its caption, set "
                f"dataset.caption_extension = {extension}."
            )
        json_file = next((name for name, ending in own.items() if ending.lower() == ".json"), "")
        if json_file and not notes:
            notes = (
                f" Of a folder no .json such as {json_file} is read: write a metadata.jsonl beside the images, a line "
                f'for each: {{"file_name": "{PurePosixPath(image.path).name}", "text": "..."}}; or pack image and '
                ".json into tar files (WebDataset)."
            )
    return notes


def _ending(name: str, image: PurePosixPath) -> str:
    """What a caption file's name has more than its image's: ".caption.txt"."""
    for beginning in (image.name, image.stem, image.name.partition(".")[0]):
        if name.startswith(f"{beginning}."):
            return name.removeprefix(beginning)
    return PurePosixPath(name).suffix


def _tables(without: Sequence[Listed]) -> str:
    tables = [*dict.fromkeys(name for image in without for name in image.beside if "/" in name)]
    if not tables:
        return ""
    if len(tables) > 1 and len({PurePosixPath(table).name for table in tables}) == 1:
        cure = 'set dataset.format = "table"'
    else:
        cure = "set dataset.path to it" if len(tables) == 1 else "set dataset.path to the one that is meant"
    are = "There is a table, {}, which is" if len(tables) == 1 else "There are tables, {}, which are"
    return f" {are.format(', '.join(tables))} not read beside images: if the captions are there, {cure}."


def _masks(without: Sequence[Listed]) -> str:
    """Images that look like the masks of others."""
    for path in (PurePosixPath(image.path) for image in without):
        suffix = _MASK.search(path.name)
        if suffix:
            return f' If {path.name} is a mask and no picture, set dataset.mask_suffix = "{suffix[1]}".'
        if path.parent.name.lower() in ("mask", "masks"):
            return f" If what is in {path.parent} are masks and no pictures, move them out of dataset.path."
    return ""
