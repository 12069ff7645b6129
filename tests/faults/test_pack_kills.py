"""kill -9 at several moments of `data pack`: the bytes of an undisturbed run, and no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_post.data.tokenizer import train_small_tokenizer

KILLS = 8 if os.environ.get("FAULT_TESTS") else 2
# Batches of 32 rows make many moments at which a kill can come.
PROGRAM = """
import sys
from megatron_post.config.load import load_config
from megatron_post.data import render_sources
from megatron_post.data.build import build_store
from megatron_post.display import make_console

if __name__ == "__main__":
    render_sources._ROWS_IN_BATCH = 32
    build_store(load_config(sys.argv[1]), console=make_console(quiet=True), workers=2)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    train_small_tokenizer(["the cat sat on a mat"] * 10, 300).save(tmp_path / "tokenizer")
    rows = ({"prompt": f"question {row}", "completion": f"answer {row} " * 40} for row in range(3000))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def _start(directory: Path, store: str) -> subprocess.Popen[bytes]:
    config = {
        "run_dir": str(directory / "run"),
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(directory / "tokenizer")},
        "data": {
            "store": str(directory / store),
            "sources": [{"name": "a", "path": str(directory / "a.jsonl")}],
            "pack_length": 2048,
        },
        "train": {"steps": 1, "global_batch": 1},
    }
    (directory / f"{store}.json").write_text(json.dumps(config))
    arguments = [sys.executable, str(directory / "program.py"), str(directory / f"{store}.json")]
    return subprocess.Popen(arguments, start_new_session=True)


def _files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def _group_is_alive(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_after(process: subprocess.Popen[bytes], journal: Path, batches: int) -> None:
    """Kill the process when the journal names so many batches, and wait until its pool has ended too."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not (journal.exists() and _batches(journal) >= batches):
        assert time.monotonic() < deadline, "no batch was finished"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _group_is_alive(process.pid):
        assert time.monotonic() < deadline, "a process of the pool is left"
        time.sleep(0.01)


def _batches(journal: Path) -> int:
    return journal.read_bytes().count(b"\n")


def test_kills_while_rows_are_rendered(directory: Path) -> None:
    assert _start(directory, "undisturbed").wait(timeout=120) == 0
    journal, finished = directory / ".store.rows/train.journal", 0
    for _ in range(KILLS):
        wanted = finished + 3
        _kill_after(_start(directory, "store"), journal, wanted)
        assert not (directory / "store").exists()
        finished = _batches(journal)  # earlier batches are still among them
        assert finished >= wanted
    assert _start(directory, "store").wait(timeout=120) == 0
    assert _files(directory / "store") == _files(directory / "undisturbed")
    assert not list(directory.glob(".store*"))
