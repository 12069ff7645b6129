"""Interleaved timing on one GPU and the table of results, for the benchmarks of kernels.

Implementations run in turn, round by round, so that clocks and temperature are the same for all of them. The
roofs (a cuBLAS matrix multiplication or a copy) are timed in the same way. Times are medians between CUDA
events.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Implementation:
    """One row of a table. `step` is timed. `prepare` is called before each step and is not timed."""

    name: str
    step: Callable[[], object]
    prepare: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Timing:
    seconds: float  # median over steps
    peak_bytes: int  # the most memory that a step allocated beyond what was allocated before; 0 on the CPU


def arguments(description: str, *, tokens: list[int], hidden: list[int] | None = None) -> argparse.Namespace:
    """Parse the command line. Ends the process with one line if there is neither a GPU nor --tiny."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--rows", type=int, nargs="+", default=[128_256, 128_256 // 8], help="v/tp")
    if hidden is not None:
        parser.add_argument("--hidden", type=int, nargs="+", default=hidden)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30, help="after 3 rounds, stop a shape at this")
    parser.add_argument("--tiny", action="store_true", help="a smoke test on the CPU: its times mean nothing")
    chosen = parser.parse_args()
    if not chosen.tiny and not torch.cuda.is_available():
        sys.exit(f"{parser.prog}: no GPU here, and a benchmark wants one (--tiny tries the code on the CPU)")
    chosen.device = "cpu" if chosen.tiny else "cuda"
    return chosen


def heading(device: str) -> str:
    """The GPU, torch's version and the date, without which figures cannot be compared."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny shapes: times mean nothing"
    return f"{name}, torch {torch.__version__}, {datetime.date.today()}"


def interleaved(
    implementations: Sequence[Implementation], *, device: str, rounds: int, seconds: float
) -> dict[str, Timing | str]:
    """The timing of each implementation by name, or a sentence if it does not fit in memory.

    Two untimed steps come first. One is for compilation, and the other measures the peak of memory.
    """
    results: dict[str, Timing | str] = {}
    peaks = {}
    for implementation in implementations:
        try:
            _step(implementation, device)
            peaks[implementation.name] = _peak_bytes(implementation, device)
        except torch.cuda.OutOfMemoryError:
            results[implementation.name] = "does not fit"
    running = [implementation for implementation in implementations if implementation.name in peaks]
    times: dict[str, list[float]] = {implementation.name: [] for implementation in running}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for implementation in running[number % len(running) :] + running[: number % len(running)]:
            times[implementation.name].append(_step(implementation, device))
    for name, values in times.items():
        results[name] = Timing(statistics.median(values), peaks[name])
    return results


def _step(implementation: Implementation, device: str) -> float:
    implementation.prepare()
    if device == "cpu":
        start = time.perf_counter()
        implementation.step()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    implementation.step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def _peak_bytes(implementation: Implementation, device: str) -> int:
    if device == "cpu":
        implementation.step()
        return 0
    implementation.prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    implementation.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_roof(tokens: int, rows: int, hidden: int, device: str) -> tuple[Implementation, float]:
    """A cuBLAS product [tokens, hidden] x [hidden, rows] in bf16, and its number of operations."""
    left = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    right = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    return Implementation("cuBLAS", lambda: torch.mm(left, right.T, out=out)), 2.0 * tokens * rows * hidden


def copy_roof(count: int, device: str) -> tuple[Implementation, float]:
    """A copy of `count` bytes, and the number of bytes that it reads and writes."""
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Implementation("copy", lambda: target.copy_(source)), 2.0 * count


def print_table(
    title: str, timings: dict[str, Timing | str], *, work: dict[str, float], unit: str, roof: str
) -> None:
    """Print one row for each implementation.

    work: the least number of floating-point operations or bytes that the task needs, by name. unit: "TFLOP/s"
    or "GB/s". roof: the name of the implementation whose rate is 100%.
    """
    scale = {"TFLOP/s": 1e12, "GB/s": 1e9}[unit]
    best = timings[roof]
    rate = work[roof] / best.seconds if isinstance(best, Timing) else float("nan")
    print(f"\n{title}\n{'':<32}{'ms':>10}{unit:>10}{'roof':>8}{'GiB':>8}")
    for name, timing in timings.items():
        if isinstance(timing, str):
            print(f"{name:<32}{timing:>36}")
            continue
        speed = work[name] / timing.seconds
        peak = timing.peak_bytes / 2**30
        print(
            f"{name:<32}{timing.seconds * 1e3:>10.3f}{speed / scale:>10.1f}{speed / rate:>8.1%}{peak:>8.2f}"
        )
