"""The rows of a Ray Data job, and in one line what went wrong with it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from sdxl_ray.cache.jobs.reports import ShardReport, failure, raise_error
from sdxl_ray.errors import CacheError

Result = TypeVar("Result")


def reports_of(dataset: ray.data.Dataset) -> Generator[ShardReport, None, None]:
    """What the encoders tell of their shards, in any order.

    Raises:
        SdxlRayError: what an encoder has said.
        CacheError: anything else that went wrong on a node.
    """
    for row in rows_of(dataset, "encoding failed", "Finished shards are kept"):
        report = ShardReport.from_row(row)
        raise_error(report.error)
        yield report


def rows_of(dataset: ray.data.Dataset, failed: str, kept: str) -> Generator[dict[str, Any], None, None]:
    """The dataset's rows, as they come.

    Raises:
        CacheError: see `failure`.
    """
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        reason = reason_of(error)
        memory = reason.startswith("MemoryError") or isinstance(error, ray.exceptions.OutOfMemoryError)
        raise CacheError(failure(failed, reason, kept, memory=memory)) from error


def reason_of(error: ray.exceptions.RayError) -> str:
    """The line that says what went wrong.

    Of what Ray itself found, the first. What a task raised comes as text: tracebacks, each the cause of the next one,
    and last Ray Data's own exception, which says nothing about it.
    """
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ray.exceptions.UserCodeException):
        return text.splitlines()[0].rstrip(".")
    raised = text.split("\n\nThe above exception was the direct cause")[-2:][0].splitlines()
    last_frame = max((number for number, line in enumerate(raised) if line.startswith('  File "')), default=0)
    return next((line for line in raised[last_frame:] if line and not line[0].isspace()), raised[-1]).rstrip(".")


def quiet() -> None:
    """Progress is ours to show, and so are errors: those of Ray Data are raised with all that it would log."""
    # Of `max_retries` and `max_restarts` ("Use the named remote parameters instead", of which none is for these), and
    # of `ExecutionOptions.exclude_resources` ("Use `ExecutionOptions.label_selector`", which cannot keep cores of one
    # machine free). They go with Ray 2.64 and after January 2027; Ray is pinned.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning, module=r"sdxl_ray\.")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class InThread(Generic[Result]):
    """A call that runs in a thread. The process may end without it."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # raised where the result is wanted
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Waited for. Raises what the call raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]
