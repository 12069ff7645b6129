"""What the kernel itself limits, in each process of a program: prlimit's words."""

import math
import platform
import re

from megatron_post.sandbox.settings import Limits

MIB = 2**20
_STACK = 8 * MIB
_SPARE = 128 * MIB  # of memory that node and Java map and do not use
_COUNTED_IN_NAMESPACE = (5, 14)  # Linux, from which on a user's processes are counted in each namespace


def of_each_process(limits: Limits) -> list[str]:
    """Options that hold for a process and for all that it starts.

    data: twice the memory, because at this limit a call would only fail. The watcher, which names the limit
    and kills, comes first. core: with 0 the host's own program for core dumps would run.
    """
    seconds = math.ceil(limits.cpu_seconds) + 1
    return [
        "--core=1", f"--cpu={seconds}:{seconds + 1}", f"--fsize={limits.disk_mib * MIB}",
        f"--data={2 * limits.memory_mib * MIB + _SPARE}", f"--nofile={limits.open_files}",
        f"--stack={_STACK}", "--memlock=0", "--msgqueue=0",
    ]  # fmt: skip


def of_a_namespace(limits: Limits) -> list[str]:
    """Options that hold for all processes of a user namespace together, if they are set inside of it.

    Older kernels would count every process of this user on the machine. There the watcher alone counts.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if release is None or (int(release[1]), int(release[2])) < _COUNTED_IN_NAMESPACE:
        return []
    return [f"--nproc={2 * limits.processes + 32}"]
