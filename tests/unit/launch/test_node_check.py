"""Reports of broken nodes lead to findings, and the whole check runs on real ranks."""

import contextlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_post.config.sections import Parallel
from megatron_post.launch import node_check
from megatron_post.launch.node_check import check_nodes
from megatron_post.launch.node_findings import (
    Arrival,
    Finding,
    Report,
    gpu_faults,
    judge,
    judge_arrivals,
    judge_clocks,
)
from megatron_post.launch.placement import Placement
from tests.ranks import run_ranks

# TP 2 x DP 2 on two nodes: TP groups 0-1 and 2-3, DP groups 0,2 and 1,3
PLACEMENT = Placement(2, 1, 2, 1, ranks_per_node=2)


def _reports(**changes: Callable[[Report], Report]) -> list[Report]:
    """Four healthy reports; `rank2=...` changes the one of rank 2."""
    collectives = {"TP": 0.002, "DP": 0.004}
    healthy = [Report(r, f"n{r // 2}", clock=100.0, compute=0.010, collectives=collectives) for r in range(4)]
    return [changes.get(f"rank{r.rank}", lambda report: report)(r) for r in healthy]


def _texts(findings: list[Finding], *, is_fatal: bool) -> list[str]:
    return [finding.text for finding in findings if finding.is_fatal == is_fatal]


def test_healthy_reports_give_no_findings() -> None:
    assert judge(_reports(), PLACEMENT) == []
    arrivals = [Arrival(rank, f"n{rank // 2}", gpus=2) for rank in range(4)]
    assert judge_arrivals(arrivals, PLACEMENT, waited=180) == []


def test_absent_ranks_and_broken_gpus_are_fatal() -> None:
    """Rank 1 is absent. Node n1 has one GPU for its two ranks, and that GPU has memory errors."""
    faults = ["GPU 0 has 3 uncorrected memory errors"]
    arrivals = [Arrival(0, "n0", 2), Arrival(2, "n1", 1, faults), Arrival(3, "n1", 1)]
    assert _texts(judge_arrivals(arrivals, PLACEMENT, waited=180), is_fatal=True) == [
        "ranks 1 did not arrive within 180 s (node number 0 of the job, from 0)",
        "node n1 has 1 GPUs for 2 ranks",
        "node n1: GPU 0 has 3 uncorrected memory errors",
    ]


def test_unfit_versions_are_fatal() -> None:
    """One image is on all nodes, so a text that all of them report is one finding."""
    unfit = ["torch 2.5.1 is not one of 2.6 or newer"]
    arrivals = [Arrival(r, f"n{r // 2}", 2, unfit=unfit if r % 2 == 0 else []) for r in range(4)]
    assert _texts(judge_arrivals(arrivals, PLACEMENT, waited=180), is_fatal=True) == [
        "node n0 and 1 more: torch 2.5.1 is not one of 2.6 or newer"
    ]


def test_a_cpu_cluster_lacks_no_gpus() -> None:
    arrivals = [Arrival(rank, "n0", gpus=0) for rank in range(4)]
    assert judge_arrivals(arrivals, PLACEMENT, waited=180) == []


def test_a_wrong_sum_is_fatal() -> None:
    reports = _reports(rank1=lambda r: replace(r, wrong_sums=["the all-reduce of its DP group is wrong"]))
    assert _texts(judge(reports, PLACEMENT), is_fatal=True) == [
        "node n0, rank 1: the all-reduce of its DP group is wrong"
    ]


def test_slow_node_and_slow_group_are_named() -> None:
    """n1 computes in 40 ms, the median of 10 and 40 is 25: 1.6 times. One TP group of four takes 40 ms, the
    others, and so the median, 2 ms."""
    reports = _reports(rank3=lambda r: replace(r, compute=0.040))
    assert _texts(judge(reports, PLACEMENT), is_fatal=False) == [
        "slow node n1: a matrix product takes 1.6 times the median node's"
    ]
    wide = Placement(2, 1, 4, 1, ranks_per_node=2)
    reports = [
        Report(rank, f"n{rank // 2}", 100.0, 0.010, {"TP": 0.040 if rank in (4, 5) else 0.002})
        for rank in range(8)
    ]
    (finding,) = judge(reports, wide)
    assert finding.text == ("slow TP group on n2: an all-reduce takes 40.0 ms, the median TP group's 2.0 ms")


def test_wrong_clocks_are_named() -> None:
    """By rank 0's clock the reports came between 100 and 103 s, so 99 is 1 s behind and 110 is 7 s ahead."""
    reports = _reports(
        rank1=lambda r: replace(r, clock=102.9),
        rank2=lambda r: replace(r, clock=99.0),
        rank3=lambda r: replace(r, host="n2", clock=110.0),
    )
    found = judge_clocks(reports, earliest=100.0, latest=[103.0] * 4)
    assert [finding.text for finding in found] == [
        "node n1: its clock is -1.0 s or more off rank 0's",
        "node n2: its clock is +7.0 s or more off rank 0's",
    ]


def test_faults_in_the_output_of_nvidia_smi() -> None:
    """A line has the index, the uncorrected errors, the hardware slowdown and the MiB in use."""
    assert gpu_faults("0, 0, Not Active, 4\n1, [N/A], Not Active, 530\n") == []
    found = gpu_faults("0, 2, Not Active, 4\n1, 0, Active, 0\n2, 0, Not Active, 40210\n")
    assert [text.split(":")[0] for text in found] == [
        "GPU 0 has 2 uncorrected memory errors",
        "GPU 1 is slowed down by its hardware (heat or power)",
        "GPU 2 has 40210 MiB in use already",
    ]


def _checked(name: str, parallel: Parallel, clock_error: float) -> tuple[bool, str]:
    """Whether this rank may start, and what it printed."""
    rank = int(os.environ["RANK"])
    os.environ |= {"SLURMD_NODENAME": f"n{rank // 2}", "SLURM_NTASKS_PER_NODE": "2"}
    real = time.time
    if name == "clock" and rank == 3:
        node_check.time.time = lambda: real() + clock_error  # type: ignore[attr-defined]
    if name == "absent":
        node_check.ARRIVAL_SECONDS = 3.0
        if rank == 3:
            return False, ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return check_nodes(parallel), out.getvalue()


def test_check_on_four_ranks() -> None:
    """Four gloo ranks with TP 2 x CP 2 may all start, and rank 3's wrong clock is named."""
    results = run_ranks(_checked, 4, "clock", Parallel(tensor=2, context=2), 60.0)
    assert [may_start for may_start, _ in results] == [True] * 4
    out = results[0][1]
    assert "warning: node n1: its clock is +" in out and "FAULT" not in out
    assert [text for _, text in results[1:]] == [""] * 3


def test_an_absent_rank_is_named() -> None:
    """Rank 3 never arrives, so no rank may start. The check ends within seconds."""
    results = run_ranks(_checked, 4, "absent", Parallel(), 0.0)
    assert [may_start for may_start, _ in results] == [False] * 4
    assert "FAULT: ranks 3 did not arrive within 3 s (node number 1 of the job" in results[0][1]


def test_a_layout_that_does_not_fit_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch --ntasks-per-node=3` with TP 2 has no groups to check, and no rank waits."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert check_nodes(Parallel(tensor=2))
