"""An HTTP client for untrusted servers. It limits time and size, and does not follow redirects."""

import asyncio
import math
import os
import resource
import ssl
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import unquote

import httpx2

LARGEST_ANSWER, _LARGEST_REFUSAL = 16 * 1024**2, 2**14  # bytes
_LONGEST_WAIT = 600.0  # seconds. A longer wait in Retry-After is shortened
_CONNECTIONS = 8  # per client, which searches all of them for each request. 64 take a fifth more CPU
_OTHER_FILES = 256  # open files of a process that are not connections
_SECONDS_IDLE = 2.0  # before an idle connection is closed. Servers close theirs after 5 or more


@dataclass(frozen=True)
class Answer:
    """An answer of a server.

    status: the HTTP status. content: the body, or for a status other than 200 the beginning that arrived in
    time. retry_after: seconds, or 0 without this header. location: the target of a redirect.
    """

    status: int
    content: bytes
    retry_after: float
    location: str


class NotReached(Exception):
    """There is no connection to the server."""


class NoAnswer(Exception):
    """The server was reached but gave no complete answer."""


class HttpClient:
    """Posts JSON, with any number of requests at once. It belongs to one event loop.

    Its errors have no cause, because the text of the cause could repeat the key.
    """

    def __init__(self, *, key: str | None, timeout: float) -> None:
        """timeout: seconds for a whole request, including its answer.

        Raises `ValueError` if a proxy that the environment names cannot be used.
        """
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._tls = ssl.create_default_context()
        self._clients = [self._new_client()]  # raises here if a proxy cannot be used
        # For each server, its clients. A client is in the list once for each of its free connections.
        self._idle: dict[str, list[httpx2.AsyncClient]] = defaultdict(list)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def post(self, url: str, body: bytes) -> Answer:
        """The answer with any status. Raises `NotReached` and `NoAnswer`."""
        idle = self._idle[url]
        if not idle:
            self._clients.append(self._new_client())
            idle += [self._clients[-1]] * _CONNECTIONS
        client = idle.pop()
        content, head = bytearray(), None
        try:
            async with (
                asyncio.timeout(self._timeout),
                client.stream("POST", url, content=body, headers=self._headers) as response,
            ):
                head = response
                most = LARGEST_ANSWER if head.status_code == 200 else _LARGEST_REFUSAL
                async for block in response.aiter_raw():
                    content += block
                    if len(content) > most:
                        break
        except TimeoutError:
            if head is None or head.status_code == 200:
                raise NoAnswer(f"no answer within timeout={self._timeout} s") from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise NotReached(_reason(error)) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            if head is None or head.status_code == 200:
                raise NoAnswer(_reason(error)) from None
        finally:
            idle.append(client)
        assert head is not None
        if head.status_code != 200:
            del content[_LARGEST_REFUSAL:]
        elif len(content) > LARGEST_ANSWER:
            raise NoAnswer(f"an answer of more than {LARGEST_ANSWER:,} bytes")
        headers = head.headers
        wait = seconds_of(headers.get("Retry-After", ""))
        return Answer(head.status_code, bytes(content), wait, headers.get("Location", "nowhere"))

    def _new_client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_CONNECTIONS,
            keepalive_expiry=_SECONDS_IDLE,
        )
        try:
            # httpx's own timeouts are not used, because they are for single packets. Redirects are not
            # followed, because their target would get the key.
            return httpx2.AsyncClient(verify=self._tls, timeout=None, follow_redirects=False, limits=limits)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise ValueError(f"a proxy that the environment names cannot be used: {error}") from None


def seconds_of(value: str) -> float:
    """The seconds until the time in a Retry-After header, which is a number or a date. 0 for other values."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def _reason(error: BaseException) -> str:
    """The text of an error, with the operating system's error that caused it, if there is one."""
    text, cause = f"{type(error).__name__}: {error}", error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return f"{text}: {os.strerror(cause.errno)}"
        cause = cause.__cause__ or cause.__context__
    return text


def allow_open_files(wanted: int, *, needed: int) -> None:
    """Raise this process's limit on open files so that it can have the `wanted` number of connections.

    Usually the soft limit is 1,024, and a process may raise it to the hard limit. Raises `ValueError` if the
    hard limit is too low for the `needed` number of connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if hard == resource.RLIM_INFINITY else hard
    if needed + _OTHER_FILES > most:
        raise ValueError(
            f"parallel_requests: {needed} connections are more than this process may open (`ulimit -Hn` says "
            f"{hard}); lower it, or have that limit raised"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        limit = int(min(most, wanted + _OTHER_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def key_in_environment(name: str) -> str:
    """The key in a variable. Raises `ValueError` if there is none."""
    if not os.environ.get(name, "").strip():
        raise ValueError(f"api_key_variable: the environment has no {name}")
    try:
        return checked_key(os.environ[name])
    except ValueError as error:
        raise ValueError(f"api_key_variable: {name} {error}") from None


def checked_key(text: str) -> str:
    """A key without the white space around it.

    Raises `ValueError` for a text that cannot be a key. The message does not repeat the text.
    """
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("is not a key, which has only printable ASCII characters and no spaces")
    return key


def proxy_passwords() -> list[str]:
    """The passwords of the environment's proxies, to hide them. Errors may print a URL that is not valid."""
    found = []
    for url in urllib.request.getproxies().values():
        user, at, _ = url.rpartition("@")
        password = user.partition("://")[2].partition(":")[2]
        found += [password, unquote(password)] if at else []
    return found
