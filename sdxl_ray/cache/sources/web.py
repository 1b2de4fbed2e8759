"""Images behind http:// and https:// addresses, as tables name them."""

from __future__ import annotations

import errno
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from sdxl_ray.storage import Outages

TIMEOUT_S = 30.0
DEADLINE_S = 300.0  # for one image, however slowly its server sends
MAX_BYTES = 500_000_000
PAUSES_S = (1.0, 4.0, 16.0)  # before each further attempt
_outages = Outages()


class _TryAgain(Exception):
    """The reason, where another attempt may work. `answered`: whether the server said anything."""

    def __init__(self, reason: str, answered: bool = True) -> None:
        super().__init__(reason)
        self.answered = answered


def read_url(url: str, length: int = -1) -> bytes:
    """What the address holds, or its first `length` bytes.

    Raises:
        FileNotFoundError, PermissionError: its server does not give it, whoever asks.
        OSError: it cannot be read now: no answer after several attempts; at once where its server has not answered for
            many requests.
        ValueError: it is larger than 500 MB; or the address can never work.
    """
    server = _server_of(url)
    for pause_s in (*PAUSES_S, None):
        silent = _outages.reason(server)
        if silent:
            raise OSError(errno.EIO, silent, url)
        try:
            content = _fetch(url, length)
        except _TryAgain as error:
            if pause_s is None:
                (_outages.answered if error.answered else _outages.failed)(server)
                raise OSError(errno.EIO, f"{error}, {len(PAUSES_S) + 1} attempts", url) from None
            time.sleep(pause_s)
        except (OSError, ValueError):  # refused, or too large
            _outages.answered(server)
            raise
        else:
            _outages.answered(server)
            return content
    raise AssertionError("unreachable")


def _server_of(url: str) -> str:
    """
    Raises:
        ValueError: the address names none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_one = bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", parts.netloc) and parts.port != 0
    except ValueError:  # a port that is no number, or half of the brackets
        is_one = False
    if not is_one:
        raise ValueError("its address names no server")
    return parts.netloc.rpartition("@")[2]


def _fetch(url: str, length: int) -> bytes:
    # Tables hold addresses as browsers show them, with spaces and letters beyond ASCII.
    quoted = urllib.parse.quote(url, safe=":/?&=%#+,;@!$'()*~[]")
    headers = {"User-Agent": "sdxl-ray"}
    if length >= 0:
        headers["Range"] = f"bytes=0-{max(0, length - 1)}"
    content = bytearray()
    limit = MAX_BYTES if length < 0 else length
    end = time.monotonic() + DEADLINE_S
    try:
        with urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_S) as answer:
            while len(content) < limit + (length < 0):
                piece = answer.read(1 << 16)
                if not piece:
                    break
                content += piece
                if time.monotonic() > end:
                    raise _TryAgain(f"not complete after {DEADLINE_S:.0f} s")
            expected = answer.headers.get("Content-Length", "")
            if length < 0 and expected.isdecimal() and len(content) < min(int(expected), MAX_BYTES):
                raise _TryAgain(f"the answer ended after {len(content)} of {expected} bytes")
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise _TryAgain(f"HTTP {error.code} {error.reason}") from None
        number = errno.ENOENT if error.code in (404, 410) else errno.EACCES if error.code >= 400 else errno.EIO
        raise OSError(number, f"HTTP {error.code} {error.reason}", url) from None
    except urllib.error.URLError as error:
        raise _TryAgain(
            f"no answer: {getattr(error.reason, 'strerror', None) or error.reason}", answered=False
        ) from None
    except (TimeoutError, http.client.HTTPException, ConnectionError) as error:
        raise _TryAgain(f"no answer: {error or type(error).__name__}", answered=False) from None
    if length < 0 and len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES / 1e6:.0f} MB")
    return bytes(content[:length] if length >= 0 else content)
