"""The whole demo with very small sizes: data, packs, two ranks, export, and both models' answers."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.demo.run import Sizes, run_demo

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "tiny" / "demo.yaml"
SMALL = ("train.steps=4", "train.log_every=1", "model.num_layers=1", "data.pack_length=512")

pytest.importorskip("transformers")


def test_demo_from_data_to_rounds(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    _shrunk_configs(tmp_path)
    words = [
        "demo",
        "--config",
        "configs/tiny/demo.yaml",
        "--run-dir",
        str(run_dir),
        "--train-problems",
        "200",
        "--held-out-problems",
        "8",
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_post", *words, "--round-problems", "20", *SMALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((run_dir / "results.json").read_text())
    assert (
        results["before"]["total"] == results["sft"]["total"] == results["rounds"][0]["greedy"]["total"] == 8
    )
    assert results["same"] == {"correct": 8, "total": 8}  # our model's and transformers', token for token
    assert done.stdout.count("step 4/4") == 4  # SFT; the round's reward model, SFT, DPO
    assert "8 held-out problems" in done.stdout
    assert "warn" not in done.stdout.lower() and not done.stderr.strip()
    assert "Held-out prompts" in (run_dir / "rounds" / "round-01" / "report.html").read_text()


def _shrunk_configs(directory: Path) -> None:
    """The shipped files with four steps in each stage. The trained model has learned nothing."""
    target = directory / "configs" / "tiny"
    target.mkdir(parents=True)
    shutil.copytree(ROOT / "configs" / "curation", directory / "configs" / "curation")
    for path in (ROOT / "configs" / "tiny").glob("*.yaml"):
        text = re.sub(r"(?m)^  steps: \d+$", "  steps: 4", path.read_text())
        text = re.sub(r"(?m)^  warmup_steps: \d+$", "  warmup_steps: 2", text)
        (target / path.name).write_text(text)


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files than those of an earlier demo"):
        run_demo(
            str(CONFIG),
            [f"run_dir={tmp_path}"],
            sizes=Sizes(train=200, held_out=8, round=20, rounds=1),
            console=Console(file=io.StringIO()),
        )
    assert (tmp_path / "precious.txt").read_text() == "mine"
