"""Addresses of files and folders: what kind they are, and their parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sdxl_ray.errors import ConfigError

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hf")
_OPTIONS = (
    *("region", "scheme", "endpoint_override", "force_virtual_addressing", "anonymous", "tls_ca_file_path"),
    *("project_id", "blob_storage_authority", "blob_storage_scheme", "dfs_storage_authority", "dfs_storage_scheme"),
    *("connect_timeout", "request_timeout", "max_attempts"),
)
_PAIR = rf"(?:{'|'.join(_OPTIONS)})=[^&/?]*"
_QUERY = re.compile(rf"\?({_PAIR}(?:&{_PAIR})*)(?=/|$)")
CREDENTIALS = {  # by scheme: what sets them
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
    "hf": "HF_TOKEN",
}


def is_uri(path: str) -> bool:
    """Whether it is written as `scheme://...`."""
    return _URI.match(path) is not None


def local_path(path: str) -> Path | None:
    """The real path, where there is one: of a plain path or a file:// address."""
    if path.startswith("file://"):
        return Path(unquote(path.removeprefix("file://")))
    return None if is_uri(path) else Path(path)


def join(folder: str, name: str) -> str:
    """The path or address of what is called `name` in the folder."""
    return folder + name if folder.endswith("/") else f"{folder}/{name}"


@dataclass(frozen=True, slots=True)
class Place:
    """A cloud address, taken apart."""

    scheme: str
    bucket: str  # of Azure container@account
    key: str  # what the filesystem calls it: bucket/cats/cat.jpg
    options: tuple[tuple[str, str], ...]


def place_of(uri: str) -> Place:
    """
    Raises:
        ConfigError: a scheme that is not known, a key in the address, no bucket.
    """
    matched = _URI.match(uri)
    if matched is None:
        raise ValueError(f"{uri} is not an address")
    scheme, rest = matched[1].lower(), matched[2]
    if scheme not in _SCHEMES:
        raise ConfigError(f"{uri}: {scheme}:// cannot be read. Use a folder, s3://, gs://, abfs:// or hf://.")
    options: tuple[tuple[str, str], ...] = ()
    query = _QUERY.search(rest)
    if query:
        pairs = [pair.partition("=") for pair in query[1].split("&")]
        options = tuple((name, unquote(value)) for name, _, value in pairs)
        rest = rest[: query.start()].rstrip("/") + rest[query.end() :]
    bucket, _, path = rest.partition("/")
    login, at, host = bucket.rpartition("@")
    if at and (":" in login or not scheme.startswith("abfs")):
        raise ConfigError(
            f"{scheme}://***@{host}/{path}: holds a key, and addresses land in logs. Take what is before the @ out "
            f"and set the environment instead: {CREDENTIALS[scheme]}."
        )
    if not bucket:
        raise ConfigError(f"{uri}: names no bucket. Write {scheme}://bucket/folder.")
    key = f"{login or bucket}/{path}" if scheme.startswith("abfs") else f"{bucket}/{path}"
    return Place(scheme, bucket, key.rstrip("/"), options)


def check_address(path: str) -> None:
    """Refuse what can never work, before anything is asked for.

    Raises:
        ConfigError: a scheme that is not known, a key in the address, an option misspelt.
    """
    if not is_uri(path) or path.startswith("file://"):
        return
    place = place_of(path)
    unknown = re.search(r"\?([\w-]+)=[^/]*", place.key)
    if unknown:
        raise ConfigError(f'{path}: unknown option "{unknown[1]}". There are: {", ".join(_OPTIONS)}.')
