import time

import pytest

from sdxl_ray.cache.sources import address, read_bytes, read_start, web
from tests import s3


def found(body, **headers):
    return 200, headers, body


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(web, "PAUSES_S", (0.01, 0.02, 0.03))
    monkeypatch.setattr(web, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(web, "_outages", web.Outages())


@pytest.mark.parametrize("name", ["a:b", "row:1:x:y", "tar:1+2:x", "line\nbreak", "%41", "https:x", "😺"])
def test_any_name_of_a_file_fits(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"0123456789")
    assert read_bytes(str(path)) == b"0123456789"
    assert read_start(str(path), 4) == b"0123"
    assert read_bytes(address.tar_address(str(path), 3, 4)) == b"3456"
    assert read_start(address.tar_address(str(path), 3, 4), 2) == b"34"
    assert address.row_address(name, 7, "a:b/c") == f"row:7:a%3Ab%2Fc:{name}"


@pytest.mark.parametrize("prefix", ["", "tar:0+1:", "row:0:image:"])
def test_what_is_not_there_is_not_found(tmp_path, prefix):
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{prefix}{tmp_path}/gone.parquet")


def test_a_download():
    seen = []

    def answer(number, method, path):
        seen.append(path)
        return found(b"0123456789")

    with s3.answering(answer) as (server, _):
        assert read_bytes(f"{server}/a b/ü.jpg?x=1&y=%20#z") == b"0123456789"
        assert read_start(f"{server}/a.jpg", 3) == b"012"  # of a server that knows no ranges
    assert seen == ["/a%20b/%C3%BC.jpg?x=1&y=%20", "/a.jpg"]


def test_the_start_of_a_download_is_asked_for_as_a_range():
    with s3.answering(lambda number, method, path: (206, {}, b"012")) as (server, _):
        assert read_start(f"{server}/a.jpg", 3) == b"012"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with s3.answering(lambda number, *_: (status, {}, b"") if number < 4 else found(b"x")) as (server, requests):
        assert read_bytes(f"{server}/a.jpg") == b"x"
    assert len(requests) == 4


def test_a_server_that_stays_busy():
    with s3.answering(lambda *_: (503, {}, b"")) as (server, requests):
        with pytest.raises(OSError, match="HTTP 503 Service Unavailable, 4 attempts") as error:
            read_bytes(f"{server}/a.jpg")
        assert error.value.filename == f"{server}/a.jpg"
    assert len(requests) == 4


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, FileNotFoundError, "HTTP 404 Not Found"),
        (410, FileNotFoundError, "HTTP 410 Gone"),
        (403, PermissionError, "HTTP 403 Forbidden"),
        (400, PermissionError, "HTTP 400 Bad Request"),
        (418, PermissionError, "HTTP 418 I'm a Teapot"),
    ],
)
def test_a_server_that_refuses_is_not_asked_again(status, kind, text):
    with s3.answering(lambda *_: (status, {}, b"")) as (server, requests), pytest.raises(kind) as error:
        read_bytes(f"{server}/a.jpg")
    assert error.value.strerror == text
    assert len(requests) == 1


def test_a_server_that_never_answers():
    with s3.answering(lambda *_: None) as (server, requests):
        start = time.monotonic()
        with pytest.raises(OSError, match="no answer: timed out, 4 attempts"):
            read_bytes(f"{server}/a.jpg")
        assert time.monotonic() - start < 5
        assert len(requests) == 4


def test_a_server_that_is_gone_is_left_alone_for_a_while(monkeypatch):
    monkeypatch.setattr("sdxl_ray.storage.outages.LIMIT", 2)
    monkeypatch.setattr(web, "TIMEOUT_S", 0.1)
    answers = []
    with s3.answering(lambda *_: answers[0] if answers else None) as (server, requests):
        for _ in range(2):
            with pytest.raises(OSError, match="no answer: timed out, 4 attempts"):
                read_bytes(f"{server}/a.jpg")
        with pytest.raises(OSError, match="has not answered for the last 2 requests") as error:
            read_bytes(f"{server}/b.jpg")
        assert error.value.strerror == f"{server.removeprefix('http://')} has not answered for the last 2 requests"
        assert len(requests) == 8
        answers.append(found(b"x"))
        monkeypatch.setattr("time.monotonic", lambda clock=time.monotonic: clock() + 61)
        assert read_bytes(f"{server}/b.jpg") == b"x"
    assert web._outages._failures == {}


@pytest.mark.parametrize("status", [404, 418, 503])
def test_a_server_that_refuses_has_answered(status, monkeypatch):
    monkeypatch.setattr("sdxl_ray.storage.outages.LIMIT", 2)
    monkeypatch.setattr(web, "PAUSES_S", ())
    with s3.answering(lambda *_: (status, {}, b"")) as (server, requests):
        for _ in range(4):
            with pytest.raises(OSError, match=f"HTTP {status}"):
                read_bytes(f"{server}/a.jpg")
    assert len(requests) == 4


def test_what_may_not_be_read_says_why():
    for read in (read_bytes, lambda address: read_start(address, 9)):
        with pytest.raises(ValueError, match=r"^the reason: of it$"):
            read(address.refused_address("the reason: of it"))


def test_no_server():
    with pytest.raises(OSError, match="no answer: Connection refused, 4 attempts"):
        read_bytes("http://127.0.0.1:9/a.jpg")


@pytest.mark.parametrize(
    "url", ["http://host:abc/x.jpg", "http:///x.jpg", "https://exa mple/x.jpg", "http://[::1/x.jpg", "http://host:0/x"]
)
def test_an_address_that_can_never_work_is_not_tried(url, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(ValueError, match=r"^its address names no server$"):
        read_bytes(url)
    assert web._outages._failures == {}


def test_an_answer_that_is_cut_short_is_asked_for_again():
    def answer(number, method, path):
        return (200, {"Content-Length": "9", "Connection": "close"}, b"cut") if number == 1 else found(b"whole now")

    with s3.answering(answer) as (server, requests):
        assert read_bytes(f"{server}/a.jpg") == b"whole now"
    assert len(requests) == 2


def test_a_server_that_sends_too_slowly(monkeypatch):
    monkeypatch.setattr(web, "DEADLINE_S", 0.0)
    with (
        s3.answering(lambda *_: found(b"x" * 10)) as (server, _),
        pytest.raises(OSError, match="not complete after 0 s, 4 attempts"),
    ):
        read_bytes(f"{server}/a.jpg")


def test_a_download_that_is_too_large(monkeypatch):
    monkeypatch.setattr(web, "MAX_BYTES", 1_000_000)
    with (
        s3.answering(lambda *_: found(bytes(1_000_001))) as (server, _),
        pytest.raises(ValueError, match=r"^larger than 1 MB$"),
    ):
        read_bytes(f"{server}/a.jpg")
    with s3.answering(lambda *_: found(bytes(1_000_000))) as (server, _):
        assert len(read_bytes(f"{server}/a.jpg")) == 1_000_000
