"""Servers that do not answer: a word while they are waited for, and then they are left alone for a while.

300,000 images of a dead server would take days of waiting, and each attempt minutes without a line.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator

LIMIT = 20  # failures in a row, each after its own attempts
PAUSE_S = 60.0


class Outages:
    """Counts for each server, in this process. Safe to share between threads."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def reason(self, server: str) -> str:
        """Why it need not be asked now; empty: ask it."""
        if time.monotonic() < self._until.get(server, 0.0):
            return f"{server} has not answered for the last {LIMIT} requests"
        return ""

    def answered(self, server: str) -> None:
        """Whatever the answer was."""
        if server in self._failures:
            with self._lock:
                self._failures.pop(server, None)
                self._until.pop(server, None)

    def failed(self, server: str) -> None:
        """Not reached, or no answer in time. After a pause one more failure begins the next."""
        with self._lock:
            self._failures[server] = self._failures.get(server, 0) + 1
            if self._failures[server] >= LIMIT:
                self._until[server] = time.monotonic() + PAUSE_S


class LongWaits:
    """Says once for each server, in this process, that it is taking its time. Safe to share between threads.

    A thread of its own looks at the running calls: the libraries that make them say nothing between their attempts.
    """

    def __init__(self, after_s: float) -> None:
        """
        Args:
            after_s: how long a call may take before something is said.
        """
        self.after_s = after_s
        self._running: dict[object, tuple[float, str, str]] = {}  # of each call: when to tell, the server, the text
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    @contextlib.contextmanager
    def watched(self, server: str, text: str) -> Iterator[None]:
        """Around a call to the server. `text`: the warning, if it takes long."""
        if server in self._told:
            yield
            return
        call = object()
        with self._lock:
            self._running[call] = (time.monotonic() + self.after_s, server, text)
            if self._watcher is None or not self._watcher.is_alive():  # a thread does not survive a fork
                self._watcher = threading.Thread(target=self._watch, name="long waits", daemon=True)
                self._watcher.start()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(call, None)

    def _watch(self) -> None:
        while True:
            time.sleep(self.after_s / 10)
            with self._lock:
                if not self._running:
                    self._watcher = None
                    return
                late = {server: text for due, server, text in self._running.values() if due < time.monotonic()}
                new = {server: text for server, text in late.items() if server not in self._told}
                self._told.update(new)
            for text in new.values():
                warnings.warn(text, stacklevel=1)
