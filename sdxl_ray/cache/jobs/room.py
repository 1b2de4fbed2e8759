"""Is there room on the cluster for what encodes? Without it a job waits, and Ray's own warnings are not shown."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, TypeVar

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_get, _internal_kv_put

from sdxl_ray.cache.jobs.pools import Share

Item = TypeVar("Item")

_TELL_AFTER_S = 60.0


class Reserved(NamedTuple):
    """What training has; only beside a training run."""

    cpus: float = 0.0
    gpus: float = 0.0


class Mark:
    """Set on any node, seen on the driver. May be pickled."""

    def __init__(self) -> None:
        self.key = f"sdxl-ray/{uuid.uuid4().hex}"  # in the key-value store of the cluster, where its value is one byte
        self._is_set = False

    def set(self) -> None:
        """Once for each process; a mark is not worth the shard that it would take with it."""
        if not self._is_set:
            with contextlib.suppress(Exception):
                _internal_kv_put(self.key, b"1")
            self._is_set = True

    def is_set(self) -> bool:
        return bool(_internal_kv_exists(self.key))


class Begun:
    """Called by an encoder as it begins, on its node: sets the mark, and counts. May be pickled."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __call__(self) -> int:
        """How often this actor has begun by now: more than once where its process has died. 1 where nobody can tell."""
        self.mark.set()
        try:
            key = f"{self.mark.key}/{ray.get_runtime_context().get_actor_id()}"
            number = int(_internal_kv_get(key) or b"0") + 1
            _internal_kv_put(key, str(number).encode())
        except Exception:  # as for the mark; Ray counts too
            return 1
        return number


class Room:
    """Looks at one Ray Data job: has Ray found room for its encoders, and for its decode tasks?

    A job that has begun on a node and gives no rows yet is no case for it: an encoder may take minutes to load.
    """

    def __init__(
        self, stage: str, share: Share, reserved: Reserved | None = None, *, after_s: float = _TELL_AFTER_S
    ) -> None:
        """
        Args:
            stage: "text" or "images".
        """
        self.stage, self.share, self.reserved, self.after_s = stage, share, reserved, after_s
        self.encoding, self.decoding = Mark(), Mark()

    def watched(self, items: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """The same items. Where none comes for a minute, and Ray has no room, it is said in one line, once."""
        over = threading.Event()
        last = [time.monotonic()]
        threading.Thread(target=self._watch, args=(over, last), name="room to encode", daemon=True).start()
        try:
            with contextlib.closing(items):
                for item in items:
                    last[0] = time.monotonic()
                    yield item
        finally:
            over.set()

    def _watch(self, over: threading.Event, last: list[float]) -> None:
        while not over.wait(self.after_s / 10):
            if time.monotonic() - last[0] < self.after_s:
                continue
            try:
                text = self.lacking(ray.available_resources(), ray.cluster_resources())
            except Exception:  # Ray is ending, or its head does not answer: the job itself tells what is wrong
                continue
            if text and not over.is_set():
                warnings.warn(text, stacklevel=1)
                return

    def lacking(self, free: Mapping[str, float], total: Mapping[str, float]) -> str:
        """What has found no room although it needs it, and what a person can do; "" where nothing waits for room."""
        share, decodes = self.share, self.stage == "images"
        if not self.encoding.is_set():
            who, needs = "an encoder", {"GPU": share.gpus_per_actor, "CPU": share.cpus_per_actor}
        elif decodes and not self.decoding.is_set():
            who, needs = "a task that decodes images", {"CPU": share.cpus_per_decode}
        else:
            return ""
        short = [name for name, need in needs.items() if free.get(name, 0.0) < need - 1e-6]
        if not short:
            return ""
        wanted = " and ".join(f"{need:g} {name}" for name, need in needs.items() if need)
        have = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}s" for name in short)
        if self.reserved is not None:
            cure = (
                "Training will wait for it. Lower train.num_workers or cluster.cpus_per_worker, add a machine, or set "
                'cache.mode = "disk" or "off".'
            )
        elif "GPU" in short:
            setting = "gpus_per_encoder" if decodes else "gpus_per_text_encoder or cache.gpus_per_encoder"
            cure = (
                f"Wait for what else runs on this cluster, or end it; or lower cache.{setting}, or encode on CPUs with "
                'cluster.accelerator = "cpu".'
            )
        else:
            cure = "Wait for what else runs on this cluster, or end it; or add a machine."
        waiting = "images" if decodes else "captions"
        return (
            f"no {waiting} encoded for {self.after_s:g} s: {who} needs {wanted}, and free are {have}. It begins as "
            f"soon as there is room. {cure}"
        )


def marked(call: Callable[[dict[str, Any]], Item], mark: Mark, *, name: str) -> Callable[[dict[str, Any]], Item]:
    """The same call, which sets the mark first. `name`: what Ray calls the task."""

    def marked_call(row: dict[str, Any]) -> Item:
        mark.set()
        return call(row)

    marked_call.__name__ = name
    return marked_call
