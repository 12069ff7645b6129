"""Reads from /proc what a process and its descendants use."""

import contextlib
import os
import re
from collections.abc import Iterable

_CHUNK = 2**16  # bytes
_TICKS = os.sysconf("SC_CLK_TCK")  # clock ticks of processor time per second
# Fields of /proc/PID/status, in kB, for memory that is not backed by a file on a disk. VmPTE is page tables.
_HELD = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap|VmPTE|HugetlbPages):\s+(\d+)", re.MULTILINE)
# The same from /proc/PID/smaps_rollup, where a page that n processes share counts 1/n for each of them.
_SHARED = re.compile(
    rb"^(?:Pss_Anon|Pss_Shmem|SwapPss|Private_Hugetlb|Shared_Hugetlb):\s+(\d+)", re.MULTILINE
)


def descendants(root: int) -> dict[int, int]:
    """The descendants of `root` and the number of their threads.

    A process that ends meanwhile may be missing. Daemons are found too, because an orphan becomes a child of
    the first process of its namespace.
    """
    threads: dict[int, int] = {}
    found = [root]
    for process in found:  # the list grows meanwhile
        if process in threads:
            continue  # it got another parent meanwhile and was found twice
        tasks = _listing(f"/proc/{process}/task")
        threads[process] = len(tasks)
        for task in tasks:
            found += map(int, _read(f"/proc/{process}/task/{task}/children").split())
    del threads[root]
    return threads


def memory(processes: Iterable[int]) -> int:
    """Bytes of memory of processes. A page that several of them share counts once for each."""
    return sum(_kilobytes(_HELD, _read(f"/proc/{process}/status")) for process in processes)


def shared_memory(processes: Iterable[int]) -> int:
    """Bytes of memory of processes, where a shared page counts only once. Slower than `memory`."""
    return sum(
        _kilobytes(_SHARED, _read(f"/proc/{process}/smaps_rollup"))
        or _kilobytes(_HELD, _read(f"/proc/{process}/status"))
        for process in processes
    )


def open_files(processes: Iterable[int]) -> int:
    return sum(len(_listing(f"/proc/{process}/fd")) for process in processes)


def cpu_seconds(processes: Iterable[int]) -> float:
    """Processor time of processes and of their children that have ended."""
    return sum(_ticks(_read(f"/proc/{process}/stat")) for process in processes) / _TICKS


def _ticks(stat: bytes) -> int:
    # The name of a process is in parentheses and may contain any text. Field 14 is the first of four times.
    fields = stat.rpartition(b")")[2].split()
    return sum(map(int, fields[11:15]))


def _kilobytes(fields: re.Pattern[bytes], text: bytes) -> int:
    return sum(map(int, fields.findall(text))) * 1024


def _listing(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read(path: str) -> bytes:
    """The content of a file, read without Python's file objects, which take twice as long."""
    text = b""
    with contextlib.suppress(OSError):  # the process has ended
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while chunk := os.read(descriptor, _CHUNK):
                text += chunk
        finally:
            os.close(descriptor)
    return text
