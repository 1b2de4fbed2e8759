"""Stamps of files that tables name, wherever they lie: what changes when a file does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from sdxl_ray import storage
from sdxl_ray.cache.sources.files import MISSING, ahead, local_stamps, stamp_of
from sdxl_ray.errors import StoreRefusal

ADDRESS_ONLY = "-"  # the stamp of what is known by its address alone
MAX_NAMES = 1_000_000  # of listed folders in memory, about 200 MB


class Stamps:
    """Folders of stores that were listed stay in memory, for the next piece of the table."""

    def __init__(self) -> None:
        self._folders: OrderedDict[str, Mapping[str, str] | None] = OrderedDict()
        self._num_names = 0

    def of(self, addresses: Sequence[str]) -> dict[str, str]:
        """Of each file, in any order: size and date.

        In a store they come from one listing of each folder, not from a request for each file. What is behind a URL
        would take a request, and of a folder that may not be listed nothing is told: there the stamp never changes.

        Raises:
            StorageError: a store does not answer. Images without their stamps would be other images, encoded again.
        """
        local = [address for address in addresses if not storage.is_uri(address)]
        found = dict(zip(local, local_stamps(local), strict=True))
        by_folder: dict[str, list[str]] = {}
        for address in addresses:
            if address.startswith(("http://", "https://")):
                found[address] = ADDRESS_ONLY
            elif storage.is_uri(address):
                by_folder.setdefault(address.rpartition("/")[0], []).append(address)
        for folder, listed in self._listed(sorted(by_folder)):
            for address in by_folder[folder]:
                name = address.rpartition("/")[2]
                found[address] = ADDRESS_ONLY if listed is None else listed.get(name, MISSING)
        return found

    def _listed(self, folders: Sequence[str]) -> list[tuple[str, Mapping[str, str] | None]]:
        new = [folder for folder in folders if folder not in self._folders]
        for folder, names in zip(new, ahead(_list, new), strict=True):
            self._folders[folder] = names
            self._num_names += len(names or ())
        found = []
        for folder in folders:
            self._folders.move_to_end(folder)
            found.append((folder, self._folders[folder]))
        while self._num_names > MAX_NAMES:
            _, gone = self._folders.popitem(last=False)
            self._num_names -= len(gone or ())
        return found


def _list(folder: str) -> Mapping[str, str] | None:
    """Name -> stamp; None where it may not be listed."""
    try:
        return {entry.name: stamp_of(entry) for entry in storage.list_level(folder)[1]}
    except StoreRefusal:
        return None
