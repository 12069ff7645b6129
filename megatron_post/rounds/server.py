"""A server that speaks OpenAI's chat protocol, trusted in nothing."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from megatron_post.data.tokenizer import END_OF_MESSAGE
from megatron_post.rounds.backends import Request, Response, Sampling, ServerBackend

_LARGEST_ANSWER = 16 * 1024**2
_FIRST_WAIT = 0.5  # seconds; doubled after each try
_CALLS = (END_OF_MESSAGE, 128008)  # its id in Llama 3's tokenizer


class BadServer(ValueError):
    """A server that cannot be reached, or whose answers cannot be used."""


class _TryAgain(Exception):
    """What another try may mend."""


class Server:
    """Sends each request by itself, with its own seed; many at a time."""

    def __init__(self, settings: ServerBackend) -> None:
        """Raises `ValueError` where the variable with the key is not set."""
        self._settings, self._url = settings, f"{settings.url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if settings.api_key_variable is not None:
            key = os.environ.get(settings.api_key_variable)
            if not key:
                raise ValueError(f"api_key_variable: the environment has no {settings.api_key_variable}")
            self._headers["Authorization"] = f"Bearer {key.strip()}"
        self._given_up = threading.Event()

    def close(self) -> None:
        """The server goes on."""

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Raises `BadServer` where one request fails for good."""
        with ThreadPoolExecutor(self._settings.parallel_requests) as pool:
            tasks = [pool.submit(self._respond, request, sampling) for request in requests]
            try:
                for task in as_completed(tasks):
                    task.result()  # the first failure ends the others' waiting
                return [task.result() for task in tasks]
            except BaseException:
                self._given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _respond(self, request: Request, sampling: Sampling) -> Response:
        body = {
            "model": self._settings.served_model,
            "messages": list(request.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "seed": request.seed % 2**31,  # some servers read 32 bits
        }
        said = ""
        for attempt in range(self._settings.retries + 1):
            if attempt and self._given_up.wait(_FIRST_WAIT * 2 ** (attempt - 1)):
                break
            try:
                return parse_answer(self._post(json.dumps(body).encode()))
            except _TryAgain as error:
                said = str(error)
        raise BadServer(
            f"{self._url}: {self._settings.retries + 1} tries failed, the last with: {said}; responses that "
            "were finished before are kept: mend the server and run the same command again"
        )

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._url, data=body, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._settings.timeout) as answer:
                content = self._read(answer)
        except urllib.error.HTTPError as error:
            text = f"HTTP status {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code in (408, 429) or error.code >= 500:
                raise _TryAgain(text) from error
            raise BadServer(f"{self._url} refuses the request: {text}") from error
        except TimeoutError as error:
            raise _TryAgain(f"no answer within timeout={self._settings.timeout} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        return content

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        """All of an answer within `timeout`, which `urlopen` applies to each packet alone."""
        deadline, content = time.monotonic() + self._settings.timeout, bytearray()
        while block := answer.read1(2**16):
            content += block
            if len(content) > _LARGEST_ANSWER:
                raise _TryAgain(f"an answer of more than {_LARGEST_ANSWER:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if answer.length:
            raise http.client.IncompleteRead(bytes(content[:200]), answer.length)
        return bytes(content)


def parse_answer(content: bytes) -> Response:
    """The response in a chat completion. Raises `_TryAgain` for anything else."""
    shown = content[:200].decode(errors="replace")
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
        # vLLM says "stop" and here which token: this one ends a message that calls a tool
        finish = "tool_calls" if choice.get("stop_reason") in _CALLS else finish
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _TryAgain(f"an answer that is no chat completion ({error!r}): {shown}") from None
    if not isinstance(text, str) or not isinstance(finish, str) or type(tokens) is not int:
        raise _TryAgain(f"a chat completion without text, reason of ending or count of tokens: {shown}")
    # a lone surrogate is valid JSON and no text
    return Response(text.encode(errors="replace").decode(), tokens, finish)
