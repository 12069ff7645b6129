"""A chain of real jobs: pack, SFT, pack pairs, reference, DPO. A requeued job changes no byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_post.config.chain import load_chain
from megatron_post.config.load import to_yaml
from megatron_post.launch.chain import submit_chain
from megatron_post.launch.cluster import load_cluster
from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab
from tests.slurm.runs import Run
from tests.tiny import tiny_config


def _chain(data: Path, directory: Path) -> Path:
    """Write the files of a chain whose every output is in `directory`."""
    directory.mkdir()
    pairs = [
        {"prompt": f"What is {i} plus {i % 7}?", "chosen": f"{i + i % 7}.", "rejected": f"{i + 3 + i % 5}?"}
        for i in range(60)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    common: dict[str, Any] = {
        "model": {"vocab_size": 512},
        "tokenizer": {"path": str(data / "tokenizer")},
        "checkpoint": {"every": 1, "keep": 2},
    }

    def stage(name: str, rows: Path, **sections: Any) -> str:
        store = {"store": str(directory / f"{name}-store"), "sources": [{"name": "rows", "path": str(rows)}]}
        config = tiny_config(
            directory / name,
            stage=name,
            **{
                **common,
                "train": {"steps": 12, "global_batch": 2, "export_hf": True},
                "data": store,
                **sections,
            },
        )
        (directory / f"{name}.yaml").write_text(to_yaml(config))
        return str(directory / f"{name}.yaml")

    sft = stage("sft", data / "rows.jsonl")
    policy = str(directory / "sft" / "hf")
    dpo = stage("dpo", directory / "pairs.jsonl", model={"vocab_size": 512, "init_from": policy})
    store = str(directory / "dpo-store")

    def step(
        name: str, *command: str, after: tuple[str, ...] = (), run_dir: Path | None = None
    ) -> dict[str, Any]:
        return {
            "name": name,
            "command": list(command),
            "after": list(after),
            "ranks_per_node": 1,
            "run_dir": None if run_dir is None else str(run_dir),
        }

    steps = [
        step("pack-sft", "data", "pack", sft),
        step("sft", "train", sft, after=("pack-sft",), run_dir=directory / "sft"),
        step("pack-dpo", "data", "pack", dpo),
        step(
            "reference",
            "reference",
            store,
            "--model",
            policy,
            "precision.dtype=fp32",
            after=("sft", "pack-dpo"),
        ),
        step("dpo", "train", dpo, after=("reference",), run_dir=directory / "dpo"),
    ]
    (directory / "chain.yaml").write_text(
        yaml.safe_dump({"run_dir": str(directory / "round"), "steps": steps})
    )
    return directory / "chain.yaml"


@pytest.mark.slow
def test_round(lab: Lab, data: Path, clusters: ClusterFiles) -> None:
    """Two chains run at once, and in one of them the SFT step is requeued.

    At step 0, policy and reference agree.
    """
    cluster = load_cluster(clusters())
    runs = {}
    for name in ("plain", "disturbed"):
        jobs = submit_chain(load_chain(_chain(data, data / name)), cluster, Path.cwd())
        runs[name] = {job.name: Run(lab, data / name / job.name, job) for job in jobs}
    sft = runs["disturbed"]["sft"]
    sft.reaches(3)
    lab("scontrol", "requeue", str(sft.number))
    sft.restarted(1)
    assert lab.state(runs["disturbed"]["dpo"].number) == "PENDING"
    weights = {name: steps["dpo"].weights() for name, steps in runs.items()}
    assert weights["plain"] == weights["disturbed"]
    assert "resumed after step" in sft.log
    lines = (data / "disturbed" / "dpo" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    np.testing.assert_allclose(first["loss"], np.log(2) + 0.2 * first["nll"], atol=1e-5)
