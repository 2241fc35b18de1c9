"""One request to a server: it has an end and a bound whatever the server does, and never repeats the key."""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, SSLError, TimeoutError

from npd.config import TeacherConfig
from npd.errors import SHOWN, UserError, foreign

LEAST_BODY = 16 << 20  # bytes that any answer may have
WORDS = 1 << 16  # bytes that are looked at of an answer that says what is wrong
SHORTEST_KEY = 4  # characters: what is shorter is no secret, and stands in every word
HIDDEN = "[the API key]"
_ESCAPE = r"(?:\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|[abefnrtv0]))*"

# It logs header lines that it can't read as they came.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)


class TryAgain(Exception):
    """What may be another way in a moment.

    Args:
        after: seconds that the server asks to wait.
    """

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Answer(NamedTuple):
    status: int
    data: bytes
    """The body: all of it where the status is 200, else no more than its beginning."""
    after: float
    """Seconds that the server asks to wait."""


class Transport:
    """Requests to one server, from any number of threads. Redirections are not followed: the key would go with them."""

    def __init__(self, config: TeacherConfig, url: str) -> None:
        self.config, self.url = config, url
        timeout = urllib3.Timeout(connect=min(10.0, config.timeout), read=config.timeout)
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, timeout=timeout, retries=False)
        self._pool.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def key(self) -> str:
        """The server's API key; "" if there is none.

        Raises:
            UserError: it has characters that no key has.
        """
        key = os.environ.get(self.config.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"The environment variable {self.config.api_key_env} holds characters that no API key has.")
        return key

    def words(self, value: object, limit: int = SHOWN) -> str:
        """What a server said, as one line that may be shown and kept: every word of a server passes here, so the key, which
        some repeat in what they say is wrong, is in no message, log or record."""
        return foreign(hide(foreign(value, WORDS), self.key()), limit)

    def request(self, path: str, body: dict[str, Any] | None, most: int) -> Answer:
        """The answer to a GET, or to a POST of `body`; after `teacher.timeout` all told, or `most` bytes, it is given up.

        Raises:
            TryAgain: there is none, or it is late.
            UserError: the server can't be trusted, or what it sends has no bound.
        """
        key = self.key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        late = TryAgain(f"it did not answer {path} within teacher.timeout {self.config.timeout:g} s")
        with _Deadline(self.config.timeout) as deadline:
            try:
                answer = self._request(path, body, headers, most)
            except LocationParseError as error:
                raise UserError(f"teacher.server {self.url!r} is no URL: {self._last(error)}.") from None
            except NewConnectionError as error:
                raise TryAgain(f"nothing answers there ({self._last(error)})") from None
            except TimeoutError:
                raise late from None
            except (HTTPError, HTTPException, OSError, ValueError) as error:
                if deadline.over:
                    raise late from None
                if isinstance(error, SSLError):
                    raise UserError(f"The server {self.url} can't be trusted: {self.words(error)}.") from None
                raise TryAgain(f"the connection broke ({self._last(error)})") from None
            if deadline.over:  # what has no length ends where the connection does
                raise late
            return answer

    def _request(self, path: str, body: dict[str, Any] | None, headers: dict[str, str], most: int) -> Answer:
        how: dict[str, Any] = {"headers": headers, "redirect": False, "preload_content": False, "decode_content": False}
        if body is None:
            response = self._pool.request("GET", self.url + path, **how)
        else:
            response = self._pool.request("POST", self.url + path, json=body, **how)
        data, whole = bytearray(), False
        most = most if response.status == 200 else WORDS
        try:
            coding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if coding not in ("identity", ""):  # a few kilobytes may hold gigabytes; no server was asked for it
                raise UserError(
                    f"The server {self.url} answers {path} in {self.words(coding, 40)!r}, though it was not asked to "
                    "compress. Have what stands before it, a proxy for instance, leave answers as they are."
                )
            while len(data) <= most:
                piece = response.read(1 << 16)
                if not piece:
                    whole = True
                    break
                data += piece
        finally:
            response.release_conn() if whole else response.close()
        if not whole and response.status == 200:
            raise UserError(
                f"The server {self.url} answers {path} with more than {most / 1e6:.0f} MB, which is more than an answer to "
                f"what it was asked can have: {self.words(bytes(data[:WORDS]).decode('utf-8', 'replace'), 80)!r}. Check "
                "teacher.server."
            )
        return Answer(response.status, bytes(data), _seconds(response.headers.get("Retry-After")))

    def _last(self, error: Exception) -> str:
        return self.words(str(error).rpartition(": ")[2])


def hide(text: str, key: str) -> str:
    """A text without a key, however it is written there: quoted, escaped, in base64, in other letters' case."""
    if len(key) < SHORTEST_KEY:
        return text
    shapes = sorted(set(_shapes(key)), key=len, reverse=True)
    broken = _ESCAPE.join(map(re.escape, key))  # by a control character, as Python or JSON writes it
    return re.sub("|".join([broken, *map(re.escape, shapes)]), HIDDEN, text, flags=re.IGNORECASE)


def _shapes(key: str) -> Iterator[str]:
    yield from (
        key,
        quote(key, safe=""),
        quote(key),
        quote_plus(key),
        html.escape(key),
        json.dumps(key)[1:-1],
        repr(key)[1:-1],
    )
    yield key.encode().hex()
    for before in range(3):  # in base64 a key looks in three ways, by what stands before it
        coded = base64.b64encode(b"\0" * before + key.encode())
        inner = coded[-(-8 * before // 6) : 8 * (before + len(key)) // 6].decode()  # without letters that others share
        if len(inner) >= SHORTEST_KEY:
            yield from (inner, inner.replace("+", "-").replace("/", "_"))


class _Deadline:
    """Within this context a thread's connection to a server is cut once the time is up.

    A socket's own time-out begins anew with every byte, and a server may drip them for ever.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self.sock: socket.socket | None = None  # not the connection: it lets go of one that ends with the answer
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        _mine.deadline = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        _mine.deadline = self.sock = None

    def _end(self) -> None:
        self.over = True
        sock = self.sock
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS too: a thread is reading in it


class _Mine(threading.local):
    deadline: _Deadline | None = None


_mine = _Mine()


class _Cut(HTTPConnection):
    """Shows its socket to the deadline of the thread that works with it."""

    def connect(self) -> None:
        super().connect()
        self._show()

    def request(self, *args: Any, **options: Any) -> None:
        self._show()
        super().request(*args, **options)

    def _show(self) -> None:
        deadline = _mine.deadline
        if deadline is not None:
            deadline.sock = self.sock
            if deadline.over:  # while there was nothing to cut
                raise OSError("too late")


class _SecureCut(_Cut, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Cut


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureCut


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(urllib3.Retry().parse_retry_after(retry_after or "0")))
    except (HTTPError, ValueError, TypeError, ArithmeticError):
        return 0.0
