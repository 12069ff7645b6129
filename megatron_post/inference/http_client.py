"""HTTP as strangers must be asked: within a time for all of it, up to a size, and at no other address."""

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
_LONGEST_WAIT = 600.0  # seconds, whatever a server asks for
_CONNECTIONS = 8  # of a client, which looks at all of them for each request; 64 take a fifth more CPU
_OTHER_FILES = 256  # that a process has open
_SECONDS_IDLE = 2.0  # of a connection; servers close theirs after 5 or more


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. content: of another status than 200 its beginning, as far as it came in time.

    retry_after: seconds, 0 where the server asks for none. location: where a redirect leads.
    """

    status: int
    content: bytes
    retry_after: float
    location: str


class NotReached(Exception):
    """No connection to the server."""


class NoAnswer(Exception):
    """A server that was reached, and gave no whole answer."""


class HttpClient:
    """Posts JSON, any number of requests at a time. It belongs to one event loop.

    Errors do not have what caused them, which could repeat the key.
    """

    def __init__(self, *, key: str | None, timeout: float) -> None:
        """timeout: seconds for a whole request, reading the answer included.

        Raises `ValueError` if a proxy that the environment names cannot be used.
        """
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._tls = ssl.create_default_context()
        self._clients = [self._new_client()]  # which fails here if a proxy cannot be used
        # for each server its clients, each as often as it has connections to spare
        self._idle: dict[str, list[httpx2.AsyncClient]] = defaultdict(list)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def post(self, url: str, body: bytes) -> Answer:
        """The answer of any status. Raises `NotReached` and `NoAnswer`."""
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
            # without httpx's own timeouts, which are for each packet; a redirect would get the key
            return httpx2.AsyncClient(verify=self._tls, timeout=None, follow_redirects=False, limits=limits)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise ValueError(f"a proxy that the environment names cannot be used: {error}") from None


def seconds_of(value: str) -> float:
    """Seconds that a Retry-After asks for: their number, or a date. 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def _reason(error: BaseException) -> str:
    """An error, with the one of the operating system that caused it if there is one."""
    text, cause = f"{type(error).__name__}: {error}", error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return f"{text}: {os.strerror(cause.errno)}"
        cause = cause.__cause__ or cause.__context__
    return text


def allow_open_files(wanted: int, *, needed: int) -> None:
    """Let this process have as many connections open as are wanted, beside its files.

    Systems start a process with a limit of 1,024, which it may raise to a second one. Raises `ValueError` if
    that does not allow those that are needed.
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
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"api_key_variable: the environment has no {name}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"api_key_variable: {name} holds spaces, or what is no ASCII: that is no key")
    return key


def proxy_passwords() -> list[str]:
    """Of the proxies that the environment names. A URL that cannot be parsed is printed in errors."""
    found = []
    for url in urllib.request.getproxies().values():
        user, at, _ = url.rpartition("@")
        password = user.partition("://")[2].partition(":")[2]
        found += [password, unquote(password)] if at else []
    return found
