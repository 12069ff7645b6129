"""Gather, on a machine with a network, what `gpu_day` needs on one that has none. Standard library only.

    python -m megatron_post.bench.gpu_day.prepare [--output runs/gpu_day]

`carry-1`, `carry-2`, ... hold at most 60 MiB each, so that each goes with one command where 64 MiB may. The
first has all but Transformer Engine. That machine has Python 3.12, torch for CUDA 13, Triton, numpy, pytest,
typer, rich, tokenizers, safetensors, pyarrow, einops, onnxscript, tensorboard and transformers.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_post.bench.gpu_day.plan import OUTPUT

ROOT = Path(__file__).resolve().parents[3]
MOST = 60 * 2**20  # bytes of a carry
ENGINE = "transformer_engine"
PART = ".part-"
_PYTHON = "3.12"
# as they were seen to work together on that machine
_WHEELS = (
    "megatron_core==0.16.1", "pydantic==2.14.3", "pydantic_core==2.50.4", "zarr==3.1.6",
    "numcodecs==0.16.6", "datasets==5.2.0", "liger_kernel==0.8.5", "annotated_types", "typing_inspection",
    "donfig", "google_crc32c", "multiprocess", "dill", "httpx2", "httpcore2", "truststore",
    "importlib_metadata", "zipp", "blake3", "isal",
)  # fmt: skip
_ENGINE_WHEELS = ("transformer_engine==2.11.0", "transformer_engine_cu13==2.11.0")
_ENGINE_SOURCE = "transformer_engine_torch==2.11.0"


def prepare(output: Path) -> None:
    """Download, pack and cut. Earlier carries are replaced. Raises `SystemExit` where pip or git fails."""
    gathered = output / "gathered"
    shutil.rmtree(gathered, ignore_errors=True)
    for old in output.glob("carry-*"):
        shutil.rmtree(old)
    gathered.mkdir(parents=True)
    _tree(gathered)
    _demo(gathered)
    binary = ["--only-binary=:all:", "--python-version", _PYTHON, "--platform", "manylinux_2_28_x86_64"]
    binary += ["--platform", "manylinux2014_x86_64", "--implementation", "cp"]
    _download(gathered, *binary, *_WHEELS)
    small = sorted(gathered.iterdir())
    _download(gathered, *binary, *_ENGINE_WHEELS)
    _download_source(gathered, _ENGINE_SOURCE)
    large = [path for path in sorted(gathered.iterdir()) if path not in small]
    carries = fill([*small, *large], output)
    shutil.rmtree(gathered)
    for carry in carries:
        size = sum(path.stat().st_size for path in carry.iterdir())
        print(f"{carry}: {size / 2**20:.1f} MiB, {len(list(carry.iterdir()))} files")


def fill(files: list[Path], output: Path, *, most: int = MOST) -> list[Path]:
    """Files, in their order, in directories of at most `most` bytes; what does not fit is cut into parts."""
    carries: list[Path] = []
    left = 0
    for path in files:
        size = path.stat().st_size
        if left < size <= most:
            left = 0  # whole into the next one
        count, written = 1, 0
        pieces: list[Path] = []
        with path.open("rb") as file:
            while written < size or not pieces:
                if left == 0:
                    carries.append(output / f"carry-{len(carries) + 1}")
                    carries[-1].mkdir(parents=True)
                    left = most
                data = file.read(min(left, size - written))
                pieces.append(carries[-1] / f"{path.name}{PART}{count}")
                pieces[-1].write_bytes(data)
                count, written, left = count + 1, written + len(data), left - len(data)
        for number, piece in enumerate(pieces, start=1):
            name = path.name if len(pieces) == 1 else f"{path.name}{PART}{number}-of-{len(pieces)}"
            piece.rename(piece.with_name(name))
    return carries


def _tree(target: Path) -> None:
    """This checkout at its commit, which the file COMMIT names."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    name = commit.stdout.strip()
    archive = [*git, "archive", "--format=tar.gz", f"--add-virtual-file=COMMIT:{name}"]
    if commit.returncode or subprocess.run([*archive, "-o", str(target / "tree.tar.gz"), "HEAD"]).returncode:
        sys.exit("git has no commit of this checkout to archive, or is older than 2.38")
    print(f"tree.tar.gz has commit {name}")


def _demo(target: Path) -> None:
    """The model and prompts of an earlier `make demo`, which `generate` is tested with."""
    demo = ROOT / "runs" / "demo"
    if not (demo / "hf").is_dir():
        print("runs/demo/hf is missing, so `generate` will be skipped: run `make demo` first to have it")
        return
    with tarfile.open(target / "demo.tar", "w") as archive:
        for name in ("hf", "held_out_prompts.jsonl"):
            archive.add(demo / name, arcname=name)


def _download_source(target: Path, requirement: str) -> None:
    """pip runs the setup.py of a source that it only downloads. Transformer Engine's asks torch for CUDA's
    version, which a torch for CPUs does not have."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "sitecustomize.py").write_text("import torch\n\ntorch.version.cuda = '13.0'\n")
        paths = os.pathsep.join(filter(None, (directory, os.environ.get("PYTHONPATH"))))
        arguments = ("--no-binary=:all:", "--no-build-isolation", requirement)
        _download(target, *arguments, environment=os.environ | {"PYTHONPATH": paths})


def _download(target: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(target)]
    if subprocess.run([sys.executable, "-m", "pip", *command, *arguments], env=environment).returncode:
        sys.exit(f"pip could not download {' '.join(arguments)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default=OUTPUT)
    prepare(Path(parser.parse_args().output).resolve())


if __name__ == "__main__":
    main()
