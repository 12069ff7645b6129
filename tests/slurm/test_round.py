"""A round as a chain of real jobs has the same weights as a round on this machine. Two nodes sample."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.config.chain import load_chain
from megatron_post.launch.chain import submit_chain
from megatron_post.launch.cluster import load_cluster
from megatron_post.rounds.chain import write_chain
from megatron_post.rounds.run import run_rounds
from tests.e2e.test_round import round_file
from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab


@pytest.mark.slow
def test_round_as_a_chain(lab: Lab, tmp_path: Path, clusters: ClusterFiles) -> None:
    """Rows, scores and averaged weights are equal. After the chain, no step is left to do."""
    console = Console(quiet=True)
    config = round_file(tmp_path / "slurm")
    on_two_nodes = ("generate.copies=2", "ranks_per_node=1")
    write_chain(config, on_two_nodes, tmp_path / "chain.yaml", console=console)
    jobs = submit_chain(load_chain(tmp_path / "chain.yaml"), load_cluster(clusters()), Path.cwd())
    run_rounds(round_file(tmp_path / "local"), console=console)
    state = lab.wait(jobs[-1].job_id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=1200)
    logs = "".join(f"\n== {job.name}\n{job.log.read_text()[-2000:]}" for job in jobs if job.log.is_file())
    assert state == "COMPLETED", logs
    drawn = next(job.log for job in jobs if job.name == "round-01/generate").read_text()
    assert all(f"rank {rank} of 2: " in drawn for rank in (0, 1)) and " 2 ranks" in drawn, drawn
    here, there = (tmp_path / name / "run" / "round-01" for name in ("local", "slurm"))
    for name in ("scores.jsonl", "held_out-scores.jsonl"):
        assert (here / name).read_text() == (there / name).read_text()
    local, chained = (load_file(r / "average" / "model.safetensors") for r in (here, there))
    assert all(torch.equal(local[name], chained[name]) for name in local)
