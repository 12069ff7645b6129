"""Careless actions of users against a live run. The run ends well, or its message says what is wrong."""

import shutil
import signal
import time

import pytest

from megatron_post.storage import manifest
from megatron_post.train.signals import REQUEUE
from tests.faults.conftest import FIGURES, STEPS, Run, losses
from tests.faults.injections import BAD_STEP, nan_loss, slow_steps

pytestmark = pytest.mark.usefixtures("whole_set")


def test_one_signal_after_another(run: Run) -> None:
    """SIGTERM and SIGUSR1 are sent to both ranks many times, from the middle of a save on.

    The run writes one more checkpoint and ends once.
    """
    first = run.start()
    first.until(lambda: first.step >= 3 and list(run.root.glob(".partial-*")))
    while first.alive:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            first.signal(number)
            time.sleep(0.005)
        if "asked to stop" in first.output:
            break
    assert first.wait() == [REQUEUE, REQUEUE], first.output
    manifest.verify_step(manifest.step_directory(run.root, run.published[-1]))
    second = run.start()
    assert second.wait() == [0, 0], second.output
    assert second.resumed == first.step
    run.check_end()
    FIGURES.append("SIGTERM and SIGUSR1 by the dozen: saved once, left with 75")


def test_checkpoints_removed_while_it_runs(run: Run) -> None:
    """After `rm -r RUN/checkpoints` the run goes on and saves again. If a save fails, it reports that."""
    first = run.start("train.steps=60")
    first.until(lambda: first.step >= 4)
    shutil.rmtree(run.root, ignore_errors=True)
    statuses = first.wait()
    if statuses != [0, 0]:
        assert statuses == [2, 2], first.output
        assert "a checkpoint could not be saved" in first.output
    for step in run.published:
        manifest.verify_step(manifest.step_directory(run.root, step))
    FIGURES.append(f"checkpoints removed under a live run: ended with {statuses}")


def test_a_deadline_shorter_than_a_step(run: Run) -> None:
    """The report says that no rank is missing."""
    first = run.start("train.step_deadline=2", inject=slow_steps)
    assert first.wait() == [REQUEUE, REQUEUE], first.output
    assert "train.step_deadline is too short" in first.output
    assert "ranks 0-1 waiting in step 3, data" in first.output


def test_rollback_before_the_first_checkpoint(run: Run) -> None:
    """Without a checkpoint the next start begins at step 0, and skips the packs that were not finite."""
    settings = ("train.on_not_finite=rollback", "checkpoint.every=100")
    first = run.start(*settings, inject=nan_loss)
    assert first.wait() == [REQUEUE, REQUEUE], first.output
    assert "no checkpoint to go back to" in first.output and run.published == []
    second = run.start(*settings)
    assert second.wait() == [0, 0], second.output
    before = list(range(1, BAD_STEP))
    assert [step for step, _ in losses(run.directory)] == [*before, *before, *range(BAD_STEP + 1, STEPS + 1)]
    FIGURES.append("rollback without a checkpoint: left with 75, started anew without those packs")
