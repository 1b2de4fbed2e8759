"""The scan on the nodes: the driver's list of files as work items, and what became of them. No Ray in here."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sdxl_ray.cache.jobs.reports import unreadable_on_node
from sdxl_ray.cache.scan import ScannedFile, scan_file, scan_images
from sdxl_ray.records import Listed

_READ_AGAIN = 20  # files of one row


class ScanChunk:
    """Ray Data task: some files of the list that the driver made."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        files = listed_from(str(row["files"]))
        scanned = [asdict(scan_file(listed, self.max_pixels, by_listing=trusted)) for listed, trusted in files]
        return {
            "first": row["first"],
            "scanned": json.dumps(scanned),
            "by_listing": json.dumps([trusted for _, trusted in files]),
            "node": socket.gethostname(),
        }


def files_as_row(first: int, files: Sequence[Listed], trusted: Sequence[bool]) -> dict[str, Any]:
    """A work item of `ScanChunk`; `first` is the place of its first file in the list."""
    items = [
        [file.path, file.stamp, file.address, file.original_hw, by_listing]
        for file, by_listing in zip(files, trusted, strict=True)
    ]
    return {"first": first, "files": json.dumps(items)}


def listed_from(text: str) -> list[tuple[Listed, bool]]:
    """What `files_as_row` wrote."""
    return [
        (Listed(path, stamp, address, tuple(original_hw) if original_hw else None), trusted)
        for path, stamp, address, original_hw, trusted in json.loads(text)
    ]


def scanned_files(row: Mapping[str, Any], files: Sequence[Listed], max_pixels: int) -> list[ScannedFile]:
    """The files of one row of `ScanChunk`, on the driver.

    What the node could not read is read here again, 20 of them and then, if any of these can be read, the others: a
    network drive may have stumbled. What neither can read is skipped like any other.

    Raises:
        CacheError: the node cannot read more than 20 files that the driver can, which is no stumbling.
    """
    scanned = [ScannedFile(**item) for item in json.loads(str(row["scanned"]))]
    by_listing, first = json.loads(str(row["by_listing"])), int(row["first"])

    def read_here(places: Sequence[int]) -> dict[int, ScannedFile]:
        found = scan_images(
            [files[first + at] for at in places], max_pixels=max_pixels, by_listing=[by_listing[at] for at in places]
        )
        return {at: image for at, image in zip(places, found, strict=True) if image.kind != "unreadable"}

    failed = [at for at, found in enumerate(scanned) if found.kind == "unreadable"]
    # Spread over all of them, so that they tell what the others are like.
    chosen = failed[:: -(-len(failed) // _READ_AGAIN)] if failed else []
    readable = read_here(chosen)
    num_readable = len(readable) * len(failed) / max(1, len(chosen))
    if readable and num_readable <= _READ_AGAIN:
        readable |= read_here(sorted(set(failed) - set(chosen)))
        num_readable = len(readable)
    if num_readable > _READ_AGAIN:
        at = min(readable)
        _, _, reason = scanned[at].problem.partition(": ")  # behind "cannot be read"
        raise unreadable_on_node(str(row["node"]), files[first + at].path, reason)
    for at, found in readable.items():
        scanned[at] = found
    return scanned
