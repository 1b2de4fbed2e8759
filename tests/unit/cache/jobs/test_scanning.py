"""The scan on the nodes, called here without Ray."""

import numpy as np
import pytest

from sdxl_ray.cache.jobs import scanning
from sdxl_ray.cache.jobs.scanning import ScanChunk, files_as_row, listed_from, scanned_files
from sdxl_ray.cache.scan import scan_file, scan_images
from sdxl_ray.errors import CacheError
from sdxl_ray.records import Listed


def scanned_on_a_node(files, trusted, first=0):
    row = ScanChunk(10**6)(files_as_row(first, files, trusted))
    return {name: np.array([value])[0] for name, value in row.items()}  # as Ray Data hands it on


def test_a_work_item_says_all_that_a_scan_needs():
    files = [
        Listed("/a\nb 😺.png", "1-2"),
        Listed("x", "3", address="row:1:image:/x", original_hw=(3, 4), text_file="t", texts=("a",)),
    ]
    found = listed_from(files_as_row(7, files, [False, True])["files"])
    assert found == [
        (Listed("/a\nb 😺.png", "1-2"), False),
        (Listed("x", "3", address="row:1:image:/x", original_hw=(3, 4)), True),
    ]


def test_a_scan_on_the_nodes_finds_what_a_scan_here_finds(images):
    (images / "bad.png").write_bytes(b"bad")
    (images / "dangling.png").symlink_to(images / "gone.png")
    names = ["0.png", "bad.png", "1.png", "dangling.png", "2.png", "2.png"]
    files = [Listed(str(images / name), "1-1") for name in names]
    trusted = [False, False, True, False, True, False]
    row = scanned_on_a_node(files[2:], trusted[2:], first=2)
    found = scanned_files(row, files, 10**6)
    assert found == scan_images(files, max_pixels=10**6, by_listing=trusted)[2:]
    assert found == [scan_file(file, 10**6, by_listing=by) for file, by in zip(files[2:], trusted[2:], strict=True)]
    assert found[1].problem == "cannot be read: No such file or directory"


def not_on_the_node(files, missing, trusted=False):
    """A row of a node that does not see those of the files."""
    seen = [Listed("/elsewhere", "1-1") if at in missing else file for at, file in enumerate(files)]
    return {**scanned_on_a_node(seen, [trusted] * len(files)), "node": "node-7"}


def test_a_file_that_only_the_node_could_not_read_is_read_here(images, monkeypatch):
    """A network drive that stumbles does not end the job."""
    files = [Listed(str(images / f"{number % 3}.png"), "1-1") for number in range(30)]
    for trusted in (False, True):  # how images are identified is kept
        expected = scan_images(files, max_pixels=10**6, by_listing=[trusted] * 30)
        for missing in ({4}, set(range(20))):
            assert scanned_files(not_on_the_node(files, missing, trusted), files, 10**6) == expected


def test_a_node_that_cannot_read_what_the_driver_can_stops_the_scan(images):
    files = [Listed(str(images / f"{number % 3}.png"), "1-1") for number in range(300)]
    for missing in (set(range(21)), set(range(0, 300, 7)), set(range(300))):
        with pytest.raises(CacheError) as error:
            scanned_files(not_on_the_node(files, missing), files, 10**6)
        assert str(error.value).startswith(f"node node-7 cannot read {files[min(missing)].path}: No such file or d")


def test_at_most_twenty_files_of_a_row_are_read_again(images, monkeypatch):
    """Where neither reads them, all are skipped; where the driver reads a few, those few are taken."""
    gone = [Listed(str(images / f"gone {number}.png"), "1-1") for number in range(100)]
    read = []
    monkeypatch.setattr(scanning, "scan_images", lambda files, **rest: read.extend(files) or scan_images(files, **rest))
    found = scanned_files(not_on_the_node(gone, set()), gone, 10**6)
    assert {each.problem for each in found} == {"cannot be read: No such file or directory"}
    assert len(read) == 20
    files = [Listed(str(images / "0.png"), "1-1"), *gone[1:]]
    found = scanned_files(not_on_the_node(files, set(range(100))), files, 10**6)
    assert [at for at, each in enumerate(found) if not each.problem] == [0]


def test_where_a_few_were_read_here_the_others_are_read_too(images):
    """What nobody has tried is not skipped."""
    gone = [Listed(str(images / f"gone {number}.png"), "1-1") for number in range(80)]
    here = [Listed(str(images / f"{number % 3}.png"), "1-1") for number in range(18)]
    files = [gone.pop() if number % 6 else here.pop() for number in range(96)]
    found = scanned_files(not_on_the_node(files, set(range(96))), files, 10**6)
    assert [at for at, each in enumerate(found) if not each.problem] == list(range(0, 96, 6))
