"""What asking costs a client: requests a second, memory and the journal's size, over the scripted server.

python -m tests.load [REQUESTS]    # 10,000 of 1 kB, with 256 in flight and then with all
"""

import asyncio
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_post.inference.journal import Journal
from megatron_post.inference.model import Model
from megatron_post.inference.server import Server
from megatron_post.inference.settings import ServerBackend

_WORDS = "word " * 200  # of a question, and of its answer


def answer(body: dict[str, Any]) -> str:
    """About as long as the question."""
    return f"{body['seed']} {_WORDS}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    # in one case the servers' time is short and the client's work shows; in the other they keep all in flight
    for in_flight, seconds in ((min(256, count), 0.02), (count, 20.0)):
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(measure(Path(directory), count, in_flight, seconds)), flush=True)


def measure(directory: Path, count: int, in_flight: int, seconds: float) -> dict[str, Any]:
    """seconds: that the server takes for each answer."""
    command = [sys.executable, "-m", "tests.scripted_server", str(directory / "log")]
    command += ["--answer", "tests.load:answer", "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        found: dict[str, Any] = {"requests": count, "parallel_requests": in_flight}
        for name in ("asked", "replayed"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process whose memory is its own
                found[name] = pool.apply(_ask, (url, str(directory / "journal"), count, in_flight))
        server.terminate()
        found["most in flight at the server"] = int(server.stdout.readline())
    size = (directory / "journal" / "journal-00000.jsonl").stat().st_size
    return found | {"journal, bytes a request": round(size / count)}


def _ask(url: str, directory: str, count: int, in_flight: int) -> dict[str, float]:
    settings = ServerBackend(
        kind="server", url=url, served_model="m", parallel_requests=in_flight, timeout=300.0
    )

    async def ask() -> None:
        async with Server(settings) as server:
            model = Model(server, journal, name="m", scope=("load", 1))
            await asyncio.gather(*(model.ask(f"{i} {_WORDS}", seed=i) for i in range(count)))

    imported, processor, began = _megabytes(), time.process_time(), time.monotonic()
    with Journal(directory) as journal:
        asyncio.run(ask())
    taken = time.monotonic() - began
    return {
        "seconds": round(taken, 1),
        "CPU seconds": round(time.process_time() - processor, 1),
        "requests/s": round(count / taken),
        "peak MB": _megabytes(),
        "MB of imports": imported,
    }


def _megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
