import errno
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_ray.cache.local_copies import GIB, LocalCopies
from sdxl_ray.errors import ConfigError
from tests.remote import RemoteFolder

KIB = 1024


@pytest.fixture
def remote(tmp_path):
    """A bucket with ten shards of 1 KiB."""
    folder = RemoteFolder(tmp_path / "bucket")
    for number in range(10):
        folder.inner.write(f"text/{number}.safetensors", bytes([number]) * KIB)
    return folder


def copies_of(remote, tmp_path, limit_kib=100.0):
    return LocalCopies(remote, str(tmp_path / "copies"), limit_gib=limit_kib * KIB / GIB, report=pytest.fail)


def held(tmp_path):
    return sorted(path.stem for path in (tmp_path / "copies").rglob("*.safetensors"))


def fetch(copies, *numbers):
    """One after another; each was used a second after the one before."""
    for number in numbers:
        path = copies.fetch(f"text/{number}.safetensors")
        fetch.now += 1
        os.utime(path, (fetch.now, fetch.now))
        assert path.read_bytes() == bytes([number]) * KIB


fetch.now = 1_000_000


def test_a_shard_is_copied_once(remote, tmp_path):
    copies = copies_of(remote, tmp_path)
    fetch(copies, 3, 4, 3, 3)
    assert remote.reads == ["text/3.safetensors", "text/4.safetensors"]
    fetch(copies_of(remote, tmp_path), 3)  # another process of this machine
    assert len(remote.reads) == 2
    assert not list((tmp_path / "copies").rglob(".tmp-*"))


def test_the_least_recently_used_go_first(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=5)
    fetch(copies, 0, 1, 2, 3, 4)
    assert held(tmp_path) == ["0", "1", "2", "3", "4"]  # as much as allowed is allowed
    fetch(copies, 0, 5)
    # One too many: room is made below nine tenths of the limit, so that not every copy has to make room again.
    assert held(tmp_path) == ["0", "3", "4", "5"]
    fetch(copies, 6)
    assert held(tmp_path) == ["0", "3", "4", "5", "6"]


def test_using_a_copy_is_noted_on_disk_for_all_processes(remote, tmp_path):
    first, second = copies_of(remote, tmp_path, 3.5), copies_of(remote, tmp_path, 3.5)
    for number in (0, 1):
        os.utime(first.fetch(f"text/{number}.safetensors"), (1, 1))
    second.fetch("text/0.safetensors")
    third = copies_of(remote, tmp_path, 3.5)  # counts what is there
    third.fetch("text/2.safetensors")
    third.fetch("text/3.safetensors")
    assert held(tmp_path) == ["0", "2", "3"]


def test_what_is_asked_for_stays_however_small_the_limit(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=0.5)
    fetch(copies, 0, 1, 2)
    assert held(tmp_path) == ["2"]


def test_a_copy_that_another_process_removed_is_made_again(remote, tmp_path):
    copies = copies_of(remote, tmp_path)
    fetch(copies, 0)
    for path in (tmp_path / "copies").rglob("*.safetensors"):
        path.unlink()
    fetch(copies, 0)
    assert remote.reads == ["text/0.safetensors"] * 2


def test_a_copy_that_is_not_as_it_should_be_is_forgotten(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=2)
    copies.fetch("text/0.safetensors").write_bytes(b"cut")
    copies.remove("text/0.safetensors")
    copies.remove("text/9.safetensors")  # was never there
    fetch(copies, 0, 1)
    assert held(tmp_path) == ["0", "1"]


def test_a_copy_that_is_read_survives_its_removal(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=1)
    fetch(copies, 0)
    with (copies.root / "text" / "0.safetensors").open("rb") as file:
        fetch(copies, 1)
        assert held(tmp_path) == ["1"]
        assert file.read() == bytes(KIB)


def test_what_was_asked_for_just_now_is_not_removed_before_it_is_opened(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=2)
    fetch(copies, 0)
    paths = [copies.fetch(f"text/{number}.safetensors") for number in range(1, 5)]
    assert held(tmp_path) == ["1", "2", "3", "4"]
    for path in paths:
        os.utime(path, (1, 1))
    fetch(copies, 5)
    assert held(tmp_path) == ["5"]


def test_two_threads_that_need_a_shard_copy_it_once(remote, tmp_path, monkeypatch):
    """The second waits for the first; one that needs another shard does not."""
    copies, started, go_on = copies_of(remote, tmp_path), threading.Event(), threading.Event()
    read = remote.inner.read

    def slow(name):
        if name == "text/0.safetensors":
            started.set()
            assert go_on.wait(10)
        return read(name)

    monkeypatch.setattr(remote.inner, "read", slow)
    with ThreadPoolExecutor(3) as threads:
        both = [threads.submit(copies.fetch, "text/0.safetensors") for _ in range(2)]
        assert started.wait(10)
        assert threads.submit(copies.fetch, "text/1.safetensors").result(10).read_bytes() == b"\1" * KIB
        go_on.set()
        assert {each.result(10).read_bytes() for each in both} == {bytes(KIB)}
    assert sorted(remote.reads) == ["text/0.safetensors", "text/1.safetensors"]


def test_threads_that_make_room_for_each_other_read_what_they_asked_for(remote, tmp_path):
    copies = copies_of(remote, tmp_path, limit_kib=3)

    def read(offset):
        return all(
            copies.fetch(f"text/{number % 10}.safetensors").read_bytes() == bytes([number % 10]) * KIB
            for number in range(offset, offset + 50)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, (0, 3, 5, 8)))


def test_two_caches_do_not_share_copies(remote, tmp_path):
    other = RemoteFolder(tmp_path / "other")
    other.inner.write("text/0.safetensors", b"other")
    fetch(copies_of(remote, tmp_path), 0)
    assert copies_of(other, tmp_path).fetch("text/0.safetensors").read_bytes() == b"other"
    fetch(copies_of(remote, tmp_path), 0)


def size_of_all(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "copies").rglob("*") if path.is_file())


def test_the_limit_is_for_all_processes_and_all_caches_of_a_machine(tmp_path):
    """Each knows of its own copies only; what is on the disk decides."""
    remotes = [RemoteFolder(tmp_path / f"bucket {number}") for number in range(2)]
    for number, remote in enumerate(remotes):
        for name in range(200):
            remote.inner.write(f"text/{name}.safetensors", bytes([number]) * KIB)
    processes = [copies_of(remotes[number % 2], tmp_path, limit_kib=100) for number in range(8)]
    most = 0
    for name in range(200):
        for number in range(8):
            path = processes[number].fetch(f"text/{(name + 25 * number) % 200}.safetensors")
            fetch.now += 1
            os.utime(path, (fetch.now, fetch.now))
        most = max(most, size_of_all(tmp_path))
    assert 80 * KIB < most <= 101 * KIB  # one is copied, then room is made


def test_what_is_not_ours_is_neither_counted_nor_deleted(remote, tmp_path):
    """Somebody may set cache.local_path to a folder with other things in it."""
    other = tmp_path / "copies" / "models" / "unet.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(50 * KIB))
    os.utime(other, (1, 1))
    fetch(copies_of(remote, tmp_path, limit_kib=5), *range(5))
    assert other.exists()
    assert held(tmp_path) == ["0", "1", "2", "3", "4", "unet"]


def test_the_disk_is_not_searched_for_every_copy(remote, tmp_path, monkeypatch):
    copies, now, counts = copies_of(remote, tmp_path, limit_kib=100), [1000.0], []
    monkeypatch.setattr(copies, "_held", lambda held=copies._held: counts.append(now[0]) or held())
    monkeypatch.setattr("sdxl_ray.cache.local_copies.time.monotonic", lambda: now[0])
    fetch(copies, 0, 1, 2, 3, 4)
    assert len(counts) == 1
    fetch(copies, 5, 6)  # a twentieth of the limit
    assert len(counts) == 2
    now[0] += 61  # others may have copied
    fetch(copies, 6, 7, 8)
    assert len(counts) == 3


def test_what_killed_processes_leave_behind_is_deleted_after_a_day(remote, tmp_path):
    copies = copies_of(remote, tmp_path)
    old, young = copies.root / "text" / ".tmp-old", copies.root / "text" / ".tmp-young"
    of_another = tmp_path / "copies" / ("ab" * 6) / "latents" / "64x64" / ".tmp-old"
    for path in (old, young, of_another):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    for path in (old, of_another):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    fetch(copies, 0)
    assert [path.exists() for path in (old, young, of_another)] == [False, True, False]


def test_a_shard_that_is_not_there(remote, tmp_path):
    with pytest.raises(FileNotFoundError):
        copies_of(remote, tmp_path).fetch("text/gone.safetensors")
    assert held(tmp_path) == []


def refuse_writing(monkeypatch, number):
    def refuse(self, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)


def test_a_full_disk_is_told_once_and_the_shards_come_without_copies(remote, tmp_path, monkeypatch):
    said = []
    copies = LocalCopies(remote, str(tmp_path / "copies"), limit_gib=1, report=said.append)
    refuse_writing(monkeypatch, errno.ENOSPC)
    for number in (0, 1, 0):
        assert copies.fetch(f"text/{number}.safetensors") == bytes([number]) * KIB
    assert said == [
        f"cache.local_path = {tmp_path}/copies on {socket.gethostname()}: takes no more copies (No space left on "
        f"device). Shards of {remote.path} are read without them, whole ones each time, which is slow: free some "
        "space, or lower cache.local_gib."
    ]
    assert not list((tmp_path / "copies").rglob("*.*"))
    monkeypatch.undo()
    assert copies.fetch("text/0.safetensors").read_bytes() == bytes(KIB)  # there is room again


@pytest.mark.parametrize("path", ["copies", "/proc/nope"])
def test_a_folder_that_never_takes_a_copy_is_an_error(remote, tmp_path, monkeypatch, path):
    copies = LocalCopies(remote, str(tmp_path / path), limit_gib=1, report=pytest.fail)
    if path == "copies":
        refuse_writing(monkeypatch, errno.EACCES)
    with pytest.raises(ConfigError) as error:
        copies.fetch("text/0.safetensors")
    reason = "Permission denied" if path == "copies" else "No such file or directory"
    assert str(error.value) == (
        f"cache.local_path = {tmp_path / path} on {socket.gethostname()}: cannot be written ({reason}). Shards of "
        f"{remote.path} are copied there before they are read: make it writable, or set it to a folder on a local disk "
        "of every machine."
    )


def test_a_disk_that_becomes_read_only_does_not_stop_a_run(remote, tmp_path, monkeypatch):
    said = []
    copies = LocalCopies(remote, str(tmp_path / "copies"), limit_gib=1, report=said.append)
    copies.fetch("text/0.safetensors")
    refuse_writing(monkeypatch, errno.EROFS)
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    assert copies.fetch("text/0.safetensors") == copies.root / "text" / "0.safetensors"
    assert copies.fetch("text/1.safetensors") == b"\1" * KIB
    assert len(said) == 1


def test_the_folder_of_copies_may_begin_with_a_tilde(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copies = LocalCopies(remote, "~/copies", limit_gib=1, report=pytest.fail)
    assert tmp_path / "copies" in copies.fetch("text/0.safetensors").parents


# ---- a folder that several users share -------------------------------------------------------------------------------


@pytest.fixture
def of_another_user(monkeypatch):
    """Names of files that only somebody else may delete."""
    names, unlink = set(), Path.unlink

    def refuse(self, missing_ok=False):
        if self.name in names:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    return names


def test_copies_of_another_user_stay_and_ours_go_in_their_stead(remote, tmp_path, of_another_user):
    of_another_user |= {f"{number}.safetensors" for number in (0, 1)}
    copies = copies_of(remote, tmp_path, limit_kib=5)
    fetch(copies, 0, 1, 2, 3, 4, 5)
    assert held(tmp_path) == ["0", "1", "4", "5"]
    fetch(copies, 2, 3)
    assert held(tmp_path) == ["0", "1", "2", "3"]


def test_where_copies_of_another_user_leave_no_room_reading_goes_on_and_that_is_told_once(
    remote, tmp_path, of_another_user
):
    of_another_user |= {f"{number}.safetensors" for number in range(6)}
    fetch(copies_of(remote, tmp_path), *range(6))
    said = []
    copies = LocalCopies(remote, str(tmp_path / "copies"), limit_gib=4 * KIB / GIB, report=said.append)
    fetch(copies, 6, 7, 8, 6)
    assert held(tmp_path) == [*"012345", "6"]
    (text,) = said
    assert text.startswith(f"cache.local_path = {tmp_path}/copies on {socket.gethostname()}: 0.0 GiB of copies there")
    assert text.endswith("raise cache.local_gib, or set cache.local_path to a folder of your own.")


def test_others_copies_are_not_counted_with_every_shard(remote, tmp_path, of_another_user, monkeypatch):
    """That is a look at every file below the folder."""
    of_another_user |= {f"{number}.safetensors" for number in range(10)}
    copies = LocalCopies(remote, str(tmp_path / "copies"), limit_gib=160 * KIB / GIB, report=lambda text: None)
    (copies.root / "text").mkdir(parents=True)
    (copies.root / "text" / "0.safetensors").write_bytes(bytes(200 * KIB))
    os.utime(copies.root / "text" / "0.safetensors", (1, 1))
    counted, count = [], copies._held
    monkeypatch.setattr(copies, "_held", lambda: counted.append(1) or count())
    fetch(copies, *range(1, 10))
    assert 1 <= len(counted) <= 5


def test_a_damaged_copy_of_another_user_is_read_around(remote, tmp_path, of_another_user):
    of_another_user.add("3.safetensors")
    copies = copies_of(remote, tmp_path)
    fetch(copies, 3)
    copies.remove("text/3.safetensors")
    assert copies.fetch("text/3.safetensors") == b"\3" * KIB
    assert held(tmp_path) == ["3"]


def test_caches_that_are_called_alike_do_not_share_copies(tmp_path):
    """s3://one/cache and s3://two/cache, each with the shard of one name."""
    for name in ("one", "two"):
        RemoteFolder(tmp_path / name / "cache").inner.write("text/0.safetensors", name.encode())
    for name in ("one", "two"):
        copies = copies_of(RemoteFolder(tmp_path / name / "cache"), tmp_path)
        assert copies.fetch("text/0.safetensors").read_bytes() == name.encode()
