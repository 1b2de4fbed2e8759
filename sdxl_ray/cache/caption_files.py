"""Read caption files: text that is UTF-8, or says what else it is. Those in cloud storage are read once."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sdxl_ray import storage
from sdxl_ray.cache.sources.address import read_start, tar_parts
from sdxl_ray.records import Listed

if TYPE_CHECKING:
    from sdxl_ray.cache.text_memo import TextMemo

MAX_BYTES = 1_000_000  # of a caption file: the encoders read some 300 characters, so a larger one is something else
_LONGEST_REMEMBERED = 10_000  # characters
_BYTE_ORDER_MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive


class UnreadableCaption(Exception):
    """A caption file that is no text, or not readable; the image is skipped and listed with this reason."""


class CaptionFiles:
    """The texts of some images' caption files. What earlier runs have read of those in cloud storage is remembered."""

    def __init__(self, listed: Sequence[Listed], memo: TextMemo | None = None) -> None:
        self._stamps = {image.text_file: image.text_stamp for image in listed if image.text_stamp}
        self._memo = memo
        self._known = {} if memo is None else memo.find(list(self._stamps.items()))
        self._new: dict[str, str] = {}

    def read(self, address: str) -> str:
        """Safe to call from several threads.

        Raises:
            UnreadableCaption: the text is not UTF-8 (or UTF-16 or -32 that says so), too large, or cannot be read.
            StorageError: cloud storage does not let us read. That is no matter of single images.
        """
        text = self._known.get(address)
        if text is None:
            text = _read_text(address)
            if address in self._stamps:
                self._new[address] = text
        return text

    def remember(self) -> None:
        """What has been read, for later runs."""
        if self._memo is not None:
            new = {address: text for address, text in self._new.items() if len(text) <= _LONGEST_REMEMBERED}
            self._memo.add([(address, self._stamps[address]) for address in new], list(new.values()))


def is_elsewhere(address: str) -> bool:
    """Whether a caption file is in cloud storage, or a part of another file."""
    return _SCHEME.match(address) is not None


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
        at_home = shown == "UTF-8" and not is_elsewhere(address)
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
    if not is_elsewhere(address):
        with storage.open_local(address) as file:
            content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise UnreadableCaption(too_large(what, os.fstat(file.fileno()).st_size))
            return content
    content = read_start(address, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        member = tar_parts(address)
        raise UnreadableCaption(too_large(what, member[1] if member else len(content)))
    return content


def too_large(what: str, size: int) -> str:
    """`size` may be one more than allowed, where nothing says how large it is."""
    return f"{what} is too large: {size / 1e6:.1f} MB or more, expected at most {MAX_BYTES / 1e6:.0f} MB."


def _name(address: str) -> str:
    """A caption file as a person finds it: its name; for a part of a tar file, where it lies there."""
    member = tar_parts(address)
    name = f"at byte {member[0]} of {PurePosixPath(member[2]).name}" if member else PurePosixPath(address).name
    return os.fsencode(name).decode("utf-8", "backslashreplace")  # file names can be anything; a terminal cannot
