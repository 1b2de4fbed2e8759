"""Files wherever they lie: on this machine's disks, or in a bucket behind an address.

    /data/cats                                           a folder or file
    s3://bucket/cats?region=eu-central-1                 Amazon S3 and what speaks its language; AWS_ENDPOINT_URL counts
    gs://bucket/cats                                     Google Cloud Storage
    abfs://container@account.dfs.core.windows.net/cats   Azure; abfs://container/cats with AZURE_STORAGE_ACCOUNT
    hf://datasets/org/name@revision/data                 the Hugging Face Hub, for reading only
    file:///data/cats                                    the same as /data/cats

Names in addresses are written as they are: a space is a space, not %20. Options follow "?" and end at a "/", so that a
name can be appended to any address. Credentials come from the environment alone: addresses land in logs.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sdxl_ray.errors import StorageError, storage_errors
from sdxl_ray.storage.addresses import (
    check_address,
    is_uri,
    join,
    local_path,
    normalized,
    place_of,
    shown,
    split_options,
)
from sdxl_ray.storage.clouds import FileEntry, cloud_errors, file_status, filesystem, listing
from sdxl_ray.storage.outages import Outages

__all__ = [
    "FileEntry",
    "Folder",
    "Outages",
    "check_address",
    "is_uri",
    "join",
    "list_level",
    "local_path",
    "normalized",
    "open_arrow",
    "open_buffered",
    "open_folder",
    "open_local",
    "read_bytes",
    "reading_errors",
    "shown",
    "split_options",
    "status",
]

_BUFFER_BYTES = 256 * 1024


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """The file's content, or `length` bytes from `offset` on; fewer where it ends before.

    Raises:
        OSError: FileNotFoundError, PermissionError and the like; EINVAL: a pipe or a device.
        StorageError: a store refuses, or cannot be reached.
    """
    local = local_path(path)
    if local is not None:
        with open_local(local) as file:
            file.seek(offset)
            return file.read(length)
    with open_arrow(path) as file, cloud_errors(path, "reading"):  # side by side: a wait is told of as one of the two
        size = file.size()
        return bytes(
            file.read_at(max(0, size - offset if length < 0 else min(length, size - offset)), min(offset, size))
        )


def open_local(path: str | Path) -> BinaryIO:
    """A file of this machine, open for reading. Never waits for a pipe's writer, or reads a device without an end.

    Raises:
        OSError: as `open` does; with EINVAL: it is no regular file. Of one that is there by a name which is not UTF-8,
            and was listed with what is not escaped (\\xe9), `strerror` says so.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)  # which means nothing to a regular file
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _no_regular_file(path) from None
        if error.errno == errno.ENOENT and _is_there_unescaped(path):
            raise FileNotFoundError(errno.ENOENT, "its name is not UTF-8; rename it", path) from None
        raise
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # of a folder `open` says so itself
        os.close(descriptor)
        raise _no_regular_file(path)
    return descriptor


def _is_there_unescaped(path: str) -> bool:
    escaped = os.fsencode(path)
    name = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes([int(found[1], 16)]), escaped)
    return name != escaped and os.path.lexists(name)


def _no_regular_file(path: str) -> OSError:
    return OSError(errno.EINVAL, "it is not a regular file, but a pipe, socket or device", path)


@contextlib.contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Around reads from what `open_arrow` opened: a store's failure becomes a StorageError, damaged data stays
    pyarrow's ArrowInvalid.
    """
    from pyarrow import ArrowException

    damage = None
    with contextlib.nullcontext() if local_path(path) else cloud_errors(path, "reading"):
        try:
            yield
        except ArrowException as error:
            if isinstance(error, OSError):  # pyarrow's ArrowIOError is OSError
                raise
            damage = error
    if damage is not None:
        raise damage


def open_arrow(path: str) -> Any:
    """The file as pyarrow's readers take it: seekable, safe to read from several threads.

    Raises what `read_bytes` raises.
    """
    import pyarrow as pa

    local = local_path(path)
    if local is not None:
        open_local(local).close()
        return pa.OSFile(os.fsencode(local), "rb")
    with cloud_errors(path, "opening"):
        place = place_of(path)
        return filesystem(place).open_input_file(place.key)


def open_buffered(path: str) -> BinaryIO:
    """The file as the standard library's readers take it; of a store it fetches 256 KiB at a time.

    Raises what `read_bytes` raises.
    """
    local = local_path(path)
    if local is not None:
        return open_local(local)
    return cast(BinaryIO, io.BufferedReader(_Raw(path), _BUFFER_BYTES))


class _Raw(io.RawIOBase):
    """A file of a store, unbuffered, whose errors have names."""

    def __init__(self, path: str) -> None:
        self._path, self._file, self._at = path, open_arrow(path), 0
        with cloud_errors(path, "opening"):
            self._size = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        with cloud_errors(self._path, "reading"):
            content = self._file.read_at(length, self._at) if length else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def status(path: str) -> FileEntry | None:
    """Size and date of a file; None where there is none, or a folder of that name."""
    local = local_path(path)
    if local is not None:
        try:
            found = local.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if local.is_dir() else FileEntry(path, found.st_size, found.st_mtime_ns)
    return file_status(path)


def list_level(path: str) -> tuple[list[str], list[FileEntry]]:
    """(names of the folders, files) directly in a cloud folder, hidden ones too, in no order. Missing: both empty."""
    return listing(path, recursive=False)


# ---- folders ---------------------------------------------------------------------------------------------------------


def open_folder(path: str | Path) -> Folder:
    """The folder, which need not be there yet.

    Raises:
        ConfigError: an address that can never work.
    """
    local = local_path(str(path))
    if local is not None:
        return _LocalFolder(str(local))
    check_address(str(path))
    return _CloudFolder(str(path))


class Folder(abc.ABC):
    """A folder of this machine or of a store. Names are relative to it, with "/" between their parts.

    Reading raises FileNotFoundError and its kind, or StorageError. May be pickled.
    """

    local: Path | None = None  # the real folder, where it is one

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        return read_bytes(join(self.path, name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return read_bytes(join(self.path, name), offset, length)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return status(join(self.path, name)) is not None

    def write(
        self,
        name: str,
        content: bytes,
        *,
        doing: str = "writing",
        cure: str = "Free some space and run again: what was written before is kept.",
    ) -> None:
        """Write a file whole or not at all, with the folders above it. `doing`, `cure`: as in `storage_errors`.

        Raises:
            StorageError: the disk is full or read-only, or the store refuses.
        """
        self._write(name, content, doing, cure)

    @abc.abstractmethod
    def _write(self, name: str, content: bytes, doing: str, cure: str) -> None:
        """`write`, with nothing left out."""

    @abc.abstractmethod
    def write_by(self, name: str, write: Callable[[BinaryIO], None], *, doing: str, cure: str) -> None:
        """The same for what is too large to be held in memory: `write` is handed an open file."""

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file. One that is not there is fine."""

    @abc.abstractmethod
    def list(self, prefix: str = "", suffix: str = "", *, hidden_folders: bool = False) -> list[FileEntry]:
        """The files in the folder `prefix` and below whose names end in `suffix`, sorted by name.

        Names are relative to this folder. Hidden files are left out, and what is in hidden folders unless
        `hidden_folders`. A missing folder has no files.

        Raises:
            StorageError: a folder cannot be listed, which says nothing about what is in it.
        """


class _LocalFolder(Folder):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.local = Path(path)

    def _write(self, name: str, content: bytes, doing: str, cure: str) -> None:
        with self._whole(name, doing, cure) as temporary:
            temporary.write_bytes(content)

    def write_by(self, name: str, write: Callable[[BinaryIO], None], *, doing: str, cure: str) -> None:
        with self._whole(name, doing, cure) as temporary, temporary.open("wb") as file:
            write(file)

    @contextlib.contextmanager
    def _whole(self, name: str, doing: str, cure: str) -> Iterator[Path]:
        path = Path(self.path) / name
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        with storage_errors(doing, path, cure):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        (Path(self.path) / name).unlink(missing_ok=True)

    def list(self, prefix: str = "", suffix: str = "", *, hidden_folders: bool = False) -> list[FileEntry]:
        found = []
        for folder, folders, names in os.walk(Path(self.path) / prefix, onerror=_cannot_be_listed, followlinks=True):
            folders[:] = [name for name in folders if hidden_folders or not name.startswith(".")]
            inside = "" if folder == self.path else Path(folder).relative_to(self.path).as_posix()
            for name in names:
                if name.endswith(suffix) and not name.startswith("."):
                    try:
                        of = Path(folder, name).stat()
                    except OSError as error:
                        _cannot_be_listed(error)
                        continue
                    found.append(FileEntry(join(inside, name) if inside else name, of.st_size, of.st_mtime_ns))
        return sorted(found, key=lambda entry: entry.name)


def _cannot_be_listed(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # deleted while we look; a file in its place
        raise StorageError(
            f"{error.filename}: cannot be listed: {error.strerror}. Make it readable for the user that runs this, or "
            "mount it again; then run again: what is done is kept."
        ) from None


class _CloudFolder(Folder):
    def _write(self, name: str, content: bytes, doing: str, cure: str) -> None:
        address = join(self.path, name)
        place = place_of(address)
        if place.scheme == "hf":
            raise StorageError(
                f"{shown(address)}: the Hub is only read here. Choose a folder, s3://, gs:// or abfs://."
            )
        with cloud_errors(address, doing), filesystem(place).open_output_stream(place.key) as file:
            file.write(content)

    def write_by(self, name: str, write: Callable[[BinaryIO], None], *, doing: str, cure: str) -> None:
        address = join(self.path, name)
        place = place_of(address)
        with tempfile.TemporaryFile() as copy:  # what breaks off half-way would be uploaded when it is closed
            with storage_errors(f"{doing} ({shown(address)} by way of this folder)", tempfile.gettempdir(), cure):
                write(cast(BinaryIO, copy))
                copy.seek(0)
            errors = cloud_errors(address, doing, many_requests=True)  # most of them while it is closed
            with errors, filesystem(place).open_output_stream(place.key) as file:
                shutil.copyfileobj(copy, file, 8 * 2**20)

    def delete(self, name: str) -> None:
        address = join(self.path, name)
        place = place_of(address)
        with contextlib.suppress(FileNotFoundError), cloud_errors(address, "deleting"):
            filesystem(place).delete_file(place.key)

    def list(self, prefix: str = "", suffix: str = "", *, hidden_folders: bool = False) -> list[FileEntry]:
        start = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        _, files = listing(join(self.path, start.rstrip("/")) if start else self.path, recursive=True)
        hidden = re.compile(r"(?:^|/)\.[^/]*$" if hidden_folders else r"(?:^|/)\.")
        shown = [file for file in files if file.name.endswith(suffix) and not hidden.search(file.name)]
        named = [FileEntry(start + file.name, file.size, file.mtime_ns) for file in shown]
        return sorted(named, key=lambda entry: entry.name)
