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


def split_options(path: str) -> tuple[str, str]:
    """(the address without its options, "?region=eu" or empty). A local path has none, whatever its name."""
    matched = _URI.match(path)
    query = _QUERY.search(matched[2]) if matched and matched[1].lower() in _SCHEMES else None
    if matched is None or query is None:
        return path, ""
    rest = matched[2][: query.start()].rstrip("/") + matched[2][query.end() :]
    return f"{matched[1]}://{rest}", query[0]


def normalized(path: str) -> str:
    """The address with its options behind the bucket, where they survive that names are taken off and put on.

    s3://bucket/list.csv?region=eu becomes s3://bucket?region=eu/list.csv; file:///data/cats becomes /data/cats.
    """
    local = local_path(path)
    if local is not None:
        return str(local) if path.startswith("file://") else path
    address, options = split_options(path)
    if not options or address.startswith("hf://"):  # the Hub has no options
        return path
    scheme, _, rest = address.partition("://")
    bucket, slash, key = rest.partition("/")
    return f"{scheme}://{bucket}{options}{slash}{key}"


def shown(path: str) -> str:
    """The address as it may be printed: without a login, and without options that are not ours, which may be keys."""
    if not is_uri(path):
        return path
    path = re.sub(r"://[^/@?\s]*:[^@\s]*@", "://***@", path)
    path = re.sub(r"=[^&/@]*:[^&/@]*@", "=***@", path)  # an endpoint's
    known = split_options(path)[1]
    unknown = re.search(r"\?[\w.%-]+=", path.replace(known, "", 1) if known else path)
    return path.partition("?")[0] if unknown else path


def place_of(uri: str) -> Place:
    """
    Raises:
        ConfigError: a scheme that is not known, a key in the address, no bucket.
    """
    matched = _URI.match(uri)
    if matched is None:
        raise ValueError(f"{shown(uri)} is not an address")
    scheme, rest = matched[1].lower(), matched[2]
    if scheme not in _SCHEMES:
        raise ConfigError(f"{shown(uri)}: {scheme}:// cannot be read. Use a folder, s3://, gs://, abfs:// or hf://.")
    options: tuple[tuple[str, str], ...] = ()
    query = _QUERY.search(rest)
    if query:
        pairs = [pair.partition("=") for pair in query[1].split("&")]
        options = tuple((name, unquote(value)) for name, _, value in pairs)
        rest = rest[: query.start()].rstrip("/") + rest[query.end() :]
    bucket, _, path = rest.partition("/")
    login, at, host = bucket.rpartition("@")
    # The secret of a key may have a "/", so that its "@" comes later.
    split_key = ":" in bucket and not at and "@" in path
    if split_key or (at and (":" in login or not scheme.startswith("abfs"))):
        after = path.partition("@")[2] if split_key else f"{host}/{path}"
        raise ConfigError(
            f"{shown(f'{scheme}://***@{after}')}: holds a key, and addresses land in logs. Take what is before the @ "
            f"out and set the environment instead: {CREDENTIALS[scheme]}."
        )
    if not bucket:
        raise ConfigError(f"{shown(uri)}: names no bucket. Write {scheme}://bucket/folder.")
    key = f"{login or bucket}/{path}" if scheme.startswith("abfs") else f"{bucket}/{path}"
    return Place(scheme, bucket, key.rstrip("/"), options)


def check_address(path: str) -> None:
    """Refuse what can never work, before anything is asked for.

    Raises:
        ConfigError: a scheme that is not known, a key in the address, an option misspelt. Its text holds no values of
            options: they may be keys.
    """
    if not is_uri(path) or path.startswith("file://"):
        return
    place = place_of(path)
    unknown = re.search(r"\?[\w.%-]+=.*", place.key, re.DOTALL)
    if unknown:
        names = re.findall(r"[?&]([\w.%-]+)=", unknown[0])
        name = next((name for name in names if name not in _OPTIONS), names[0])
        raise ConfigError(
            f'{shown(path).partition("?")[0]}: unknown option "{name}". There are: {", ".join(_OPTIONS)}. Keys are set '
            f"in the environment: {CREDENTIALS[place.scheme]}."
        )
