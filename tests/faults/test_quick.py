"""One fault of each kind, in under two minutes. `make fault-test` runs many of each."""

import signal
import time

import pytest

from megatron_post.storage import manifest
from megatron_post.train.signals import REQUEUE
from tests.faults.conftest import Run, weights
from tests.faults.injections import nan_gradient, nan_loss


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_one_rank_saves_and_asks_for_a_requeue(run: Run, number: signal.Signals) -> None:
    first = run.start()
    first.until(lambda: first.step >= 3)
    first.signal(number, 1)
    assert first.wait() == [REQUEUE, REQUEUE], first.output
    saved = run.published[-1]
    assert f"saved after step {saved}" in first.output
    manifest.verify_step(manifest.step_directory(run.root, saved))
    second = run.start()
    assert second.wait() == [0, 0], second.output
    assert second.resumed == saved == first.step
    run.check_end()


def test_kill_in_the_middle_of_a_save(run: Run) -> None:
    first = run.start()
    first.until(lambda: first.step >= 2 and list(run.root.glob(".partial-*")))
    first.signal(signal.SIGKILL, 0)
    first.kill()
    for step in run.published:
        manifest.verify_step(manifest.step_directory(run.root, step))
    second = run.start()
    assert second.wait() == [0, 0], second.output
    assert not list(run.root.glob(".*tial-*"))
    run.check_end()


def test_a_suspended_rank_is_reported_and_the_job_ends(run: Run) -> None:
    """The deadline is 4 s and the job ends within 9 s, although a suspended process cannot end itself."""
    first = run.start("train.step_deadline=4")
    first.until(lambda: first.step >= 3)
    first.signal(signal.SIGSTOP, 1)
    began = time.monotonic()
    assert first.wait(timeout=60) == [REQUEUE, -signal.SIGKILL], first.output
    assert time.monotonic() - began < 4 + 5
    assert "rank 1 does not answer" in first.output
    (report,) = run.directory.glob("watchdog/epoch-*/report.txt")
    assert "rank 0 waiting in step" in report.read_text()
    assert "in step" in (report.parent / "rank-0.txt").read_text()  # the trainer's frame
    second = run.start()
    assert second.wait() == [0, 0], second.output
    run.check_end()


@pytest.mark.parametrize("inject", [nan_loss, nan_gradient])
def test_not_finite_on_one_rank_is_reported_before_the_weights_change(run: Run, inject: object) -> None:
    first = run.start(inject=inject)
    assert first.wait() == [2, 2], first.output
    kind = "loss" if inject is nan_loss else "gradient"
    assert "step 5: not finite" in first.output
    assert f"rank 1, microbatch 1: {kind}; samples sums:" in first.output
    assert "rank 0, microbatch" not in first.output
    assert run.published[-1] == 4
    second = run.start()  # without the fault
    assert second.wait() == [0, 0], second.output
    run.check_end()


def test_skip_and_rollback_agree(run: Run) -> None:
    """Both policies skip the packs of step 5, "rollback" after returning to step 4.

    A kill changes nothing.
    """
    ends = []
    for policy in ("skip", "rollback"):
        one = Run(run.config, run.directory.with_name(policy), run.expected, run.losses)
        policy_override = f"train.on_not_finite={policy}"
        first = one.start(policy_override, inject=nan_loss)
        first.until(lambda first=first: first.step >= 7)
        first.kill()
        assert "these packs are skipped from now on" in first.output
        assert ("rolled back to step 4" in first.output) == (policy == "rollback")
        second = one.start(policy_override)
        assert second.wait() == [0, 0], second.output
        ends.append(weights(one.directory))
    assert ends[0] == ends[1] != run.expected


def test_a_suspended_incarnation_that_resumes_publishes_nothing(run: Run) -> None:
    old = run.start(name="1.0")
    old.until(lambda: old.step >= 3)
    old.signal(signal.SIGSTOP)
    new = run.start(name="1.1")
    assert new.wait() == [0, 0], new.output
    before = {path.name: path.stat().st_mtime_ns for path in run.root.iterdir()}
    old.signal(signal.SIGCONT)
    assert old.wait() == [2, 2], old.output
    assert "incarnation 1.0 (epoch 1) may not publish" in old.output
    assert {path.name: path.stat().st_mtime_ns for path in run.root.glob("step-*")} == {
        name: time for name, time in before.items() if name.startswith("step-")
    }
    for step in run.published:
        manifest.verify_step(manifest.step_directory(run.root, step))
    assert weights(run.directory) == run.expected
