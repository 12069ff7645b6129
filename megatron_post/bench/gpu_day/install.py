"""Installing on a machine without a network what `prepare` has gathered. Standard library only."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from megatron_post.bench.gpu_day.prepare import ENGINE, PART

# The wheels' own dependencies are gathered too, or are on the machine: pip must look for none.
_OFFLINE = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]


def install(output: Path) -> None:
    """Put what was carried into `output/site`, where it is missing. Says what it does.

    Without anything carried, the packages must be installed already. Raises `SystemExit` where pip fails.
    """
    _join_parts(output)
    wheels = [path for path in _carried(output, "*.whl") if not path.name.startswith(ENGINE)]
    missing = [path for path in wheels if not _is_there(path, output / "site")]
    if missing:
        print(f"installing {len(missing)} wheels into {output / 'site'}", flush=True)
        _pip("install", *_OFFLINE, "--upgrade", "--target", str(output / "site"), *map(str, missing))
    elif not wheels and importlib.util.find_spec("megatron") is None:
        sys.exit(f"{output} holds no wheels and megatron-core is not installed: run `make gpu-day-prepare`")


def engine_path(output: Path) -> Path | None:
    """Where Transformer Engine is, which only some checks may see; None where it is not."""
    if (output / "engine" / "built").exists():
        return output / "engine"
    spec = importlib.util.find_spec("transformer_engine_torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def build_engine(output: Path) -> None:
    """Install Transformer Engine from what was carried, and build its extension for this torch.

    Objects that are compiled stay in `output`, so that a build which was cut off goes on.
    """
    target = output / "engine"
    if engine_path(output) is not None:
        print("Transformer Engine is here")
        return
    wheels, sources = _carried(output, f"{ENGINE}*.whl"), _carried(output, f"{ENGINE}*.tar.gz")
    if len(wheels) < 2 or not sources:
        sys.exit(f"the wheels and the source of {ENGINE} are not in {output}: run `make gpu-day-prepare`")
    _pip("install", *_OFFLINE, "--upgrade", "--target", str(target), *map(str, wheels))
    tree = output / "engine-source"
    tree.mkdir(exist_ok=True)
    subprocess.run(
        ["tar", "-xf", str(sources[0]), "-C", str(tree), "--strip-components=1", "--skip-old-files"],
        check=True,
    )
    # the headers of CUDA, cuDNN and NCCL come with torch's own packages, beside it
    torch = importlib.util.find_spec("torch")
    packages = Path(torch.origin).parents[1] / "nvidia" if torch and torch.origin else tree
    headers = [str(path) for path in packages.glob("*/include") if path.is_dir()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH")))),
        "CPATH": os.pathsep.join([*headers, os.environ.get("CPATH", "")]).strip(os.pathsep),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # and no look for a wheel on GitHub
        "MAX_JOBS": str(max(1, (os.cpu_count() or 4) * 3 // 4)),
    }
    # isolated, pip would build it for another torch than the one that is here
    _pip(
        "install",
        *_OFFLINE,
        "--no-build-isolation",
        "--target",
        str(target),
        str(tree),
        environment=environment,
    )
    (target / "built").touch()


def _join_parts(output: Path) -> None:
    """Files that were cut into parts, whole again in `output/joined` once all of their parts are there."""
    for first in _carried(output, f"*{PART}1-of-*"):
        name, count = first.name.split(f"{PART}1-of-")
        parts = [
            found
            for n in range(1, int(count) + 1)
            for found in _carried(output, f"{name}{PART}{n}-of-{count}")
        ]
        whole = output / "joined" / name
        if len(parts) == int(count) and not whole.exists():
            whole.parent.mkdir(exist_ok=True)
            with (partial := whole.with_suffix(".partial")).open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            partial.rename(whole)


def _carried(output: Path, pattern: str) -> list[Path]:
    return sorted(path for folder in ("carry-*", "joined") for path in output.glob(f"{folder}/{pattern}"))


def _is_there(wheel: Path, site: Path) -> bool:
    name, version = wheel.name.split("-")[:2]
    return (site / f"{name}-{version}.dist-info").exists()


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=environment)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} has failed with status {done.returncode}")
