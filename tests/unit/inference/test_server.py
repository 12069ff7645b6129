"""Tests with servers that answer, are slow, give invalid answers, or refuse requests."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.inference import server as module
from megatron_post.inference.generate import Generate, generate
from megatron_post.inference.request import Refusal, Reply, Sampling
from megatron_post.inference.samples import read_samples
from megatron_post.inference.server import BadServer
from megatron_post.inference.settings import SamplesPerPrompt, ServerBackend
from tests.unit.inference.asking import answer, ask_server, asking

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


class _Server(ThreadingHTTPServer):
    answer: Answer
    bodies: list[dict[str, Any]]
    keys: list[str | None]
    drip = 0.0  # seconds between bytes
    hangs_up: bool = False
    hangs_up_after: int | None = None


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, content = self.server.answer(len(self.server.bodies), body)
        if self.server.hangs_up_after is None and self.server.hangs_up:
            return
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        content = content[: self.server.hangs_up_after] if self.server.hangs_up else content
        size = 1 if self.server.drip else max(1, len(content))
        for start in range(0, len(content), size):
            self.wfile.write(content[start : start + size])
            time.sleep(self.server.drip)

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


def _ask(served: _Server, count: int = 1, **settings: Any) -> list[Reply | Refusal]:
    url = f"http://127.0.0.1:{served.server_address[1]}/v1"
    backend = ServerBackend(kind="server", url=url, served_model="m", **{"retries": 2, **settings})
    sampling = Sampling(temperature=0.5, max_tokens=9)
    return ask_server(backend, [asking(str(i), 2**40 + i, sampling) for i in range(count)])


def test_answers_in_the_order_of_requests(served: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret\n")  # a mounted secret ends with a newline
    served.answer = lambda n, body: (200, _completion(f"to {body['messages'][0]['content']}"))
    found = _ask(served, 20, api_key_variable="A_KEY")
    assert found == [answer(f"to {i}", 5, "stop") for i in range(20)]
    assert {(b["temperature"], b["max_tokens"], b["model"]) for b in served.bodies} == {(0.5, 9, "m")}
    assert sorted(b["seed"] for b in served.bodies) == list(range(20))  # 2^40 mod 2^31 is 0
    assert set(served.keys) == {"Bearer secret"}
    with pytest.raises(ValueError, match="the environment has no NO_KEY"):
        _ask(served, api_key_variable="NO_KEY")


def test_what_passes_is_tried_again(served: _Server) -> None:
    served.answer = lambda n, body: (503, b"busy") if n < 3 else (200, _completion("\ud800!", "length"))
    assert _ask(served) == [answer("?!", 5, "length")]
    uncounted = json.dumps(json.loads(_completion("fine")) | {"usage": None}).encode()
    served.answer = lambda n, body: (200, uncounted)
    assert _ask(served) == [answer("fine", 0, "stop")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>It works!</html>", "not a chat completion .*It works"),
        (b"[]", "not a chat completion"),
        (b'{"choices": []}', "not a chat completion"),
        (b'{"choices": [{"message": null}]}', "not a chat completion"),
        (_completion("x", None), "without text"),
        (_completion("x", "stop" * 26), "without text"),
        (
            _completion("x")[:-1] + b', "usage": {"completion_tokens": 1' + b"0" * 400 + b"}}",
            "count of tokens",
        ),
        (b"[" * 100_000, "not a chat completion"),
        (_completion("cut")[:-9], "not a chat completion"),
        (b"", "not a chat completion"),
        (b'{"error": {"message": "CUDA out of memory"}}', "not a chat completion .*CUDA out of memory"),
    ],
)
def test_nonsense_is_refused(served: _Server, content: bytes, message: str) -> None:
    served.answer = lambda n, body: (200, content)
    with pytest.raises(BadServer, match=f"3 tries failed, the last with: .*{message}"):
        _ask(served)
    assert len(served.bodies) == 4  # the last request checks whether the server answers any request


def test_a_slow_server(served: _Server) -> None:
    def slow(n: int, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(1)
        return 200, _completion("late")

    served.answer = slow
    with pytest.raises(BadServer, match=r"2 tries failed, the last with: no answer within timeout=0.1 s"):
        _ask(served, timeout=0.1, retries=1)


def test_a_server_that_drips(served: _Server) -> None:
    """Each byte arrives in time, but the whole answer does not."""
    served.answer = lambda n, body: (200, _completion("slow"))
    served.drip = 0.05
    with pytest.raises(BadServer, match=r"1 tries failed, the last with: no answer within timeout=0.3 s"):
        _ask(served, timeout=0.3, retries=0)


def test_a_server_that_hangs_up(served: _Server) -> None:
    """It closes the connection before its answer, or in the middle of it."""
    served.answer = lambda n, body: (200, _completion("lost"))
    for sent, message in (
        (None, "Server disconnected|Connection reset"),
        (20, "without sending complete message body"),
    ):
        served.hangs_up, served.hangs_up_after = True, sent
        with pytest.raises(BadServer, match=f"3 tries failed, the last with: .*({message})"):
            _ask(served)


def test_a_server_that_always_fails(served: _Server) -> None:
    served.answer = lambda n, body: (500, b"<html>Internal Server Error</html>")
    with pytest.raises(BadServer, match=r"3 tries failed, .*HTTP status 500: <html>Internal.*same command"):
        _ask(served)


def test_another_model_is_refused_at_once(served: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is vLLM's. Requests that wait for another try end at the same time."""
    monkeypatch.setattr(module, "_FIRST_WAIT", 60.0)
    served.answer = lambda n, body: (503, b"") if n < 3 else (404, b"The model `m` does not exist.")
    began = time.monotonic()
    with pytest.raises(BadServer, match=r"HTTP status 404: The model `m` does not exist"):
        _ask(served, 3)
    assert time.monotonic() - began < 30


def test_what_is_done_is_kept_while_the_server_is_mended(served: _Server, tmp_path: Path) -> None:
    """The server fails in the second of three parts of two prompts until it is mended.

    The rows equal those of a server that never failed.
    """
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(6)))
    url = f"http://127.0.0.1:{served.server_address[1]}/v1"
    settings = Generate(
        model="theirs",
        prompts=str(prompts),
        part=2,
        sampling=SamplesPerPrompt(samples=2),
        backend=ServerBackend(kind="server", url=url, served_model="m", retries=1),
    )

    def question(body: dict[str, Any]) -> str:
        return str(body["messages"][0]["content"])

    def reply(n: int, body: dict[str, Any]) -> tuple[int, bytes]:
        return 200, _completion(f"{question(body)}: {body['seed']}")

    first = ["question 0", "question 1"]
    console, output = Console(file=io.StringIO()), tmp_path / "out.jsonl"
    served.answer = lambda n, body: reply(n, body) if question(body) in first else (500, b"")
    with pytest.raises(BadServer, match="responses that were finished before are kept"):
        generate(settings, output, console=console)
    assert not output.exists()
    # The server may still read requests that the client gave up, so those of the first part are counted.
    served.answer = reply
    assert generate(settings, output, console=console).written == 8
    assert sum(question(body) in first for body in served.bodies) == 4
    generate(settings, tmp_path / "whole.jsonl", console=console)
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [(row["prompt"], row["sample"]) for row in read_samples(output)] == [
        (prompt, sample) for prompt in range(1, 7) for sample in range(2)
    ]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_is_of_its_request_alone(served: _Server, status: int) -> None:
    """It is final, so the request is not sent again."""
    served.answer = lambda n, body: (
        (status, b"too long") if body["seed"] == 1 else (200, _completion(str(body["seed"])))
    )
    found = _ask(served, 3)
    assert found == [
        answer("0", 5, "stop"),
        Refusal(f"the server refuses the request: HTTP status {status}: too long"),
        answer("2", 5, "stop"),
    ]
    assert len(served.bodies) == 3


def test_an_answer_without_text_is_a_failure(served: _Server) -> None:
    """Refusals, tool calls, and reasoning that used all of max_tokens have no text. A blank one is text."""
    served.answer = lambda n, body: (
        200,
        _completion(None, "tool_calls") if body["seed"] else _completion(""),
    )
    blank, failure = _ask(served, 2)
    assert blank == answer("", 5, "stop")
    assert (
        isinstance(failure, Refusal) and "without text: " in failure.reason and "tool_calls" in failure.reason
    )
    assert len(served.bodies) == 2


@pytest.mark.parametrize(("status", "content"), [(500, b"no"), (200, b"<html>")])
def test_one_request_that_the_server_cannot_take(served: _Server, status: int, content: bytes) -> None:
    """The server answers other requests, so only this request fails."""
    others = threading.Event()

    def reply(n: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if body["seed"] == 0:
            others.wait(10)
            return status, content
        return 200, _completion("fine")

    served.answer = reply
    threading.Timer(0.3, others.set).start()
    failure, fine = _ask(served, 2)
    assert fine == answer("fine", 5, "stop")
    assert isinstance(failure, Refusal) and failure.reason.startswith("3 tries failed, the last with: ")


def test_a_busy_server_is_no_fault_of_the_request(served: _Server) -> None:
    served.answer = lambda n, body: (503, b"busy") if body["seed"] == 0 else (200, _completion("fine"))
    with pytest.raises(BadServer, match="3 tries failed, the last with: HTTP status 503"):
        _ask(served, 2)


def test_a_key_that_is_refused_ends_it(served: _Server) -> None:
    served.answer = lambda n, body: (401, b"no such key") if body["seed"] == 0 else (200, _completion("fine"))
    with pytest.raises(BadServer, match="refuses the request: HTTP status 401"):
        _ask(served, 2)


def test_nobody_there() -> None:
    settings = ServerBackend(kind="server", url="http://127.0.0.1:9/v1", served_model="m", retries=0)
    with pytest.raises(BadServer, match="Connection refused"):
        ask_server(settings, [asking("?")])
