"""What the Ray Data jobs make of errors that no encoder has told. With Ray: tests/integration/test_cache.py"""

import json

import pytest
import ray

from sdxl_ray.cache.ray_jobs import _results, _rows
from sdxl_ray.errors import CacheError, StorageError

# As Ray 2.60 shows an error of a task of Ray Data.
RAISED = """[36mray::MapWorker(MapBatches(WriteLatentShard)).submit()[39m (pid=20318, ip=192.0.2.2, repr=x)
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58, in run
    result = self.fn(*self.args, **self.kwargs)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
{first}  File "/x/sdxl_ray/cache/actors.py", line 11, in __call__
    tensors = encoder.encode()
              ^^^^^^^^^^^^^^^^
{last}

The above exception was the direct cause of the following exception:

[36mray::MapWorker(MapBatches(WriteLatentShard)).submit()[39m (pid=20318, ip=192.0.2.2, actor_id=237d, repr=x)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`."""
FIRST = """  File "/x/sdxl_ray/cache/encode.py", line 11, in encode
    size = sizes[name]
KeyError: 'name'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
"""
CUDA = """RuntimeError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.

Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


class Dataset:
    """Rows, then an error."""

    def __init__(self, error, *rows):
        self.error, self.rows = error, rows

    def iter_rows(self):
        yield from self.rows
        raise self.error


def error_of(error):
    with pytest.raises(CacheError) as raised:
        list(_results(Dataset(error)))
    assert raised.value.__cause__ is error
    return str(raised.value)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("ValueError: too many values", "ValueError: too many values"),
        (CUDA, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("AssertionError", "AssertionError"),
    ],
)
@pytest.mark.parametrize("first", ["", FIRST])
def test_what_a_task_raised_is_told_in_its_own_line(first, last, reason):
    error = ray.exceptions.UserCodeException(RAISED.format(first=first, last=last))
    assert error_of(error) == (
        f"encoding failed: {reason}. Finished shards are kept; run again to go on. With --traceback, the whole error "
        "is shown."
    )


@pytest.mark.parametrize("last", ["MemoryError", "MemoryError: Unable to allocate 4.00 GiB"])
def test_too_little_memory_of_a_task_is_told_with_the_cure(last):
    text = error_of(ray.exceptions.UserCodeException(RAISED.format(first="", last=last)))
    assert text.startswith(
        f"encoding failed: {last}. A node has too little memory. Let fewer tasks run there at once: "
    )
    assert "Finished shards are kept; run again to go on." in text


def test_a_node_that_runs_out_of_memory_is_told_with_the_cure():
    killed = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on ...")
    assert error_of(killed).startswith(
        "encoding failed: Task was killed due to the node running low on memory. A node has too little memory. Let "
    )


def test_what_ray_found_is_told_in_its_first_line():
    full = ray.exceptions.RaySystemError("the disk is full.\nMore about it")
    assert error_of(full).startswith("encoding failed: System error: the disk is full. Finished shards are kept; ")


def test_what_an_encoder_has_told_stays_what_it_is_and_a_bug_of_ours_too():
    told = {"error": json.dumps(["StorageError", "no space", "here"])}
    with pytest.raises(StorageError, match="no space"):
        list(_results(Dataset(AssertionError(), told)))
    with pytest.raises(ZeroDivisionError):
        list(_results(Dataset(ZeroDivisionError(), {"error": ""})))


def test_a_scan_that_fails_is_no_encoding():
    died = ray.exceptions.WorkerCrashedError()
    with pytest.raises(CacheError, match=r"^scanning failed: .*\. What was found is kept; run again to go on\."):
        list(_rows(Dataset(died), "scanning failed", "What was found is kept"))
