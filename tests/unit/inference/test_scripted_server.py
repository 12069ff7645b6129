"""The tests' own server does what its script says."""

import http.client
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_server import ScriptedServer, by_rates, digest


def _body(text: str = "a b", seed: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "seed": seed}


def _post(port: int, body: dict[str, Any], path: str = "/v1/chat/completions") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("POST", path, json.dumps(body), {"Authorization": "Bearer k"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_it_answers_and_logs_what_it_answered(tmp_path: Path) -> None:
    with ScriptedServer(log=tmp_path / "log.jsonl") as server:
        status, content = _post(server.port, _body())
        answer = json.loads(content)
        assert status == 200 and answer["choices"][0]["message"]["content"] == "a b 1"
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3}
        assert _post(server.port, _body(), "/v2")[0] == 404
        assert server.requests == [_body()] * 2 and server.keys == ["Bearer k"] * 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["request"], line["status"]) for line in lines] == [(digest(_body()), s) for s in (200, 404)]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("429", 429),
        ("500", 500),
        ("nonsense", 200),
        ("null", 200),
        ("hang", TimeoutError),
        ("hang up", http.client.RemoteDisconnected),
        ("half", http.client.IncompleteRead),
    ],
)
def test_faults(tmp_path: Path, fault: str, found: int | type[Exception]) -> None:
    """Only answers that are whole stand in the log."""
    log = tmp_path / "log.jsonl"
    with ScriptedServer(fault=lambda body, attempt: fault if attempt == 1 else None, log=log) as server:
        if isinstance(found, int):
            assert _post(server.port, _body())[0] == found
        else:
            with pytest.raises(found):
                _post(server.port, _body())
        assert _post(server.port, _body())[0] == 200
    assert len(log.read_text().splitlines()) == (2 if isinstance(found, int) else 1)


def test_a_message_as_answer() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": None, "tool_calls": [call], "reasoning_content": "so"}
    with ScriptedServer(lambda body: message) as server:
        (choice,) = json.loads(_post(server.port, _body())[1])["choices"]
    assert choice["message"] == {"role": "assistant", **message} and choice["finish_reason"] == "tool_calls"


def test_rates_are_of_requests_and_not_of_luck() -> None:
    """Of 1,000 requests 0.1 and 0.2 get each fault: 100 and 200 +- 4 sqrt(n p (1 - p))."""
    fault = by_rates({"400": 0.1, "500": 0.2}, attempts=1)
    bodies = [_body(seed=seed) for seed in range(1000)]
    drawn = [fault(body, 1) for body in bodies]
    assert abs(drawn.count("400") - 100) < 38 and abs(drawn.count("500") - 200) < 51
    assert [fault(body, 2) for body in bodies] == [name if name == "400" else None for name in drawn]


def test_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.scripted_server", str(tmp_path / "log"), "--rates", '{"400": 1}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert _post(int(url.rpartition(":")[2].removesuffix("/v1")), _body())[0] == 400
        process.kill()
