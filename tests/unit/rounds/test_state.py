"""Finished steps stay recorded until they are forgotten."""

from pathlib import Path

import pytest

from megatron_post.rounds.state import State
from megatron_post.storage.files import read_lines, write_lines


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


def test_what_a_kill_left_growing_is_removed(tmp_path: Path) -> None:
    for stray in (".rows.jsonl.123", ".rows.jsonl.lock.9", ".rows.json.123"):
        (tmp_path / stray).touch()
    write_lines(tmp_path / "rows.jsonl", [{"a": 1}])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rows.json.123", "rows.jsonl"]


@pytest.mark.parametrize("content", ["", "[]", '{"done": {}}'])
def test_another_state_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state.json: not the record of a run of rounds; choose another"):
        State(tmp_path, {})


def test_errors_name_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"a": 1}, {"b": "ü\ud800\u2028"}])
    assert list(read_lines(path)) == [{"a": 1}, {"b": "ü\ud800\u2028"}]
    for broken, message in (("{", "not JSON"), ("[]", "not a JSON object")):
        path.write_text('{"a": 1}\n' + broken)
        with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
            list(read_lines(path))
