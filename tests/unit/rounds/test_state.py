"""What is done stays done; and two processes never run the same rounds."""

from pathlib import Path

import pytest

from megatron_post.rounds.files import read_lines, write_lines
from megatron_post.rounds.state import State, alone


def test_state_survives_and_forgets(tmp_path: Path) -> None:
    state = State(tmp_path / "run", {"seed": 1})
    for step in ("a", "b", "c"):
        state.finish(step, 1.26)
    assert list(State(tmp_path / "run", {"seed": 1}).done.items()) == [("a", 1.3), ("b", 1.3), ("c", 1.3)]
    state.forget(["b", "c", "never done"])
    assert list(State(tmp_path / "run", {"seed": 1}).done) == ["a"]
    with pytest.raises(ValueError, match="of a run with other seed; undo the change"):
        State(tmp_path / "run", {"seed": 2})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.json"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        alone(tmp_path),
        pytest.raises(ValueError, match="another process runs these rounds"),
        alone(tmp_path),
    ):
        pass
    with alone(tmp_path):
        pass


def test_lines_are_named_where_they_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"a": 1}, {"b": "ü\ud800\u2028"}])
    assert list(read_lines(path)) == [{"a": 1}, {"b": "ü\ud800\u2028"}]
    for broken, message in (("{", "not JSON"), ("[]", "not a JSON object")):
        path.write_text('{"a": 1}\n' + broken)
        with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
            list(read_lines(path))
