"""Hostile programs are held, each with its outcome named, and nothing of them is left."""

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_post.sandbox import processes
from megatron_post.sandbox.languages import program
from megatron_post.sandbox.sandbox import Sandbox
from megatron_post.sandbox.settings import Limits
from tests.unit.sandbox.hostile import PROGRAMS

LIMITS = Limits(cpu_seconds=8, memory_mib=256, processes=32, disk_mib=16, output_kib=64)
SHORT = Limits(**{**LIMITS.model_dump(), "seconds": 1.0, "cpu_seconds": 0.5})


class Host(NamedTuple):
    """What a hostile program looks for."""

    secret: str  # the path of a file
    token: str  # this process's environment has it reversed, so that a program that knows it is not found
    port: int
    abstract: str
    home: str


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    token = secrets.token_hex(16)
    (tmp_path / "secret").write_text("LEAK")
    monkeypatch.setenv("SECRET", token[::-1])
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(f"\0{token}")
        unix.listen()
        yield Host(str(tmp_path / "secret"), token, tcp.getsockname()[1], token, str(Path.home()))


def _planted() -> list[str]:
    """Files that a hostile program has left in a directory which the host shares with others."""
    return [
        place for place in (tempfile.gettempdir(), "/dev/shm", "/usr", "/") if Path(place, "planted").exists()
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_held(sandbox: Sandbox, host: Host, name: str) -> None:
    language, source, kind, printed = PROGRAMS[name]
    if missing := sandbox.missing(language):
        pytest.skip(f"not installed: {', '.join(missing)}")
    before = set(processes.descendants(os.getpid()))
    limits = SHORT if kind == "timeout" else LIMITS
    for key, value in host._asdict().items():
        source = source.replace(f"@{key}", repr(value))

    outcome = asyncio.run(sandbox.run(*program(language, source), limits))

    assert outcome.kind == kind, outcome
    assert "LEAK" not in outcome.stdout and host.token[::-1] not in outcome.stdout
    assert printed in outcome.stdout + outcome.stderr, outcome
    assert len(outcome.stdout) + len(outcome.stderr) <= LIMITS.output_kib * 1024
    assert set(processes.descendants(os.getpid())) <= before
    assert not _planted()
    assert asyncio.run(sandbox.run({}, ["true"])).ok  # the sandbox goes on
