"""A soak: a run of two ranks has faults of every kind, and ends like a run without faults.

After each fault the same command is started again, often on another layout. The layouts are two data-parallel
ranks, one rank, and two pipeline ranks. With two packs a step and no clipping their arithmetic is the same to
the last bit. A gradient is the sum of two packs' gradients, which does not depend on their order, and Adam
works element by element. So weights, Adam's state, losses and rates must be equal and not only close.
`test_soak_over_tensor_parallel_ranks` describes the check for layouts that round differently.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.faults.conftest import FIGURES
from tests.faults.soak import (
    EVERY,
    EXACT,
    WITH_TP,
    Figures,
    Layout,
    Soak,
    Undisturbed,
    losses_of_steps,
    undisturbed,
)

SECONDS = float(os.environ.get("SOAK_SECONDS", 1800))  # no new run begins after this time
SEED = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(2**32)))
EACH_ONCE = (
    "SIGKILL of a rank",
    "SIGUSR1",
    "SIGKILL of the launcher",
    "SIGSTOP for a moment",
    "SIGSTOP for long",
    "SIGKILL at the start",
    "SIGSTOP, superseded",
)


def soak(
    twin: Undisturbed,
    directory: Path,
    kinds: Sequence[str],
    layouts: Mapping[str, Layout],
    *,
    seconds: float,
    is_close: Callable[[str, Tensor, Tensor], bool],
) -> Figures:
    """Repeat runs with faults until `seconds` have passed."""
    print(f"faults drawn from SOAK_SEED={SEED}")
    draw, figures, began = random.Random(SEED), Figures(), time.monotonic()
    while not figures.runs or time.monotonic() - began < seconds:
        figures.runs += 1
        order = draw.sample(kinds, len(kinds))
        one = Soak(twin, directory / f"run-{figures.runs}", draw, order, layouts, figures)
        one.to_the_end()
        one.check_end(is_close)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(figures.faults.items()))
    starts = ", ".join(f"{count} on {name}" for name, count in sorted(figures.starts.items()))
    FIGURES.append(
        f"soak: {figures.faults.total()} faults in {(time.monotonic() - began) / 60:.1f} min, in "
        f"{figures.runs} runs of {twin.steps} steps, saved every {EVERY} (seed {SEED})\n  faults: {faults}\n"
        f"  starts: {figures.starts.total()}: {starts}\n"
        f"  steps taken again: {figures.repeated}; hangs that no fault caused: {figures.hangs}"
    )
    return figures


def _equal(_: str, one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


@pytest.mark.slow
def test_each_fault_once(tmp_path: Path) -> None:
    """The short form. Weights, Adam's state and the samples of every step equal the undisturbed run's."""
    (tmp_path / "twin").mkdir()
    twin = undisturbed(tmp_path / "twin", 1000)
    soak(twin, tmp_path, EACH_ONCE, EXACT, seconds=0, is_close=_equal)


def test_soak(whole_set: None, tmp_path: Path) -> None:
    """The soak takes thirty minutes, and each of its runs has thirty-six faults."""
    (tmp_path / "twin").mkdir()
    twin = undisturbed(tmp_path / "twin", 3000)
    figures = soak(
        twin, tmp_path, (*EACH_ONCE, "SIGTERM", "SIGUSR1") * 4, EXACT, seconds=SECONDS, is_close=_equal
    )
    assert figures.faults.total() >= 30


def test_soak_over_tensor_parallel_ranks(whole_set: None, tmp_path: Path) -> None:
    """The samples must be exactly those of the undisturbed run, but weights may differ by rounding.

    Two tensor-parallel ranks sum in another order, and a difference in rounding affects all later steps. The
    distance of weights, Adam's state and losses may be at most ten times the distance that this layout causes
    without any fault.
    """
    for name in ("twin", "control"):
        (tmp_path / name).mkdir()
    # With this learning rate rounding differences stay small. With ten times the rate they grow to a tenth of
    # the values in 1,500 steps.
    twin = undisturbed(tmp_path / "twin", 1500, lr=1e-4)
    control = undisturbed(tmp_path / "control", 1500, WITH_TP["TP 2"], lr=1e-4)
    assert control.units == twin.units and control.state == twin.state
    allowed: dict[str, float] = defaultdict(float)
    for name, tensor in {**twin.tensors, "loss": losses_of_steps(twin.metrics)}.items():
        other = losses_of_steps(control.metrics) if name == "loss" else control.tensors[name]
        allowed[_kind(name)] = max(allowed[_kind(name)], 10 * _distance(other, tensor))
    assert 0 < max(allowed.values()) < 1e-3, allowed
    print(f"relative distances allowed: {dict(allowed)}")
    soak(
        twin,
        tmp_path,
        EACH_ONCE,
        WITH_TP,
        seconds=SECONDS / 10,
        is_close=lambda name, one, other: _distance(one, other) <= allowed[_kind(name)],
    )


def _kind(name: str) -> str:
    """Weight, first or second moment, or loss."""
    return name.split(".")[2] if name.startswith("optimizer.state.") else name.split(".")[0]


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())
