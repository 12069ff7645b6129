"""A whole run in days, GPU-hours, disk space, requeues and interruptions."""

import dataclasses

import pytest
from typer.testing import CliRunner

from megatron_post.cli import app
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import gpu
from megatron_post.plan.outlook import Outlook, most_checkpoints
from megatron_post.train.shards import checkpoint_bytes
from tests.tiny import tiny_config
from tests.unit.plan.test_memory import llama_config

H100 = gpu("h100-80gb")


def _outlook(steps: int = 1000, **checkpoint: int) -> Outlook:
    config = llama_config(
        "llama3.1_8b",
        {},
        train={"steps": steps, "global_batch": 16},
        checkpoint={"every": 100, "keep": 2, **checkpoint},
    )
    return Outlook(make_plan(config, gpus=16, gpu=H100))


def test_hours_and_interruptions_by_hand() -> None:
    """1,000 steps on two nodes, of which each fails once in 100 hours. Half of 100 steps are repeated."""
    outlook = dataclasses.replace(_outlook(), node_hours=100.0)
    step = outlook.plan.time.seconds
    training = 1000 * step / 3600
    failures = training * 2 / 100
    hours = training + failures * (50 * step + 600) / 3600
    assert outlook.training_hours == pytest.approx(training)
    assert outlook.interruptions == pytest.approx(failures)
    assert outlook.hours == pytest.approx(hours)
    assert outlook.gpu_hours == pytest.approx(16 * hours)


@pytest.mark.parametrize(("jobs", "requeues"), [(0.9, 0), (1.0, 0), (1.1, 1), (3.5, 3)])
def test_requeues(jobs: float, requeues: int) -> None:
    outlook = _outlook()
    assert dataclasses.replace(outlook, time_limit=outlook.hours * 3600 / jobs).requeues == requeues


def test_a_run_without_checkpoints_loses_half_of_its_steps() -> None:
    outlook = _outlook(every=0)
    assert outlook.lost_seconds == pytest.approx(500 * outlook.plan.time.seconds + 600)
    assert _outlook(steps=10).lost_seconds == pytest.approx(5 * outlook.plan.time.seconds + 600)


def test_disk_space_is_that_of_the_saved_tensors() -> None:
    outlook = _outlook()
    assert outlook.checkpoint_bytes == checkpoint_bytes(outlook.plan.config)
    assert outlook.values["checkpoints_bytes"] == 3 * checkpoint_bytes(outlook.plan.config)


@pytest.mark.parametrize(
    ("steps", "keep_every", "count"),
    [(100, 0, 3), (100, 20, 6), (100, 15, 5), (100, 1000, 3), (105, 20, 7), (5, 20, 3)],
)
def test_checkpoints_at_the_end(steps: int, keep_every: int, count: int) -> None:
    """Checkpoints are saved after steps 10, 20, ... 100.

    While 100 is written, 80 and 90 are the newest two. Older ones are kept if they are multiples of
    `keep_every`: 20, 40 and 60 for 20, or 30 and 60 for 15. While 105 is written, 80 is older too.
    """
    checkpoint = {"every": 10, "keep": 2, "keep_every": keep_every}
    assert most_checkpoints(tiny_config(checkpoint=checkpoint, train={"steps": steps})) == count


def test_the_commands() -> None:
    runner = CliRunner()
    arguments = ["configs/llama3_8b/sft.yaml", "--gpus", "8"]
    output = runner.invoke(app, ["plan", *arguments, "--time-limit", "1", "--node-mtbf", "100"]).output
    assert "GPU-hours" in output and "requeues with a time limit of 1.0 hours" in output
    assert "if one fails in 100 hours" in output
    second = ["configs/llama3_8b/dpo.yaml", "--gpus", "8", "--gpus-of-second", "16"]
    compared = runner.invoke(app, ["plan", "compare", arguments[0], *second]).output
    assert "16 x h100-80gb" in compared and "seconds a step" in compared
