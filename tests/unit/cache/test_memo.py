import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_ray.cache import formats
from sdxl_ray.cache import memo as memo_module
from sdxl_ray.cache.memo import FILE_NAME, Memo
from sdxl_ray.cache.scan import ScannedFile
from sdxl_ray.errors import StorageError
from sdxl_ray.records import Listed
from sdxl_ray.storage import open_folder
from tests.remote import RemoteFolder

LIMIT = 10**6


def listed(number, stamp="1-1", **changes):
    return Listed(path=f"/images/猫 {number}\n.png", stamp=stamp, **changes)


def scanned(number, problem="", kind="damaged"):
    if problem:
        return ScannedFile("", 0, 0, problem, kind)
    return ScannedFile(f"{number:02x}" * 31 + "00", 10 + number, 20)  # ends in a zero, which NumPy would like to cut


def memo_of(tmp_path):
    return Memo(open_folder(tmp_path))


def remember(tmp_path, files, found, trusted=False):
    memo = memo_of(tmp_path)
    memo.add(files, [trusted] * len(files), found)
    memo.write()
    return memo


def find(memo, files, trusted=False, limit=LIMIT):
    return memo.find(files, [trusted] * len(files), limit)


FILES = [listed(number) for number in range(6)]
FOUND = [*(scanned(number) for number in range(5)), scanned(5, "damaged header: cut")]


def test_what_was_found_is_found_again_in_any_order(tmp_path):
    memo = remember(tmp_path, FILES, FOUND)
    for each in (memo, memo_of(tmp_path)):
        assert find(each, FILES) == FOUND
        assert find(each, FILES[::-1]) == FOUND[::-1]
        assert find(each, [listed(99), FILES[3], listed(98)]) == [None, FOUND[3], None]
        assert find(each, []) == []


def test_no_memo_is_an_empty_one(tmp_path):
    memo = memo_of(tmp_path / "nothing")
    assert find(memo, FILES) == [None] * 6
    memo.add([], [], [])
    memo.write()
    assert not (tmp_path / "nothing").exists()  # nothing to remember


@pytest.mark.parametrize(
    "changed",
    [
        listed(2, stamp="1-2"),  # another date
        listed(2, stamp="2-1"),  # another size
        Listed(path="/elsewhere/2.png", stamp="1-1"),
        listed(2, address="tar:512+9:/images.tar"),
    ],
)
def test_only_what_changed_is_unknown(tmp_path, changed):
    memo = remember(tmp_path, FILES, FOUND)
    assert find(memo, [*FILES[:2], changed, *FILES[3:]]) == [*FOUND[:2], None, *FOUND[3:]]


def test_two_members_of_a_tar_file_are_two_images(tmp_path):
    files = [Listed("/0.tar/cat.png", "7-7", address=f"tar:{start}+9:/0.tar") for start in (512, 1536)]
    memo = remember(tmp_path, files, FOUND[:2])
    assert find(memo, files) == FOUND[:2]


def test_how_an_image_is_identified_is_part_of_what_is_remembered(tmp_path):
    """A hash of the listing must never pass for one of the content."""
    memo = remember(tmp_path, FILES, FOUND, trusted=True)
    assert find(memo, FILES, trusted=True) == FOUND
    assert find(memo, FILES, trusted=False) == [None] * 6


@pytest.mark.parametrize("kind", ["damaged", "too_large", "unreadable", "needs_package"])
def test_what_may_be_over_is_looked_at_again(tmp_path, kind):
    """Another limit, a network drive that is back, a machine that has the package. The words do not matter."""
    found = [scanned(number, problem, kind) for number, problem in enumerate(["cannot be read: pip install it", "x"])]
    remember(tmp_path, FILES[:2], found)
    assert find(memo_of(tmp_path), FILES[:2]) == (found if kind == "damaged" else [None] * 2)


@pytest.mark.parametrize("change", ["nothing", "Pillow", "plug-in", "unknown"])
def test_with_another_pillow_or_plug_in_problems_are_looked_at_again(tmp_path, monkeypatch, change):
    monkeypatch.setattr(formats, "PLUGINS", {"HEIC": ("pillow_of_this_test", "pillow-of-this-test")})
    found = [scanned(0), scanned(1, "not an image that Pillow can read"), *FOUND[2:]]
    remember(tmp_path, FILES, found)
    memo_of(tmp_path).mark({scanned(2).image_hash: "cannot be decoded: truncated"})
    if change == "Pillow":
        monkeypatch.setattr("PIL.__version__", "99.0.0")
    elif change == "plug-in":
        (tmp_path / "pillow_of_this_test.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    elif change == "unknown":  # written before there was such a note
        table = pq.read_table(tmp_path / FILE_NAME)
        pq.write_table(table.replace_schema_metadata(None), tmp_path / FILE_NAME)
    again = find(memo_of(tmp_path), FILES)
    assert [again[at] for at in (0, 3, 4)] == [found[at] for at in (0, 3, 4)]
    if change == "nothing":
        assert [again[at].problem for at in (1, 2, 5)] == [
            "not an image that Pillow can read",
            "cannot be decoded: truncated",
            "damaged header: cut",
        ]
        return
    assert [again[at] for at in (1, 2, 5)] == [None] * 3
    remember(tmp_path, FILES[1:2], [scanned(7)])  # it can be read now
    assert find(memo_of(tmp_path), FILES)[1] == scanned(7)


def test_the_limit_on_pixels_is_never_remembered_wrongly(tmp_path):
    memo = remember(tmp_path, FILES, FOUND)
    sizes = [20 * (10 + number) for number in range(5)]
    assert find(memo, FILES, limit=sizes[2]) == [*FOUND[:3], None, None, FOUND[5]]


def test_the_later_of_two_findings_counts(tmp_path):
    memo = remember(tmp_path, FILES, FOUND)
    for found in (scanned(7), scanned(8)):
        memo.add(FILES[:1], [False], [found])
    memo.write()
    assert find(memo, FILES) == [scanned(8), *FOUND[1:]]
    assert find(memo_of(tmp_path), FILES) == [scanned(8), *FOUND[1:]]
    assert pq.read_metadata(tmp_path / FILE_NAME).num_rows == 6


def test_what_is_not_written_yet_is_known_already(tmp_path):
    """Two sections over one folder: the second need not read it again."""
    memo = memo_of(tmp_path)
    memo.add(FILES[3:][::-1], [False] * 3, FOUND[3:][::-1])
    assert find(memo, FILES) == [None] * 3 + FOUND[3:]
    memo.add(FILES[:4], [False] * 4, [*FOUND[:3], scanned(9)])
    assert find(memo, FILES) == [*FOUND[:3], scanned(9), *FOUND[4:]]
    assert find(memo, FILES[:2], limit=1) == [None] * 2
    assert find(memo, FILES, trusted=True) == [None] * 6
    assert not (tmp_path / FILE_NAME).exists()
    memo.add(FILES[:1], [False], [scanned(0, "cannot be read: gone", "unreadable")])
    assert find(memo, FILES[:2]) == [None, FOUND[1]]


def test_what_cannot_be_decoded_is_marked_wherever_it_lies(tmp_path):
    files, found = [*FILES, listed(9)], [*FOUND, scanned(3)]  # a copy of image 3
    remember(tmp_path, files, found)
    memo_of(tmp_path).mark({scanned(3).image_hash: "cannot be decoded: truncated", "ff" * 32: "not ours"})
    again = find(memo_of(tmp_path), files)
    assert [each.problem for each in again] == [
        *[""] * 3,
        "cannot be decoded: truncated",
        "",
        FOUND[5].problem,
        "cannot be decoded: truncated",
    ]
    assert (again[3].image_hash, again[3].kind) == (scanned(3).image_hash, "damaged")
    assert [again[at] for at in (0, 1, 2, 4, 5)] == [FOUND[at] for at in (0, 1, 2, 4, 5)]


def test_nothing_to_mark(tmp_path):
    memo_of(tmp_path).mark({"ff" * 32: "not ours"})
    remember(tmp_path, FILES, FOUND)
    memo_of(tmp_path).mark({"ff" * 32: "not ours"})
    assert find(memo_of(tmp_path), FILES) == FOUND


def test_what_has_changed_without_a_new_date_is_looked_at_again_wherever_it_lies(tmp_path):
    files, found = [*FILES, listed(9)], [*FOUND, scanned(3)]  # a copy of image 3
    remember(tmp_path, files, found)
    memo = memo_of(tmp_path)
    memo.forget([scanned(3).image_hash, "ff" * 32])
    expected = [*FOUND[:3], None, *FOUND[4:], None]
    assert find(memo, files) == expected
    assert find(memo_of(tmp_path), files) == expected


def test_nothing_new_is_not_written(tmp_path, monkeypatch):
    """The cache may lie where nobody can write, and some images are looked at in each run."""
    remember(tmp_path, FILES, FOUND)

    def fail(self, *args, **kwargs):
        raise StorageError("the file system is read-only")

    memo = memo_of(tmp_path)
    monkeypatch.setattr(type(memo.folder), "write_by", fail)
    memo.add(FILES[2:4], [False] * 2, FOUND[2:4])
    memo.add(FILES[5:], [False], FOUND[5:])
    memo.write()
    memo.mark({"ff" * 32: "not ours"})
    memo.forget(["ff" * 32])
    for file, found in ((FILES[2], scanned(7)), (FILES[5], scanned(5)), (listed(9), scanned(2))):
        memo = memo_of(tmp_path)
        memo.add(FILES[:1], [False], FOUND[:1])
        memo.add([file], [False], [found])
        with pytest.raises(StorageError):
            memo.write()


def test_a_killed_scan_has_not_been_for_nothing(tmp_path, monkeypatch):
    memo = memo_of(tmp_path)
    memo.add(FILES[:2], [False] * 2, FOUND[:2])
    assert not (tmp_path / FILE_NAME).exists()
    now = time.monotonic()
    monkeypatch.setattr(memo_module.time, "monotonic", lambda: now + 61)
    memo.add(FILES[2:4], [False] * 2, FOUND[2:4])
    assert find(memo_of(tmp_path), FILES) == [*FOUND[:4], None, None]


def test_a_memo_that_takes_long_to_write_is_written_less_often(tmp_path, monkeypatch):
    """That of ten million images: else a scan would do little else."""
    now = [1000.0]
    monkeypatch.setattr(memo_module.time, "monotonic", lambda: now[0])
    memo = memo_of(tmp_path)
    write_by = memo.folder.write_by

    def slow(*arguments, **rest):
        now[0] += 30
        write_by(*arguments, **rest)

    monkeypatch.setattr(memo.folder, "write_by", slow)
    for passed, remembered in ((61, 1), (61, 1), (240, 3)):
        now[0] += passed
        number = int(now[0])
        memo.add([listed(number)], [False], [scanned(1)])
        assert pq.read_metadata(tmp_path / FILE_NAME).num_rows == remembered


def test_an_image_takes_about_seventy_bytes(tmp_path):
    files = [listed(number) for number in range(20_000)]
    found = [ScannedFile(f"{number:064x}"[::-1], 1000, 1000) for number in range(20_000)]
    memo = remember(tmp_path, files, found)
    assert memo._table.nbytes / 20_000 < 80
    started = time.perf_counter()
    assert find(memo, files) == found
    assert time.perf_counter() - started < 5


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_damaged_memo_is_as_good_as_none(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.warns(UserWarning, match=r"scan\.parquet: .*the images are scanned again"):
        assert find(memo_of(tmp_path), FILES) == [None] * 6
    with pytest.warns(UserWarning):
        remember(tmp_path, FILES, FOUND)
    assert find(memo_of(tmp_path), FILES) == FOUND


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"path": ["cat.png"], "size": [1], "mtime_ns": [2], "image_hash": ["x"], "height": [1], "width": [1]}),
        pa.table({name: ["x"] for name in ("identity", "image_hash", "height", "width", "problem", "kind")}),
        pa.table(
            {"identity": [b"x" * 15], "image_hash": [b""], "height": [1], "width": [1], "problem": [""], "kind": [""]}
        ),
    ],
)
def test_a_memo_of_another_version_is_as_good_as_none(tmp_path, table):
    pq.write_table(table, tmp_path / FILE_NAME)
    with pytest.warns(UserWarning, match="the images are scanned again"):
        assert find(memo_of(tmp_path), FILES) == [None] * 6


def test_a_full_disk_leaves_the_old_memo_and_no_temporary(tmp_path, monkeypatch):
    remember(tmp_path, FILES, FOUND)

    def fail(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(StorageError, match=r"scan\.parquet: no space left on the device while writing"):
            remember(tmp_path, [listed(9)], [scanned(9)])
    assert find(memo_of(tmp_path), [*FILES, listed(9)]) == [*FOUND, None]
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_of_two_jobs_that_write_at_once_one_wins_and_the_file_is_whole(tmp_path):
    threads = [
        threading.Thread(target=remember, args=(tmp_path, [listed(number)], [scanned(number)])) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = find(memo_of(tmp_path), [listed(number) for number in range(8)])
    assert 1 <= sum(each is not None for each in found) <= 8
    assert all(each in (None, scanned(number)) for number, each in enumerate(found))


def test_a_memo_may_lie_in_a_bucket(tmp_path):
    remote = RemoteFolder(tmp_path)
    memo = Memo(remote)
    memo.add(FILES, [False] * 6, FOUND)
    memo.write()
    assert find(Memo(remote), FILES) == FOUND
    assert remote.calls["write"] == 1


def test_a_later_finding_counts_before_it_is_written_too(tmp_path):
    memo = remember(tmp_path, FILES, FOUND)
    memo.add(FILES[:1], [False], [scanned(9)])
    assert find(memo, FILES) == [scanned(9), *FOUND[1:]]


def test_what_was_found_by_the_same_memo_is_forgotten_too(tmp_path):
    for written in (False, True):
        memo = memo_of(tmp_path / str(written))
        memo.add(FILES, [False] * 6, FOUND)
        if written:
            memo.write()
        memo.forget([scanned(3).image_hash])
        assert find(memo, FILES) == [*FOUND[:3], None, *FOUND[4:]]
