"""A round with a list of rewards, a sweep, models by capability and a curriculum, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import load_round
from megatron_post.storage.files import read_lines
from tests.e2e.runs import start
from tests.e2e.test_round import round_file
from tests.unit.rounds.models import tiny_policy


@pytest.mark.slow
def test_rewards_sweep_capabilities_and_curriculum(tmp_path: Path) -> None:
    """The trained reward model and one of steps rank the samples, and SFT is the average of two runs."""
    directory = tmp_path / "round"
    file = round_file(directory)
    prompts = [json.loads(line) for line in (directory / "prompts.jsonl").read_text().splitlines()]
    rows = [row | {"capability": ("code", "math")[i % 2]} for i, row in enumerate(prompts)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    human = [{"prompt": "a b?", "completion": f"c {i}"} for i in range(8)]
    (directory / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in human))
    steps = tiny_policy(directory / "steps", scalar_head=True, scores_steps=True)
    settings = yaml.safe_load(file.read_text())
    settings["reward"] = [
        {"name": "helpful", "models": ["trained"]},
        {"name": "steps", "models": [str(steps)], "of_steps": "product", "weight": {"math": 2.0}},
    ]
    settings["generate"] |= {"by_capability": True, "previous_samples": 0}
    settings["data"] |= {
        "sft": [{"name": "human", "path": str(directory / "human.jsonl")}],
        "curriculum": [{"from_round": 1, "mix": {"selected": 1.0, "human": 2.0}}],
    }
    settings["stages"]["sweep"] = {
        "sft": [{"weight": 3.0}, {"set": {"optimizer.lr": 2e-3}}],
        "dpo": [{}, {"set": {"data.preferences.max_similarity": 0.99}}],
    }
    file.write_text(yaml.safe_dump(settings))
    log = tmp_path / "log"
    assert start(["round", str(file)], ranks=1, log=log).wait(900) == 0, log.read_text()[-5000:]
    first = directory / "run" / "round-01"
    models = [
        load_file(first / f"sft/{name}/model.safetensors") for name in ("variant-1/hf", "variant-2/hf", "hf")
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(models[0][name], models[1][name])
    torch.testing.assert_close(models[2][name], (3 * models[0][name] + models[1][name]) / 4)
    # each variant of DPO has a store of its own, with the reference of the average in it
    for number in (1, 2):
        metrics = first / f"dpo/variant-{number}/metrics.jsonl"
        found = json.loads(metrics.read_text().splitlines()[0])
        assert found["loss"] == pytest.approx(0.693147 + 0.2 * found["nll"], abs=1e-4)
    lines = [json.loads(line) for line in (first / "scores-2.jsonl").read_text().splitlines()]
    assert all(0 < line["product"][0] <= line["min"][0] <= 1 for line in lines)
    selected = list(read_lines(first / "selection" / "sft.jsonl"))
    for row in selected:
        parts = row["provenance"]["rewards"]
        weight = 2.0 * (rows[row["provenance"]["prompt"] - 1]["capability"] == "math")
        total = parts["helpful"] + weight * parts["steps"]
        assert row["provenance"]["reward"] == pytest.approx(total, rel=1e-9)
    choice = json.loads((first / "choice.json").read_text())["by_capability"]
    assert set(choice) == {"code", "math"}
    second = Round(load_round(file, ["rounds=2"]), 2, Console(quiet=True))
    best = json.loads((first / "choice.json").read_text())["best"]
    assert second.policies == {"": best, **{name: each["best"] for name, each in choice.items()}}
    sources = yaml.safe_load((first / "sft/variant-1/config.yaml").read_text())["data"]["sources"]
    assert {source["name"]: source["weight"] for source in sources} == {"round-01": 1.0, "human": 2.0}
    assert "Validation prompts by capability" in (first / "report.html").read_text()
