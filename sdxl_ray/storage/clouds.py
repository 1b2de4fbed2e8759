"""Connections to stores, listings of them, and names for what goes wrong there."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdxl_ray.errors import ConfigError, StorageError, StoreRefusal
from sdxl_ray.storage.addresses import CREDENTIALS, Place, place_of, shown
from sdxl_ray.storage.outages import LongWaits, Outages

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 8  # with back-off between them
SILENCE_S = 20.0  # before a word is said of a server that has not answered
# What a connection depends on besides its address.
_ENVIRONMENT = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"),
    *("AWS_ACCESS_KEY_ID", "AZURE_STORAGE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"),
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file in a listing. `name` is relative to the folder that was listed."""

    name: str
    size: int  # bytes
    mtime_ns: int  # on the Hub, which tells no dates, a number made of the content's hash


def filesystem(place: Place) -> Any:
    """pyarrow's filesystem for the place, made once in a process.

    Raises:
        ConfigError: an option that the store does not have.
    """
    environment = tuple(os.environ.get(name, "") for name in _ENVIRONMENT)
    limits = (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, MAX_ATTEMPTS)
    # By process: a connection does not survive a fork.
    return _connect(place.scheme, place.bucket, place.options, environment, limits, os.getpid())


@functools.lru_cache(maxsize=64)
def _connect(
    scheme: str,
    bucket: str,
    options: tuple[tuple[str, str], ...],
    environment: tuple[str, ...],
    limits: tuple[float, float, int],
    pid: int,
) -> Any:
    from pyarrow import fs

    given = dict(options)
    switches = {
        key: given.pop(key).lower() == "true" for key in ("anonymous", "force_virtual_addressing") if key in given
    }
    try:
        timeout_s = float(given.pop("request_timeout", limits[1]))
        connect_timeout_s = float(given.pop("connect_timeout", limits[0]))
        attempts = int(given.pop("max_attempts", limits[2]))
        if scheme == "s3":
            endpoint = _endpoint()
            if endpoint and "endpoint_override" not in given:
                given["scheme"], _, host = endpoint.rpartition("://")
                given["scheme"] = given["scheme"] or "https"
                given["endpoint_override"] = host.rstrip("/")
            region = given.pop("region", None) or _region(bucket, given)
            return fs.S3FileSystem(
                **given,
                **switches,
                region=region,
                connect_timeout=connect_timeout_s,
                request_timeout=timeout_s,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
                allow_delayed_open=True,  # small files in one PUT
            )
        if scheme in ("gs", "gcs"):
            limit = datetime.timedelta(seconds=timeout_s * 2)
            return fs.GcsFileSystem(**given, **switches, retry_time_limit=limit)
        if scheme in ("abfs", "abfss"):
            account = bucket.partition("@")[2].partition(".")[0] or os.environ.get("AZURE_STORAGE_ACCOUNT")
            if not account:
                raise ConfigError(
                    f"{scheme}://{bucket}: of which account? Write {scheme}://{bucket}@ACCOUNT.dfs.core.windows.net, "
                    "or set AZURE_STORAGE_ACCOUNT."
                )
            key, token = os.environ.get("AZURE_STORAGE_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
            if shutil.which("az") is None:  # Azure's library would run it, and the shell complain
                os.environ.setdefault("AZURE_TOKEN_CREDENTIALS", "prod")
            system = fs.AzureFileSystem(account, account_key=key, sas_token=None if key else token, **given)
            if not (key or token):  # where there is no login, the library's first read ends the process; this raises
                nothing = f"{bucket.partition('@')[0]}/.sdxl-ray"
                system.get_file_info(fs.FileSelector(nothing, allow_not_found=True))
            return system
    except (TypeError, ValueError) as error:  # an option of another kind of store, or no number
        raise ConfigError(f"{scheme}://{bucket}: {error}. Correct the options in the address.") from None
    return fs.PyFileSystem(fs.FSSpecHandler(_hub_filesystem()))


def _endpoint() -> str:
    """Of S3, from the environment; empty: Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _region(bucket: str, options: dict[str, str]) -> str | None:
    from pyarrow import fs

    known = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if known or "endpoint_override" in options:
        return known or "us-east-1"
    with contextlib.suppress(OSError):  # what is wrong shows again, and is named, where the bucket is used
        return str(fs.resolve_s3_region(bucket))
    return None


def _hub_filesystem() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


# ---- what can go wrong -----------------------------------------------------------------------------------------------

_AWS = re.compile(r"AWS Error (\w+) during (\w+) operation: ?(.*)", re.DOTALL)
_CHECK_NETWORK = "Check the network between this machine and the store, then run again: what is done is kept."
_REASONS = (  # what an error's text holds -> the reason, and what to do
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|(?:HTTP status|code) 40[13]|Forbidden|Unauthorized|"
        r"PERMISSION_DENIED|PermissionDenied|UNAUTHENTICATED|AuthenticationFailed|AuthorizationFailure|Gated|[Cc]redentials",
        "access denied",
        "Check the key and what it is allowed: {credentials}, on every machine.",
    ),
    (
        r"NO_SUCH_BUCKET|bucket does not exist|ContainerNotFound|RepositoryNotFound",
        "no such bucket",
        "Check its name{bucket_in}.",
    ),
    (
        r"SLOW_DOWN|THROTTL|SERVICE_UNAVAILABLE|REQUEST_LIMIT|TOO_MANY|(?:HTTP status|code) (?:429|503)|ServerBusy|"
        r"RESOURCE_EXHAUSTED|Too Many Requests|Slow Down|SlowDown|reduce your request rate",
        "the store asks for fewer requests",
        "It was asked again with growing pauses. Run later, or with fewer machines at once: what is done is kept.",
    ),
    (
        r"curlCode: 28|[Tt]imed? ?out|TIMEOUT|DEADLINE",
        "timed out",
        _CHECK_NETWORK,
    ),
    (
        r"NETWORK_CONNECTION|curlCode|[Oo]ffline|[Cc]onnection|ConnectError|UNAVAILABLE|resolve host",
        "cannot be reached",
        "Check the address, {reached_by} and the network, then run again: what is done is kept.",
    ),
)
_REACHED_BY = {  # by scheme: what else decides where a request goes
    "s3": "the endpoint (AWS_ENDPOINT_URL)",
    "gs": "the key (GOOGLE_APPLICATION_CREDENTIALS; without one, only machines of Google's cloud are let in)",
    "abfs": "the account (its name stands in the address, or in AZURE_STORAGE_ACCOUNT)",
    "hf": "the endpoint (HF_ENDPOINT), whether HF_HUB_OFFLINE is set,",
}
_BUCKET_IN = {"s3": ", and the region and endpoint (AWS_REGION, AWS_ENDPOINT_URL)", "abfs": ", and the account"}
_SAME_AS = {"gcs": "gs", "abfss": "abfs"}
_SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN"),
)
_NO_ANSWER = ("timed out", "cannot be reached")  # of the reasons
_REFUSALS = ("access denied", "no such bucket")
_outages = Outages()
_long_waits = LongWaits(SILENCE_S)
_HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests")


@contextlib.contextmanager
def cloud_errors(uri: str, doing: str, *, many_requests: bool = False) -> Iterator[None]:
    """Turn what pyarrow and the Hub raise into a StorageError with reason and cure (a StoreRefusal where another try is
    in vain); not found is a FileNotFoundError.

    A store that has failed to answer many times in a row is not asked at all for a while.

    Args:
        many_requests: it may take long although the store answers, so nothing is said of how long it takes.
    """
    from pyarrow import ArrowException

    place = place_of(uri)
    store = f"{place.scheme}://{place.bucket}"
    silent = _outages.reason(store)
    if silent:
        raise StorageError(f"{shown(uri)}: {silent}. {_CHECK_NETWORK}")
    try:
        with contextlib.nullcontext() if many_requests else _long_waits.watched(store, _still_waiting(place, doing)):
            yield
    except Exception as error:
        if _is_not_found(error):
            _outages.answered(store)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(uri)) from None
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError | ArrowException) or library in _HUB_LIBRARIES:
            reason, text = _named(error, place, doing)
            (_outages.failed if reason in _NO_ANSWER else _outages.answered)(store)
            raise (StoreRefusal if reason in _REFUSALS else StorageError)(f"{shown(uri)}: {text}") from None
        raise
    else:
        _outages.answered(store)


def _still_waiting(place: Place, doing: str) -> str:
    """What is said of a server after SILENCE_S."""
    endpoint = dict(place.options).get("endpoint_override") or _endpoint() if place.scheme == "s3" else ""
    host = endpoint.rpartition("@")[2].rpartition("://")[2]
    return (
        f"no answer from {host or f'{place.scheme}://{place.bucket}'} yet while {doing}, for {SILENCE_S:.0f} s; trying "
        f"for up to {REQUEST_TIMEOUT_S * MAX_ATTEMPTS / 60:.0f} minutes"
    )


def _is_not_found(error: Exception) -> bool:
    """Also of what was there when it was opened and is not when it is read, for which there are other names."""
    if isinstance(error, FileNotFoundError) or "EntryNotFoundError" in (base.__name__ for base in type(error).__mro__):
        return True
    aws = _AWS.search(str(error))
    return aws is not None and aws[1] in ("NO_SUCH_KEY", "RESOURCE_NOT_FOUND") and aws[2] == "GetObject"


def _named(error: Exception, place: Place, doing: str) -> tuple[str, str]:
    """(reason, the text of an error); the reason is empty where it is not known."""
    aws = _AWS.search(str(error))  # without the file's name, which may be "503"
    told = f"{aws[1]}: {aws[3]}" if aws else f"{type(error).__name__}: {error}"
    for pattern, reason, cure in _REASONS:
        if re.search(pattern, told):
            # The store's own words are left out: with a wrong key they may quote it.
            scheme = _SAME_AS.get(place.scheme, place.scheme)
            cure = cure.format(
                credentials=CREDENTIALS[scheme],
                reached_by=_REACHED_BY[scheme],
                bucket_in=_BUCKET_IN.get(scheme, ""),
            )
            return reason, f"{reason} while {doing}. {cure}"
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        told = told.replace(secret, "***")
    told = re.sub(r"\?[\w.%-]+=[^\s'\"]*", "?***", told)  # of an address that it quotes
    return "", f"failed while {doing}: {' '.join(told.split())}"


# ---- listings --------------------------------------------------------------------------------------------------------


def file_status(path: str) -> FileEntry | None:
    """Size and date of a file; None where there is none."""
    with cloud_errors(path, "looking for it"):
        place = place_of(path)
        system = filesystem(place)
        if place.scheme == "hf":
            try:
                info = system.handler.fs.info(place.key)
            except FileNotFoundError:
                return None
            return _hub_entry(path, info) if info["type"] == "file" else None
        found = system.get_file_info([place.key])[0]
        return FileEntry(path, found.size, found.mtime_ns or 0) if found.is_file else None


def listing(path: str, *, recursive: bool) -> tuple[list[str], list[FileEntry]]:
    """(folders, files) in a folder of a store, in no order. A folder that is not there has none."""
    from pyarrow import fs

    place = place_of(path)
    with cloud_errors(path, "listing", many_requests=True):  # one for a thousand files, and for each folder
        system = filesystem(place)
        if place.scheme == "hf":
            return _hub_listing(system.handler.fs, place.key, recursive=recursive)
        found = system.get_file_info(fs.FileSelector(place.key, allow_not_found=True, recursive=recursive))
        bucket = place.key.partition("/")[0]
        if not found and system.get_file_info([bucket])[0].type == fs.FileType.NotFound:
            raise OSError("NO_SUCH_BUCKET")  # pyarrow lists it as if it were empty
    start = len(place.key) + 1
    folders = [info.path[start:].rstrip("/") for info in found if info.type == fs.FileType.Directory]
    return folders, [FileEntry(info.path[start:], info.size, info.mtime_ns or 0) for info in found if info.is_file]


_REPOSITORY = re.compile(r"^/?datasets/[^/]+/[^/]+")  # with its revision, which the Hub may write in another way


def _hub_listing(system: Any, key: str, *, recursive: bool) -> tuple[list[str], list[FileEntry]]:
    try:
        found = system.find(key, maxdepth=None if recursive else 1, withdirs=True, detail=True)
    except FileNotFoundError:
        return [], []
    folder = _REPOSITORY.sub("", key).strip("/")
    infos = {_REPOSITORY.sub("", name).strip("/").removeprefix(folder).strip("/"): info for name, info in found.items()}
    folders = [name for name, info in infos.items() if info["type"] == "directory" and name]
    return folders, [_hub_entry(name, info) for name, info in infos.items() if info["type"] == "file"]


def _hub_entry(name: str, info: dict[str, Any]) -> FileEntry:
    content = str(info.get("blob_id") or info.get("xet_hash") or "0")
    return FileEntry(name, int(info["size"]), int(re.sub("[^0-9a-f]", "", content)[:15] or "0", 16))
