"""Shards that did not come back: which of their images are at fault?

A decode task may die of an image: too little memory, or a fault in a decoder's C code. An image may be gone since it
was scanned. And a node may not read what the driver can: once in a while that is a network drive that has stumbled, and
the shard is encoded again as it is; from the first shard on, or again and again, the node does not see the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from sdxl_ray.cache.jobs.actors import decode_shard
from sdxl_ray.cache.jobs.reports import ShardReport, packed, record_from, unpacked, unreadable_on_node
from sdxl_ray.cache.reading import reason_of as why_unreadable
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.cache.sources import read_bytes, read_start, shown_address
from sdxl_ray.errors import StorageError
from sdxl_ray.records import ImageRecord

# Shards of one job that a node may fail to read although the driver can. More of them are no stumbling.
_STUMBLES_AT_MOST = 20
_DEADLY = "its decoder ended the process that read it (too little memory, or a fault in the decoder)"


class Undecodable(NamedTuple):
    """An image whose pixels turned out damaged."""

    key: str  # of its latent
    image_hash: str
    skipped: Skipped


class LostShards:
    """Those of one job. It has to be shown every report, since it judges a node by what else came from there."""

    def __init__(self, undecodable: list[Undecodable], *, num_cpus: float = 1.0) -> None:
        """
        Args:
            undecodable: images that are at fault are added to it.
            num_cpus: of a decode task.
        """
        self.undecodable, self.num_cpus = undecodable, num_cpus
        self._sound: set[str] = set()  # nodes of which a shard has come back
        self._suspects: set[str] = set()  # those that have not read an image
        self._some_there = False  # shards that another job has written; nobody read images for them
        self._stumbled: set[str] = set()  # names of shards that were put back

    def finished(self, report: ShardReport) -> None:
        """This shard is done."""
        if report.num:
            self._sound.add(report.node)
        self._some_there = self._some_there or report.num_there > 0

    def without_the_faulty(self, shard: bytes, report: ShardReport | None) -> bytes:
        """The work item without the images that kept it from being encoded; they are added to `undecodable`.

        Args:
            report: of a node that could not read an image. None: the decode task has died.

        Raises:
            CacheError: a node cannot read images that the driver can, and has not just stumbled.
        """
        fields = unpacked(shard)
        records = {
            key: record_from(record)
            for key, record in zip(fields["keys"], fields["records"], strict=True)
            if key not in fields.get("without", ())
        }
        if report is None:
            reasons = dict.fromkeys(_deadly(fields, records, self.num_cpus), _DEADLY)
        else:
            reasons = self._gone(report, records)
        if not reasons:
            return shard
        self.undecodable += [
            Undecodable(key, records[key].image_hash, Skipped(records[key].path, reason, kind="unreadable"))
            for key, reason in reasons.items()
        ]
        return packed({**fields, "without": [*fields.get("without", ()), *reasons]})

    def _gone(self, report: ShardReport, records: Mapping[str, ImageRecord]) -> dict[str, str]:
        """Key -> why the driver cannot read the image either: of the one that the node told, and of the others."""
        told = dict(report.unreadable or {})
        found = {told["key"]: _unreadable(records[told["key"]])}
        if not found[told["key"]]:
            is_known, is_suspect = report.name in self._stumbled, told["node"] in self._suspects
            self._stumbled.add(report.name)
            self._suspects.add(told["node"])
            may_be_sound = told["node"] in self._sound or (self._some_there and not is_suspect)
            if is_known or not may_be_sound or len(self._stumbled) > _STUMBLES_AT_MOST:
                raise unreadable_on_node(told["node"], records[told["key"]].path, told["reason"])
            return {}
        others = [other for other in records if other != told["key"]]
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
        key: task.remote({"shard": packed({"name": shard["name"], "keys": [key], "records": [fields[key]]})})
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
