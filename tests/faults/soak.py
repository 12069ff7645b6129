"""A run with many faults, its undisturbed twin, and the comparison of the two."""

import contextlib
import json
import random
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_post.storage import manifest
from megatron_post.train.signals import REQUEUE
from tests.checkpoints import checkpoint_tensors
from tests.e2e.runs import small_run
from tests.e2e.runs import start as start_under_torchrun
from tests.faults.incarnation import Incarnation
from tests.faults.injections import record_history

EVERY, DEADLINE = 20, 8.0  # steps between checkpoints, and seconds after which a step counts as a hang

Layout = tuple[int, tuple[str, ...]]  # ranks, overrides
EXACT: dict[str, Layout] = {
    "DP 2": (2, ()),
    "one rank": (1, ()),
    "PP 2": (2, ("parallel.pipeline=2",)),
}
WITH_TP: dict[str, Layout] = {**EXACT, "TP 2": (2, ("parallel.tensor=2",))}


@dataclass(frozen=True)
class Undisturbed:
    """The result of a run without faults, and the units of each of its steps."""

    config: Path
    steps: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, object]
    metrics: list[tuple[int, float, float]]
    units: Mapping[int, Counter[int]]


@dataclass
class Figures:
    faults: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    repeated: int = 0
    hangs: int = 0  # hangs without a fault, because the machine was busy


class Soak:
    """One run with faults. `draw` decides when they happen, and which layout each start uses."""

    def __init__(
        self,
        twin: Undisturbed,
        directory: Path,
        draw: random.Random,
        kinds: Sequence[str],
        layouts: Mapping[str, Layout],
        figures: Figures,
    ) -> None:
        self.twin, self.directory, self.draw, self.figures = twin, directory, draw, figures
        self.layouts = layouts
        share = twin.steps / (len(kinds) + 1)
        self.faults = deque((kind, int(share * (i + draw.random())) + 1) for i, kind in enumerate(kinds))
        self.history = directory / "history"
        self.history.mkdir(parents=True)
        self.starts = 0
        self.deck: list[str] = []  # layouts of the next starts
        self.stray: list[psutil.Process] = []  # ranks that have outlived their launcher

    def to_the_end(self) -> None:
        """Run until the last step, with all faults on the way."""
        one = self.start()
        while True:
            while self.faults and self.reaches(one, self.faults[0][1]):
                kind, _ = self.faults.popleft()
                self.figures.faults[kind] += 1
                one = self.strike(kind, one)
                self.end_stray()
            statuses = one.wait()
            if set(statuses) == {0}:
                assert not self.faults, "the run was over before all faults had struck"
                return
            # A step took too long although no rank was suspended.
            assert set(statuses) <= {REQUEUE, -signal.SIGKILL} and "hang: step" in one.output, one.output
            self.figures.hangs += 1
            one = self.start()

    def start(self, *, last: Incarnation | None = None) -> Incarnation:
        """Start the same command again on the next layout. last: the incarnation that has just ended."""
        if last is not None:
            for step in manifest.published_steps(self.directory / "checkpoints"):
                manifest.verify_step(manifest.step_directory(self.directory / "checkpoints", step))
        # Each layout is in the deck twice, so that a layout can also follow itself.
        self.deck = self.deck or self.draw.sample([*self.layouts] * 2, 2 * len(self.layouts))
        name = self.deck.pop()
        ranks, overrides = self.layouts[name]
        self.starts += 1
        self.figures.starts[name] += 1
        return Incarnation(
            self.twin.config,
            f"run_dir={self.directory}",
            *overrides,
            log=self.directory / f"log-{self.starts:04d}",
            ranks=ranks,
            inject=partial(record_history, self.history, self.starts),
        )

    def reaches(self, one: Incarnation, step: int) -> bool:
        """Wait until a step is printed, and a moment longer. Returns False if a rank ends before."""
        while one.step < step:
            if not all(rank.is_alive() for rank in one.ranks):
                return False
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, 0.05))
        return all(rank.is_alive() for rank in one.ranks)

    def strike(self, kind: str, one: Incarnation) -> Incarnation:
        """Inject one fault. Returns the incarnation that goes on, or a new one."""
        before = one.step
        victim = self.draw.randrange(len(one.ranks))
        match kind:
            case "SIGKILL of a rank":
                one.signal(signal.SIGKILL, victim)
                time.sleep(self.draw.uniform(0, 0.3))  # the other ranks go on for a moment
                one.kill()
            case "SIGKILL at the start":
                one.kill()
                one = self.start()
                time.sleep(self.draw.uniform(0, 3))
                one.kill()
            case "SIGKILL of the launcher":
                one.kill()
                self.kill_a_launcher()
            case "SIGUSR1" | "SIGTERM":
                one.signal(signal.Signals[kind], victim)
                assert set(one.wait()) <= {REQUEUE}, one.output
                again = self.start(last=one)
                self.is_resumed(again, one.step, exactly=True)
                return again
            case "SIGSTOP for a moment":
                one.signal(signal.SIGSTOP, victim)
                time.sleep(self.draw.uniform(0.1, DEADLINE / 2 - 0.5))
                one.signal(signal.SIGCONT, victim)
                return one
            case "SIGSTOP for long" if len(one.ranks) == 1:
                one.signal(signal.SIGSTOP)  # no other rank watches this one
                time.sleep(DEADLINE + 1)
                one.signal(signal.SIGCONT)
                return one
            case "SIGSTOP for long":
                one.signal(signal.SIGSTOP, victim)
                statuses = one.wait(timeout=60)
                assert statuses[victim] == -signal.SIGKILL and REQUEUE in statuses, one.output
            case "SIGSTOP, superseded":
                one.signal(signal.SIGSTOP)
                new = self.start()
                self.reaches(new, 1)
                one.signal(signal.SIGCONT)
                assert set(one.wait(timeout=60)) <= {2, REQUEUE}, one.output
                return new
            case _:
                raise AssertionError(kind)
        again = self.start(last=one)
        self.is_resumed(again, before)
        return again

    def kill_a_launcher(self) -> None:
        """Continue the run under torchrun, and kill torchrun while it trains. Its ranks may stay alive."""
        self.starts += 1
        log = self.directory / f"log-{self.starts:04d}"
        command = [str(self.history), str(self.starts), "train", str(self.twin.config)]
        command.append(f"run_dir={self.directory}")
        torchrun = start_under_torchrun(command, ranks=2, log=log, module="tests.faults.observed")
        self.figures.starts["torchrun, DP 2"] += 1
        deadline = time.monotonic() + 120
        while "\nstep " not in log.read_text() and torchrun.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        assert torchrun.poll() is None, log.read_text()
        time.sleep(self.draw.uniform(0, 1))
        self.stray = psutil.Process(torchrun.pid).children(recursive=True)
        torchrun.kill()
        torchrun.wait()
        if self.draw.random() < 0.5:  # as happens when a cgroup ends
            self.end_stray()

    def end_stray(self) -> None:
        for process in self.stray:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.stray, timeout=10)
        self.stray = []

    def is_resumed(self, one: Incarnation, before: int, *, exactly: bool = False) -> None:
        """Check that at most an unfinished checkpoint and the steps after it are lost."""
        one.until(lambda: one.step or not one.alive)
        lost = before - one.resumed
        assert lost == 0 if exactly else lost <= 2 * EVERY, (before, one.resumed)

    def check_end(self, is_close: Callable[[str, Tensor, Tensor], bool]) -> None:
        """Check that samples, metrics, weights and Adam's state are those of the undisturbed run."""
        units, total = units_of_steps(self.history)
        assert units == self.twin.units
        self.figures.repeated += total - self.twin.steps
        found, expected = metrics_of_steps(self.directory), self.twin.metrics
        # Each step is there once and in order, even if it was repeated.
        assert [(step, rate) for step, _, rate in found] == [(step, rate) for step, _, rate in expected]
        assert is_close("loss", losses_of_steps(found), losses_of_steps(expected))
        tensors, state = end_of(self.directory, self.twin.steps)
        assert state == self.twin.state
        assert tensors.keys() == self.twin.tensors.keys()
        for name, tensor in tensors.items():
            assert is_close(name, tensor, self.twin.tensors[name]), name


def units_of_steps(history: Path) -> tuple[dict[int, Counter[int]], int]:
    """The units of each step, as the newest start has trained it, and the number of steps of all starts.

    The units of an older start in a step must be a part of the newest start's units. They may be fewer,
    because a killed start may have finished the step on some ranks only.
    """
    starts: defaultdict[int, defaultdict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for file in history.iterdir():
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            starts[int(file.name[:4])][entry["step"]].update(entry["units"])
    units: dict[int, Counter[int]] = {}
    for _, steps in sorted(starts.items(), reverse=True):
        for step, trained in steps.items():
            assert not trained - units.setdefault(step, trained), step
    return dict(sorted(units.items())), sum(map(len, starts.values()))


def end_of(run_dir: Path, steps: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and Adam's state of the last checkpoint, and its step and position in the data."""
    directory = manifest.step_directory(run_dir / "checkpoints", steps)
    stored = manifest.read_manifest(directory)
    state = {"step": stored["step"], "consumed_packs": stored["state"]["consumed_packs"]}
    return checkpoint_tensors(directory), state


def undisturbed(
    directory: Path, steps: int, layout: Layout = EXACT["DP 2"], *, lr: float = 1e-3
) -> Undisturbed:
    """Prepare a run, and run it to its last step without faults."""
    ranks, overrides = layout
    small_run(
        directory,
        model={"num_layers": 2},
        optimizer={"lr": lr, "schedule": "cosine", "warmup_steps": 10, "clip_grad": 0.0, "weight_decay": 0.1},
        train={"steps": steps, "global_batch": 2, "step_deadline": DEADLINE, "export_hf": False},
        checkpoint={"every": EVERY, "keep": 2},
    )
    config, whole, history = directory / "config.yaml", directory / "whole", directory / "history"
    history.mkdir()
    inject = partial(record_history, history, 0)
    log = directory / "whole.log"
    run = Incarnation(config, f"run_dir={whole}", *overrides, log=log, ranks=ranks, inject=inject)
    assert run.wait(timeout=1800) == [0] * ranks, run.output
    tensors, state = end_of(whole, steps)
    units, total = units_of_steps(history)
    counts = sum(units.values(), Counter()).values()
    assert total == steps and max(counts) - min(counts) <= 1  # each epoch has each unit once
    return Undisturbed(config, steps, tensors, state, metrics_of_steps(whole), units)


def metrics_of_steps(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of each training line, in the order of the file."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines if line["kind"] == "train"]


def losses_of_steps(metrics: Sequence[tuple[int, float, float]]) -> Tensor:
    return torch.tensor([loss for _, loss, _ in metrics], dtype=torch.float64)
