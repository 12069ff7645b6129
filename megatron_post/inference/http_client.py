"""HTTP as strangers must be asked: within a time for all of it, and only at the address that was given.

urllib applies its timeout to each packet, so that a byte a second goes on for ever, and it follows a redirect
with all headers, the key among them.
"""

import http.client
import io
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from typing import Any


def open_url() -> Callable[..., http.client.HTTPResponse]:
    """A function as `urllib.request.urlopen`, for any number of threads.

    Its `timeout` is in seconds for a whole request, reading the answer included. A redirect is an
    `HTTPError`.
    """
    return urllib.request.build_opener(_Handler(), _SecureHandler(), _NoRedirects()).open


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Timed(io.RawIOBase):
    """What a socket receives, all of it within the timeout that it has left."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock = raw, sock
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Answer

    def __init__(self, host: str, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._deadline = time.monotonic() + (self.timeout or 0.0)

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.sock.settimeout(_left(self._deadline))
        super().send(data)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        super().__init__()
        self._tls = ssl.create_default_context()

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=self._tls)


def _left(deadline: float) -> float:
    """Seconds. Raises `TimeoutError` where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
