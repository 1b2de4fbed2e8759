"""What can go wrong, as one family.

SdxlRayError                 anything we can name; the command line prints message and cure, no traceback
├── InputError               what the user gave cannot be used                        exit code 2
│   ├── ConfigError          a setting: unknown, out of range, contradictory
│   ├── DatasetError         images or captions: none found, ambiguous, too many unreadable
│   └── ModelError           the base model: a part missing, not reachable, not SDXL
└── RunError                 the run failed although its input was sound              exit code 1
    ├── CacheError           an encoded shard is damaged or belongs to something else
    ├── CheckpointError      a checkpoint is incomplete or does not fit the run
    ├── ExportError          a written LoRA does not reproduce the trained model
    ├── StorageError         a disk or bucket refused to take or give data
    │   └── StoreRefusal     and would refuse again: access denied, no such bucket
    ├── ClusterError         Ray cannot be reached or cannot place the workers
    └── TrainingError        non-finite loss, workers that died too often
Interrupted                  the user asked to stop; what was computed is saved       exit code 130

A message says what and where, what was found against what was expected, and what to type next.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class SdxlRayError(Exception):
    """Root of everything this package raises on purpose."""

    exit_code = 1


class InputError(SdxlRayError):
    """What the user gave cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown, out of range, or contradicts another."""


class DatasetError(InputError):
    """The images or captions cannot be used."""


class ModelError(InputError):
    """The base model cannot be used."""


class RunError(SdxlRayError):
    """The run failed although its input was sound."""


class CacheError(RunError):
    """An encoded shard is damaged or belongs to something else."""


class CheckpointError(RunError):
    """A checkpoint is incomplete or does not fit the run."""


class ExportError(RunError):
    """A written LoRA does not reproduce the trained model."""


class StorageError(RunError):
    """A disk or bucket refused to take or give data."""


class StoreRefusal(StorageError):
    """A store says no, and would say so again: access denied, no such bucket."""


class ClusterError(RunError):
    """Ray cannot be reached or cannot place the workers."""


class TrainingError(RunError):
    """The loss is not finite, or workers died too often."""


class Interrupted(SdxlRayError):
    """The user asked to stop; what was computed is saved."""

    exit_code = 130


@contextlib.contextmanager
def storage_errors(doing: str, path: str | Path, cure: str) -> Iterator[None]:
    """Turn a full or read-only disk into a `StorageError` that says what was being written and what to do.

    `doing` completes "while ..." ("writing a latent shard"). Of `cure`, "Free some space" becomes "Make it writable",
    "Remove what is in its place" or "Check the disk or its mount" where room is not what is missing. Other OSErrors
    pass unchanged.
    """
    no_room, no_right = "Free some space", "Make it writable"
    in_place, faulty = "Remove what is in its place", "Check the disk or its mount"
    known = {  # reason, and what takes the place of "Free some space"
        errno.ENOSPC: ("no space left on the device", no_room),
        errno.EDQUOT: ("the disk quota is used up", no_room),
        errno.EROFS: ("the file system is read-only", no_right),
        errno.EACCES: ("permission denied", no_right),
        errno.EPERM: ("not permitted", no_right),
        errno.EIO: ("input/output error", faulty),
        errno.ESTALE: ("stale file handle", faulty),
        errno.ENOTDIR: ("a file is in the place of a folder", in_place),
        errno.EEXIST: ("a file is in the place of a folder", in_place),
        errno.EISDIR: ("a folder is in the place of the file", in_place),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in known:
            raise
        reason, instead = known[error.errno]
        cure = cure.replace(no_room, instead)
        raise StorageError(f"{path}: {reason} while {doing}. {cure}") from error
