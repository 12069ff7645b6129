"""The behaviour of train.sbatch around its ranks, on a real Slurm.

The ranks are a shell script that fulfils the contract: on SIGUSR1 or SIGTERM it saves and ends with 75.
"""

import shutil
import time
from pathlib import Path

import pytest

from megatron_post.config.chain import load_chain
from megatron_post.config.load import ConfigError
from megatron_post.launch import slurm
from megatron_post.launch.chain import submit_chain
from megatron_post.launch.cluster import load_cluster
from megatron_post.launch.record import active_findings, cancel_run, record_job, status_rows
from megatron_post.launch.script import Job
from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab, wait_until
from tests.slurm.runs import preempt

# These tests mostly wait, and real runs train in the meantime.
pytestmark = pytest.mark.usefixtures("whole", "moved")

# $4 says what the rank does. Every rank runs this script, but only rank 0 writes checkpoints.
RANK = r"""#!/bin/bash
checkpoint() {
    [[ $SLURM_PROCID == 0 ]] || return 0
    mkdir -p "$RUN/checkpoints/step-0000000$1" && : >"$RUN/checkpoints/step-0000000$1/manifest.json"
}
leave() { checkpoint $((${SLURM_RESTART_COUNT:-0} + 1)); sleep 0.$SLURM_PROCID; exit 75; }
trap leave USR1 TERM
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS local $SLURM_LOCALID on $SLURMD_NODENAME" \
    "incarnation $MEGATRON_POST_INCARNATION at $MASTER_ADDR:$MASTER_PORT"
case $4 in
done) exit 0 ;;
crash) [[ $SLURM_PROCID == 1 ]] && exit 3; sleep 60 ;;
loop) exit 75 ;;
until-lost) until [[ -e $RUN/finish ]]; do [[ -e $RUN/lost ]] && exit 1; sleep 0.1; done ;;
hang) [[ $SLURM_PROCID == 2 ]] && kill -STOP $$; exit 75 ;;
wait) until [[ -e $RUN/finish ]]; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "rank.sh"
    path.write_text(RANK)
    path.chmod(0o755)
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    return path


def _submit(
    directory: Path, cluster_file: str, what: str, *, name: str = "job", nodes: int = 2
) -> tuple[int, Path]:
    """Job id and log of ranks that do `what`. Rank scripts receive `-m megatron_post train WHAT`."""
    cluster = load_cluster(cluster_file)
    job = Job(name, ("train", what), "run", directory, nodes=nodes)
    submitted = record_job([job.folder], job, slurm.submit(job, cluster))
    return submitted.job_id, submitted.log


def _log(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _nodes(lab: Lab, job: int) -> list[str]:
    return lab("scontrol", "show", "hostnames", lab("squeue", "-h", "-j", str(job), "-o", "%N")).split()


def _wait_for_line(path: Path, text: str, times: int = 1, timeout: float = 60) -> None:
    wait_until(lambda: _log(path).count(text) >= times, timeout, lambda: f"{text!r} not in {_log(path)}")


@pytest.fixture(scope="module", autouse=True)
def limited(
    lab: Lab, clusters: ClusterFiles, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Path]:
    """Job, log and directory of ranks with a time limit of a minute, Slurm's shortest.

    They run while other tests run. Slurm checks limits twice a minute, and sends the warning up to 30 s
    early.
    """
    directory = tmp_path_factory.mktemp("limited")
    path = directory / "rank.sh"
    path.write_text(RANK.replace("$RUN", str(directory / "run")))
    path.chmod(0o755)
    cluster_file = clusters(python=str(path), time_limit="1:00", warning_seconds=20)
    return *_submit(directory, cluster_file, "wait"), directory


def test_ranks_have_number_address_and_incarnation(
    lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path
) -> None:
    """Four ranks run in order, two on each node, with one address and port.

    The incarnation is made from the job and its restarts.
    """
    job, log = _submit(tmp_path, clusters(python=str(rank)), "done")
    assert lab.wait(job, "COMPLETED", "FAILED") == "COMPLETED", _log(log)
    lines = sorted(line.split() for line in _log(log).splitlines() if line.startswith("rank "))
    assert [line[1] for line in lines] == ["0", "1", "2", "3"]
    assert [line[5] for line in lines] == ["0", "1", "0", "1"]
    assert lines[0][7] == lines[1][7] != lines[2][7] == lines[3][7]
    assert {line[9] for line in lines} == {str(job * 1000000)}
    assert len({line[11] for line in lines}) == 1


def test_job_names_are_never_run(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """A shell never runs a job's name or its arguments."""
    name = f"$(touch {tmp_path}/witness) `touch {tmp_path}/witness` 'x' \" JobState=FAKED"
    job, log = _submit(tmp_path, clusters(python=str(rank)), "done", name=name, nodes=1)
    assert lab.wait(job, "COMPLETED", "FAILED") == "COMPLETED", _log(log)
    assert lab("squeue", "-h", "--states=all", "-j", str(job), "-o", "%j") == name
    assert slurm.job_state(job).state == "COMPLETED"
    assert not (tmp_path / "witness").exists()
    (row,) = status_rows(tmp_path / "run")
    assert (row["name"], row["state"], row["why"]) == (name, "COMPLETED", "done")


def test_warning_requeues_the_job(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """Slurm's warning reaches all ranks, each ends with 75 at its own pace, and the requeued job continues.

    Each incarnation has a higher number than the last one, and its own port.
    """
    job, log = _submit(tmp_path, clusters(python=str(rank)), "wait")
    _wait_for_line(log, "rank 3 of 4")
    lab("scancel", "--batch", "--signal=USR1", str(job))
    lab.restarted(job, 1, lambda: _log(log))
    _wait_for_line(log, "rank 3 of 4", times=2)
    assert status_rows(tmp_path / "run")[0]["checkpoint"] == "1"
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(job, "COMPLETED", "FAILED") == "COMPLETED", _log(log)
    text = _log(log)
    assert "the ranks asked for it after USR1: requeued after checkpoint 1" in text
    assert "restart 1, checkpoint 1, 0 without progress" in text
    assert f"incarnation {job * 1000000 + 1}" in text
    ports = {line.rsplit(":", 1)[1] for line in text.splitlines() if line.startswith("rank 0")}
    assert len(ports) == 2


def test_preempted_with_grace(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """A more urgent job takes the nodes.

    The ranks save within the grace time, and the job waits and continues.
    """
    job, log = _submit(tmp_path, clusters(python=str(rank), partition="spot"), "wait")
    _wait_for_line(log, "rank 3 of 4")
    preempt(lab, job)
    lab.restarted(job, 1, lambda: _log(log))
    _wait_for_line(log, "rank 3 of 4", times=2)
    assert "requeued after checkpoint 1" in _log(log)
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(job, "COMPLETED", "FAILED") == "COMPLETED", _log(log)
    assert lab.restarts(job) == 1


def test_a_crash_is_not_requeued(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """One rank fails.

    The other ranks are stopped at once, and the job fails because all nodes are healthy.
    """
    started = time.monotonic()
    job, log = _submit(tmp_path, clusters(python=str(rank)), "crash")
    assert lab.wait(job, "COMPLETED", "FAILED") == "FAILED", _log(log)
    assert time.monotonic() - started < 40
    assert "the ranks (rank 1 on" in _log(log) and "ended with status 3)" in _log(log)
    assert "on fit nodes, so the job is not requeued" in _log(log)
    assert lab.restarts(job) == 0
    assert "not requeued" in status_rows(tmp_path / "run")[0]["why"]


def test_an_unfit_node_is_left_out(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """A health check drains a node, and a rank fails. The job is requeued without that node."""
    job, log = _submit(tmp_path, clusters(python=str(rank)), "until-lost")
    _wait_for_line(log, "rank 3 of 4")
    unfit = _nodes(lab, job)[0]
    lab("scontrol", "update", f"NodeName={unfit}", "State=DRAIN", "Reason=test")
    (tmp_path / "run" / "lost").touch()
    _wait_for_line(log, f"unfit node ({unfit} drain")
    (tmp_path / "run" / "lost").unlink()
    lab.restarted(job, 1, lambda: _log(log))
    _wait_for_line(log, "rank 3 of 4", times=2)
    assert unfit not in _nodes(lab, job)
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(job, "COMPLETED", "FAILED") == "COMPLETED", _log(log)
    lab("scontrol", "update", f"NodeName={unfit}", "State=RESUME")


def test_requeue_loop_stops_with_a_reason(
    lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path
) -> None:
    """Ranks always request a requeue. After 2 restarts without a new checkpoint the job stops."""
    job, log = _submit(tmp_path, clusters(python=str(rank), max_stalled_restarts=1), "loop", nodes=1)
    _wait_for_line(log, "stopped: ", timeout=120)
    assert lab.wait(job, "COMPLETED", "FAILED") == "FAILED", _log(log)
    assert lab.restarts(job) == 2
    assert _log(log).count("rank 0 of 2") == 2
    (row,) = status_rows(tmp_path / "run")
    assert row["why"].startswith("stopped: 2 restarts in a row without progress since checkpoint 0")
    assert "for this reason: the ranks asked for it" in row["why"]


def test_a_hanging_rank_is_killed(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """A watchdog ends the ranks with 75, but one does not react.

    It is killed after 5 s, and the job is requeued.
    """
    job, log = _submit(tmp_path, clusters(python=str(rank)), "hang")
    lab.restarted(job, 1, lambda: _log(log))
    assert "the ranks asked for it: requeued after checkpoint 0" in _log(log)
    lab("scancel", str(job))
    lab.wait(job, "CANCELLED")


def test_cancelled_stays_cancelled(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """`launch cancel` causes no requeue, although the ranks save and end with 75."""
    job, log = _submit(tmp_path, clusters(python=str(rank)), "wait")
    _wait_for_line(log, "rank 3 of 4")
    (found,) = active_findings([str(tmp_path / "run"), str(tmp_path / "other")])
    assert f"job {job} is queued or running for it" in found
    assert cancel_run(tmp_path / "run") == [job]
    assert lab.wait(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    time.sleep(2)
    assert (slurm.job_state(job).state, lab.restarts(job)) == ("CANCELLED", 0)
    assert cancel_run(tmp_path / "run") == active_findings([str(tmp_path / "run")]) == []


def test_chain(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """A step waits for the steps before it. After a failed step, no later step runs or stays queued."""
    (tmp_path / "chain.yaml").write_text(
        """
run_dir: run
steps:
  - {name: last, command: [train, done], after: [left, right]}
  - {name: left, command: [train, done], after: [first]}
  - {name: right, command: [train, wait], after: [first]}
  - {name: first, command: [train, done], ranks_per_node: 1}
"""
    )
    chain, cluster = load_chain(tmp_path / "chain.yaml"), load_cluster(clusters(python=str(rank)))
    first, left, right, last = submit_chain(chain, cluster, tmp_path)
    assert [job.name for job in (first, left, right, last)] == ["first", "left", "right", "last"]
    assert last.after == (left.job_id, right.job_id)
    lab.wait(left.job_id, "COMPLETED")
    _wait_for_line(right.log, "rank 1 of 2")
    # A job is requeued in the middle of the chain. The later jobs continue to wait.
    lab("scontrol", "requeue", str(right.job_id))
    lab.restarted(right.job_id, 1, lambda: _log(right.log))
    _wait_for_line(right.log, "rank 1 of 2", times=2)
    assert lab.state(last.job_id) == "PENDING"
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(last.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert lab.restarts(right.job_id) == 1

    (tmp_path / "chain.yaml").write_text(
        """
run_dir: run
steps:
  - {name: fails, command: [train, crash]}
  - {name: never, command: [train, done], after: [fails]}
"""
    )
    fails, never = submit_chain(load_chain(tmp_path / "chain.yaml"), cluster, tmp_path)
    assert lab.wait(fails.job_id, "FAILED", "COMPLETED") == "FAILED"
    assert lab.wait(never.job_id, "CANCELLED", "COMPLETED") == "CANCELLED"
    assert not never.log.exists()


def test_small_steps_share_a_job(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """Three steps run one after the other in a job on the CPU partition, and training follows elsewhere.

    After a requeue the job begins with the unfinished step, the second one, and repeats none.
    """
    (tmp_path / "chain.yaml").write_text(
        """
run_dir: run
steps:
  - {name: a, command: [data, done]}
  - {name: b, command: [data, wait], after: [a]}
  - {name: c, command: [data, done], after: [b]}
  - {name: last, command: [train, done], after: [c]}
"""
    )
    cluster = load_cluster(clusters(python=str(rank), cpu_partition="urgent"))
    shared, last = submit_chain(load_chain(tmp_path / "chain.yaml"), cluster, tmp_path)
    assert (shared.name, last.after) == ("a+b+c", (shared.job_id,))
    ended = "command 1 of this job has ended with 0; the next one is data wait"
    _wait_for_line(shared.log, "rank 0 of 1", times=2)
    assert ended in _log(shared.log)
    assert lab("squeue", "-h", "-j", str(shared.job_id), "-o", "%P %D %C") == "urgent 1 2"
    lab("scontrol", "requeue", str(shared.job_id))
    lab.restarted(shared.job_id, 1, lambda: _log(shared.log))
    _wait_for_line(shared.log, "rank 0 of 1", times=3)
    assert lab.state(last.job_id) == "PENDING"
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(shared.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert lab.wait(last.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert _log(shared.log).count("rank 0 of 1") == 4 and _log(shared.log).count(ended) == 1
    assert "command 2 of this job has ended with 0; the next one is data done" in _log(shared.log)


def test_a_step_of_a_chain_is_an_array(lab: Lab, clusters: ClusterFiles, tmp_path: Path, rank: Path) -> None:
    """Each task has its own command, run_dir and log, as the variants of a sweep have.

    A requeued task starts alone again. The step behind the array waits for all tasks, and never starts if
    one of them fails.
    """
    chain_file = """
run_dir: run
steps:
  - name: variants
    tasks:
      - {command: [train, done], run_dir: run/variant-1}
      - {command: [train, WHAT], run_dir: run/variant-2}
      - {command: [train, done], run_dir: run/variant-3}
  - {name: merge, command: [train, done], after: [variants]}
"""
    cluster = load_cluster(clusters(python=str(rank)))
    (tmp_path / "chain.yaml").write_text(chain_file.replace("WHAT", "wait"))
    first, second, third, merge = submit_chain(load_chain(tmp_path / "chain.yaml"), cluster, tmp_path)
    assert merge.after == (int(str(first.job_id).removesuffix("_0")),)
    for job, number in ((first, 1), (second, 2), (third, 3)):
        assert job.run_dir == tmp_path / "run" / f"variant-{number}"
        _wait_for_line(job.log, "rank 1 of 2", timeout=120)
    for job in (first, third):
        assert lab.wait(job.job_id, "COMPLETED", "FAILED") == "COMPLETED"
    lab("scontrol", "requeue", str(second.job_id))
    _wait_for_line(second.log, "rank 1 of 2", times=2, timeout=120)
    assert lab.state(merge.job_id) == "PENDING" and not merge.log.exists()
    (tmp_path / "run" / "finish").touch()
    assert lab.wait(merge.job_id, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert [_log(job.log).count("rank 1 of 2") for job in (first, second, third)] == [1, 2, 1]

    (tmp_path / "chain.yaml").write_text(chain_file.replace("WHAT", "crash"))
    _, crash, _, never = submit_chain(load_chain(tmp_path / "chain.yaml"), cluster, tmp_path)
    assert lab.wait(crash.job_id, "FAILED", "COMPLETED") == "FAILED"
    assert lab.wait(never.job_id, "CANCELLED", "COMPLETED") == "CANCELLED"
    assert not never.log.exists()


def test_a_refused_chain_leaves_nothing_queued(lab: Lab, clusters: ClusterFiles, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(
        """
run_dir: run
steps:
  - {name: small, command: [train, done]}
  - {name: too-large, command: [train, done], nodes: 4000, after: [small]}
"""
    )
    before = set(lab("squeue", "-h", "-o", "%i").split())
    with pytest.raises(slurm.SlurmError, match=r"too-large.* failed: sbatch: error"):
        submit_chain(load_chain(tmp_path / "chain.yaml"), load_cluster(clusters()), tmp_path)
    assert set(lab("squeue", "-h", "-o", "%i").split()) == before


def test_time_limit(lab: Lab, limited: tuple[int, Path, Path]) -> None:
    """Slurm warns the ranks before the limit. They save, and the job continues."""
    job, log, directory = limited
    # It restarts more often if the tests before took longer.
    wait_until(lambda: lab.restarts(job) >= 1, 90, lambda: _log(log))
    (directory / "run" / "finish").touch()
    assert lab.wait(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", _log(log)
    assert "the ranks asked for it after USR1: requeued after checkpoint 1" in _log(log)


def test_everything_wrong_at_once(lab: Lab, clusters: ClusterFiles, data: Path, tmp_path: Path) -> None:
    """One error has the findings about layout, tokenizer, weights, store and Slurm's refusal.

    Nothing is queued.
    """
    from megatron_post.launch.launch import launch_run

    shutil.copy(data / "config.yaml", tmp_path / "config.yaml")
    before = lab("squeue", "-h", "-o", "%i")
    with pytest.raises(ConfigError) as error:
        launch_run(
            str(tmp_path / "config.yaml"),
            clusters(partition="nowhere"),
            [
                "train.global_batch=3",
                "tokenizer.path=absent",
                "data.pack_length=256",
                "model.init_from=no/weights",
                f"run_dir={tmp_path}/run",
            ],
            nodes=2,
        )
    message = str(error.value)
    assert "5 finding(s), nothing was queued" in message
    for part in (
        "train.global_batch=3 is not a multiple of the 2 data-parallel ranks",
        "model.init_from=no/weights is neither a directory here nor in the hub",
        "tokenizer.path=absent",
        "has packs of 128 tokens, data.pack_length is 256",
        "invalid partition specified",
    ):
        assert part in message, message
    assert lab("squeue", "-h", "-o", "%i") == before
