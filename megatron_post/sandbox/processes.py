"""What a process and all its descendants use, read from /proc."""

import contextlib
import os
import re
from collections.abc import Iterable

_CHUNK = 2**16  # bytes
_TICKS = os.sysconf("SC_CLK_TCK")  # of processor time, in one second
# kB, in /proc/PID/status: what no file on a disk holds. VmPTE: page tables
_HELD = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap|VmPTE|HugetlbPages):\s+(\d+)", re.MULTILINE)
# kB, in /proc/PID/smaps_rollup: as above, a page that n processes share counts as a n-th
_SHARED = re.compile(
    rb"^(?:Pss_Anon|Pss_Shmem|SwapPss|Private_Hugetlb|Shared_Hugetlb):\s+(\d+)", re.MULTILINE
)


def descendants(root: int) -> dict[int, int]:
    """Processes below `root` and the number of their threads. A process that ends meanwhile may be missing.

    An orphan is the child of the first process of its namespace, so that a daemon is found too.
    """
    threads: dict[int, int] = {}
    found = [root]
    for process in found:  # grows
        if process in threads:
            continue  # it was moved to another parent meanwhile
        tasks = _listing(f"/proc/{process}/task")
        threads[process] = len(tasks)
        for task in tasks:
            found += map(int, _read(f"/proc/{process}/task/{task}/children").split())
    del threads[root]
    return threads


def memory(processes: Iterable[int]) -> int:
    """Bytes that processes hold. A page that several of them share counts for each."""
    return sum(_kilobytes(_HELD, _read(f"/proc/{process}/status")) for process in processes)


def shared_memory(processes: Iterable[int]) -> int:
    """Bytes that processes hold together: slower than `memory`, and a shared page counts once."""
    return sum(
        _kilobytes(_SHARED, _read(f"/proc/{process}/smaps_rollup"))
        or _kilobytes(_HELD, _read(f"/proc/{process}/status"))
        for process in processes
    )


def open_files(processes: Iterable[int]) -> int:
    return sum(len(_listing(f"/proc/{process}/fd")) for process in processes)


def cpu_seconds(processes: Iterable[int]) -> float:
    """Processor time of processes, and of their children that have ended."""
    return sum(_ticks(_read(f"/proc/{process}/stat")) for process in processes) / _TICKS


def _ticks(stat: bytes) -> int:
    # the name of a process stands in parentheses and may hold anything; field 14 is the first of four times
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
    """Without Python's own layers of a file, which take twice as long: many programs are looked at."""
    text = b""
    with contextlib.suppress(OSError):  # it has ended
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while chunk := os.read(descriptor, _CHUNK):
                text += chunk
        finally:
            os.close(descriptor)
    return text
