"""Steps of a chain that use no GPU get none, small neighbours share a job, and GPU-hours are counted."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from megatron_post.config.chain import load_chain
from megatron_post.config.load import load_config, to_yaml
from megatron_post.launch.allocation import ChainedJob, chained_jobs
from megatron_post.launch.chain import chain_findings
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.gpu_hours import hours_table, step_hours
from megatron_post.launch.script import render, sbatch_options
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import gpu
from megatron_post.plan.outlook import Outlook

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CLUSTER = Cluster(
    cpus_per_node=96,
    partition="gpu",
    cpu_partition="cpu",
    cpu_memory="64G",
    memory="0",
    constraint="h100",
    gpu_type="h100",
    time_limit="10:00:00",
)


def _jobs(directory: Path, steps: str, cluster: Cluster = CLUSTER) -> dict[str, ChainedJob]:
    (directory / "chain.yaml").write_text(f"run_dir: run\nsteps:\n{steps}")
    chain = load_chain(directory / "chain.yaml")
    return {each.job.name: each for each in chained_jobs(chain, cluster, directory)}


def test_a_step_without_gpus(tmp_path: Path) -> None:
    """It takes 8 cores of a CPU node. The step with GPUs takes whole nodes, as before."""
    jobs = _jobs(tmp_path, "  - {name: a, command: [data, pack, x]}\n  - {name: b, command: [train, x]}\n")
    alone = sbatch_options(jobs["a"].job, jobs["a"].cluster)
    for option in ("--partition=cpu", "--ntasks-per-node=1", "--cpus-per-task=8", "--mem=64G"):
        assert option in alone
    assert not [option for option in alone if re.match("--(gpus|exclusive|constraint)", option)]
    whole = sbatch_options(jobs["b"].job, jobs["b"].cluster)
    for option in (
        "--partition=gpu",
        "--gpus-per-node=h100:8",
        "--exclusive",
        "--mem=0",
        "--constraint=h100",
    ):
        assert option in whole


@pytest.mark.parametrize(
    ("step", "gpus"),
    [
        ("command: [select, x]", 0),
        ("command: [--debug, merge, x]", 0),
        ("command: [generate, x]", 1),
        ("command: [curate, run, none.yaml]", 1),  # nothing is known about a file that does not exist yet
        ("command: [curate, run, cpu.yaml]", 0),
        ("command: [curate, run, cpu.yaml, 'steps=[{kind: quality, model: m}]']", None),
        ("command: [curate, run, gpu.yaml]", 1),
        ("command: [generate, x], gpus_per_rank: 0", 0),
        ("command: [data, pack, x], gpus_per_rank: 2", 2),
        ("tasks: [{command: [merge, x]}, {command: [train, x]}]", 1),
        ("tasks: [{command: [merge, x]}, {command: [merge, y]}]", 0),
    ],
)
def test_gpus_of_a_step(tmp_path: Path, step: str, gpus: int | None) -> None:
    source = "run: c\nsources: [{name: s, path: rows.jsonl}]\nsteps: [{kind: %s}]\n"
    (tmp_path / "cpu.yaml").write_text(source % "exact_duplicates")
    (tmp_path / "gpu.yaml").write_text(source % "semantic_duplicates, encoder: e")
    if gpus is None:  # overrides are read too, and wrong ones are refused
        with pytest.raises(ValueError, match=r"cpu\.yaml"):
            _jobs(tmp_path, f"  - {{name: a, {step}}}\n")
        return
    assert _jobs(tmp_path, f"  - {{name: a, {step}}}\n")["a"].gpus_per_rank == gpus


def test_small_neighbours_share_a_job(tmp_path: Path) -> None:
    """c follows b, which follows a. Nothing else waits for a or b. d trains, so e cannot join them."""
    steps = (
        "  - {name: a, command: [select, x]}\n  - {name: b, command: [data, pack, x], after: [a]}\n"
        "  - {name: c, command: [merge, x], after: [b]}\n  - {name: d, command: [train, x], after: [c]}\n"
        "  - {name: e, command: [merge, x], after: [d]}\n"
    )
    jobs = _jobs(tmp_path, steps)
    assert list(jobs) == ["a+b+c", "d", "e"]
    assert jobs["a+b+c"].job.command == ("select", "x")
    assert jobs["a+b+c"].job.then == (("data", "pack", "x"), ("merge", "x"))


@pytest.mark.parametrize(
    "others",
    [
        "  - {name: b, command: [merge, x], after: [a]}\n  - {name: c, command: [train, x], after: [a]}\n",
        "  - {name: b, command: [merge, x]}\n",
        "  - {name: b, command: [merge, x], after: [a], nodes: 2}\n",
        "  - {name: b, command: [merge, x], after: [a], ranks_per_node: 2}\n",
        "  - {name: b, command: [merge, x], after: [a], run_dir: own}\n",
        "  - {name: b, command: [train, x], after: [a], gpus_per_rank: 0}\n",
        "  - {name: b, command: [train, x], after: [a], ranks_per_node: 1}\n",
        "  - {name: b, tasks: [{command: [merge, x]}], after: [a]}\n",
        "  - {name: b, command: [merge, x]}\n  - {name: c, command: [merge, x], after: [a, b]}\n",
    ],
)
def test_what_does_not_share_a_job(tmp_path: Path, others: str) -> None:
    """Another step that waits for the first would be delayed. Arrays, ranks and training are not small."""
    steps = "  - {name: a, command: [select, x]}\n" + others
    assert len(_jobs(tmp_path, steps)) == steps.count("name:")


def test_the_script_takes_one_command_after_the_other(tmp_path: Path) -> None:
    """bash reads every command as it is written, and `take_command` fails behind the last one."""
    steps = (
        '  - {name: a, command: [select, "it\'s $HOME"]}\n'
        "  - {name: b, command: [merge, 'x y'], after: [a]}\n"
    )
    job = _jobs(tmp_path, steps)["a+b"]
    settings = render(job.job, job.cluster).split("# >>> settings\n")[1].split("# <<< settings\n")[0]
    loop = 'n=0; while printf "%s|" "${command[@]}"; echo; do take_command $((++n)) || break; done'
    done = subprocess.run(["bash", "-c", settings + loop], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["select|it's $HOME|", "merge|x y|"]


def test_more_than_a_node_has(tmp_path: Path) -> None:
    steps = (
        "  - {name: a, command: [generate, x], ranks_per_node: 5, gpus_per_rank: 2}\n"
        "  - {name: b, command: [merge, x], ranks_per_node: 97}\n"
    )
    jobs = list(_jobs(tmp_path, steps).values())
    assert chain_findings(load_chain(tmp_path / "chain.yaml"), jobs, CLUSTER, tmp_path) == [
        "step 'a': ranks_per_node=5 with gpus_per_rank=2 needs 10 GPUs of a node, and the cluster has "
        "gpus_per_node=8",
        "step 'b': ranks_per_node=97 is more than cpus_per_node=96 of the cluster",
    ]


def test_gpu_hours(tmp_path: Path) -> None:
    """The planner knows the training step, and the time limit of 10 h bounds the others.

    The samples take 160 GPU-hours of 16 GPUs. A model on 2 GPUs of each node leaves 12 of them idle. An array
    of two tasks takes 2 x 80.
    """
    config = load_config(CONFIGS / "llama3_8b" / "sft.yaml")
    (tmp_path / "sft.yaml").write_text(to_yaml(config))
    steps = (
        "  - {name: pack, command: [data, pack, sft.yaml]}\n"
        "  - {name: sft, command: [train, sft.yaml], nodes: 2}\n"
        "  - {name: draw, command: [generate, x], nodes: 2, ranks_per_node: 1, gpus_per_rank: 2}\n"
        "  - {name: many, tasks: [{command: [score, x]}, {command: [score, y]}]}\n"
    )
    rows = {row.name: row for row in step_hours(list(_jobs(tmp_path, steps).values()), tmp_path)}
    plan = make_plan(config, gpus=16, gpu=dataclasses.replace(gpu("h100-80gb"), per_node=8))
    hours = Outlook(plan, time_limit=36000).hours
    assert (rows["sft"].hours, rows["sft"].gpu_hours) == (hours, 16 * hours)
    assert (rows["sft"].source, rows["draw"].source) == ("planner", "time limit")
    assert (rows["pack"].gpus, rows["pack"].gpu_hours, rows["pack"].partition) == (0, 0, "cpu")
    assert (rows["draw"].gpus, rows["draw"].idle) == (16, 12)
    assert (rows["draw"].gpu_hours, rows["draw"].idle_hours) == (160, 120)
    assert (rows["many"].gpus, rows["many"].hours, rows["many"].gpu_hours) == (16, 10, 160)
    assert hours_table(list(rows.values()))[-1] == (
        f"{16 * hours:,.0f} GPU-hours by the planner, and at most 320 by time limits. Up to 120 of them are "
        "idle, on GPUs that a job allocates and no rank uses"
    )


def test_hours_without_a_known_gpu(tmp_path: Path) -> None:
    """`gpu: null` leaves the planner without a device. A cluster without GPUs has no GPU-hours."""
    (tmp_path / "sft.yaml").write_text((CONFIGS / "tiny" / "sample.yaml").read_text())
    steps = "  - {name: sft, command: [train, sft.yaml]}\n"
    unknown = CLUSTER.model_copy(update={"gpu": None})
    none = Cluster(gpus_per_node=0, ranks_per_node=2, cpus_per_node=2)
    for cluster, gpus in ((unknown, 8), (none, 0)):
        (row,) = step_hours(list(_jobs(tmp_path, steps, cluster).values()), tmp_path)
        assert (row.gpus, row.source) == (gpus, "time limit")
