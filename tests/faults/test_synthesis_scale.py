"""10,000 rows with two requests each: requests per second, memory, the journal's size, and a replay."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.faults.conftest import FIGURES
from tests.scripted_server import ScriptedServer

ROWS = 10_000
_RECIPE = '''\
"""Two requests a row."""

from megatron_post.data.dialog import Message
from megatron_post.synthesis.row import Row

VERSION = 1


async def recipe(row, task):
    dialog = [Message("user", f"{row['number']} " + "word " * 200)]
    first = await task.ask("write", dialog)
    dialog += [first.message, Message("user", "again")]
    second = await task.ask("again", dialog)
    return [Row([*dialog, second.message], "general")]
'''


def _measured(config: Path, *overrides: str) -> tuple[float, float, float]:
    """Seconds by the clock and of the processor, and MiB of memory, of one process of a run."""
    command = [sys.executable, "-m", "megatron_post", "synthesize", "run", str(config), *overrides]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


@pytest.mark.slow
def test_ten_thousand_rows(tmp_path: Path, whole_set: None) -> None:
    (tmp_path / "ask.py").write_text(_RECIPE)
    rows = "".join(json.dumps({"number": number}) + "\n" for number in range(ROWS))
    (tmp_path / "rows.jsonl").write_text(rows)
    with ScriptedServer(lambda body: "answer " * 150) as server:
        backend = {"kind": "server", "url": server.url, "served_model": "m", "parallel_requests": 512}
        settings = {
            "recipe": str(tmp_path / "ask.py"),
            "input": {"kind": "rows", "path": str(tmp_path / "rows.jsonl")},
            "models": {"author": {"model": "m", "backend": backend}},
            "rows_in_flight": ROWS,
            "output": str(tmp_path / "output"),
        }
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(settings))
        clock, processor, memory = _measured(config)
        assert len(server.requests) == 2 * ROWS
        again, processor_again, memory_again = _measured(config, "max_failed=0.02")
        assert len(server.requests) == 2 * ROWS
    assert (tmp_path / "output/rows.jsonl").read_bytes().count(b"\n") == ROWS
    assert max(memory, memory_again) < 2048
    journal = sum(file.stat().st_size for file in (tmp_path / "output/journal").iterdir())
    FIGURES.append(
        f"synthesize: {ROWS:,} rows and {2 * ROWS:,} requests in {clock:.0f} s ({processor:.0f} s of "
        f"processor, {2 * ROWS / clock:,.0f} requests/s), {memory:.0f} MiB of memory, a journal of "
        f"{journal / 1e6:.0f} MB; a replay in {again:.0f} s ({processor_again:.0f} s of processor)"
    )
