"""A server with OpenAI's chat interface whose answers and faults follow a script: real HTTP on loopback.

python -m tests.scripted_server LOG [--answer MODULE:FUNCTION] [--rates JSON]    # until SIGTERM

It prints its URL, and in the end the most requests that were in flight at a time.
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib
import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Body = dict[str, Any]
Answer = Callable[[Body], str | dict[str, Any]]  # a text, or OpenAI's message; it may have `finish_reason`
Fault = Callable[[Body, int], str | None]  # of a request that arrives for the n-th time, from 1

# A status, or: `hang` says nothing until the client leaves, `hang up` leaves without a word, `half` leaves in
# the middle, `drip` sends a byte every 50 ms, `nonsense` is a page of HTML, `null` is neither text nor call.
FAULTS = (
    "400",
    "401",
    "404",
    "413",
    "422",
    "429",
    "500",
    "503",
    "hang",
    "hang up",
    "half",
    "drip",
    "nonsense",
    "null",
)
RETRY_AFTER = "0.05"  # seconds, beside a 429
_DRIP = 0.05


def echo(body: Body) -> str:
    """The last message and the seed."""
    return f"{body['messages'][-1]['content']} {body.get('seed')}"


def never(body: Body, attempt: int) -> None:
    """No fault."""


def by_rates(rates: Mapping[str, float], *, attempts: int = 2) -> Fault:
    """Faults at random, and the same in each run, of a request's first attempts. A 4xx other than 429 stays.

    rates: fault -> share of the requests.
    """
    assert not rates.keys() - set(FAULTS)

    def fault(body: Body, attempt: int) -> str | None:
        draw = int(digest(body)[:8], 16) / 16**8
        for name, rate in rates.items():
            if draw < rate:
                lasts = name in ("400", "413", "422", "null")
                return name if lasts or attempt <= attempts else None
            draw -= rate
        return None

    return fault


def digest(body: Body) -> str:
    """Names a request in the log."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ScriptedServer:
    """Serves from a thread of its own until it is closed.

    `requests` are the bodies as they arrived, and `keys` their Authorization headers. `log`: a line for each
    answer that was sent whole, `{"request": digest, "status": 200, "body": ...}`.
    """

    def __init__(
        self,
        answer: Answer = echo,
        fault: Fault = never,
        *,
        log: Path | None = None,
        port: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """seconds: that each answer takes."""
        self.requests: list[Body] = []
        self.keys: list[str | None] = []
        self.in_flight = self.most_in_flight = 0
        self._answer, self._fault, self._seen = answer, fault, Counter[str]()
        self._seconds = seconds
        self._log = None if log is None else log.open("a")
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", port, backlog=20_000, limit=2**24)
        )
        self.port: int = self._listening.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop every connection."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        if self._log is not None:
            self._log.close()

    async def _stop(self) -> None:
        self._listening.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._request(reader, writer):
                pass
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        if line.startswith("GET /health "):  # as vLLM's server, which answers it once the model is loaded
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append(body)
        self.keys.append(headers.get("authorization"))
        self._seen[digest(body)] += 1
        fault = self._fault(body, self._seen[digest(body)])
        if not line.startswith("POST /v1/chat/completions "):
            fault = "404"
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._respond(body, fault, reader, writer)
        finally:
            self.in_flight -= 1

    async def _respond(
        self, body: Body, fault: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if fault == "hang":
            await reader.read()
        if fault in ("hang", "hang up"):
            return False
        await asyncio.sleep(self._seconds)
        status = int(fault) if fault and fault.isdigit() else 200
        content = self._content(body, fault)
        head = f"HTTP/1.1 {status} Scripted\r\nContent-Length: {len(content)}\r\n"
        head += f"Retry-After: {RETRY_AFTER}\r\n" if status == 429 else ""
        sent = head.encode() + b"\r\n" + (content[: len(content) // 2] if fault == "half" else content)
        step = 1 if fault == "drip" else len(sent)
        for start in range(0, len(sent), step):
            writer.write(sent[start : start + step])
            await writer.drain()
            if fault == "drip":
                await asyncio.sleep(_DRIP)
        if fault != "half" and self._log is not None:
            self._log.write(json.dumps({"request": digest(body), "status": status, "body": body}) + "\n")
            self._log.flush()
        return fault != "half"

    def _content(self, body: Body, fault: str | None) -> bytes:
        if fault == "nonsense":
            return b"<html>It works!</html>"
        if fault and fault.isdigit():
            return json.dumps({"error": {"message": f"scripted {fault}"}}).encode()
        answer: Any = {"content": None} if fault == "null" else self._answer(body)
        message = {"content": answer} if isinstance(answer, str) else answer
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {
            "index": 0,
            "message": {"role": "assistant", **message},
            "finish_reason": message.pop("finish_reason", finish),
        }
        asked = sum(len((each.get("content") or "").split()) for each in body["messages"])
        usage = {"prompt_tokens": asked, "completion_tokens": len((message["content"] or "").split())}
        return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--answer", default="tests.scripted_server:echo")
    parser.add_argument("--rates", type=json.loads, default={})
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    values = parser.parse_args()
    module, _, name = values.answer.partition(":")
    answer = getattr(importlib.import_module(module), name)
    server = ScriptedServer(
        answer, by_rates(values.rates), log=values.log, port=values.port, seconds=values.seconds
    )
    print(server.url, flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    print(server.most_in_flight, flush=True)


if __name__ == "__main__":
    main()
