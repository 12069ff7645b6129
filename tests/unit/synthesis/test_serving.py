"""A server of a run publishes its address when it answers, and ends when it is no longer needed."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.synthesis.serving import clear_servers, end_servers, server_command, server_key
from megatron_post.synthesis.settings import Synthesis, load_synthesis
from tests.unit.synthesis.author import write_config, write_recipe, write_tasks

SCRIPTED = [sys.executable, "-m", "tests.scripted_server"]


def served(directory: Path, *, seconds: float = 0.0, **serve: Any) -> Path:
    """A synthesis file whose author is asked at the servers of `serve`. seconds: that each answer takes."""
    backend = {"kind": "server", "served_model": "author", "url": None}
    models = {"author": {"model": "author", "backend": backend}}
    command = [*SCRIPTED, str(directory / "log-{port}"), "--answer", "tests.unit.synthesis.author:answer"]
    wanted = {
        "model": "author",
        "command": [*command, "--port", "{port}", "--seconds", str(seconds)],
        **serve,
    }
    return write_config(directory, "", models=models, serve=wanted)


def _settings(directory: Path, **serve: Any) -> Synthesis:
    return load_synthesis(str(served(directory, **serve)))


def _start(config: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "megatron_post", "synthesize", "serve", str(config)]
    environment = {key: text for key, text in os.environ.items() if key not in ("MASTER_ADDR", "RANK")}
    environment |= {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _published(directory: Path, process: "subprocess.Popen[str]") -> str:
    began = time.monotonic()
    while not (found := list(directory.glob("*.url"))):
        assert process.poll() is None and time.monotonic() < began + 60, process.communicate()
        time.sleep(0.05)
    return found[0].read_text()


def test_a_run_asks_the_server_that_was_started_for_it(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_tasks(tmp_path / "tasks.jsonl", "right", "mended")
    config = served(tmp_path)
    process = _start(config)
    servers = tmp_path / "output/servers"
    assert _published(servers, process).startswith("http://127.0.0.1:")
    run = [sys.executable, "-m", "megatron_post", "synthesize", "run", str(config)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert "2 rows from 2 of 2 input rows" in done.stdout, done
    end_servers(servers)
    assert process.wait(30) == 0 and not list(servers.glob("*.url"))
    key = (servers / "key").read_text()
    assert stat.S_IMODE((servers / "key").stat().st_mode) == 0o600
    assert len(key) > 30 and key not in done.stdout + done.stderr + process.communicate()[0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_of_slurm_asks_for_another_start(tmp_path: Path, number: int) -> None:
    process = _start(served(tmp_path))
    servers = tmp_path / "output/servers"
    _published(servers, process)
    process.send_signal(number)
    assert process.wait(30) == 75 and not list(servers.glob("*.url"))


def test_a_server_that_never_answers_ends_with_its_status(tmp_path: Path) -> None:
    process = _start(served(tmp_path, command=[sys.executable, "-c", "raise SystemExit(3)"]))
    assert process.wait(60) == 3
    assert "the server ended with status 3" in process.communicate()[0]


def test_a_server_that_dies_after_it_has_answered_asks_for_another_start(tmp_path: Path) -> None:
    killing = "import os, time, threading, tests.scripted_server as s; s.ScriptedServer(port={port}); "
    process = _start(
        served(tmp_path, command=[sys.executable, "-c", f"{killing} time.sleep(4); os._exit(9)"])
    )
    _published(tmp_path / "output/servers", process)
    assert process.wait(60) == 75


def test_a_program_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    process = _start(served(tmp_path, command=["no-such-server", "{port}"]))
    assert process.wait(60) == 2
    assert "serve: no-such-server cannot be started: No such file" in process.communicate()[0]


def test_the_command_of_vllm(tmp_path: Path) -> None:
    settings = _settings(tmp_path, command=None, model="/models/405b", arguments=["--max-model-len", "16384"])
    assert " ".join(server_command(settings, rank=0, host="n1", port=8000)) == (
        "vllm serve /models/405b --served-model-name author --host 0.0.0.0 --port 8000 "
        "--tensor-parallel-size 8 --max-model-len 16384"
    )


def test_a_server_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first node has the API. The flags are those of vLLM's own multi-node mode."""
    monkeypatch.setenv("MASTER_PORT", "12345")
    settings = _settings(tmp_path, command=None, nodes=2)
    first, second = (server_command(settings, rank=rank, host="n1", port=8000) for rank in (0, 1))
    assert " ".join(first[first.index("--pipeline-parallel-size") :]) == (
        "--pipeline-parallel-size 2 --distributed-executor-backend mp --nnodes 2 --node-rank 0 "
        "--master-addr n1 --master-port 12345"
    )
    assert second[-1] == "--headless" and second[second.index("--node-rank") + 1] == "1"


def test_an_earlier_launch_leaves_nothing_but_the_key(tmp_path: Path) -> None:
    key = server_key(tmp_path)
    (tmp_path / "7.url").write_text("http://gone:1/v1")
    end_servers(tmp_path)
    clear_servers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["key"] and server_key(tmp_path) == key


@pytest.mark.parametrize(
    ("serve", "backend", "message"),
    [
        ({"arguments": ["--x"], "command": ["a"]}, {}, "arguments: they have no effect with command"),
        ({"command": []}, {}, "serve.command"),
        ({"gpus": 0, "command": None}, {}, "serve.gpus"),
        ({}, {"urls_from": "elsewhere"}, "no model asks the servers that it starts"),
        ({}, {"url": "http://localhost:8000/v1"}, "and urls_from of the backend of one model out"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, serve: dict[str, Any], backend: dict[str, Any], message: str
) -> None:
    config = served(tmp_path, **serve)
    overrides = [f"models.author.backend.{key}={value}" for key, value in backend.items()]
    with pytest.raises(ConfigError, match=message):
        load_synthesis(str(config), overrides)


def test_serve_without_the_section(tmp_path: Path) -> None:
    config = write_config(tmp_path, "http://localhost:1/v1")
    process = _start(config)
    assert process.wait(60) == 2 and "serve: the file has no such section" in process.communicate()[0]
