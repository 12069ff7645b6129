"""The steps of a round, and what one leaves when it is to be done anew."""

from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.rounds.round import Step, _forget, all_steps
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import State

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_what_the_shipped_rounds_ask_of_score(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the reward model, but never an interleaved schedule, which scores cannot take."""
    monkeypatch.chdir(CONFIGS.parent)
    settings = load_round(CONFIGS / f"llama3_{size}" / "round.yaml")
    commands = {step.name: step.command for step in all_steps(settings, Console(quiet=True))}
    for name in ("round-01/score", "round-01/score-held-out"):
        assert any(word.startswith("parallel.tensor=") for word in commands[name]) or size == "8b"
        assert not any(word.startswith("parallel.virtual_pipeline") for word in commands[name])
    assert "parallel.virtual_pipeline=5" in commands["round-01/reference"] or size != "70b"


def test_what_is_removed_before_a_step_is_done_anew(tmp_path: Path) -> None:
    """Of training all but what the step before has made: a list of skipped packs would change what it learns.
    Of other steps their outputs, and what a kill has left of these."""
    run_dir, average = tmp_path / "sft", tmp_path / "average"
    for name in ("store", "checkpoints", "hf", ".partial-hf", "incarnations", "slurm", "watchdog"):
        (run_dir / name).mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "skipped.jsonl"):
        (run_dir / name).touch()
    for name in ("average", ".partial-average", ".converting-average", "dpo"):
        (tmp_path / name / "below").mkdir(parents=True)
    state = State(tmp_path / "run", {})
    for step in ("pack", "train", "average"):
        state.finish(step, 1.0)
    _forget([Step("train", (run_dir,), run_dir=run_dir), Step("average", (average,))], state)
    assert list(state.done) == ["pack"]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.yaml",
        "incarnations",
        "slurm",
        "store",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "run", "sft"]
    _forget([Step("train", (tmp_path / "none",), run_dir=tmp_path / "none")], state)  # never begun
