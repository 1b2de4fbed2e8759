"""The driver beside a running trainer: progress one way, Ctrl-C the other; what failed, in a person's words."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from sdxl_ray import errors
from sdxl_ray.cache.pipeline import Background
from sdxl_ray.errors import SdxlRayError, TrainingError

Event = dict[str, Any]
_SAVE_WITHIN_S = 120.0


class RunMonitor:
    """Ray actor between the driver and rank 0: progress one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stop = False
        self.fatal: tuple[str, str] | None = None
        self.encoded = True  # with cache.mode = "ondemand": whether nothing more will be

    def post(self, event: str) -> None:
        self.events.append(event)

    def drain(self) -> list[str]:
        events, self.events = self.events, []
        return events

    def request_stop(self) -> None:
        self.stop = True

    def stop_requested(self) -> bool:
        return self.stop

    def report_fatal(self, kind: str, text: str) -> None:
        self.fatal = self.fatal or (kind, text)

    def set_encoded(self, encoded: bool) -> None:
        self.encoded = encoded

    def encoding_state(self) -> tuple[tuple[str, str] | None, bool]:
        return self.fatal, self.encoded

    def fatal_error(self) -> tuple[str, str] | None:
        return self.fatal


def run_and_watch(
    trainer: TorchTrainer, monitor: Any, on_event: Callable[[Event], None], background: Background | None
) -> dict[str, Any]:
    """`trainer.fit()` in a thread, so that this one can show progress and hear signals; what rank 0 has returned.

    Args:
        monitor: actor handle of a `RunMonitor`.
        background: is started once the workers run, and told of.

    Raises:
        SdxlRayError: what a worker has said.
        TrainingError: the workers failed otherwise, or the monitor has died.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = trainer.fit()
        except Exception as error:  # handed to the main thread, which explains it
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    encoding = WatchedBackground(background, monitor, on_event) if background is not None else None
    placed = False
    try:
        with _signals_heard() as asked:
            thread.start()
            told = False
            while thread.is_alive():
                thread.join(0.25)
                placed = _show_events(monitor, on_event) or placed
                # Once the workers run: encoders that came first might take what the workers need.
                if encoding is not None and placed:
                    encoding.look()
                if asked.is_set() and not told:
                    told = True
                    monitor.request_stop.remote()
                    text = "stopping: the step is finished and saved first (again to stop at once)"
                    on_event({"event": "line", "text": text})
        _show_events(monitor, on_event)
        if encoding is not None:
            encoding.show_notes()
        fatal = ray.get(monitor.fatal_error.remote())
    except ray.exceptions.RayActorError as error:
        if _in_trial():
            raise  # Tune has stopped it, with all of its processes
        thread.join(_SAVE_WITHIN_S)  # the workers notice it too, and save
        if not outcome.get("result") or not outcome["result"].return_value["finished"]:
            also = f" The workers: {_explained(outcome['error'], None)}" if "error" in outcome else ""
            raise TrainingError(
                "the process that this one and the workers talk through has died, and the run ends with it. Killed for "
                f"want of memory? `dmesg` tells. Checkpoints are kept; --resume continues from the last one.{also}"
            ) from error
        fatal = None
    if "error" in outcome or fatal:
        raise _explained(outcome.get("error"), fatal)
    returned: dict[str, Any] = outcome["result"].return_value
    return returned


class WatchedBackground:
    """Encoding on demand beside the run: begun, shown as far as it is, and where it failed the workers are told."""

    def __init__(self, background: Background, monitor: Any, on_event: Callable[[Event], None]) -> None:
        self.background, self.monitor, self.on_event = background, monitor, on_event
        self._progress: dict[str, tuple[int, int]] = {}  # of each stage, as it was shown
        self._notes: set[str] = set()
        self._has_ended = self._has_failed = False

    def look(self) -> None:
        """Start it, unless it has begun; tell what is new."""
        self.background.start()
        for stage, (done, total) in list(self.background.progress.items()):
            if self._progress.get(stage) != (done, total):
                self._progress[stage] = (done, total)
                self.on_event({"event": "progress", "stage": stage, "done": done, "total": total})
        self.show_notes()
        if not self.background.running and not self._has_ended:
            self._has_ended = True
            self.monitor.set_encoded.remote(True)
        error = self.background.error
        if error is not None and not self._has_failed:
            self._has_failed = True
            self.monitor.report_fatal.remote(type(error).__name__, str(error))

    def show_notes(self) -> None:
        """Images that turned out damaged, each once, and how many captions were cut."""
        notes = [f"{item.path}: {item.reason}; it does not count in training" for item in self.background.skipped]
        if self.background.num_long_captions:
            notes.append(
                f"{self.background.num_long_captions} captions are longer than {self.background.plan.max_tokens} "
                "tokens; the rest of them is not seen (cache.caption_chunks)"
            )
        for note in notes:
            if note not in self._notes:
                self._notes.add(note)
                self.on_event({"event": "line", "text": f"note: {note}"})


def _show_events(monitor: Any, on_event: Callable[[Event], None]) -> bool:
    """Whether there were any."""
    try:
        events = ray.get(monitor.drain.remote())
    except ray.exceptions.ActorUnavailableError:  # its machine cannot be reached just now
        return False
    for event in events:
        on_event(json.loads(event))
    return bool(events)


def _in_trial() -> bool:
    """Tune runs its trials in threads."""
    return threading.current_thread() is not threading.main_thread()


@contextmanager
def _signals_heard() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends this process as usual.

    The handler does nothing else: it can interrupt a line that is just being printed.
    """
    asked = threading.Event()
    if _in_trial():
        yield asked  # signals are the sweep's
        return

    def hear(number: int, frame: Any) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(error: Exception | None, fatal: tuple[str, str] | None) -> SdxlRayError:
    """What a worker said, without the five layers that Ray wraps around it."""
    if fatal is not None:
        kind, text = fatal
        known = getattr(errors, kind, errors.RunError)
        explained: SdxlRayError = known(text)
        explained.__cause__ = error
        return explained
    reasons = {str(failure).strip().splitlines()[-1] for failure in getattr(error, "worker_failures", {}).values()}
    reason = "; ".join(sorted(reasons)) or str(error).strip().splitlines()[-1]
    explained = TrainingError(
        f"the workers failed: {reason}\nCheckpoints are kept; --resume continues from the last one. "
        "Ray's logs: /tmp/ray/session_latest/logs. With --traceback, the whole error is shown."
    )
    explained.__cause__ = error
    return explained
