"""The most memory that a process took."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors took on the GPU since the last reset; without one, `peak_rss`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()


def peak_rss() -> int:
    """Most bytes of this process that ever were resident.

    Of Linux's own count, which begins anew with each program, where `ru_maxrss` begins at what the process
    that started this one took. Elsewhere `ru_maxrss`, which macOS gives in bytes.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
