"""Runs the kernels' benchmarks, `kernels/benchmarks/bench_*.py`, and collects their times in a record."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once

_KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_NAME = 32  # the width of the implementation's name in a row


def scripts() -> list[Path]:
    """The benchmark scripts. Raises `ValueError` if there are none, as in an installed package."""
    found = sorted((_KERNELS / "benchmarks").glob("bench_*.py"))
    if not found:
        raise ValueError(
            f"{_KERNELS / 'benchmarks'} holds no benchmarks; a checkout has them, an installed package has "
            "none"
        )
    return found


def without_gpu() -> str:
    """A text that says what cannot be measured without a GPU, and what can be checked."""
    names = ", ".join(path.stem.removeprefix("bench_") for path in scripts())
    return (
        f"this machine has no GPU: time, memory and bandwidth of the kernels ({names}) cannot be measured, "
        "and figures of a CPU say nothing about a GPU. Registers and spills can be checked without a GPU: "
        "`pytest tests/kernels/test_compile.py tests/kernels/test_pair_kernels_compile.py` compiles the "
        "kernels for sm_90 and sm_100. docs/benchmarks.md has the table"
    )


def measure_kernels(*, tiny: bool = False) -> Record:
    """Run every script. Its times are medians of interleaved rounds.

    tiny: run tiny shapes on the CPU, to try the code. Raises `ValueError` with the end of the output of a
    script that fails.
    """
    text = "\n".join(_run(path, tiny=tiny) for path in scripts())
    return Record(
        benchmark="kernels",
        subject="tiny shapes: times mean nothing" if tiny else "beside torch and Liger-Kernel",
        settings={"scripts": ", ".join(path.name for path in scripts())},
        figures=dict(read_tables(text)),
        environment=environment(),
        notes=("each time is a median of rounds, measured by kernels/benchmarks",),
        text=text,
    )


def read_tables(text: str) -> Iterator[tuple[str, Figure]]:
    """The milliseconds in the tables that `kernels/benchmarks/timing.py:print_table` prints.

    A table has a title, a line that names the columns, and a row for each implementation.
    """
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
