import errno
import re

import pytest

from sdxl_ray import errors
from sdxl_ray.errors import InputError, Interrupted, RunError, SdxlRayError, StorageError, storage_errors

FAMILY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SdxlRayError)]


def tree_of_the_docstring():
    """(class, parent) of each line, by its indentation."""
    found, above = [], {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+)\s{2,}", line)
        if match:
            depth = len(match[1]) // 4
            above[depth] = match[2]
            found.append((match[2], above.get(depth - 1)))
    return found


def test_the_docstring_is_the_tree():
    in_code = {(each.__name__, each.__base__.__name__ if each is not SdxlRayError else None) for each in FAMILY}
    in_docstring = {
        (name, parent or ("SdxlRayError" if name == "Interrupted" else None))
        for name, parent in tree_of_the_docstring()
    }
    assert in_docstring == in_code


def test_exit_codes():
    for each in FAMILY:
        expected = 2 if issubclass(each, InputError) else 130 if each is Interrupted else 1
        assert each.exit_code == expected, each


@pytest.mark.parametrize(
    ("number", "reason", "cure"),
    [
        (errno.ENOSPC, "no space left on the device", "Free some space"),
        (errno.EDQUOT, "the disk quota is used up", "Free some space"),
        (errno.EROFS, "the file system is read-only", "Make it writable"),
        (errno.EACCES, "permission denied", "Make it writable"),
        (errno.EPERM, "not permitted", "Make it writable"),
        (errno.EIO, "input/output error", "Check the disk or its mount"),
        (errno.ESTALE, "stale file handle", "Check the disk or its mount"),
        (errno.ENOTDIR, "a file is in the place of a folder", "Remove what is in its place"),
        (errno.EEXIST, "a file is in the place of a folder", "Remove what is in its place"),
        (errno.EISDIR, "a folder is in the place of the file", "Remove what is in its place"),
    ],
)
def test_a_disk_that_refuses_is_a_storage_error_with_place_and_cure(number, reason, cure):
    cause = OSError(number, "whatever")
    with (
        pytest.raises(StorageError) as error,
        storage_errors("writing a shard", "/cache/x", "Free some space, or choose another folder."),
    ):
        raise cause
    assert str(error.value) == f"/cache/x: {reason} while writing a shard. {cure}, or choose another folder."
    assert error.value.__cause__ is cause
    assert isinstance(error.value, RunError)


@pytest.mark.parametrize("cause", [FileNotFoundError(errno.ENOENT, "gone"), OSError("no number"), ValueError("other")])
def test_other_errors_pass_unchanged(cause):
    with pytest.raises(type(cause)) as error, storage_errors("writing", "/x", "Cure."):
        raise cause
    assert error.value is cause
