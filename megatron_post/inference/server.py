"""A server that speaks OpenAI's chat protocol, trusted in nothing."""

import contextlib
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import NoReturn
from urllib.parse import unquote

from megatron_post.config.secrets import redact, repeats
from megatron_post.data.tokenizer import END_OF_MESSAGE
from megatron_post.inference.http_client import open_url
from megatron_post.inference.request import Refusal, Reply, Request, assistant_message, messages_as_json
from megatron_post.inference.settings import ServerBackend

_LARGEST_ANSWER = 16 * 1024**2
_LONGEST_MESSAGE = 500  # characters of what a server says
_LONGEST_FINISH, _MOST_TOKENS = 100, 2**31
_FIRST_WAIT = 0.5  # seconds; doubled after each try
_CALLS = (END_OF_MESSAGE, 128008)  # its id in Llama 3's tokenizer


class BadServer(ValueError):
    """A server that cannot be reached, or whose answers cannot be used."""


class _TryAgain(Exception):
    """What another try may mend."""


class _BadAnswer(_TryAgain):
    """An answer of a server that is there: it may be about this request alone."""


class _Refused(Exception):
    """A request that this server never answers."""


class Server:
    """Sends each request by itself, with its own seed; many at a time. What it says of a server holds neither
    the key nor the password of a proxy."""

    def __init__(self, settings: ServerBackend) -> None:
        """Raises `ValueError` where the variable with the key is not set, or holds no key."""
        self._settings, self._url = settings, f"{settings.url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        secrets = _proxy_passwords()
        if (name := settings.api_key_variable) is not None:
            key = os.environ.get(name, "").strip()
            if not key:
                raise ValueError(f"api_key_variable: the environment has no {name}")
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"api_key_variable: {name} holds spaces, or what is no ASCII: that is no key"
                )
            self._headers["Authorization"] = f"Bearer {key}"
            secrets.append(key)
        self._secrets, self._hide = secrets, partial(redact, secrets=secrets)
        self._open = open_url()
        self._given_up = threading.Event()
        self._answered = -math.inf  # when

    def close(self) -> None:
        """The server goes on."""

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        """A request fails where the server refuses it, or where it alone has no usable answer while others
        have. Raises `BadServer` where the server as a whole does not work."""
        with ThreadPoolExecutor(self._settings.parallel_requests) as pool:
            tasks = [pool.submit(self._respond, request) for request in requests]
            try:
                for task in as_completed(tasks):
                    task.result()  # the first failure ends the others' waiting
                return [task.result() for task in tasks]
            except BaseException:
                self._given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _respond(self, request: Request) -> Reply | Refusal:
        sampling = request.sampling
        body = {
            "model": self._settings.served_model,
            "messages": messages_as_json(request.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "seed": request.seed % 2**31,  # some servers read 32 bits
        }
        began, last = time.monotonic(), _TryAgain()
        for attempt in range(self._settings.retries + 1):
            if attempt and self._given_up.wait(_FIRST_WAIT * 2 ** (attempt - 1)):
                break
            try:
                response = parse_answer(self._post(json.dumps(body).encode()))
            except _Refused as error:
                return Refusal(self._hide(str(error))[:_LONGEST_MESSAGE])
            except _TryAgain as error:
                last = error
            else:
                self._answered = time.monotonic()
                if repeats(f"{response.text}\n{response.finish}", self._secrets):
                    return Refusal("the answer repeats the key or a password, and is not kept")
                return response
        said = self._hide(str(last))[:_LONGEST_MESSAGE]
        failed = f"{self._settings.retries + 1} tries failed, the last with: {said}"
        if isinstance(last, _BadAnswer) and self._answered > began:
            return Refusal(failed)
        raise BadServer(
            f"{self._url}: {failed}; responses that were finished before are kept: mend the server and run "
            "the same command again"
        )

    def _post(self, body: bytes) -> bytes:
        """The answer to a request. Errors do not have what caused them, which could repeat the key."""
        request = urllib.request.Request(self._url, data=body, headers=self._headers)
        try:
            with self._open(request, timeout=self._settings.timeout) as answer:
                return _read(answer)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except TimeoutError:
            raise _TryAgain(f"no answer within timeout={self._settings.timeout} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from None

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            if 300 <= error.code < 400:
                place = self._hide(str(error.headers["Location"]))[:_LONGEST_MESSAGE]
                raise BadServer(
                    f"{self._url} redirects to {place}. Redirects are not followed, since that server would "
                    "get the key and the prompts: if it is the one to ask, set the backend's url to it"
                ) from None
            text = _beginning(error)
        text = self._hide(f"HTTP status {error.code}: {text}")[:_LONGEST_MESSAGE]
        if error.code in (400, 413, 422):
            raise _Refused(f"the server refuses the request: {text}") from None
        if error.code == 500:
            raise _BadAnswer(text) from None
        if error.code in (408, 429) or error.code >= 500:
            raise _TryAgain(text) from None
        raise BadServer(f"{self._url} refuses the request: {text}") from None


def _read(answer: http.client.HTTPResponse) -> bytes:
    """All of an answer, up to a size."""
    content = bytearray()
    while block := answer.read1(2**16):
        content += block
        if len(content) > _LARGEST_ANSWER:
            raise _TryAgain(f"an answer of more than {_LARGEST_ANSWER:,} bytes")
    if answer.length:
        raise http.client.IncompleteRead(bytes(content[:200]), answer.length)
    return bytes(content)


def _beginning(answer: urllib.error.HTTPError) -> str:
    """As much of a refusal's text as comes in time."""
    content = b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while len(content) < 2**14 and (block := answer.read1(2**14)):
            content += block
    return content.decode(errors="replace")


def _proxy_passwords() -> list[str]:
    """Of the proxies that the environment names. A URL that cannot be parsed is printed in errors."""
    found = []
    for url in urllib.request.getproxies().values():
        user, at, _ = url.rpartition("@")
        password = user.partition("://")[2].partition(":")[2]
        found += [password, unquote(password)] if at else []
    return found


def parse_answer(content: bytes) -> Reply:
    """The response in a chat completion. Raises `_Refused` where it has no text, and `_BadAnswer` for what is
    no chat completion."""
    shown = content[: 2**14].decode(errors="replace")  # whoever prints it hides keys first, and then cuts
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
        # vLLM says "stop" and here which token: this one ends a message that calls a tool
        finish = "tool_calls" if choice.get("stop_reason") in _CALLS else finish
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _BadAnswer(f"an answer that is no chat completion ({error!r}): {shown}") from None
    if text is None and isinstance(finish, str):  # a refusal, a call of a tool, or reasoning alone
        raise _Refused(f"a chat completion without text: {shown}")
    is_finish = isinstance(finish, str) and len(finish) <= _LONGEST_FINISH
    if (
        not isinstance(text, str)
        or not is_finish
        or type(tokens) is not int
        or not 0 <= tokens < _MOST_TOKENS
    ):
        raise _BadAnswer(f"a chat completion without text, reason of ending or count of tokens: {shown}")
    # a lone surrogate is valid JSON and no text
    text = text.encode(errors="replace").decode()
    return Reply(assistant_message(text, finish=finish), finish, tokens)
