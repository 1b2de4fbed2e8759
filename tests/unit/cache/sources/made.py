"""Datasets for these tests."""

import io
import tarfile

import pytest

from sdxl_ray.cache.sources import list_dataset, read_bytes
from sdxl_ray.config.schema import DatasetSection


def section(path, **settings):
    return DatasetSection(path=str(path), **settings)


def listed(path, **settings):
    return list(list_dataset(section(path, **settings)))


def contents(images):
    """The bytes of each image."""
    return [read_bytes(image.address or image.path) for image in images]


def write(folder, *names):
    """Files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def tar_bytes(members, format=tarfile.PAX_FORMAT):
    """A tar file of these (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def note_of(call):
    """What the call warns of, which is one thing."""
    with pytest.warns(UserWarning) as warned:
        call()
    (warning,) = warned
    return str(warning.message)
