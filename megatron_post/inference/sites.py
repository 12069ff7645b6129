"""Chooses the server for each request, and leaves servers that fail out for a while."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from megatron_post.inference.settings import ServerBackend, check_url

ADDRESSES = "*.url"  # files in the directory `urls_from`, each with one address
KEY_FILE = "key"  # file in that directory, if the servers demand a key
_SECONDS_BETWEEN_LOOKS = 5.0  # between two readings of that directory
_LONGEST_LEFT_OUT = 60.0  # seconds


@dataclass(eq=False)
class Site:
    """One server. left_out_until, answered: times of the monotonic clock. answered: its last answer."""

    url: str
    in_flight: int = 0
    failures: int = 0
    left_out_until: float = 0.0
    answered: float = float("-inf")


class Sites:
    """Spreads requests over servers.

    A server that fails is left out for a while. Afterwards it gets only one request until it answers again.
    """

    def __init__(self, settings: ServerBackend) -> None:
        self._settings = settings
        self._sites = {url: Site(url) for url in settings.urls}
        self._looked = float("-inf")
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[Site | None]:
        """Wait until a server has room, and reserve it for one request. None if no address is known.

        Raises `ValueError` for a file in `urls_from` that does not contain an address.
        """
        async with self._changed:
            while (site := self._choose()) is None and self._sites:
                try:
                    await self._changed.wait()
                except asyncio.CancelledError:  # it may have received the only notification, so pass it on
                    self._changed.notify()
                    raise
            if site is not None:
                site.in_flight += 1
        had_failed = site is not None and site.failures > 0
        try:
            yield site
        finally:
            if site is not None:
                site.in_flight -= 1
            async with self._changed:  # a server that answers again has room for several requests
                self._changed.notify(len(self._sites) * self._settings.parallel_requests if had_failed else 1)

    def has_answered(self, site: Site) -> None:
        site.answered, site.failures = time.monotonic(), 0

    def has_failed(self, site: Site, *, began: float) -> None:
        """Leave a server out if it has answered nothing since `began`, when the failed request was sent."""
        if site.answered < began and site.left_out_until < began:
            site.left_out_until = time.monotonic() + min(2.0**site.failures, _LONGEST_LEFT_OUT)
            site.failures += 1

    @property
    def answered(self) -> float:
        """The time of the last answer of any server."""
        return max((site.answered for site in self._sites.values()), default=float("-inf"))

    def _choose(self) -> Site | None:
        """The least busy server with room. If all are left out, the server that is tried again first."""
        self._look()
        now = time.monotonic()
        sites = self._sites.values()
        answering = [s for s in sites if s.left_out_until <= now and (not s.failures or not s.in_flight)]
        if not answering and all(site.left_out_until > now for site in sites):
            answering = sorted(sites, key=lambda site: site.left_out_until)[:1]
        free = [site for site in answering if site.in_flight < self._settings.parallel_requests]
        return min(free, key=lambda site: site.in_flight, default=None)

    def _look(self) -> None:
        """Read the addresses again. A server whose file is gone gets no more requests."""
        if self._settings.urls_from is None or time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        urls = []
        for path in sorted(Path(self._settings.urls_from).glob(ADDRESSES)):
            with contextlib.suppress(FileNotFoundError):  # the file has been removed meanwhile
                urls += _address_in(path)
        if urls != list(self._sites):
            self._sites = {url: self._sites.get(url) or Site(url) for url in urls}
            self._changed.notify_all()


def _address_in(path: Path) -> list[str]:
    """The address in a file, or none if it is still empty."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return [check_url(text)] if text else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
