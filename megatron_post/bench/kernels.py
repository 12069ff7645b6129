"""The kernels' own benchmarks, `kernels/benchmarks/bench_*.py`, run one after the other into a record."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once

_KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_NAME = 32  # columns of a row that are the implementation's name


def scripts() -> list[Path]:
    """Raises `ValueError` where there are none, as in an installed package."""
    found = sorted((_KERNELS / "benchmarks").glob("bench_*.py"))
    if not found:
        raise ValueError(
            f"{_KERNELS / 'benchmarks'} holds no benchmarks: they are in a checkout, not in a package"
        )
    return found


def without_gpu() -> str:
    """What cannot be said here, and what can."""
    names = ", ".join(path.stem.removeprefix("bench_") for path in scripts())
    return (
        f"no GPU here: time, memory and bandwidth of the kernels ({names}) cannot be measured, and a CPU's "
        "say nothing about them. Registers and spills need none: `pytest tests/kernels/test_compile.py "
        "tests/kernels/test_pair_kernels_compile.py` compiles for sm_90 and sm_100 and checks them; "
        "docs/benchmarks.md has the table"
    )


def measure_kernels(*, tiny: bool = False) -> Record:
    """Run every script; its times are medians of interleaved rounds. tiny: on the CPU, to try the code.

    Raises `ValueError` with the end of what a script said that fails.
    """
    text = "\n".join(_run(path, tiny=tiny) for path in scripts())
    return Record(
        benchmark="kernels",
        subject="tiny shapes: times mean nothing" if tiny else "beside torch and Liger-Kernel",
        settings={"scripts": ", ".join(path.name for path in scripts())},
        figures=dict(read_tables(text)),
        environment=environment(),
        notes=("a median of rounds each, taken by kernels/benchmarks",),
        text=text,
    )


def read_tables(text: str) -> Iterator[tuple[str, Figure]]:
    """The milliseconds of `kernels/benchmarks/timing.py:print_table`: a title, a line that names the
    columns, then a row for each."""
    title, before, inside = "", "", False
    for line in text.splitlines():
        values = line[_NAME:].split()
        if values[:1] == ["ms"]:
            title, inside = before, True
        elif inside and values:
            if values[0].replace(".", "").isdigit():
                yield f"{title}: {line[:_NAME].strip()}", once("ms", float(values[0]), "lower")
        else:
            inside = False
        before = line.strip()


def _run(path: Path, *, tiny: bool) -> str:
    paths = os.pathsep.join(filter(None, (str(_KERNELS), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(path), *(["--tiny"] if tiny else [])],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{path.name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
