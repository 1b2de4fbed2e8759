"""Shards that did not come back: which of their images are at fault?

A decode task may die of an image: too little memory, or a fault in a decoder's C code. And an image may be gone since
it was scanned, or out of reach of a node.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from sdxl_ray.cache.actors import decode_shard, record_from, unreadable_on_node
from sdxl_ray.cache.reading import reason_of as why_unreadable
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.cache.sources import read_bytes, read_start, shown_address
from sdxl_ray.errors import StorageError
from sdxl_ray.records import ImageRecord

_DEADLY = "its decoder ended the process that read it (too little memory, or a fault in the decoder)"


class Undecodable(NamedTuple):
    """An image whose pixels turned out damaged."""

    key: str  # of its latent
    image_hash: str
    skipped: Skipped


def look_into(
    text: str, undecodable: list[Undecodable], *, told: Mapping[str, str] | None = None, num_cpus: float = 1.0
) -> str:
    """Find the images that kept a shard from being encoded, and add them to `undecodable`.

    Args:
        text: the work item.
        told: of an image that a node could not read, its "key", the "node" and the "reason". None: the decode task has
            died.
        num_cpus: of a decode task.

    Returns:
        the work item without these images.

    Raises:
        CacheError: a node cannot read an image that the driver can.
    """
    shard = json.loads(text)
    records = {
        key: record_from(fields)
        for key, fields in zip(shard["keys"], shard["records"], strict=True)
        if key not in shard.get("without", ())
    }
    reasons = _gone(records, **told) if told else dict.fromkeys(_deadly(shard, records, num_cpus), _DEADLY)
    undecodable += [
        Undecodable(key, records[key].image_hash, Skipped(records[key].path, reason, kind="unreadable"))
        for key, reason in reasons.items()
    ]
    return json.dumps({**shard, "without": [*shard.get("without", ()), *reasons]})


def _gone(records: Mapping[str, ImageRecord], *, key: str, node: str, reason: str) -> dict[str, str]:
    """Key -> why the driver cannot read the image either: of the one that `node` could not read, and of the others.

    Raises:
        CacheError: it can.
    """
    found = {key: _unreadable(records[key])}
    if not found[key]:
        raise unreadable_on_node(node, records[key].path, reason)
    others = [other for other in records if other != key]
    with ThreadPoolExecutor(16) as threads:  # their first byte will do
        found |= zip(others, threads.map(lambda other: _unreadable(records[other], 1), others), strict=True)
    return {key: reason for key, reason in found.items() if reason}


def _unreadable(record: ImageRecord, length: int = -1) -> str:
    """Why an image or its mask cannot be read from here; "" if it can."""
    of_mask = "" if record.mask in ("", "alpha") else record.mask
    for address, what in ((record.address or record.path, ""), (of_mask, f"its mask {shown_address(of_mask)} ")):
        if not address:
            continue
        try:
            if length < 0:
                read_bytes(address)
            else:
                read_start(address, length)
        except FileNotFoundError:
            return f"{what}is not there any more"
        except (OSError, StorageError, ValueError) as error:
            return f"{what}cannot be read: {why_unreadable(error) if not isinstance(error, ValueError) else error}"
    return ""


def _deadly(shard: Mapping[str, Any], keys: Iterable[str], num_cpus: float) -> list[str]:
    """Of these keys those whose images end the process that decodes them.

    All are tried at once, and those that died, of whatever their neighbours took, once more one at a time.
    """
    suspects = _dying(shard, keys, num_cpus, max_retries=0)
    return [key for suspect in suspects for key in _dying(shard, [suspect], num_cpus, max_retries=1)]


def _dying(shard: Mapping[str, Any], keys: Iterable[str], num_cpus: float, *, max_retries: int) -> list[str]:
    # What it raises is of no interest: it will be raised again when the shard is encoded.
    task: Any = ray.remote(num_cpus=num_cpus, max_retries=max_retries)(lambda row: bool(decode_shard(row)))
    fields = dict(zip(shard["keys"], shard["records"], strict=True))
    tasks = {
        key: task.remote({"shard": json.dumps({"name": shard["name"], "keys": [key], "records": [fields[key]]})})
        for key in keys
    }
    died = []
    for key, result in tasks.items():
        try:
            ray.get(result)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            died.append(key)
        except ray.exceptions.RayError:
            continue
    return died
