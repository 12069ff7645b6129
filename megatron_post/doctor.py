"""`megatron-post doctor` reports installed versions, the fused parts that run, and the cost of missing ones.

It must work on a machine where something is broken. So it reads versions without importing packages, and it
reports a probe that fails instead of raising its error.
"""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_post.config.fp8 import RECIPES, refusal
from megatron_post.display import printable
from megatron_post.installation import install_command
from megatron_post.sandbox.languages import LANGUAGES
from megatron_post.sandbox.sandbox import open_sandbox
from megatron_post.sandbox.settings import Bubblewrap

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "triton", "flash-attn", "nvidia-dali-cuda120",
    "numpy", "zarr", "tokenizers", "datasets", "safetensors", "transformers", "pydantic", "pyyaml",
    "psutil",
)  # fmt: skip

ENGINE_VERSIONS = ((2, 9), (2, 12))  # megatron-core 0.16 supports versions from the first to below the second
IMPORT_SECONDS = 300  # importing megatron-core from a cold disk that many nodes share can take minutes

T = TypeVar("T")
ApexKind = Literal["absent", "nvidia", "nvidia without CUDA extensions", "unrelated"]


@dataclass(frozen=True)
class Part:
    """A fused part with its state, the effect on a run on this machine, and the command that installs it."""

    name: str
    state: Literal["active", "missing", "not needed"]
    meaning: str
    remedy: str = ""


def diagnose(console: Console) -> None:
    """Print everything. Never raises."""
    has_gpu = _or(False, _has_gpu)
    _print(console, "versions", versions())
    _print(console, "machine", machine())
    table = Table("fused part", "state", "what it means here", box=SIMPLE)
    colours = {"active": "green", "missing": "yellow", "not needed": "dim"}
    parts = fused_parts(has_gpu=has_gpu, core_loads=import_failure() is None)
    for part in parts:
        table.add_row(part.name, Text(part.state, style=colours[part.state]), part.meaning)
    console.print(table)
    # Each command is on a line of its own that is not wrapped, so that users can copy it.
    for part in parts:
        if part.remedy:
            console.print(f"to add {part.name}: {part.remedy}", highlight=False, soft_wrap=True)
    problems = list(find_problems())
    for problem in problems:
        text = Text.assemble(("problem: ", "red"), printable(problem))
        console.print(text, highlight=False, soft_wrap=True)
    if not problems:
        console.print("no problems found", highlight=False)


def versions() -> list[tuple[str, str]]:
    """Python and `PACKAGES`, read from their metadata."""
    return [("python", platform.python_version()), *((name, installed_version(name)) for name in PACKAGES)]


def installed_version(name: str) -> str:
    """The version of a distribution, "not installed", or the error in its metadata."""
    try:
        return metadata.version(name) or "installed, but its metadata names no version"
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unreadable: {error}"


def machine() -> list[tuple[str, str]]:
    """Processor, memory, GPUs, NCCL, Slurm and the sandbox."""
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("CPU cores", _or("unknown", _cores)),
        ("memory", _or("unknown", _memory)),
        *_or([("GPUs", "unreadable")], _gpus),
        ("NCCL", _or("unreadable", _nccl)),
        ("Slurm", _or("unreadable", _slurm)),
        ("sandbox", _or("unreadable", _sandbox)),
    ]


def apex_kind() -> ApexKind:
    """Which `apex` is importable, without importing it.

    NVIDIA's has `apex/optimizers/fused_adam.py` and, if built with them, CUDA extensions in module `amp_C`.
    The `apex` on PyPI (0.9.x) is an unrelated toolkit for the Pyramid web framework.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "unrelated"
    return "nvidia" if importlib.util.find_spec("amp_C") else "nvidia without CUDA extensions"


def fused_parts(*, has_gpu: bool, core_loads: bool = True) -> list[Part]:
    """Transformer Engine, Apex's FusedAdam and Triton on this machine. core_loads: whether megatron-core can
    be imported beside them."""
    engine = _found("transformer_engine")
    return [_engine(engine, has_gpu, core_loads), _fused_adam(engine, has_gpu), _triton(has_gpu)]


@functools.cache
def import_failure() -> str | None:
    """The reason why megatron-core cannot be imported, and the remedy. None if it can, or is not installed.

    A separate process imports it once, which takes seconds. megatron-core imports Transformer Engine if it is
    installed, and handles only its absence. If Transformer Engine's extension for torch is missing or was
    built for another torch, every run fails.
    """
    if not (_found("megatron.core") and _found("torch")):
        return None  # `find_problems` reports a missing package
    code = "import megatron.core, megatron.core.extensions.transformer_engine"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"megatron.core could not be imported: {error}"
    if not done.returncode:
        return None
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].rstrip(".")
    if not _found("transformer_engine") or "transformer_engine" not in done.stderr:
        return f"megatron.core cannot be imported, nothing can be trained ({reason}); {install_command()}"
    part = (
        ""
        if _or(True, _engine_is_whole)
        else "its extension for torch, transformer_engine_torch, is missing: "
    )
    return (
        f"Transformer Engine {installed_version('transformer-engine')} is installed and cannot be loaded, "
        f"and megatron.core cannot be imported beside it: {part}{reason}. Build it for this torch: "
        f"{install_command('cuda')}; or remove it: pip uninstall transformer-engine"
    )


def _engine_is_whole() -> bool:
    """Whether the extension for torch is in one of the directories that Transformer Engine searches.

    These are its package, the directory around it, and the directory of all packages.
    """
    spec = importlib.util.find_spec("transformer_engine")
    package = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    folders = (package.parent, package, package / "wheel_lib", Path(sysconfig.get_path("purelib")))
    return any(True for folder in folders for _ in folder.glob("transformer_engine_torch*.so"))


def find_problems() -> Iterable[str]:
    """Yield each problem that breaks a run, with its remedy."""
    failure = import_failure()
    if failure is not None:
        yield failure
    if _or("absent", apex_kind) == "unrelated":
        yield (
            f"the installed apex {installed_version('apex')} is not NVIDIA's but an unrelated package of "
            "that name from PyPI (a toolkit for the Pyramid web framework); it gives no FusedAdam: "
            "pip uninstall apex, and build NVIDIA's from https://github.com/NVIDIA/apex if you want it"
        )
    if not _found("psutil"):
        yield "psutil is missing, without which megatron-core's checkpoint writer hangs; pip install psutil"
    if _found("transformer_engine") and not _or(True, _engine_fits):
        yield (
            f"transformer-engine {installed_version('transformer-engine')} is not one of those that "
            "megatron-core 0.16 is made for: older ones lack FP8 recipes, newer ones refuse to read FP8's "
            f"scales from a checkpoint; {install_command('cuda')}"
        )
    for name in ("torch", "megatron.core"):
        if not _found(name):
            yield f"{name} cannot be found: nothing can be trained; {install_command()}"


def _engine_fits() -> bool:
    major, minor = installed_version("transformer-engine").split(".")[:2]
    return ENGINE_VERSIONS[0] <= (int(major), int(minor)) < ENGINE_VERSIONS[1]


def _engine(found: bool, has_gpu: bool, core_loads: bool) -> Part:
    if found and has_gpu and not core_loads:
        meaning = "installed, but megatron-core cannot be imported beside it; see the problem below"
        return Part("Transformer Engine", "missing", meaning)
    cost = (
        "the portable layers run instead: unfused norms, activations and rotary embedding, FlexAttention "
        "(compiled when a run starts), keys and values gathered over context-parallel ranks; precision.fp8 "
        "and recompute.modules with layernorm are refused"
    )
    return _part(
        "Transformer Engine",
        found=found,
        has_gpu=has_gpu,
        active="fused norms, linears, rotary embedding and packed attention; " + _or("", _fp8_recipes),
        cost=cost,
        remedy=install_command("cuda"),
    )


def _fp8_recipes() -> str:
    """The values of `precision.fp8` that this GPU supports, and the requirements of the others."""
    import torch

    capability = torch.cuda.get_device_capability()
    found = {name: refusal(name, capability=capability, cuda=torch.version.cuda) for name in RECIPES}
    possible = ", ".join(name for name, reason in found.items() if reason is None) or "nothing but null"
    others = "".join(f"; {name} needs {reason}" for name, reason in found.items() if reason is not None)
    return f"precision.fp8 can be {possible}{others}"


def _fused_adam(engine: bool, has_gpu: bool) -> Part:
    name, kind = "NVIDIA Apex FusedAdam", _or("absent", apex_kind)
    if engine:
        return Part(name, "not needed", "Transformer Engine's own FusedAdam is taken first")
    which = {"unrelated": " (the apex installed is not NVIDIA's)", "absent": ""}.get(kind, f" (apex: {kind})")
    cost = (
        f"Adam is torch's fused kernel with Apex's interface{which}: the same update, and a run resumes. Its "
        "speed beside Apex's is not measured. Transformer Engine brings its own"
    )
    active = "one fused kernel updates all parameters"
    return _part(name, found=kind == "nvidia", has_gpu=has_gpu, active=active, cost=cost)


def _triton(has_gpu: bool) -> Part:
    cost = (
        "torch.compile cannot build GPU kernels: FlexAttention, and with it the portable layers, cannot run "
        "on a GPU"
    )
    active = "torch.compile and FlexAttention can build their kernels"
    return _part(
        "Triton",
        found=_found("triton"),
        has_gpu=has_gpu,
        active=active,
        cost=cost,
        remedy="pip install triton",
    )


def _part(name: str, *, found: bool, has_gpu: bool, active: str, cost: str, remedy: str = "") -> Part:
    if has_gpu:
        return Part(name, "active", active) if found else Part(name, "missing", cost, remedy)
    meaning = "installed, but it runs on GPUs alone" if found else f"no GPU here. On one without it, {cost}"
    return Part(name, "not needed", meaning)


def _found(module: str) -> bool:
    return _or(False, lambda: importlib.util.find_spec(module) is not None)


def _or(fallback: T, probe: Callable[[], T]) -> T:
    try:
        return probe()
    except Exception:
        return fallback


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
        *(rows or [("GPUs", "none (nvidia-smi absent or silent)")]),
        ("torch sees", _or("no torch", _torch_gpus)),
    ]


def _torch_gpus() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.cuda.device_count() if torch.cuda.is_available() else 0} GPUs (built for: {built})"


def _nccl() -> str:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "not in this torch, so ranks communicate through gloo"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _slurm() -> str:
    return _output("sinfo", "--version") if shutil.which("sinfo") else "absent (no sinfo on the PATH)"


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


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title, "", box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)
