"""The environment of a benchmark. Figures can only be compared with it."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

from megatron_post.doctor.probes import installed_version

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "trl")


def environment() -> dict[str, str]:
    """Date, machine, GPU and driver, versions, commit and load, as text."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "processor": f"{_processor()}, {cores} cores usable",
        "threads": str(torch.get_num_threads()),
        **_gpu(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in _PACKAGES},
        "commit": _commit(),
    }
    if hasattr(os, "getloadavg"):
        found["load"] = " ".join(f"{value:.1f}" for value in os.getloadavg()) + " (1, 5, 15 min)"
    return found


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"GPU": "none"}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "GPU": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        "driver": (driver.splitlines() or ["unknown"])[0],
        "CUDA of torch": str(torch.version.cuda),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if re.match(r"model name|Hardware", line):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    """The commit of the checkout of this package, and the number of files that differ from it."""
    head = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if not head:
        return "no git checkout"
    status = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    dirty = len(status.splitlines())
    return head[:12] + (f", {dirty} tracked files changed" if dirty else "")


def _output(*command: str) -> str:
    """The output of a command, or "" if the command is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
