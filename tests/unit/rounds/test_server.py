"""A server that answers, is slow, talks nonsense, or refuses."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_post.rounds import server as module
from megatron_post.rounds.backends import Request, Response, Sampling, ServerBackend
from megatron_post.rounds.server import BadServer, Server

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


class _Server(ThreadingHTTPServer):
    answer: Answer
    bodies: list[dict[str, Any]]
    keys: list[str | None]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, content = self.server.answer(len(self.server.bodies), body)
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bodies, server.keys = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _completion(text: Any, finish: Any = "stop") -> bytes:
    choice = {"message": {"content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()


def _ask(served: _Server, count: int = 1, **settings: Any) -> list[Response]:
    url = f"http://127.0.0.1:{served.server_address[1]}/v1"
    backend = ServerBackend(kind="server", url=url, served_model="m", **{"retries": 2, **settings})
    requests = [Request(({"role": "user", "content": str(i)},), seed=2**40 + i) for i in range(count)]
    return Server(backend).respond(requests, Sampling(temperature=0.5, max_tokens=9))


def test_answers_in_the_order_of_requests(served: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    served.answer = lambda n, body: (200, _completion(f"to {body['messages'][0]['content']}"))
    found = _ask(served, 20, api_key_variable="A_KEY")
    assert found == [Response(f"to {i}", 5, "stop") for i in range(20)]
    assert {(b["temperature"], b["max_tokens"], b["model"]) for b in served.bodies} == {(0.5, 9, "m")}
    assert sorted(b["seed"] for b in served.bodies) == list(range(20))  # 2^40 mod 2^31 is 0
    assert set(served.keys) == {"Bearer secret"}
    with pytest.raises(ValueError, match="the environment has no NO_KEY"):
        _ask(served, api_key_variable="NO_KEY")


def test_what_passes_is_tried_again(served: _Server) -> None:
    served.answer = lambda n, body: (503, b"busy") if n < 3 else (200, _completion("\ud800!", "length"))
    assert _ask(served) == [Response("?!", 5, "length")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>It works!</html>", "no chat completion .*It works"),
        (b"[]", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (b'{"choices": [{"message": null}]}', "no chat completion"),
        (_completion(None), "without text"),
        (_completion("x", None), "without text"),
        (b"[" * 100_000, "no chat completion"),
    ],
)
def test_nonsense_is_refused(served: _Server, content: bytes, message: str) -> None:
    served.answer = lambda n, body: (200, content)
    with pytest.raises(BadServer, match=f"3 tries failed, the last with: .*{message}"):
        _ask(served)
    assert len(served.bodies) == 3


def test_a_slow_server(served: _Server) -> None:
    def slow(n: int, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(1)
        return 200, _completion("late")

    served.answer = slow
    with pytest.raises(BadServer, match=r"2 tries failed, the last with: no answer within timeout=0.1 s"):
        _ask(served, timeout=0.1, retries=1)


def test_a_refusal_is_final(served: _Server) -> None:
    served.answer = lambda n, body: (400, b'{"error": "max_tokens is too large"}')
    with pytest.raises(BadServer, match=r"refuses the request: HTTP status 400: .*max_tokens is too large"):
        _ask(served)
    assert len(served.bodies) == 1


def test_nobody_there() -> None:
    settings = ServerBackend(kind="server", url="http://127.0.0.1:9/v1", served_model="m", retries=0)
    with pytest.raises(BadServer, match="Connection refused"):
        Server(settings).respond([Request(({"role": "user", "content": "?"},), 1)], Sampling())
