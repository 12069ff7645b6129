"""What is read from /proc is what processes use."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_post.sandbox import processes

MIB = 2**20
# a child that shares its parent's 64 MiB, and a thread
_SOURCE = """
import os, threading, time
held = os.urandom(64 << 20)
if os.fork() == 0:
    threading.Thread(target=time.sleep, args=(1000,)).start()
print(flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def family() -> Iterator[int]:
    """A process with one child, which has two threads; both hold the same 64 MiB."""
    with subprocess.Popen(
        [sys.executable, "-c", _SOURCE], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.stdout.readline()
        yield parent.pid
        os.killpg(parent.pid, 9)


def test_descendants_and_their_threads(family: int) -> None:
    assert sorted(processes.descendants(family).values()) == [2]
    assert family in processes.descendants(os.getpid())


def test_a_page_that_two_processes_share_counts_once(family: int) -> None:
    """Python itself takes some MiB in each; 64 MiB are shared, and the sum has them twice."""
    both = [family, *processes.descendants(family)]
    assert 128 * MIB < processes.memory(both) < 192 * MIB
    assert 64 * MIB < processes.shared_memory(both) < 128 * MIB


def test_open_files_and_processor_time() -> None:
    """This process has used some time, and a file more is one more."""
    before = processes.open_files([os.getpid()])
    with open(os.devnull):
        assert processes.open_files([os.getpid()]) == before + 1
    ours = os.times()
    assert processes.cpu_seconds([os.getpid()]) == pytest.approx(sum(ours[:4]), abs=0.1)


def test_a_name_in_parentheses_does_not_shift_the_fields() -> None:
    """A process chooses its name, and /proc/PID/stat has it without escapes."""
    source = (
        "import time\nopen('/proc/self/comm', 'w').write(') 9 9 (9')\nprint(flush=True)\ntime.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.cpu_seconds([process.pid]) < 5
        process.kill()


def test_a_process_that_has_ended_uses_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    time.sleep(0.01)
    gone = [process.pid]
    assert processes.descendants(process.pid) == {}
    assert (processes.memory(gone), processes.cpu_seconds(gone), processes.open_files(gone)) == (0, 0, 0)
