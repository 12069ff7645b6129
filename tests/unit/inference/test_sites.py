"""Requests are spread over servers, some of which die, hang, come back, or appear later."""

import asyncio
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_post.inference import server as module
from megatron_post.inference import sites
from megatron_post.inference.request import Refusal, Reply
from megatron_post.inference.server import BadServer, Server
from megatron_post.inference.settings import ServerBackend
from tests.scripted_server import ScriptedServer, by_rates
from tests.unit.inference.asking import answer, ask_server, asking


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(sites, "_SECONDS_BETWEEN_LOOKS", 0.02)


def _settings(*servers: ScriptedServer, **values: Any) -> ServerBackend:
    if servers:
        values["url"] = tuple(server.url for server in servers)
    return ServerBackend(kind="server", served_model="m", **values)


def _replies(count: int) -> list[Reply]:
    return [answer(f"question {i} {i}", 3, prompt_tokens=2) for i in range(count)]


def _requests(count: int) -> list[Any]:
    return [asking(f"question {i}", i) for i in range(count)]


def test_servers_share_the_requests() -> None:
    """No server gets more requests at once than it accepts, and all get about the same number."""
    with ScriptedServer(seconds=0.01) as one, ScriptedServer(seconds=0.01) as two:
        assert ask_server(_settings(one, two, parallel_requests=4), _requests(60)) == _replies(60)
        counts = [len(server.requests) for server in (one, two)]
        assert sum(counts) == 60 and min(counts) > 15
        assert [server.most_in_flight for server in (one, two)] == [4, 4]


@pytest.mark.parametrize("fault", ["hang up", "half", "500", "503", "nonsense", "hang", "401", "404"])
def test_a_server_that_fails_is_left_out(fault: str) -> None:
    """Its first requests fail, and after that it only gets one request at a time as a trial."""
    with ScriptedServer(fault=lambda *_: fault) as bad, ScriptedServer(seconds=0.01) as good:
        settings = _settings(bad, good, parallel_requests=4, timeout=1.0 if fault == "hang" else 30.0)
        assert ask_server(settings, _requests(60)) == _replies(60)
        assert len(bad.requests) < 15  # 4 at first, and 1 after 1 s, 2 s, 4 s, ...


def test_a_server_that_is_not_there_and_one_that_leaves() -> None:
    """Open requests of the server that stops go to the other one. No request is answered twice."""
    gone = ScriptedServer()
    gone.close()
    answered = Counter[int]()

    def leave_after_ten(body: dict[str, Any], attempt: int) -> str | None:
        return "hang up" if len(leaving.requests) > 10 else None

    def count(body: dict[str, Any]) -> str:
        answered[body["seed"]] += 1
        return f"{body['messages'][-1]['content']} {body['seed']}"

    with ScriptedServer(count, leave_after_ten) as leaving, ScriptedServer(count, seconds=0.01) as good:
        assert ask_server(_settings(gone, leaving, good, parallel_requests=4), _requests(60)) == _replies(60)
    assert set(answered.values()) == {1} and len(answered) == 60


def test_a_server_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_LONGEST_LEFT_OUT", 0.05)
    began = time.monotonic()

    def for_a_while(*_: Any) -> str | None:
        return "503" if time.monotonic() - began < 0.2 else None

    with ScriptedServer(fault=for_a_while) as back, ScriptedServer(seconds=0.05) as good:
        settings = _settings(back, good, parallel_requests=2)
        assert ask_server(settings, _requests(60)) == _replies(60)
        assert len(back.requests) > 20  # it is the faster server


def test_addresses_are_read_again(tmp_path: Path) -> None:
    """A server's file appears while requests wait, then another one, and then the first file is removed."""

    async def main(first: ScriptedServer, second: ScriptedServer) -> list[Reply | Refusal]:
        async with Server(_settings(urls_from=str(tmp_path), parallel_requests=1)) as server:
            asked = [asyncio.ensure_future(server.answer(request)) for request in _requests(40)]
            await asyncio.sleep(0.1)
            (tmp_path / "empty.url").touch()  # its writer has only opened it
            (tmp_path / "1.url").write_text(first.url + "\n")
            while len(first.requests) < 5:
                await asyncio.sleep(0.01)
            (tmp_path / "2.url").write_text(second.url)
            while len(second.requests) < 5:
                await asyncio.sleep(0.01)
            (tmp_path / "1.url").unlink()
            await asyncio.sleep(0.1)
            done = len(first.requests)
            found = list(await asyncio.gather(*asked))
            assert len(first.requests) == done
            return found

    with ScriptedServer(seconds=0.02) as first, ScriptedServer(seconds=0.02) as second:
        assert asyncio.run(main(first, second)) == _replies(40)


def test_a_file_with_something_else_than_an_address(tmp_path: Path) -> None:
    (tmp_path / "1.url").write_text("http://user:s3cr3t@host/v1")
    with pytest.raises(ValueError, match=r"1.url: a URL with a user") as error:
        ask_server(_settings(urls_from=str(tmp_path)), _requests(3))
    assert "s3cr3t" not in str(error.value)


def test_servers_that_never_come(tmp_path: Path) -> None:
    """`patience` lasts longer than the retries, and then the run ends."""
    began = time.monotonic()
    with pytest.raises(BadServer, match=r"has no \*.url with the address of a server"):
        ask_server(_settings(urls_from=str(tmp_path), patience=0.3, retries=0), _requests(3))
    assert 0.3 <= time.monotonic() - began < 5


def test_a_server_that_restarts_is_waited_for() -> None:
    """With `patience` and without retries, the requests wait until a server uses the port after 0.3 s."""
    before = ScriptedServer()
    before.close()
    settings = _settings(before, retries=0, patience=20)

    async def main() -> list[Reply | Refusal]:
        async with Server(settings) as server:
            asked = [asyncio.ensure_future(server.answer(request)) for request in _requests(5)]
            await asyncio.sleep(0.3)
            after.append(await asyncio.to_thread(ScriptedServer, port=before.port))
            return list(await asyncio.gather(*asked))

    after: list[ScriptedServer] = []
    try:
        assert asyncio.run(main()) == _replies(5)
    finally:
        for server in after:
            server.close()


def test_one_request_that_no_server_takes() -> None:
    """The request always fails, and there are no other requests.

    It is refused, and not the server, because the server answers a test request.
    """
    for fault in ("hang", "hang up", "half", "500", "nonsense"):
        poison = lambda body, _: fault if body["seed"] == 0 else None  # noqa: B023, E731
        with ScriptedServer(fault=poison) as server:
            (found,) = ask_server(_settings(server, retries=1, timeout=0.2), _requests(1))
        assert isinstance(found, Refusal) and found.reason.startswith("2 tries failed, the last with: ")


def test_retry_after_is_obeyed() -> None:
    """The server requires 50 ms, which is five times the client's own wait."""
    with ScriptedServer(fault=lambda body, attempt: "429" if attempt == 1 else None) as server:
        began = time.monotonic()
        assert ask_server(_settings(server), _requests(1)) == _replies(1)
        assert time.monotonic() - began > 0.05


def test_all_faults_at_once() -> None:
    """A third of 300 requests fails at first. Only a 400 and an answer without text stay failures."""
    rates = dict.fromkeys(("429", "500", "503", "hang", "hang up", "half", "nonsense", "400", "null"), 0.04)
    fault = by_rates(rates)
    with ScriptedServer(fault=fault) as server, ScriptedServer(fault=fault) as other:
        found = ask_server(_settings(server, other, timeout=0.5, parallel_requests=32), _requests(300))
        bodies = {body["seed"]: body for body in server.requests + other.requests}
    for i, (reply, wanted) in enumerate(zip(found, _replies(300), strict=True)):
        if fault(bodies[i], 3) is None:
            assert reply == wanted
        else:
            assert isinstance(reply, Refusal)
    assert 5 < sum(isinstance(reply, Refusal) for reply in found) < 60


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either the url of a server, or several, or urls_from"),
        ({"url": "http://h/v1", "urls_from": "d"}, "give either the url"),
        ({"url": ()}, "give either the url"),
        ({"url": ("http://h/v1", "http://h/v1")}, "named twice"),
        ({"url": ("http://h/v1", "h")}, "must read http"),
    ],
)
def test_where_servers_are(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _settings(**values)


def test_answers_are_waited_for_no_longer_than_the_run(tmp_path: Path) -> None:
    """One request ends the run with a 401. Requests that wait for a server or another try end too."""

    def fault(body: dict[str, Any], attempt: int) -> str | None:
        return "401" if body["seed"] == 9 else "503"

    began = time.monotonic()
    with ScriptedServer(fault=fault) as server, pytest.raises(BadServer, match="HTTP status 401"):
        ask_server(_settings(server, parallel_requests=2, retries=1000), _requests(10))
    assert time.monotonic() - began < 5


def test_a_caller_that_leaves_wakes_the_next() -> None:
    """Two requests wait for the only place. When it is free, the first one has just been cancelled."""

    async def main() -> None:
        sites = module.Sites(
            ServerBackend(kind="server", url="http://h/v1", served_model="m", parallel_requests=1)
        )

        async def take() -> None:
            async with sites.take():
                pass

        async with sites.take():
            first, second = (asyncio.ensure_future(take()) for _ in range(2))
            await asyncio.sleep(0.01)
        first.cancel()
        async with asyncio.timeout(5):
            await second

    asyncio.run(main())


def test_more_connections_than_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit is raised as far as needed, and not above the hard limit."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    Server(ServerBackend(kind="server", url="http://h/v1", served_model="m", parallel_requests=500))
    assert len(limits) == 1
    Server(ServerBackend(kind="server", url="http://h/v1", served_model="m", parallel_requests=2000))
    Server(ServerBackend(kind="server", urls_from="d", served_model="m", parallel_requests=100))
    assert limits[1:] == [(2256, 4096), (4096, 4096)]
    with pytest.raises(ValueError, match=r"parallel_requests: 4000 connections are more .*4096"):
        Server(ServerBackend(kind="server", url="http://h/v1", served_model="m", parallel_requests=4000))


def test_servers_that_all_refuse() -> None:
    """With the reason of one of them, after the retries."""
    fault, refused = lambda *_: "404", r"2 tries failed, .* refuses the request: HTTP status 404"
    with (
        ScriptedServer(fault=fault) as one,
        ScriptedServer(fault=fault) as two,
        pytest.raises(BadServer, match=refused),
    ):
        ask_server(_settings(one, two, retries=1), _requests(1))
