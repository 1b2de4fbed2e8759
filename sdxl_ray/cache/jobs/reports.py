"""What travels between the driver and the nodes, as text: work items, reports of shards, errors. No Ray in here.

An error that is raised inside an actor would come back wrapped three times, and one raised in a constructor would be
tried again and again. So it travels in a report, and `raise_error` on the driver makes of it what it was.
"""

from __future__ import annotations

import json
import socket
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdxl_ray import errors
from sdxl_ray.errors import CacheError, SdxlRayError
from sdxl_ray.records import ImageRecord


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What became of one shard: from the actor that writes it to the driver, as a row of a Ray Data job."""

    name: str
    num: int = 0  # entries that were encoded and written
    num_there: int = 0  # entries that somebody else has written meanwhile; then nothing was done
    skipped: tuple[Mapping[str, Any], ...] = ()  # images without pixels: "key", "path", "image_hash", "reason", "kind"
    # An image that a node could not read: its "key", the "node", the "reason". Then nothing was written.
    unreadable: Mapping[str, str] | None = None
    error: str = ""  # for `raise_error`
    node: str = ""  # that decoded it
    decode_s: float = 0.0
    encode_s: float = 0.0
    tiled: int = 0  # images for which an accelerator had too little memory
    long: int = 0  # captions of which the encoders see only a part

    def to_row(self) -> dict[str, Any]:
        """A batch of one row, as Ray Data expects it."""
        return {"report": np.array([json.dumps(asdict(self))])}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ShardReport:
        """Of a row, or of such a batch."""
        fields = json.loads(str(np.asarray(row["report"]).item()))
        return cls(**{**fields, "skipped": tuple(fields["skipped"])})


def packed(shard: Mapping[str, Any]) -> bytes:
    """A work item's shard, a fifth of its JSON: thousands wait on the driver and in the object store."""
    return zlib.compress(json.dumps(shard).encode(), 1)


def unpacked(shard: bytes) -> dict[str, Any]:
    """What `packed` was given."""
    fields: dict[str, Any] = json.loads(zlib.decompress(shard))
    return fields


def record_from(fields: dict[str, Any]) -> ImageRecord:
    """What `asdict` and JSON made of a record."""
    pairs = {name: tuple(fields[name]) for name in ("original_hw", "bucket_hw", "resized_hw", "crop_top_left")}
    return ImageRecord(**{**fields, **pairs})


# ---- errors ----------------------------------------------------------------------------------------------------------


def failure(failed: str, reason: str, kept: str, *, memory: bool) -> str:
    """What a person is told of an error that nobody expected.

    Args:
        failed: "encoding failed".
        kept: what is not lost.
        memory: whether it was for want of memory.
    """
    cure = (
        "A node has too little memory. Let fewer tasks run there at once: fewer encoders (cache.num_encoders, "
        "cache.max_encoders), fewer CPUs for Ray, or nothing else beside them. "
        if memory
        else ""
    )
    return f"{failed}: {reason}. {cure}{kept}; run again to go on. With --traceback, the whole error is shown."


def died_too_often(num: int) -> CacheError:
    """Of an encoder's process on this node."""
    reason = (
        f"the process that encodes on {socket.gethostname()} has died {num} times. Killed for want of memory, or its "
        "machines taken away? `dmesg` there tells; for fewer at once, lower cache.num_encoders or cache.batch_size"
    )
    return CacheError(failure("encoding failed", reason, "Finished shards are kept", memory=False))


def error_text(error: Exception) -> str:
    """An error as part of a row."""
    message, shown = str(error), ""
    if not isinstance(error, SdxlRayError):
        first = next(iter(message.splitlines()), "")
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        memory = isinstance(error, MemoryError)
        message = failure("encoding failed", reason.rstrip("."), "Finished shards are kept", memory=memory)
        shown = "".join(traceback.format_exception(error))
    return json.dumps([type(error).__name__, message, socket.gethostname(), shown])


def raise_error(text: str) -> None:
    """Nothing if there was none; else raise it as the kind it was, with its node where that is another machine.

    One that is none of ours becomes a CacheError, with its traceback as the cause.
    """
    if not text:
        return
    name, message, node, shown = json.loads(text)
    kind = getattr(errors, name, CacheError)
    told = kind(message if node == socket.gethostname() or node in message else f"on node {node}: {message}")
    raise told from (RuntimeError(f"on node {node}:\n{shown}") if shown else None)


def unreadable_on_node(node: str, path: str, reason: str) -> CacheError:
    """A node cannot read what the driver can."""
    return CacheError(
        f"node {node} cannot read {path}: {reason}. Is dataset.path the same folder on all machines, and allowed to "
        "the user that Ray runs as? For a cloud address: do all nodes have the keys?"
    )
