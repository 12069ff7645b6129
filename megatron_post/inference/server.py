"""Sends requests to untrusted servers that speak OpenAI's chat protocol over HTTP."""

import asyncio
import contextlib
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from megatron_post.config.secrets import redact, repeats
from megatron_post.data.dialog import Message
from megatron_post.display import say
from megatron_post.inference.chat import (
    NoCompletion,
    Unusable,
    parse_completion,
    request_body,
    texts_of,
)
from megatron_post.inference.http_client import (
    Answer,
    HttpClient,
    NoAnswer,
    NotReached,
    allow_open_files,
    checked_key,
    key_in_environment,
    proxy_passwords,
)
from megatron_post.inference.request import Refusal, Reply, Request, Sampling
from megatron_post.inference.settings import ServerBackend
from megatron_post.inference.sites import ADDRESSES, KEY_FILE, Sites
from megatron_post.storage.reading import reading

_LONGEST_MESSAGE = 500  # characters of what a server says
_FIRST_WAIT = 0.5  # seconds, doubled after each try
_LONGEST_WAIT = 60.0  # unless a server asks for more
_PATIENCE = 1800.0  # seconds, for servers that are published when they have started
_HELLO = Request((Message("user", "Hello"),), Sampling(max_tokens=1), seed=1)


class BadServer(ValueError):
    """A server cannot be reached, or its answers cannot be used."""


class _TryAgain(Exception):
    """An error for which the request is tried again. wait: seconds that the server asks to wait."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _BadAnswer(_TryAgain):
    """An error of a server that was reached. The reason may be this request alone."""


class _Refused(Exception):
    """The server refuses the request, or its answer cannot be used. Another try would not help."""

    def __init__(self, reason: str, *, unusable: bool = False) -> None:
        super().__init__(reason)
        self.unusable = unusable


class Server:
    """Sends each request separately, with its own seed and a bounded number at a time.

    Its messages never contain the key or the password of a proxy. It belongs to one event loop.
    """

    def __init__(self, settings: ServerBackend) -> None:
        """Raises `ValueError` for a wrong key, and `BadServer` if a proxy cannot be used.

        Also raises `ValueError` if the variable with the key is not set, or if this process may not open
        enough connections.
        """
        allow_open_files(settings.most_in_flight, needed=settings.parallel_requests * len(settings.urls))
        key = _key(settings)
        self._secrets = [*proxy_passwords(), *([] if key is None else [key])]
        self._settings, self._sites = settings, Sites(settings)
        try:
            self._http = HttpClient(key=key, timeout=settings.timeout)
        except ValueError as error:
            raise BadServer(self._shown(error)) from None
        self._began, self._says_waiting = time.monotonic(), False
        wanted = settings.patience
        self._patience = (_PATIENCE if settings.urls_from else 0.0) if wanted is None else wanted
        self._given_up = asyncio.Event()

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def answer(self, request: Request) -> Reply | Refusal:
        """The reply, or a refusal.

        It is a refusal if the server refuses the request, or if all tries fail although the server answers
        another request. Raises `BadServer` if the servers do not work at all.
        """
        began = time.monotonic()
        tries = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=partial(self._is_over, began),
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return await tries(self._try, request)
        except _Refused as error:
            return Refusal(self._shown(error), error.unusable)
        except _TryAgain as error:
            said, is_there = self._shown(error), isinstance(error, _BadAnswer)
        except ValueError:
            self._given_up.set()
            raise
        failed = f"{tries.statistics['attempt_number']} tries failed, the last with: {said}"
        if is_there and await self._answers_others():
            return Refusal(failed)
        self._given_up.set()
        raise BadServer(
            f"{self._settings.urls_from or ' '.join(self._settings.urls)}: {failed}; responses that were "
            "finished before are kept. Repair the server and run the same command again"
        )

    async def _answers_others(self) -> bool:
        """Whether a simple request is answered. Then the failure of another request has its own reason."""
        try:
            await self._try(_HELLO)
        except (_TryAgain, _Refused):
            return False
        return True

    def _shown(self, said: object) -> str:
        return redact(str(said), self._secrets)[:_LONGEST_MESSAGE]

    def _is_over(self, began: float, state: RetryCallState) -> bool:
        """Whether to stop trying a request. began: when it was first sent."""
        if self._given_up.is_set():
            return True
        assert state.outcome is not None
        answered = self._sites.answered
        nobody_answers = answered < began and not isinstance(state.outcome.exception(), _BadAnswer)
        is_patient = nobody_answers and time.monotonic() - max(answered, self._began) < self._patience
        return state.attempt_number > self._settings.retries and not is_patient

    async def _sleep(self, seconds: float) -> None:
        """Wait, or stop waiting once another request has ended the run."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._given_up.wait()

    async def _try(self, request: Request) -> Reply | Refusal:
        if self._given_up.is_set():
            raise _TryAgain("another request found that no server works")
        body = json.dumps(request_body(request, self._settings.served_model)).encode()
        async with self._sites.take() as site:
            if site is None:
                missing = f"{self._settings.urls_from} has no {ADDRESSES} with the address of a server"
                if not self._says_waiting:
                    self._says_waiting = True
                    say(f"{missing}; waiting for {self._patience:,.0f} s at most", file=sys.stderr)
                raise _TryAgain(missing)
            self._says_waiting = False
            began = time.monotonic()
            try:
                reply = await self._ask(site.url, body)
            except _Refused:
                self._sites.has_answered(site)
                raise
            except _TryAgain:
                self._sites.has_failed(site, began=began)
                raise
            self._sites.has_answered(site)
        if repeats("\n".join(texts_of(reply)), self._secrets):
            return Refusal("the answer repeats the key or a password, and is not kept")
        return reply

    async def _ask(self, url: str, body: bytes) -> Reply:
        try:
            answer = await self._http.post(f"{url.rstrip('/')}/chat/completions", body)
            if answer.status != 200:
                self._refuse(url, answer)
            return parse_completion(answer.content)
        except NotReached as error:
            raise _TryAgain(str(error)) from None
        except (NoAnswer, NoCompletion) as error:
            raise _BadAnswer(str(error)) from None
        except Unusable as error:
            raise _Refused(str(error), unusable=True) from None

    def _refuse(self, url: str, answer: Answer) -> NoReturn:
        # If there are several servers, another program may have got the port of one of them.
        bad: type[Exception] = BadServer if len(self._settings.urls) == 1 else _BadAnswer
        if 300 <= answer.status < 400:
            raise bad(
                f"{url} redirects to {self._shown(answer.location)}. Redirects are not followed, because "
                "that server would get the key and the prompts. If you trust it, set the backend's url to it"
            )
        text = self._shown(f"HTTP status {answer.status}: {answer.content.decode(errors='replace')}")
        if answer.status in (400, 413, 422):
            raise _Refused(f"the server refuses the request: {text}")
        if answer.status == 500:
            raise _BadAnswer(text)
        if answer.status in (408, 429) or answer.status >= 500:
            raise _TryAgain(text, wait=answer.retry_after)
        raise bad(f"{url} refuses the request: {text}")


def _key(settings: ServerBackend) -> str | None:
    """The key in the environment, or the key that the servers of `urls_from` have published."""
    if (name := settings.api_key_variable) is not None:
        return key_in_environment(name)
    path = None if settings.urls_from is None else Path(settings.urls_from) / KEY_FILE
    if path is None or not path.exists():
        return None
    with reading(path, "the key of the servers"):
        return checked_key(path.read_text(encoding="utf-8"))


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try. They are random, so that requests that failed together are spread out."""
    assert state.outcome is not None
    error = state.outcome.exception()
    own = min(_FIRST_WAIT * 2 ** (state.attempt_number - 1), _LONGEST_WAIT)
    wanted = error.wait if isinstance(error, _TryAgain) else 0.0
    return max(own, wanted) * random.uniform(1.0, 1.5)
