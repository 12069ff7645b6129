"""What the kernel itself limits, in each process of a program: prlimit's words."""

import math
import platform
import re

from megatron_post.sandbox.settings import Limits

MIB = 2**20
_STACK = 8 * MIB
_SPARE = 128 * MIB  # of memory that node and Java map and do not use
_COUNTED_IN_NAMESPACE = (5, 14)  # Linux, from which on it counts a user's processes in each namespace


def of_each_process(limits: Limits) -> list[str]:
    """Options that hold for a process and for all that it starts.

    data: twice the memory, because at this limit a call would only fail. The watcher, which names the limit
    and kills, comes first. core: with 0 the host's own program for core dumps would run.
    """
    seconds = math.ceil(limits.cpu_seconds) + 1
    return [
        "--core=1", f"--cpu={seconds}:{seconds + 1}", f"--fsize={limits.disk_mib * MIB}",
        f"--data={2 * limits.memory_mib * MIB + _SPARE}",
        f"--stack={_STACK}", "--memlock=0", "--msgqueue=0",
    ]  # fmt: skip


def inside_a_namespace(limits: Limits) -> list[str]:
    """Options that are set inside of a user namespace, where bubblewrap itself is done with its files.

    nproc: all processes of the namespace together. Kernels before 5.14 would count every process of this user
    on the machine. There the watcher alone counts.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    counts = release is not None and (int(release[1]), int(release[2])) >= _COUNTED_IN_NAMESPACE
    return [*([f"--nproc={2 * limits.processes + 32}"] if counts else []), f"--nofile={limits.open_files}"]
