"""The peak memory of a process."""

import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> int:
    """Peak bytes of tensors on the GPU since the last reset. Without a GPU, `peak_rss`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()


def peak_rss() -> int:
    """Peak resident bytes of this process.

    On Linux the kernel's own count is read, because it starts at zero in each program. `ru_maxrss` starts at
    the memory of the process that started this one. On other systems `ru_maxrss` is used, which macOS gives
    in bytes.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Let `peak_rss` count from now on, where the system allows it. That is on Linux."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")
