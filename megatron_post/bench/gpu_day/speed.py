"""Checks of speed and memory, see `check`."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_post.bench.gpu_day.plan import RESULT, SHARD_8B, SWITCHES
from megatron_post.bench.gpu_day.runs import TINY
from megatron_post.bench.kernels import read_tables
from megatron_post.bench.proxy import measure_proxy
from megatron_post.bench.record import Figure
from megatron_post.bench.step import Measured, measure_steps
from megatron_post.bench.step_figures import step_figures
from megatron_post.config.load import load_config
from megatron_post.config.schema import Config
from megatron_post.plan.estimate import layers_on_gpu
from megatron_post.plan.hardware import GIB
from megatron_post.plan.memory import memory

_BENCHMARKS = Path(__file__).resolve().parents[3] / "kernels" / "benchmarks"
_DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_LARGE = "configs/llama3_405b/sft.yaml"


@dataclass(frozen=True)
class Found:
    """`ok`: whether the result is as expected; None if nothing was expected. `figures` have a unit."""

    found: str
    ok: bool | None = None
    figures: dict[str, float] = field(default_factory=dict)


def kernel(name: str, *arguments: str) -> Found:
    """A benchmark of kernels/benchmarks, with the milliseconds of its tables."""
    has_gpu = torch.cuda.is_available()
    tiny = () if has_gpu else ("--tiny",)
    command = [sys.executable, str(_BENCHMARKS / f"bench_{name}.py"), *arguments, *tiny]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"bench_{name}.py has failed: {(done.stderr or done.stdout).strip()[-300:]}")
    figures = {f"{title} (ms)": figure.median for title, figure in read_tables(done.stdout)}
    return Found("" if has_gpu else "tiny shapes run", figures=figures)


def bandwidth() -> Found:
    """Share of the DRAM's peak that the kernels of the log-probabilities reach, by Nsight Compute."""
    if shutil.which("ncu") is None:
        return Found("not run: ncu is not on the PATH")
    command = ["ncu", "--csv", "--metrics", _DRAM, "--launch-count", "4"]
    command += ["--kernel-name", "regex:statistics_kernel|gradient_kernel", sys.executable]
    command += [str(_BENCHMARKS / "bench_logprob.py"), "--tokens", "8192", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    rows = [line.strip().strip('"').split('","') for line in done.stdout.splitlines() if _DRAM in line]
    if done.returncode or not rows:
        return Found("not run: ncu has failed, see the log")
    figures = {f"launch {number} (%)": float(row[-1]) for number, row in enumerate(rows, start=1)}
    return Found(f"{len(rows)} launches", figures=figures)


def step(config: str, *settings: str) -> Found:
    """`bench step`, and its memory beside the plan's, by kind."""
    loaded = load_config(config, settings)
    measured = _steps(loaded)
    figures = _named(step_figures(measured))
    if config == TINY or not torch.cuda.is_available():
        return Found("the command runs", figures=figures)
    (planned,) = memory(loaded, data_size=1, layers=layers_on_gpu(loaded))
    taken = max(rank.memory for rank in measured.ranks)
    kinds = {f"plan, {kind} (GiB)": size / GIB for kind, size in planned.kinds.items() if size}
    share = taken / planned.total
    return Found(f"{taken / GIB:.2f} GiB, {share:.1%} of the plan", abs(share - 1) <= 0.05, figures | kinds)


def proxy(*settings: str) -> Found:
    """One rank of 405B on 512 GPUs with two of its layers, compute only."""
    config = load_config(_LARGE, settings)
    record = measure_proxy(config, origin=_LARGE, rank=0, world_size=512, layers=2, steps=6, warmup=2)
    return Found(record.settings["share"], figures=_named(record.figures))


def switch(number: str) -> Found:
    """A row of `SWITCHES`, with and without, in processes of their own: each needs most of the memory."""
    row, figures = SWITCHES[int(number)], {}
    for word, setting in (("without", ()), ("with", (row.setting,))):
        command = [
            "-m",
            "megatron_post.bench.gpu_day.check",
            "step",
            row.config,
            *SHARD_8B,
            *row.base,
            *setting,
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        if done.returncode:
            raise SystemExit(f"{word} it: {(done.stderr or done.stdout).strip()[-300:]}")
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        taken = json.loads(line.removeprefix(RESULT))["figures"]
        figures[word] = next(value for name, value in taken.items() if name.startswith(f"{row.figure} ("))
    change = figures["with"] / figures["without"] - 1
    return Found(
        f"{change:+.1%} with it", figures={f"{row.figure}, {word}": x for word, x in figures.items()}
    )


def _steps(config: Config) -> Measured:
    has_gpu = torch.cuda.is_available()
    measured = measure_steps(config, steps=8 if has_gpu else 1, warmup=3 if has_gpu else 0)
    assert measured is not None, "a process that is alone reports"
    return measured


def _named(figures: dict[str, Figure]) -> dict[str, float]:
    """Medians by name with their unit."""
    return {f"{name} ({figure.unit or 'count'})": figure.median for name, figure in figures.items()}
