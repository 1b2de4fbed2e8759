"""Give each image its captions, and vary them.

    a source ─▶ cleaned ─▶ caption_replace ─▶ trimmed                     `read_captions`: base captions
    base caption ─▶ tags shuffled and thinned ─▶ trigger word, prefix, suffix   `expand_variants` in stage 1, or
                                                                          `draw_variant` while training

Trigger word, prefix and suffix come last, so that they are never moved or dropped. An image never gets another image's
caption: its source says which text file is its own, and everything here keeps the order of the images.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from sdxl_ray import storage
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.cache.text_memo import TextMemo
    from sdxl_ray.config.schema import DatasetSection

AS_IT_IS = -1  # in the place of a base caption's number: neither shuffled nor thinned
_THREADS = 32
_LONGEST_REMEMBERED = 10_000  # characters
MAX_BYTES = 1_000_000  # of a caption file: the encoders read some 300 characters, so a larger one is something else

# What no caption has and a model should not be told: control characters, among them NUL and the ends of lines, line
# and paragraph separators, and halves of surrogate pairs, which cannot be written as UTF-8.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_LINE_END = re.compile("\r\n|\r|\n")  # `splitlines` would also cut at U+2028 and others that scraped text is full of
_BYTE_ORDER_MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TAR_MEMBER = re.compile(r"tar:(\d+)\+(\d+):(.*)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive


class UnreadableCaption(Exception):
    """A caption file that is no text, or not readable; the image is skipped and listed with this reason."""


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


def read_captions(
    listed: Sequence[Listed], rules: CaptionRules, memo: TextMemo | None = None
) -> tuple[list[tuple[str, ...]], dict[int, str], Counter[str]]:
    """(base captions of each image; why images are skipped, by position in `listed`; how many captions each of
    `rules.sources` gave).

    An image that is skipped has no captions. One without captions that is not skipped simply has none: it is left out
    where the rules say so (`skips`), else see `no_captions_error`.

    Args:
        memo: what earlier runs have read of caption files in buckets.

    Raises:
        StorageError: a bucket does not let us read. That is no matter of single images.
    """
    stamped = {image.text_file: image.text_stamp for image in listed if image.text_stamp}
    files = _CaptionFiles({} if memo is None else memo.find(list(stamped.items())))
    if "textfile" not in rules.sources or not any(image.text_file for image in listed):
        found = [_captions_or_problem(image, rules, files) for image in listed]
    else:
        # In threads: on a network drive each file takes a millisecond of waiting, in a bucket fifty. Many files a
        # task, where there are many: a task costs as much as reading a file of a local disk.
        in_store = any(_SCHEME.match(image.text_file) for image in listed)
        num_threads = _THREADS if in_store else min(_THREADS, 4 * (os.cpu_count() or 1))
        size = max(1, min(256, len(listed) // num_threads))
        pieces = [listed[start : start + size] for start in range(0, len(listed), size)]

        def read(piece: Sequence[Listed]) -> list[_Found | UnreadableCaption]:
            return [_captions_or_problem(image, rules, files) for image in piece]

        with ThreadPoolExecutor(num_threads) as threads:
            found = [item for piece in threads.map(read, pieces) for item in piece]
    if memo is not None:
        new = {address: text for address, text in files.new.items() if len(text) <= _LONGEST_REMEMBERED}
        memo.add([(address, stamped[address]) for address in new], list(new.values()))
    captions = [() if isinstance(item, UnreadableCaption) else item.captions for item in found]
    given = Counter(dict.fromkeys(rules.sources, 0))
    for item in found:
        if not isinstance(item, UnreadableCaption) and item.captions:
            given[item.source] += len(item.captions)
    return captions, {at: str(item) for at, item in enumerate(found) if isinstance(item, UnreadableCaption)}, given


class _CaptionFiles:
    """Texts of caption files: those that are remembered, and those that are read now."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = known
        self.new: dict[str, str] = {}

    def read(self, image: Listed) -> str:
        """
        Raises:
            UnreadableCaption: see `_find`.
        """
        text = self.known.get(image.text_file)
        if text is None:
            text = _read_text(image.text_file)
            if image.text_stamp:
                self.new[image.text_file] = text
        return text


class _Found(NamedTuple):
    captions: tuple[str, ...]
    source: str  # which one they are from; empty where there are none


def _captions_or_problem(image: Listed, rules: CaptionRules, files: _CaptionFiles) -> _Found | UnreadableCaption:
    try:
        return _find(image, rules, files)
    except UnreadableCaption as error:
        return error


def _find(image: Listed, rules: CaptionRules, files: _CaptionFiles) -> _Found:
    """The base captions of one image, from the first source that has any; none if none has. The source "empty" has "".

    Raises:
        UnreadableCaption: the text is not UTF-8 (or UTF-16 that says so), too large, or cannot be read.
    """
    for source in rules.sources:
        if source == "empty":
            return _Found(("",), source)
        captions = _unique(filter(None, (_clean(text, rules.replace) for text in _texts(source, image, rules, files))))
        if captions:
            return _Found(captions, source)
    return _Found((), "")


def _texts(source: str, image: Listed, rules: CaptionRules, files: _CaptionFiles) -> Iterable[str]:
    if source == "textfile":
        text = files.read(image) if image.text_file else ""
        return [text] if rules.lines == "whole" else _LINE_END.split(text)
    if source == "column":
        if any(len(text) > MAX_BYTES for text in image.texts):
            raise UnreadableCaption(_too_large("its caption", max(map(len, image.texts))))
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


# ---- caption files ---------------------------------------------------------------------------------------------------


def _read_text(address: str) -> str:
    what = f"caption file {_name(address)}"
    try:
        content = _read(address, what)
    except (OSError, ValueError) as error:
        raise UnreadableCaption(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8-sig" and b"\0" in content:
            raise UnreadableCaption(_with_nul(what, address)) from None
        shown = encoding.removesuffix("-sig").upper()
        at_home = shown == "UTF-8" and not _SCHEME.match(address)
        cure = f" If it is Latin-1: iconv -f latin1 -t utf-8 {_name(address)}" if at_home else ""
        raise UnreadableCaption(
            f"{what} is not {shown}: byte 0x{error.object[error.start]:02x} at offset {error.start}.{cure}"
        ) from None
    if "\0" in text:  # UTF-16 without its mark, or no text at all; other control characters are taken out
        raise UnreadableCaption(_with_nul(what, address))
    return text


def _with_nul(what: str, address: str) -> str:
    cure = f"If it is UTF-16: iconv -f utf-16 -t utf-8 {_name(address)}"
    return f"{what} is not UTF-8 text: it has NUL characters. {cure}"


def _read(address: str, what: str) -> bytes:
    """The file's bytes; of one that is too large, no more than needed to know."""
    if not _SCHEME.match(address):
        with storage.open_local(address) as file:
            content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise UnreadableCaption(_too_large(what, os.fstat(file.fileno()).st_size))
            return content
    from sdxl_ray.cache.sources import read_start

    content = read_start(address, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        member = _TAR_MEMBER.match(address)
        raise UnreadableCaption(_too_large(what, int(member[2]) if member else len(content)))
    return content


def _too_large(what: str, size: int) -> str:
    """`size` may be one more than allowed, where nothing says how large it is."""
    return f"{what} is too large: {size / 1e6:.1f} MB or more, expected at most {MAX_BYTES / 1e6:.0f} MB."


def _name(address: str) -> str:
    """A caption file as a person finds it: its name; for a part of a tar file, where it lies there."""
    member = _TAR_MEMBER.match(address)
    name = f"at byte {member[1]} of {PurePosixPath(member[3]).name}" if member else PurePosixPath(address).name
    return os.fsencode(name).decode("utf-8", "backslashreplace")  # file names can be anything; a terminal cannot


# ---- variants --------------------------------------------------------------------------------------------------------


def expand_variants(
    captions: tuple[str, ...], rules: CaptionRules, image_hash: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(what is encoded for base captions; of which base caption each is a variant).

    If tags are shuffled or dropped: the first base caption as it is, for evaluation alone and so a variant of none
    (`AS_IT_IS`), then `rules.variants` of each. What comes out twice counts twice: tags are dropped as often as they
    are dropped. Else each base caption as it is.

    A variant depends on the image, the caption and its number alone, so that a caption that is added, or another
    number of variants, does not change the others.
    """
    if not rules.varies:
        whole = _unique(decorate(caption, rules) for caption in captions)
        return whole, tuple(range(len(whole)))
    variants = [
        (draw_variant(caption, rules, _draw(image_hash, caption, number)), base)
        for base, caption in enumerate(captions)
        for number in range(rules.variants)
    ]
    texts, bases = zip((decorate(captions[0], rules), AS_IT_IS), *variants, strict=True)
    return texts, bases


def draw_variant(caption: str, rules: CaptionRules, draw: np.random.Generator) -> str:
    """One variant of a base caption: its tags in a new order and some left out, as `rules` say; then decorated.

    The first `keep_tags` tags stay. At least one tag is left. What comes out depends on `draw` alone.
    """
    if not rules.varies:
        return decorate(caption, rules)
    # Without the spaces around it, so that "a,b" has two tags for the separator ", " as well.
    pieces = caption.split(rules.separator.strip() or rules.separator)
    tags = [tag for piece in pieces if (tag := piece.strip())]
    kept, others = tags[: rules.keep_tags], tags[rules.keep_tags :]
    # Only `random` is used: NumPy may change how it makes a permutation, and with it what all caches hold.
    chances, places = draw.random(len(others)), draw.random(len(others))
    chosen = np.flatnonzero(chances >= rules.tag_dropout).tolist()
    if not kept and not chosen and others:
        chosen = [int(chances.argmax())]
    if rules.shuffle_tags:
        chosen.sort(key=lambda at: float(places[at]))
    glue = rules.separator if rules.separator[-1].isspace() else f"{rules.separator} "
    varied = glue.join([*kept, *(others[at] for at in chosen)])
    return decorate(varied or caption, rules)  # a caption of nothing but separators stays as it is


def decorate(caption: str, rules: CaptionRules) -> str:
    """Prefix, trigger word where it is nowhere in what comes out, the caption, suffix."""
    whole = f"{rules.prefix}{caption}{rules.suffix}"
    if rules.trigger_word and not _has_word(whole, rules.trigger_word):
        separator = ", " if caption else ""
        whole = f"{rules.prefix}{rules.trigger_word}{separator}{caption}{rules.suffix}"
    return whole.strip()


def _has_word(text: str, word: str) -> bool:
    # As a word of its own: a trigger "art" is not in "party".
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _draw(image_hash: str, caption: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps([image_hash, caption, number]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


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
    columns = without[0].columns  # of a table: beside its rows, or what they name, no caption file is looked for
    in_tables = "a column" if columns else "a column (of a WebDataset: in the .json)"
    there_are = f", and there are {', '.join(columns[:30])} (dataset.caption_columns)" if columns else ""
    texts = {
        "textfile": f"{example.stem}{rules.extension} or {example.name}{rules.extension} beside {example.name} with at "
        "least one line",
        "column": f"a text in {in_tables} called {' or '.join(rules.columns)}{there_are}",
        "filename": "a file name with letters",
        "instance_prompt": "dataset.instance_prompt, which is empty",
    }
    expected = [texts[source] for source in rules.sources if not (columns and source == "textfile")]
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


def _beside(without: Sequence[Listed], rules: CaptionRules) -> str:
    """What may be a caption file under another name."""
    found = next((image for image in without if image.beside), None)
    if found is None or "textfile" not in rules.sources:
        return ""
    extensions = " or ".join(dict.fromkeys(f'"{PurePosixPath(name).suffix}"' for name in found.beside))
    return (
        f" Beside {PurePosixPath(found.path).name} there is {', '.join(found.beside)}: if that is its caption, set "
        f"dataset.caption_extension = {extensions}."
    )
