"""Servers redirect, send single bytes, never end, or repeat the key. The tests use real HTTP on loopback."""

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from megatron_post.config.load import ConfigError, parse
from megatron_post.inference import http_client
from megatron_post.inference import server as module
from megatron_post.inference.generate import Generate, generate
from megatron_post.inference.request import Refusal, Reply
from megatron_post.inference.server import BadServer, Server
from megatron_post.inference.settings import SamplesPerPrompt, ServerBackend
from tests.unit.inference.asking import answer, ask_server, asking

KEY = "s3cr3t/Hunter+2"
Talk = Callable[[socket.socket], None]


class Listener:
    """Accepts connections on a port of its own, reads a request from each, and sends what `talk` gives."""

    def __init__(self, talk: Talk) -> None:
        self._talk, self.requests = talk, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = b""
            while not request.endswith(b"}"):  # the end of the body
                if not (block := connection.recv(2**16)):
                    return
                request += block
            self.requests.append(request)
            self._talk(connection)


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Talk], Listener]]:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("A_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listeners: list[Listener] = []

    def start(talk: Talk) -> Listener:
        listeners.append(Listener(talk))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


def _settings(
    listener: Listener, *, timeout: float = 10, retries: int = 0, host: str = "127.0.0.1"
) -> ServerBackend:
    return ServerBackend(
        kind="server",
        url=f"http://{host}:{listener.port}/v1",
        served_model="m",
        timeout=timeout,
        retries=retries,
        api_key_variable="A_KEY",
    )


def _ask(listener: Listener, **settings: Any) -> list[Reply | Refusal]:
    backend = _settings(listener, **settings)
    return ask_server(backend, [asking("?")])


def _says(status: str, body: bytes = b"", *headers: str) -> Talk:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers))
    return lambda connection: connection.sendall(f"{head}\r\n".encode() + body)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:{port}/v1", "http://localhost:{port}/", "//localhost:{port}"]
)
def test_the_key_does_not_follow_a_redirect(
    listen: Callable[[Talk], Listener], status: int, place: str
) -> None:
    """Redirects to another port or host are refused for any status. The message names the target."""
    thief = listen(_says("200 OK"))
    place = place.format(port=thief.port)
    listener = listen(_says(f"{status} Elsewhere", b"", f"Location: {place}"))
    with pytest.raises(BadServer, match=f"redirects to {place}. Redirects are not followed.*set the backend"):
        _ask(listener, retries=3)
    assert not thief.requests
    assert len(listener.requests) == 1
    assert f"Authorization: Bearer {KEY}".encode() in listener.requests[0]


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("at_once", "dripping"),
    [
        (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: yes\r\n" * 90),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 90),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"x" * 90_000),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 90_000),
        (_CHUNKED, b"0" * 60_000),
        (_CHUNKED, b"1\r\nx\r\n" * 900),
        (_CHUNKED + b"0\r\n", b"Trailer: yes\r\n" * 900),
        (b"HTTP/1.1 500 No\r\nContent-Length: 90000\r\n\r\n", b"x" * 90_000),
        (b"HTTP/1.1 401 No\r\nContent-Length: 90000\r\n\r\n", b"x" * 90_000),
    ],
)
def test_no_answer_takes_longer_than_the_timeout(
    listen: Callable[[Talk], Listener], at_once: bytes, dripping: bytes
) -> None:
    """The server sends a byte every 50 ms, always within 0.4 s, in the head, the body, or a refusal."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(at_once)
        for byte in dripping:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    listener = listen(drip)
    began = time.monotonic()
    with pytest.raises(BadServer, match=r"no answer within timeout=0.4 s|HTTP status (500|401)"):
        _ask(listener, timeout=0.4)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n\r\n", _CHUNKED, b"HTTP/1.1 400 No\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "]
)
def test_endless_answers_are_cut(
    listen: Callable[[Talk], Listener], head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server sends as fast as loopback allows, without end. The answer is cut long before the timeout."""
    monkeypatch.setattr(http_client, "LARGEST_ANSWER", 2**20)
    block = b"10000\r\n" + b"x" * 2**16 + b"\r\n" if head == _CHUNKED else b"x" * 2**16

    def flood(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(block)

    if b"400" in head:  # a failure of this request only
        (failure,) = _ask(listen(flood), timeout=60)
        assert isinstance(failure, Refusal) and "HTTP status 400: xxx" in failure.reason
        return
    with pytest.raises(BadServer, match=r"more than 1,048,576 bytes|RemoteProtocolError"):
        _ask(listen(flood), timeout=60)


@pytest.mark.parametrize(
    "talk",
    [
        _says("401 Unauthorized", f"no such key: {KEY}".encode()),
        _says("401 Unauthorized", b" " * 490 + KEY.encode()),  # the end of what is shown
        _says("401 Unauthorized", b'{"error": "s3cr3t\\/Hunter+2 s3cr3t%2FHunter%2B2"}'),
        _says(f"401 no such key: {KEY}"),
        _says("500 Error", f"Authorization: Bearer {KEY}".encode()),
        _says("200 OK", f"no completion but {KEY}".encode()),
        _says("200 OK", b"{" + KEY.encode()),
        _says("302 Elsewhere", b"", f"Location: http://elsewhere/?to={KEY}"),
        _says("302 Elsewhere", b"", "Location: http://user:s3cr3tHunter@elsewhere/"),
        lambda connection: connection.sendall(f"{KEY} {KEY}\r\n\r\n".encode()),
        lambda connection: connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{KEY}".encode()),
    ],
)
def test_the_key_is_hidden_in_what_a_server_says(listen: Callable[[Talk], Listener], talk: Talk) -> None:
    """It is hidden in the message, and in everything that a traceback would show."""
    with pytest.raises(BadServer) as error:
        _ask(listen(talk))
    shown = str(error.value)
    raised: BaseException | None = error.value
    while raised is not None:
        shown += repr(raised)
        raised = raised.__cause__ or (None if raised.__suppress_context__ else raised.__context__)
    assert "s3cr3t" not in shown and "Hunter" not in shown


def test_nothing_on_disk_holds_the_key(listen: Callable[[Talk], Listener], tmp_path: Path) -> None:
    """It is in no file next to a finished output, or next to an unfinished one whose server refuses."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "?"}) + "\n")
    answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
    for status, body in (("401 No", f"no such key: {KEY}"), ("200 OK", json.dumps(answer))):
        settings = Generate(
            model="theirs",
            prompts=str(tmp_path / "prompts.jsonl"),
            sampling=SamplesPerPrompt(samples=2),
            backend=_settings(listen(_says(status, body.encode()))),
        )
        with contextlib.suppress(BadServer):
            generate(settings, tmp_path / f"{status[:3]}.jsonl", console=Console(file=io.StringIO()))
    kept = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "200.jsonl" in kept and any(".partial-401" in str(path) for path in kept)
    assert not [path for path, text in kept.items() if "s3cr3t" in text]


@pytest.mark.parametrize("said", [KEY, json.dumps(KEY), f"It is {KEY}, by the way."])
@pytest.mark.parametrize("place", ["content", "finish_reason"])
def test_an_answer_with_the_key_is_not_kept(
    listen: Callable[[Talk], Listener], said: str, place: str
) -> None:
    """A saved key would be trained, and published with the data."""
    choice = {"message": {"content": "yes"}, "finish_reason": "stop"}
    choice |= {"message": {"content": said}} if place == "content" else {place: said}
    (found,) = _ask(listen(_says("200 OK", json.dumps({"choices": [choice]}).encode())))
    assert found == Refusal("the answer repeats the key or a password, and is not kept")


def test_a_word_that_stands_for_a_key_may_be_said(
    listen: Callable[[Talk], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {"message": {"content": "The list is EMPTY."}, "finish_reason": "stop"}
    listener = listen(_says("200 OK", json.dumps({"choices": [choice]}).encode()))
    monkeypatch.setenv("A_KEY", "EMPTY")
    assert _ask(listener) == [answer("The list is EMPTY.", 0, "stop")]


@pytest.mark.parametrize(
    "key", ["s3cr3t\nX-Header: yes", "s3cr3t Hunter", "s3cr3t\xe9", "s3cr3t\u2028x", "s3cr3t\x7f"]
)
def test_what_is_no_key_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("A_KEY", key)
    settings = ServerBackend(kind="server", url="http://h/v1", served_model="m", api_key_variable="A_KEY")
    with pytest.raises(
        ValueError, match="A_KEY is not a key, which has only printable ASCII characters and no spaces"
    ) as error:
        Server(settings)
    assert "s3cr3t" not in repr(error.value)


def test_passwords_of_proxies(listen: Callable[[Talk], Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a URL that cannot be parsed, http.client's message would contain them."""
    listener = listen(_says("200 OK"))
    for url in (
        "http://user:s3cr3tHunter@127.0.0.1:80a",
        "http:user:s3cr3tHunter@proxy",
    ):
        monkeypatch.setenv("http_proxy", url)
        with pytest.raises(BadServer) as error:
            _ask(listener, host="proxied.example")
        assert "Hunter" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "http://user:s3cr3tHunter@host/v1"),
        ("url", "http://s3cr3tHunter@host/v1"),
        ("url", "http://user:s3cr3t/Hunter@host/v1"),
        ("url", "http://host/v1?api_key=s3cr3tHunter"),
        ("url", "http://host/v1?s3cr3tHunter"),
        ("url", "http://host/v1#s3cr3tHunter"),
        ("url", "ftp://user:s3cr3tHunter@host/v1"),
        ("url", "http://host:s3cr3tHunter/v1"),
        ("url", "http://[s3cr3tHunter/v1"),
        ("url", "http://"),
        ("url", "http://host/v1 s3cr3tHunter"),
        ("url", "http://host/v1\r\nX: s3cr3tHunter"),
        ("url", "s3cr3tHunter"),
        ("api_key_variable", "sk-s3cr3tHunter"),
        ("api_key_variable", "s3cr3tHunter"),
        ("api_key", "s3cr3tHunter"),
        ("apiKey", "s3cr3tHunter"),
        ("token", "s3cr3tHunter"),
        ("password", {"is": "s3cr3tHunter"}),
        ("headers", {"Authorization": "Bearer s3cr3tHunter"}),
    ],
)
def test_secrets_do_not_stand_in_settings(key: str, value: object) -> None:
    """Settings are printed and saved next to outputs, so secrets are refused, and the message hides them."""
    values = {"kind": "server", "url": "http://host/v1", "served_model": "m", key: value}
    with pytest.raises(ConfigError, match=rf"(?i)- {key}( \(its value is hidden\))?: ") as error:
        parse(ServerBackend, values, origin="file.yaml")
    assert "Hunter" not in str(error.value)
    with pytest.raises(ValidationError) as direct:
        ServerBackend(**values)  # type: ignore[arg-type]
    assert "Hunter" not in str(direct.value)
