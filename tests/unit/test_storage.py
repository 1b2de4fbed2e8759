import errno
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_ray import storage
from sdxl_ray.errors import ConfigError, StorageError
from sdxl_ray.storage import clouds, join, open_arrow, open_buffered, open_folder, read_bytes
from sdxl_ray.storage.outages import LongWaits
from tests import s3


@pytest.fixture(scope="module")
def server():
    with s3.moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(server, monkeypatch, request):
    """The address of an empty folder of its own."""
    s3.use(monkeypatch, server)
    return f"s3://{s3.BUCKET}/{re.sub('[^a-z_]', '', request.node.name)}"


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """An empty folder, local or in a bucket."""
    return str(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("bucket")


# ---- a folder, wherever it lies --------------------------------------------------------------------------------------


def test_what_was_written_is_read(place):
    folder = open_folder(place)
    folder.write("deep/er/cat 😺.bin", bytes(range(256)))
    assert folder.read("deep/er/cat 😺.bin") == bytes(range(256))
    assert read_bytes(join(place, "deep/er/cat 😺.bin")) == bytes(range(256))
    assert folder.path == place
    assert (folder.local is None) == storage.is_uri(place)
    assert folder.exists("deep/er/cat 😺.bin")
    assert not folder.exists("deep/er")  # a folder
    assert not folder.exists("dog.bin")


@pytest.mark.parametrize(
    ("offset", "length", "expected"), [(0, 3, b"012"), (8, 5, b"89"), (10, 1, b""), (99, 2, b""), (3, 0, b"")]
)
def test_a_range_ends_where_the_file_ends(place, offset, length, expected):
    folder = open_folder(place)
    folder.write("digits", b"0123456789")
    assert folder.read_range("digits", offset, length) == expected
    assert read_bytes(join(place, "digits"), 4) == b"456789"


def test_a_second_write_replaces_the_first(place):
    folder = open_folder(place)
    folder.write("x", b"long content")
    folder.write("x", b"short")
    assert folder.read("x") == b"short"
    folder.write("x", b"")
    assert folder.read("x") == b""


def test_a_large_file_arrives_whole(place):
    content = os.urandom(1 << 20) * 24  # more than one part of an upload
    open_folder(place).write("large", content)
    assert open_folder(place).read("large") == content


def test_a_listing_is_recursive_sorted_and_without_hidden_files(place):
    folder = open_folder(place)
    names = ["b/2.txt", "b/10.txt", "a.txt", "b.txt", "b/c/d.bin", ".hidden", "b/.git/x", "bb/x.txt", "b/.tmp-1"]
    for name in names:
        folder.write(name, name.encode())
    assert [entry.name for entry in folder.list()] == ["a.txt", "b.txt", "b/10.txt", "b/2.txt", "b/c/d.bin", "bb/x.txt"]
    assert [entry.name for entry in folder.list("b")] == ["b/10.txt", "b/2.txt", "b/c/d.bin"]
    assert [entry.name for entry in folder.list("b/", ".txt")] == ["b/10.txt", "b/2.txt"]
    hidden_too = [entry.name for entry in folder.list("b", hidden_folders=True)]
    assert hidden_too == ["b/.git/x", "b/10.txt", "b/2.txt", "b/c/d.bin"]
    assert folder.list("none") == []
    assert open_folder(join(place, "none")).list() == []
    (entry,) = folder.list("bb")
    assert entry.size == len("bb/x.txt")
    assert abs(entry.mtime_ns / 1e9 - time.time()) < 100
    assert storage.status(join(place, "bb/x.txt")).size == entry.size
    assert storage.status(join(place, "bb/x.txt")).mtime_ns // 10**9 == entry.mtime_ns // 10**9


def test_deleting(place):
    folder = open_folder(place)
    folder.write("a/x", b"x")
    folder.delete("a/x")
    assert not folder.exists("a/x")
    folder.delete("a/x")


def test_what_is_not_there_is_not_found(place):
    with pytest.raises(FileNotFoundError) as error:
        open_folder(place).read("cat.jpg")
    assert error.value.strerror == "No such file or directory"
    assert str(error.value.filename).endswith("cat.jpg")
    assert storage.status(join(place, "cat.jpg")) is None


def test_it_reads_like_a_file_of_python(place):
    content = os.urandom(700_000)
    open_folder(place).write("x", content)
    with storage.open_buffered(join(place, "x")) as file:
        assert file.read(3) == content[:3]
        file.seek(500_000)
        assert file.read(200) == content[500_000:500_200]
        file.seek(-5, os.SEEK_END)
        assert file.read() == content[-5:]
        assert file.seek(10) == file.tell() == 10
        assert file.read() == content[10:]


NO_FILE = "it is not a regular file, but a pipe, socket or device"


@pytest.mark.parametrize("read", [read_bytes, lambda path: read_bytes(path, 0, 10), open_buffered, open_arrow])
@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, kind, read):
    """A pipe nobody writes to would be waited for for ever, /dev/zero read until memory is full."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        if kind == "pipe":
            os.mkfifo("cat.jpg")
        elif kind == "socket":
            made.bind("cat.jpg")
        else:
            Path("cat.jpg").symlink_to("/dev/zero")
        with pytest.raises(OSError) as error:
            read("cat.jpg")
    assert (error.value.errno, error.value.strerror, error.value.filename) == (errno.EINVAL, NO_FILE, "cat.jpg")


def test_a_folder_is_no_file_either(tmp_path):
    for read in (read_bytes, open_buffered, open_arrow):
        with pytest.raises(IsADirectoryError):
            read(str(tmp_path))


@pytest.mark.parametrize("read", [read_bytes, open_buffered, open_arrow])
def test_a_name_that_is_not_utf_8_is_told_from_a_file_that_is_not_there(tmp_path, read):
    """Listings escape it, so that it can be printed and kept; by that name there is no file."""
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"meow")
    with pytest.raises(FileNotFoundError) as error:
        read(str(tmp_path / "caf\\xe9.png"))
    assert error.value.strerror == "its name is not UTF-8; rename it"
    for name in ("caf.png", "tea\\xe9.png"):
        with pytest.raises(FileNotFoundError) as error:
            read(str(tmp_path / name))
        assert error.value.strerror == "No such file or directory"
    (tmp_path / "bar\\xe9.png").write_bytes(b"a name may hold what looks like an escape")
    read(str(tmp_path / "bar\\xe9.png"))


def test_a_folder_travels_to_another_process(place):
    open_folder(place).write("x", b"here")
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).read('x'))"
    command = [sys.executable, "-c", code, pickle.dumps(open_folder(place)).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "b'here'"


# ---- this machine's disks --------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    folder.write("x", b"old")

    def disk_full(self, content):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(StorageError) as error:
        folder.write("x", b"new", doing="writing encoded tensors", cure="Free some.")
    assert str(error.value) == f"{tmp_path}/x: no space left on the device while writing encoded tensors. Free some."
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert folder.read("x") == b"old"


def test_a_full_disk_of_this_machine_on_the_way_to_a_store(monkeypatch):
    def disk_full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError) as error:
        open_folder("s3://bucket/cache").write_by("x", disk_full, doing="writing the index", cure="Free some space.")
    assert str(error.value) == (
        f"{tempfile.gettempdir()}: no space left on the device while writing the index (s3://bucket/cache/x by way of "
        "this folder). Free some space."
    )


def test_what_a_write_says_where_nobody_says_more(tmp_path, monkeypatch):
    def disk_full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(StorageError) as error:
        open_folder(tmp_path).write("x", b"new")
    assert str(error.value) == (
        f"{tmp_path}/x: no space left on the device while writing. Free some space and run again: what was written "
        "before is kept."
    )


def test_linked_folders_are_listed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "text").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cache" / "dangling").symlink_to(tmp_path / "gone")
    assert [entry.name for entry in open_folder(tmp_path / "cache").list()] == ["text/x"]


def test_a_file_address_is_a_local_path(tmp_path):
    (tmp_path / "a b").mkdir()
    folder = open_folder(f"file://{tmp_path}/a%20b")
    folder.write("x", b"x")
    assert folder.local == tmp_path / "a b"
    assert read_bytes(f"file://{tmp_path}/a%20b/x") == b"x"


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_options_may_stand_before_what_is_appended(server, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    host = server.removeprefix("http://")
    base = f"{bucket}?scheme=http&endpoint_override={host}&max_attempts=1"
    open_folder(f"{base}/datasets/cats").write("100% what?.txt", b"here")
    assert [entry.name for entry in open_folder(base).list()] == ["datasets/cats/100% what?.txt"]
    assert read_bytes(f"{base}/datasets/cats/100% what?.txt") == b"here"
    assert read_bytes(f"{bucket}/datasets/cats/100% what?.txt?scheme=http&endpoint_override={host}") == b"here"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("ftp://host/x", "ftp://host/x: ftp:// cannot be read. Use a folder, s3://, gs://, abfs:// or hf://."),
        (
            "s3://AKIA:secret@bucket/x",
            "s3://***@bucket/x: holds a key, and addresses land in logs. Take what is before the @ out and set the "
            "environment instead: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        ),
        ("s3:///x", "s3:///x: names no bucket. Write s3://bucket/folder."),
        ("s3://AKIA:sec/ret@bucket/x", "s3://***@bucket/x: holds a key, and addresses land in logs."),
        ("s3://b/x?regoin=eu", 's3://b/x: unknown option "regoin". There are: region, scheme, endpoint_'),
    ],
)
def test_an_address_that_can_never_work_is_refused(address, text):
    with pytest.raises(ConfigError) as error:
        open_folder(address)
    assert str(error.value).startswith(text)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://b/x?access_key=HIDDEN&secret_key=HID/DEN", 's3://b/x: unknown option "access_key". There are: '),
        ("s3://b/x?region=eu&secret_key=HIDDEN", 's3://b/x: unknown option "secret_key". There are: '),
        ("s3://b?region=eu/x?secret_key=HIDDEN", 's3://b: unknown option "secret_key". There are: '),
        ("s3://?secret_key=HIDDEN", 's3://: unknown option "secret_key". There are: '),
        ("hf://org/name?token=HIDDEN", 'hf://org/name: unknown option "token". There are: '),
        ("s3://AKIA:HIDDEN@b/x?sig=HIDDEN", "s3://***@b/x: holds a key"),
        ("ftp://me:HIDDEN@host/x?sig=HIDDEN", "ftp://***@host/x: ftp:// cannot be read."),
        ("https://account.blob.core.windows.net/c/x?sv=1&sig=HIDDEN", "https://account.blob.core.windows.net/c/x: "),
        (
            "abfs://c@account.dfs.core.windows.net/x?sv=1&sig=HIDDEN%3D",
            'abfs://c@account.dfs.core.windows.net/x: unknown option "sv". There are: ',
        ),
    ],
)
def test_a_key_in_an_address_is_never_shown(address, shown):
    with pytest.raises(ConfigError) as error:
        open_folder(address)
    assert str(error.value).startswith(shown)
    assert "HID" not in str(error.value)
    assert "HID" not in storage.shown(address)


def test_what_is_not_there_is_named_without_a_key(bucket):
    with pytest.raises(FileNotFoundError) as error:
        read_bytes(f"{bucket}/cat.jpg?secret_key=HIDDEN")
    assert error.value.filename == f"{bucket}/cat.jpg"


@pytest.mark.parametrize("address", ["s3://b/100%?.jpg", "s3://b?endpoint_override=h:9/me@home.jpg", "/a:b@c?d=e"])
def test_an_address_without_a_key_is_shown_whole(address):
    assert storage.shown(address) == address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s3://b/t/list.csv?region=eu", "s3://b?region=eu/t/list.csv"),
        ("s3://b/x/*.tar?region=eu&scheme=http", "s3://b?region=eu&scheme=http/x/*.tar"),
        ("s3://b/x?region=eu/y", "s3://b?region=eu/x/y"),
        ("s3://b/x/?region=eu", "s3://b?region=eu/x"),
        ("s3://b?region=eu/x", "s3://b?region=eu/x"),
        ("s3://b?region=eu", "s3://b?region=eu"),
        ("s3://b/what?.jpg", "s3://b/what?.jpg"),
        ("abfs://c@a.dfs.core.windows.net/x?request_timeout=9", "abfs://c@a.dfs.core.windows.net?request_timeout=9/x"),
        ("file:///data/a%20b", "/data/a b"),
        ("/data/x?region=eu", "/data/x?region=eu"),
    ],
)
def test_options_go_behind_the_bucket(address, expected):
    assert storage.normalized(address) == expected
    assert storage.normalized(expected) == expected
    if address.startswith(("s3", "abfs")):
        assert clouds.place_of(address) == clouds.place_of(expected)


@pytest.mark.parametrize("option", ["request_timeout=soon", "project_id=x"])
def test_an_option_that_does_not_fit_is_refused(option, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(ConfigError, match="Correct the options in the address"):
        open_folder(f"s3://bucket/x?{option}").list()


def test_azure_needs_an_account(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(ConfigError) as error:
        open_folder("abfs://pictures/cats").list()
    assert str(error.value) == (
        "abfs://pictures: of which account? Write abfs://pictures@ACCOUNT.dfs.core.windows.net, or set "
        "AZURE_STORAGE_ACCOUNT."
    )


def test_where_the_parts_of_an_address_go():
    parts = [
        (place.scheme, place.bucket, place.key, place.options)
        for place in map(
            clouds.place_of,
            [
                "abfs://pictures@account.dfs.core.windows.net/cats/",
                "gs://bucket/a b/c%20d?anonymous=true/e",
                "hf://datasets/org/name@main/data",
            ],
        )
    ]
    assert parts == [
        ("abfs", "pictures@account.dfs.core.windows.net", "pictures/cats", ()),
        ("gs", "bucket", "bucket/a b/c%20d/e", (("anonymous", "true"),)),
        ("hf", "datasets", "datasets/org/name@main/data", ()),
    ]


# ---- stores that refuse ----------------------------------------------------------------------------------------------


def test_no_such_bucket(bucket):
    folder = open_folder("s3://of-nobody/x")
    for doing, call in [("listing", folder.list), ("writing", lambda: folder.write("x", b"x"))]:
        with pytest.raises(StorageError) as error:
            call()
        assert str(error.value).endswith(
            f": no such bucket while {doing}. Check its name, and the region and endpoint (AWS_REGION, "
            "AWS_ENDPOINT_URL)."
        )


@pytest.mark.parametrize(
    ("doing", "call"),
    [
        ("reading", lambda folder: folder.read("x")),
        ("listing", lambda folder: folder.list()),
        ("writing", lambda folder: folder.write("x", b"x")),
        ("looking for it", lambda folder: folder.exists("x")),
        ("deleting", lambda folder: folder.delete("x")),
    ],
)
def test_access_denied_names_the_key_and_not_its_value(monkeypatch, doing, call):
    denied = s3.s3_error(403, "AccessDenied", "Access Denied for secret-of-the-tests")
    with s3.answering(lambda number, method, path: denied) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(StorageError) as error:
            call(open_folder("s3://bucket/cats"))
    assert str(error.value).startswith("s3://bucket/cats")
    assert "secret-of-the-tests" not in str(error.value)
    reached = f": access denied while {doing}. " if doing != "reading" else ": access denied while opening. "
    assert reached in str(error.value)
    assert str(error.value).endswith(
        "Check the key and what it is allowed: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every "
        "machine."
    )
    assert len(requests) == 1  # asking again does not help


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(clouds, "REQUEST_TIMEOUT_S", 1)
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 2)
    with s3.answering(lambda number, method, path: None) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        start = time.monotonic()
        with pytest.raises(StorageError) as error:
            read_bytes("s3://bucket/cat.jpg")
        assert time.monotonic() - start < 5  # the limit of the test, not the 6 s of the library
        assert len(requests) == 2
    assert str(error.value) == (
        "s3://bucket/cat.jpg: timed out while opening. Check the network between this machine and the store, then run "
        "again: what is done is kept."
    )


def test_a_server_that_takes_its_time_is_told_of_once(monkeypatch):
    """The library tries again in silence, for minutes."""
    monkeypatch.setattr(clouds, "REQUEST_TIMEOUT_S", 1)
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(clouds, "_long_waits", LongWaits(0.2))
    with s3.answering(lambda number, method, path: None) as (endpoint, _), pytest.warns(UserWarning) as told:
        s3.use(monkeypatch, endpoint)
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(read_bytes, f"s3://bucket/{number}.jpg") for number in range(4)]
        assert all(isinstance(call.exception(), StorageError) for call in calls)
    host = endpoint.removeprefix("http://")
    expected = f"no answer from {host} yet while opening, for 20 s; trying for up to 0 minutes"
    assert [str(warning.message) for warning in told] == [expected]


def test_a_server_that_answers_is_not_told_of():
    waits = LongWaits(0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            with waits.watched("s3://bucket", "slow"):
                time.sleep(0.1)
    assert waits._told == set()


def test_what_takes_long_by_its_size_is_no_silence(bucket, monkeypatch):
    """A recursive listing is one call of pyarrow's, and an upload is made while its file is closed."""
    folder = open_folder(bucket)
    folder.write("a.bin", b"a")
    real = clouds.filesystem
    monkeypatch.setattr(clouds, "_long_waits", LongWaits(0.4))

    class Slow:
        def __init__(self, place):
            self.system = real(place)

        def get_file_info(self, asked):
            time.sleep(0.6)
            return self.system.get_file_info(asked)

        def open_output_stream(self, key):
            time.sleep(0.6)
            return self.system.open_output_stream(key)

    monkeypatch.setattr(clouds, "filesystem", Slow)
    monkeypatch.setattr(storage, "filesystem", Slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.write_by("b.bin", lambda file: file.write(b"b"), doing="writing", cure="")
        assert [file.name for file in folder.list()] == ["a.bin", "b.bin"]
    assert clouds._long_waits._told == set()
    with pytest.warns(UserWarning, match="yet while looking for it"):
        assert folder.exists("b.bin")


def test_each_slow_server_is_told_of_once():
    waits = LongWaits(0.05)
    with pytest.warns(UserWarning) as told:
        for server in ("a", "b", "a"):
            deadline = time.monotonic() + 10
            with waits.watched(server, f"{server} is slow"):
                time.sleep(0.15)
                while server not in waits._told and time.monotonic() < deadline:
                    time.sleep(0.01)
        time.sleep(0.15)  # it is told outside of the lock
    assert [str(warning.message) for warning in told] == ["a is slow", "b is slow"]


@pytest.mark.parametrize(
    ("address", "error", "cure"),
    [
        ("s3://bucket/a", "curlCode: 7, Couldn't connect", "the endpoint (AWS_ENDPOINT_URL) and the network"),
        ("gs://bucket/a", "UNAVAILABLE: metadata server", "the key (GOOGLE_APPLICATION_CREDENTIALS; without one, "),
        ("gcs://bucket/a", "Could not resolve host", "the key (GOOGLE_APPLICATION_CREDENTIALS; without one, "),
        ("abfss://box@account/a", "Couldn't resolve host name", "the account (its name stands in the address, "),
        ("hf://datasets/org/name", "Connection refused", "the endpoint (HF_ENDPOINT), whether HF_HUB_OFFLINE is set, "),
        ("gs://bucket/a", "bucket does not exist", "Check its name."),
        ("s3://bucket/a", "NO_SUCH_BUCKET", "Check its name, and the region and endpoint (AWS_REGION, AWS_ENDPOINT"),
    ],
)
def test_the_cure_fits_the_store(monkeypatch, address, error, cure):
    monkeypatch.setattr(clouds, "_outages", storage.Outages())
    with pytest.raises(StorageError) as raised, clouds.cloud_errors(address, "listing"):
        raise OSError(error)
    assert cure in str(raised.value)
    assert address.startswith("s3") or "AWS" not in str(raised.value)


@pytest.mark.parametrize("key", ["", "a2V5"])
def test_azure_without_a_login_is_an_error_and_no_crash(monkeypatch, key):
    """What opens a file ends the process then ("terminate called"); what lists a folder raises."""
    from pyarrow import fs

    class Azure:
        def __init__(self, account, **_):
            assert account == "account"

        def get_file_info(self, what):
            assert isinstance(what, fs.FileSelector)
            raise OSError("GetToken(): error response: 403 Forbidden")

        def open_input_file(self, path):
            if not key:
                pytest.fail("the process would have ended")
            raise FileNotFoundError

    monkeypatch.setattr(fs, "AzureFileSystem", Azure)
    for name, value in (
        ("AZURE_STORAGE_KEY", key),
        ("AZURE_STORAGE_SAS_TOKEN", ""),
        ("AZURE_TOKEN_CREDENTIALS", "prod"),
    ):
        monkeypatch.setenv(name, value)
    clouds._connect.cache_clear()
    with pytest.raises(FileNotFoundError if key else StorageError) as error:
        read_bytes("abfs://box@account.dfs.core.windows.net/a")
    assert key or "access denied while opening. Check the key and what it is allowed: AZURE_STORAGE_" in str(
        error.value
    )


@pytest.mark.parametrize(("az", "sources"), [(None, "prod"), ("/usr/bin/az", None)])
def test_azures_program_is_not_run_where_it_is_not_installed(monkeypatch, az, sources):
    """Its library would have the shell say so, on the terminal."""
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "")  # so that it is put back
    monkeypatch.delenv("AZURE_TOKEN_CREDENTIALS")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    monkeypatch.setattr(clouds.shutil, "which", lambda name: az)
    clouds._connect.cache_clear()
    clouds.filesystem(clouds.place_of("abfs://box@account.dfs.core.windows.net/a"))
    assert os.environ.get("AZURE_TOKEN_CREDENTIALS") == sources


def test_no_server_at_all(monkeypatch):
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 2)
    s3.use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"^s3://bucket/cat\.jpg: cannot be reached while opening\. Check the address, "
    ):
        read_bytes("s3://bucket/cat.jpg")


def test_a_store_that_asks_for_fewer_requests_is_asked_again_later(monkeypatch):
    times = []
    found = (200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "Content-Length": "5"}, b"meow!")

    def answer(number, method, path):
        times.append(time.monotonic())
        return s3.s3_error(503, "SlowDown", "Please reduce your request rate.") if number <= 3 else found

    with s3.answering(answer) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        assert read_bytes("s3://bucket/cat.jpg") == b"meow!"
    assert [line.partition(" ")[0] for line in requests] == ["HEAD"] * 4 + ["GET"]
    assert times[3] - times[0] > 0.05  # with pauses


def test_a_store_that_asks_for_fewer_requests_for_ever(monkeypatch):
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 3)
    slow_down = s3.s3_error(503, "SlowDown", "Please reduce your request rate.")
    with s3.answering(lambda number, method, path: slow_down) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(StorageError) as error:
            open_folder("s3://bucket/cats").list()
    assert str(error.value) == (
        "s3://bucket/cats: the store asks for fewer requests while listing. It was asked again with growing pauses. "
        "Run later, or with fewer machines at once: what is done is kept."
    )
    assert len(requests) == 3


@pytest.fixture
def outages(monkeypatch):
    """Of two failures in a row."""
    monkeypatch.setattr("sdxl_ray.storage.outages.LIMIT", 2)
    monkeypatch.setattr(clouds, "_outages", storage.Outages())
    monkeypatch.setattr(clouds, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(clouds, "REQUEST_TIMEOUT_S", 1)


def test_a_store_that_is_gone_is_left_alone_for_a_while(outages, monkeypatch):
    answers = []
    found = (200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "Content-Length": "5"}, b"meow!")
    with s3.answering(lambda *_: answers[0] if answers else None) as (endpoint, requests):
        s3.use(monkeypatch, endpoint)
        for _ in range(2):
            with pytest.raises(StorageError, match="timed out while opening"):
                read_bytes("s3://bucket/cat.jpg")
        asked = len(requests)
        for call in (lambda: read_bytes("s3://bucket/dog.jpg"), lambda: open_folder("s3://bucket/x").list()):
            with pytest.raises(StorageError) as error:
                call()
            assert ": s3://bucket has not answered for the last 2 requests. Check the network" in str(error.value)
        assert len(requests) == asked
        answers.append(found)
        assert read_bytes("s3://another/cat.jpg") == b"meow!"
        monkeypatch.setattr("time.monotonic", lambda clock=time.monotonic: clock() + 61)
        assert read_bytes("s3://bucket/cat.jpg") == b"meow!"
    assert clouds._outages._failures == {}


def test_a_store_that_refuses_has_answered(outages, monkeypatch):
    answers = [s3.s3_error(403, "AccessDenied", ""), s3.s3_error(404, "NoSuchKey", "")]
    with s3.answering(lambda number, *_: answers[number % 2]) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        for _ in range(6):
            with pytest.raises((StorageError, FileNotFoundError), match=r"denied|No such file"):
                read_bytes("s3://bucket/cat.jpg")


def test_outages_are_counted_by_many_threads(monkeypatch):
    outages = storage.Outages()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: outages.failed("a"), range(19)))
        assert outages.reason("a") == ""
        outages.answered("a")
        list(threads.map(lambda _: outages.failed("a"), range(19)))
        assert outages.reason("a") == ""
        outages.failed("a")
    assert outages.reason("a") == "a has not answered for the last 20 requests"
    assert outages.reason("b") == ""
    monkeypatch.setattr("time.monotonic", lambda clock=time.monotonic: clock() + 61)
    assert outages.reason("a") == ""
    outages.failed("a")  # still gone
    assert outages.reason("a") != ""


def test_what_is_deleted_while_it_is_read_is_not_found(monkeypatch):
    """It was there when it was opened."""
    head = (200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "Content-Length": "5000"}, b"")
    gone = s3.s3_error(404, "NoSuchKey", "The specified key does not exist.")
    with s3.answering(lambda number, method, path: head if method == "HEAD" else gone) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(FileNotFoundError) as error:
            read_bytes("s3://bucket/cat.jpg")
    assert (error.value.strerror, error.value.filename) == ("No such file or directory", "s3://bucket/cat.jpg")


def test_what_the_hub_does_not_have_is_not_found():
    from huggingface_hub.errors import EntryNotFoundError

    with (
        pytest.raises(FileNotFoundError) as error,
        clouds.cloud_errors("hf://datasets/org/name/cat.jpg", "reading"),
    ):
        raise EntryNotFoundError("404 Client Error. Entry Not Found for url")
    assert error.value.filename == "hf://datasets/org/name/cat.jpg"


def test_an_answer_that_nobody_expects_is_shown(monkeypatch):
    teapot = s3.s3_error(418, "Teapot", "short and stout, secret-of-the-tests")
    with s3.answering(lambda number, method, path: teapot) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(StorageError) as error:
            open_folder("s3://bucket/cats").list()
    assert str(error.value).startswith("s3://bucket/cats: failed while listing: ")
    assert "short and stout, ***" in str(error.value)
    teapot = s3.s3_error(418, "Teapot", "no x?sig=HIDDEN here")
    with s3.answering(lambda number, method, path: teapot) as (endpoint, _):
        s3.use(monkeypatch, endpoint)
        with pytest.raises(StorageError, match=r"failed while listing: .* no x\?\*\*\* here"):
            open_folder("s3://bucket/cats").list()


def test_the_hub_is_only_read():
    with pytest.raises(StorageError, match=r"^hf://datasets/org/name/x: the Hub is only read here. Choose a folder, "):
        open_folder("hf://datasets/org/name").write("x", b"x")


def test_the_hub_out_of_reach():
    """HF_HUB_OFFLINE is set for all tests."""
    clouds._connect.cache_clear()
    with pytest.raises(StorageError, match=r"^hf://datasets/org/name: cannot be reached while listing\. "):
        open_folder("hf://datasets/org/name").list()


def test_what_is_written_piece_by_piece_is_there_whole(place):
    folder = open_folder(place)
    folder.write_by("a/b.txt", lambda file: file.writelines([b"one, ", b"two"]), doing="writing", cure="")
    assert folder.read("a/b.txt") == b"one, two"
