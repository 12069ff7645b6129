"""The limits that the kernel itself enforces in each process, as options of prlimit."""

import math
import platform
import re

from megatron_post.sandbox.settings import Limits

MIB = 2**20
_STACK = 8 * MIB
_SPARE = 128 * MIB  # memory that node and Java map but do not use
_SIGNALS = 4096
_COUNTED_IN_NAMESPACE = (5, 14)  # since this version Linux counts a user's processes in each namespace


def of_each_process(limits: Limits) -> list[str]:
    """Options that hold for a process and for all processes that it starts.

    --data is twice the watcher's limit on memory and more. At the kernel's limit an allocation only fails,
    whereas the watcher kills the program and reports the limit, so it must come first. --core is 1, because
    with 0 the host's program for core dumps would run.
    """
    seconds = math.ceil(limits.cpu_seconds) + 1
    return [
        "--core=1", f"--cpu={seconds}:{seconds + 1}", f"--fsize={limits.disk_mib * MIB}",
        f"--data={2 * limits.memory_mib * MIB + _SPARE}",
        f"--stack={_STACK}", "--memlock=0", "--msgqueue=0",
    ]  # fmt: skip


def inside_a_namespace(limits: Limits) -> list[str]:
    """Options that are set inside the user namespace, after bubblewrap has closed its own files.

    --nproc limits all processes of the namespace together, and --sigpending its timers and waiting signals,
    whose memory counts for no process. Kernels before 5.14 would count those of this user on the whole
    machine. There only the watcher limits the number of processes.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    counts = release is not None and (int(release[1]), int(release[2])) >= _COUNTED_IN_NAMESPACE
    counted = [f"--nproc={2 * limits.processes + 32}", f"--sigpending={_SIGNALS}"]
    return [*(counted if counts else []), f"--nofile={limits.open_files}"]
