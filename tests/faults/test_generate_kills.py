"""SIGKILL of `generate` at random moments, over a server that fails in every way that it can.

The process forks from a server that has imported everything, so that kills happen during work.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tests.ranks  # noqa: F401  what the server imports
from megatron_post.config.load import parse
from megatron_post.inference import server
from megatron_post.inference.failures import failures_of
from megatron_post.inference.generate import Generate, generate, parts_of
from tests.faults.conftest import FIGURES
from tests.scripted_server import digest

KILLS = int(os.environ.get("GENERATE_KILLS", 20 if os.environ.get("FAULT_TESTS") else 5))
PROMPTS = 60 if KILLS > 5 else 30
RATES = dict.fromkeys(("400", "null", "429", "500", "503", "hang", "hang up", "half", "nonsense"), 0.02)
_context = multiprocessing.get_context("forkserver")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The output and the failures are those of an undisturbed call, byte for byte.

    The server's log proves that no request was sent again whose answer was in the journal at a kill.
    """
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn from seed {seed}")
    draw = random.Random(seed)
    rows = [{"prompt": f"question {i}"} for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with _server(tmp_path / "whole.log") as url:
        _wait(_start(tmp_path, url, "whole"))
    output, kept = tmp_path / "out.jsonl", list[int]()
    with _server(tmp_path / "out.log") as url:
        answered: list[tuple[int, set[str]]] = []  # at each kill: lines of the server's log, and the journal
        while len(kept) < KILLS and not output.exists():
            process = _start(tmp_path, url, "out")
            more = draw.randrange(1, 4 * PROMPTS // KILLS)
            while process.is_alive() and len(_journalled(output)) < sum(kept[-1:]) + more:
                time.sleep(0.01)
            process.join(draw.uniform(0, 0.05))
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                time.sleep(0.2)  # the server logs what it has just sent
                answered.append((len(_asked(tmp_path / "out.log")), _journalled(output)))
                kept.append(len(answered[-1][1]))
        if not output.exists():
            _wait(_start(tmp_path, url, "out"))
    assert len(kept) == KILLS, seed
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), seed
    assert failures_of(output).read_bytes() == failures_of(tmp_path / "whole.jsonl").read_bytes(), seed
    asked = _asked(tmp_path / "out.log")
    for lines, journal in answered:
        assert not journal & set(asked[lines:]), seed
    FIGURES.append(
        f"SIGKILL of generate over a failing server: {len(kept)} tried, {len(kept)} resumed; of "
        f"{4 * PROMPTS} answers the journal held {', '.join(map(str, kept))}; none was asked for again"
    )


@contextmanager
def _server(log: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.scripted_server", str(log), "--rates", json.dumps(RATES)]
    with subprocess.Popen([*command, "--seconds", "0.05"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _start(directory: Path, url: str, name: str) -> multiprocessing.process.BaseProcess:
    process = _context.Process(target=_generate, args=(str(directory), url, name))
    process.start()
    return process


def _wait(process: multiprocessing.process.BaseProcess) -> None:
    process.join(300)
    assert process.exitcode == 0


def _generate(directory: str, url: str, name: str) -> None:
    values: dict[str, Any] = {
        "model": "theirs",
        "prompts": f"{directory}/prompts.jsonl",
        "max_failed": 0.5,
        "sampling": {"samples": 4},
        "backend": {
            "kind": "server",
            "url": url,
            "served_model": "m",
            "timeout": 1.0,
            "retries": 6,
            "parallel_requests": 4,
        },
    }
    settings = parse(Generate, values, origin="test")
    server._FIRST_WAIT = 0.05
    generate(settings, f"{directory}/{name}.jsonl", console=Console(file=io.StringIO()))


def _asked(log: Path) -> list[str]:
    """What the server has answered, in order."""
    return [_name(json.loads(line)["body"]) for line in log.read_text().splitlines()]


def _journalled(output: Path) -> set[str]:
    """What the journal holds, less the line that the kill has torn."""
    path = parts_of(output) / "journal-00000.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {_name(json.loads(line)["entry"]["request"]) for line in lines}


def _name(request: dict[str, Any]) -> str:
    return digest({"messages": request["messages"], "seed": request["seed"] % 2**31})
