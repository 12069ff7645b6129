"""What the benchmarks of kernels share: interleaved timing on one GPU, and the table.

Contenders take turns, round by round, so that clocks and heat are the same for all of them; the roofs (a
cuBLAS matrix multiplication, a copy) are contenders as well. Times are medians, between CUDA events.
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
class Contender:
    name: str
    step: Callable[[], object]  # what is timed
    prepare: Callable[[], None] = _nothing  # before each step, untimed


@dataclass(frozen=True)
class Timing:
    seconds: float  # median of a step
    peak_bytes: int  # most that a step allocated beyond what was there; 0 on the CPU


def arguments(description: str, *, tokens: list[int], hidden: list[int] | None = None) -> argparse.Namespace:
    """The command line. Ends the process with one line where there is neither a GPU nor --tiny."""
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
    """The GPU, the versions and the date: figures without them are worth nothing."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny shapes: times mean nothing"
    return f"{name}, torch {torch.__version__}, {datetime.date.today()}"


def interleaved(
    contenders: Sequence[Contender], *, device: str, rounds: int, seconds: float
) -> dict[str, Timing | str]:
    """Timing by name; a sentence instead of one for a contender that does not fit in memory.

    Two untimed steps come first: compilation, and the peak of memory.
    """
    results: dict[str, Timing | str] = {}
    peaks = {}
    for contender in contenders:
        try:
            _step(contender, device)
            peaks[contender.name] = _peak_bytes(contender, device)
        except torch.cuda.OutOfMemoryError:
            results[contender.name] = "does not fit"
    running = [contender for contender in contenders if contender.name in peaks]
    times: dict[str, list[float]] = {contender.name: [] for contender in running}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for contender in running[number % len(running) :] + running[: number % len(running)]:
            times[contender.name].append(_step(contender, device))
    for name, values in times.items():
        results[name] = Timing(statistics.median(values), peaks[name])
    return results


def _step(contender: Contender, device: str) -> float:
    contender.prepare()
    if device == "cpu":
        start = time.perf_counter()
        contender.step()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    contender.step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def _peak_bytes(contender: Contender, device: str) -> int:
    if device == "cpu":
        contender.step()
        return 0
    contender.prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_roof(tokens: int, rows: int, hidden: int, device: str) -> tuple[Contender, float]:
    """A cuBLAS product [tokens, hidden] x [hidden, rows] in bf16, and its floating-point operations."""
    left = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    right = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    return Contender("cuBLAS", lambda: torch.mm(left, right.T, out=out)), 2.0 * tokens * rows * hidden


def copy_roof(count: int, device: str) -> tuple[Contender, float]:
    """A copy of `count` bytes, and the bytes it moves: each is read and written."""
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source)), 2.0 * count


def print_table(
    title: str, timings: dict[str, Timing | str], *, work: dict[str, float], unit: str, roof: str
) -> None:
    """One row a contender. work: by name, floating-point operations or bytes that the task needs at least.

    unit: "TFLOP/s" or "GB/s". roof: the name of the contender whose rate is 100%.
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
