"""Installed versions, and the devices and services of this machine."""

import os
import platform
import shutil
import subprocess

from megatron_post.doctor.probes import installed_version, nccl_version, value_or
from megatron_post.sandbox.languages import LANGUAGES
from megatron_post.sandbox.sandbox import open_sandbox
from megatron_post.sandbox.settings import Bubblewrap

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "triton", "flash-attn", "nvidia-dali-cuda120",
    "numpy", "zarr", "tokenizers", "datasets", "safetensors", "transformers", "pydantic", "pyyaml",
    "psutil", "math-verify",
)  # fmt: skip


def versions() -> list[tuple[str, str]]:
    """Python and `PACKAGES`, read from their metadata."""
    return [("python", platform.python_version()), *((name, installed_version(name)) for name in PACKAGES)]


def machine() -> list[tuple[str, str]]:
    """Processor, memory, GPUs, NCCL, Slurm and the sandbox."""
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("CPU cores", value_or("unknown", _cores)),
        ("memory", value_or("unknown", _memory)),
        *value_or([("GPUs", "unreadable")], _gpus),
        ("NCCL", value_or("unreadable", _nccl)),
        ("Slurm", value_or("unreadable", _slurm)),
        ("sandbox", value_or("unreadable", _sandbox)),
    ]


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {usable} usable by this process"


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return f"{total:.1f} GiB, {free:.1f} GiB free"


def _gpus() -> list[tuple[str, str]]:
    """One row per GPU from nvidia-smi, which works even if torch is broken, and the GPUs that torch sees."""
    rows = []
    if shutil.which("nvidia-smi"):
        fields = "name,memory.total,memory.free,driver_version"
        text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        for number, line in enumerate(text.splitlines()):
            parts = [part.strip() for part in line.split(",")]
            text = f"{parts[0]}, {parts[1]}, {parts[2]} free, driver {parts[3]}" if len(parts) == 4 else line
            rows.append((f"GPU {number}", text))
    return [
        *(rows or [("GPUs", "none (nvidia-smi is missing or lists none)")]),
        ("torch sees", value_or("no torch", _torch_gpus)),
    ]


def _torch_gpus() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.cuda.device_count() if torch.cuda.is_available() else 0} GPUs (built for: {built})"


def _nccl() -> str:
    return nccl_version() or "not in this torch, so ranks communicate through gloo"


def _slurm() -> str:
    if not shutil.which("sinfo"):
        return "absent (no sinfo on the PATH)"
    try:
        return _output("sinfo", "--version")
    except subprocess.CalledProcessError as error:
        return f"sinfo fails: {(error.stderr.strip().splitlines() or ['it gives no reason'])[-1]}"


def _sandbox() -> str:
    """Which languages a program of a model may have, or why it is not run."""
    try:
        with open_sandbox(Bubblewrap(programs=1)) as sandbox:
            missing = {language: sandbox.missing(language) for language in LANGUAGES}
    except ValueError as error:
        return f"what a model wrote cannot be run: {error}"
    runs = ", ".join(language for language, names in missing.items() if not names)
    lacks = "".join(f"; {language} lacks {', '.join(names)}" for language, names in missing.items() if names)
    return f"bubblewrap runs {runs or 'nothing'}{lacks}"


def _output(*command: str) -> str:
    """The output of a command. Raises `subprocess.SubprocessError` if it fails or hangs."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip()
