"""What a person sees: a live display on a terminal, plain lines in a log. Everything also goes to the run's log.txt."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sdxl_ray.tracking.metrics import duration

_TELLING_S = 5.0
# Control characters but tabs and ends of lines, and the halves of surrogate pairs that stand for bytes of file names.
_NOT_PRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def for_terminal(text: str) -> str:
    """The text with whatever a terminal would take as a command, and what it cannot show, written as \\x1b.

    File names and captions can hold anything, and people train on what they have downloaded.
    """
    return _NOT_PRINTED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class Console:
    """Lines that stay, and bars that move on a terminal only.

    >>> console = Console()
    >>> console.line("12 images")
    >>> console.progress("images", 3, 12)
    """

    def __init__(self, *, live: bool | None = None, log_file: Path | None = None) -> None:
        self.rich = RichConsole(highlight=False, soft_wrap=True, emoji=False)  # ":cat:" in a path stays as it is
        self.live = self.rich.is_terminal if live is None else live
        self._logs: list[Path] = [log_file] if log_file else []
        self._early: list[str] = []  # lines from before a run's folder was its own
        self._progress: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._last_shown: dict[str, float] = {}
        self._first: dict[str, tuple[int, float]] = {}  # the first that was done of each stage: how many, when
        self._last: dict[str, tuple[int, float, int]] = {}  # and of how many

    def log_to(self, path: Path) -> None:
        """Append lines to this file too, those printed so far included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path not in self._logs:
            self._logs.append(path)
            early, self._early = self._early, []
            for text in early:
                self._log(text)

    def line(self, text: str = "", *, style: str | None = None) -> None:
        """A line that stays."""
        text = for_terminal(text)
        self.rich.print(text, style=style, markup=False)
        self._log(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """How far a stage is: a bar on a terminal; elsewhere a line when it ends and every ten seconds."""
        if not total and stage not in self._last:
            return
        now = time.monotonic()
        last, _, last_total = self._last.get(stage, (0, 0.0, 0))
        if done < last or last >= last_total:  # the first, or the same stage of another dataset
            self._first.pop(stage, None)
            self._last.pop(stage, None)
        if done:
            self._first.setdefault(stage, (done, now))
            self._last[stage] = (done, now, total)
        if self.live:
            self._bar(stage, done, total)
        elif done >= total or now - self._last_shown.setdefault(stage, now) > 10:
            self._last_shown[stage] = now
            per_second = self.per_second(stage)
            left = f", {duration((total - done) / per_second)} left" if done < total and per_second else ""
            self.line(f"{stage}: {done}/{total}" + (f"  ({per_second:.1f}/s{left})" if per_second else ""))

    def per_second(self, stage: str) -> float | None:
        """Speed of a stage from the first that was done to the last: what came before was getting ready. None: too
        short to tell, since what is done comes in bursts."""
        (first, since), (last, until, _) = self._first.get(stage, (0, 0.0)), self._last.get(stage, (0, 0.0, 0))
        return (last - first) / (until - since) if until - since >= _TELLING_S else None

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bar(self, stage: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _SpeedColumn(),
                TimeRemainingColumn(),
                console=self.rich,
                transient=True,
            )
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(stage))

    def _log(self, text: str) -> None:
        if not self._logs:
            self._early.append(text)
        for path in list(self._logs):
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:  # a full disk must not stop a run for the sake of its log; say so once
                self._logs.remove(path)
                print(f"{path}: {error.strerror}; this log ends here", file=sys.stderr)
