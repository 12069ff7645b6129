"""`megatron-post synthesize serve` runs one server for a run and publishes its address to the clients.

Servers and clients meet in the directory `servers` of the run's output. A server writes its address there
once it answers, and removes it when it ends. The file `stop` ends all servers. The file `key` has the secret
that clients send.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import httpx2
from rich.console import Console

from megatron_post.config.load import ConfigError
from megatron_post.inference.sites import KEY_FILE
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.storage.files import write_whole
from megatron_post.synthesis.settings import Serve, Synthesis

AGAIN = 75  # the exit status that asks train.sbatch to requeue the job
_STOP = "stop"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_END = 60.0  # of a server that has received SIGTERM


def serve(settings: Synthesis, *, console: Console) -> int:
    """Run one server until the run ends. Each node of a server calls this, and the first publishes it.

    Returns an exit status. It is 0 once `end_servers` was called. It is 75 after a signal of Slurm, or if the
    server ends after it has answered. If the server ends earlier, it is the server's own status. Raises
    `ConfigError` if the file has no section `serve`.
    """
    if settings.serve is None:
        raise ConfigError("serve: the file has no such section, which says how to start a server")
    directory = settings.servers
    rank, _, _ = rank_from_environment()
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    port = _free_port()
    address = directory / f"{os.environ.get('SLURM_JOB_ID', os.getpid())}.url"
    command = server_command(settings, rank=rank, host=host, port=port)
    environment = os.environ | {"VLLM_API_KEY": server_key(directory)}
    with _asked_to_leave() as leaving, _started(command, environment) as server:
        answers = False
        try:
            while server.poll() is None:
                if (directory / _STOP).exists():
                    return 0
                if leaving:
                    return AGAIN
                if rank == 0 and not answers and _is_healthy(port):
                    answers = True
                    write_whole(address, f"http://{host}:{port}/v1\n")
                    console.print(f"answering at {host}:{port}", highlight=False)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            address.unlink(missing_ok=True)
        console.print(f"the server ended with status {server.returncode}", highlight=False)
        return AGAIN if answers else server.returncode or 1


def server_command(settings: Synthesis, *, rank: int, host: str, port: int) -> list[str]:
    """The command of one node of a server. rank: index of the node. host: address of the first node."""
    wanted = settings.serve
    assert wanted is not None
    values = {
        "model": wanted.model,
        "served_model": settings.served_model,
        "port": str(port),
        "rank": str(rank),
        "host": host,
    }
    if wanted.command is not None:
        return [_filled(word, values) for word in wanted.command]
    return _vllm(wanted, **values)


def _vllm(wanted: Serve, *, model: str, served_model: str, port: str, rank: str, host: str) -> list[str]:
    """The command of vLLM's server, from the documentation of version 0.11. The project never ran it."""
    words = ["vllm", "serve", model, "--served-model-name", served_model, "--host", "0.0.0.0", "--port", port]
    words += ["--tensor-parallel-size", str(wanted.gpus)]
    if wanted.nodes > 1:
        words += ["--pipeline-parallel-size", str(wanted.nodes), "--distributed-executor-backend", "mp"]
        words += ["--nnodes", str(wanted.nodes), "--node-rank", rank, "--master-addr", host]
        words += ["--master-port", os.environ.get("MASTER_PORT", "29501")]
        words += ["--headless"] if rank != "0" else []
    return [*words, *wanted.arguments]


def server_key(directory: Path) -> str:
    """The key of all servers of a run. The first call creates it. Only this user can read its file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / KEY_FILE
    opener = partial(os.open, mode=0o600)
    with contextlib.suppress(FileExistsError), open(path, "x", opener=opener) as file:
        file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()


def end_servers(directory: Path) -> None:
    """End all servers that use this directory, also those that start later."""
    if directory.is_dir():
        write_whole(directory / _STOP, "the run needs no server\n")


def clear_servers(directory: Path) -> None:
    """Remove the files that servers of an earlier launch have left. None of the servers may still run."""
    for path in [directory / _STOP, *directory.glob("*.url")]:
        path.unlink(missing_ok=True)


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


@contextlib.contextmanager
def _started(command: list[str], environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is ended with the context."""
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ValueError(f"serve: {command[0]} cannot be started: {error.strerror}") from None
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _asked_to_leave() -> Iterator[list[int]]:
    """The signals that Slurm has sent before a time limit, at a preemption or for a cancellation."""
    leaving: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: leaving.append(number)) for number in numbers]
    try:
        yield leaving
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _is_healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
