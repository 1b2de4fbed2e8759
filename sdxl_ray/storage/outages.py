"""Servers that do not answer are left alone for a while: 300,000 images of a dead one would take days of waiting."""

from __future__ import annotations

import threading
import time

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
