"""Stand-ins for object stores on this machine: a real moto server, and small servers that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from sdxl_ray.storage import Outages, clouds

BUCKET = "pictures"


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The address of an S3 server with one bucket, BUCKET. Needs the extra `dev`."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import logging

    logging.getLogger("werkzeug").disabled = True  # one line for each request
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        make_bucket(f"http://{host}:{port}", BUCKET)
        yield f"http://{host}:{port}"
    finally:
        running.stop()


def make_bucket(endpoint: str, name: str) -> None:
    """Make a bucket, without the environment's keys."""
    filesystem(endpoint).create_dir(name)


def filesystem(endpoint: str):
    """pyarrow's own, to look at a store from outside the package."""
    from pyarrow import fs

    return fs.S3FileSystem(
        access_key="testing",
        secret_key="testing",
        region="us-east-1",
        scheme="http",
        endpoint_override=endpoint.removeprefix("http://"),
        allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Point the environment to a server, as a user does; what an earlier one did is forgotten."""
    monkeypatch.setattr(clouds, "_outages", Outages())
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


Answer = Callable[[int, str, str], tuple[int, dict[str, str], bytes] | None]


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """(address, requests so far) of a server that answers what `answer(number, method, path)` returns.

    It returns (status, headers, body), or None for a server that takes the request and never answers.
    """
    requests: list[str] = []
    lock = threading.Lock()
    stopped = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                requests.append(f"{self.command} {self.path}")
                number = len(requests)
            found = answer(number, self.command, self.path)
            if found is None:
                stopped.wait(60)
                self.close_connection = True
                return
            status, headers, body = found
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()


def s3_error(status: int, code: str, text: str) -> tuple[int, dict[str, str], bytes]:
    """An answer as S3 gives it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'
    return status, {"Content-Type": "application/xml"}, body.encode()
