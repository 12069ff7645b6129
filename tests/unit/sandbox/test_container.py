"""A site's container command. bubblewrap plays the container: as a template, and without our own options."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_post.sandbox import processes
from megatron_post.sandbox.sandbox import Sandbox, open_sandbox
from megatron_post.sandbox.settings import Container, Limits
from megatron_post.sandbox.supervise import BrokenSandbox

LIMITS = Limits(cpu_seconds=8, memory_mib=256, processes=32, disk_mib=16, output_kib=64)
SHORT = Limits(**{**LIMITS.model_dump(), "seconds": 0.5})
LINKS = [word for name in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
HOST = ("bwrap", "--die-with-parent", "--ro-bind", "/usr", "/usr", *LINKS, "--proc", "/proc", "--dev", "/dev")
PLACE = ("--bind", "{directory}", "/work", "--chdir", "/work")
WHOLE = (*HOST, "--unshare-all", "--unsetenv", "SANDBOX_CANARY", *PLACE)


@pytest.fixture(scope="module")
def stopped() -> Iterator[Path]:
    """Where `stop` leaves a file by the container's name."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def container(sandbox: Sandbox, stopped: Path) -> Iterator[Sandbox]:
    settings = Container(kind="command", command=WHOLE, stop=("touch", f"{stopped}/{{name}}"), programs=2)
    with open_sandbox(settings) as opened:
        yield opened


def _directories() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("sandbox-")]


def test_a_program_runs_among_its_files_which_are_removed(container: Sandbox) -> None:
    before = _directories()
    files = {"main.sh": "cat a/b; echo $MEMORY_MIB; mkdir -p d/e; touch d/e/f; chmod 000 d", "a/b": b"text\n"}
    outcome = asyncio.run(container.run(files, ["bash", "main.sh"], LIMITS))
    assert outcome.ok and outcome.stdout == "text\n256\n"
    assert _directories() == before


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("exit 3", "failed"),
        ("sleep 1000", "timeout"),
        ("tail /dev/zero", "memory"),
        ("while true; do sleep 1000 & done", "processes"),
        ("while true; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done", "output"),
        ("head -c 100000000 /dev/zero > file", "disk"),
        ("i=0; while true; do head -c 1000000 /dev/zero > $i; i=$((i + 1)); done", "disk"),
        ("(setsid sleep 1000 &) ; exit 0", "passed"),
    ],
)
def test_limits_hold_from_outside(container: Sandbox, stopped: Path, script: str, kind: str) -> None:
    before, running = set(stopped.iterdir()), set(processes.descendants(os.getpid()))
    limits = SHORT if kind == "timeout" else LIMITS
    outcome = asyncio.run(container.run({"main.sh": script}, ["bash", "main.sh"], limits))
    assert outcome.kind == kind, outcome
    assert set(processes.descendants(os.getpid())) <= running
    if kind in ("timeout", "memory", "processes", "output"):
        assert len(set(stopped.iterdir()) - before) == 1


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ((*WHOLE, "--share-net"), "has a network"),
        ((*HOST, "--unshare-net", "--unsetenv", "SANDBOX_CANARY", *PLACE), "sees the processes of the host"),
        ((*HOST, "--unshare-all", *PLACE), "has the variables of this process"),
        ((*WHOLE, "--ro-bind", tempfile.gettempdir(), tempfile.gettempdir()), "sees files of the host"),
        ((*WHOLE, "--ro-bind", str(Path.home()), str(Path.home())), "sees files of the host"),
        ((*WHOLE, "--ro-bind", "{directory}", "/work"), "cannot write to its working directory"),
    ],
)
def test_a_container_that_is_no_sandbox_is_refused(
    sandbox: Sandbox, command: tuple[str, ...], fault: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"sandbox\.command does not isolate programs: a program in it {fault}"
    ):
        open_sandbox(Container(kind="command", command=command))


def test_a_container_that_does_not_start_is_refused_with_its_words(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match=r"does not work: .*no-such-option; correct it"):
        open_sandbox(Container(kind="command", command=("bwrap", "--no-such-option")))


def test_files_that_stay_are_an_error(
    container: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a container that runs as another user."""
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(BrokenSandbox, match=rf"{tmp_path} cannot be removed. .*--user={os.getuid()}"):
        asyncio.run(container.run({}, ["true"]))
