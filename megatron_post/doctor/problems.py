"""What breaks a run on this machine, with its remedy."""

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from megatron_post.doctor.fused_parts import apex_kind
from megatron_post.doctor.probes import installed_version, is_found, nccl_version, value_or
from megatron_post.installation import VERSIONS, install_command, unfit_versions

IMPORT_SECONDS = 300  # importing megatron-core from a cold disk that many nodes share can take minutes


def find_problems() -> Iterable[str]:
    """Yield each problem that breaks a run, with its remedy."""
    failure = import_failure()
    if failure is not None:
        yield failure
    if value_or("absent", apex_kind) == "unrelated":
        yield (
            f"the installed apex {installed_version('apex')} is not NVIDIA's but an unrelated package of "
            "that name from PyPI (a toolkit for the Pyramid web framework); it gives no FusedAdam: "
            "pip uninstall apex, and build NVIDIA's from https://github.com/NVIDIA/apex if you want it"
        )
    if not is_found("psutil"):
        yield "psutil is missing, without which megatron-core's checkpoint writer hangs; pip install psutil"
    versions = {name: installed_version(name) for name in VERSIONS}
    yield from unfit_versions({**versions, "NCCL": value_or("", nccl_version)})
    for name in ("torch", "megatron.core"):
        if not is_found(name):
            yield f"{name} cannot be found: nothing can be trained; {install_command()}"


@functools.cache
def import_failure() -> str | None:
    """The reason why megatron-core cannot be imported, and the remedy. None if it can, or is not installed.

    A separate process imports it once, which takes seconds. megatron-core imports Transformer Engine if it is
    installed, and handles only its absence. If Transformer Engine's extension for torch is missing or was
    built for another torch, every run fails.
    """
    if not (is_found("megatron.core") and is_found("torch")):
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
    if not is_found("transformer_engine") or "transformer_engine" not in done.stderr:
        return f"megatron.core cannot be imported, nothing can be trained ({reason}); {install_command()}"
    part = (
        ""
        if value_or(True, _engine_is_whole)
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
