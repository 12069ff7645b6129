"""What a step leaves when it is to be done anew."""

from pathlib import Path

from megatron_post.rounds.round import Step, _forget
from megatron_post.rounds.state import State


def test_what_is_removed_before_a_step_is_done_anew(tmp_path: Path) -> None:
    """Of training all but what the step before has made: a list of skipped packs would change what it learns.
    Of other steps their outputs, and what a kill has left of these."""
    run_dir, average = tmp_path / "sft", tmp_path / "average"
    for name in ("store", "checkpoints", "hf", ".partial-hf", "incarnations", "watchdog"):
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
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "incarnations", "store"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "run", "sft"]
    _forget([Step("train", (tmp_path / "none",), run_dir=tmp_path / "none")], state)  # never begun
