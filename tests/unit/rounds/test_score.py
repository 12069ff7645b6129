"""`score` continues an output only if it is of the same model and rows."""

import json
from pathlib import Path

import pytest

from megatron_post.rounds.continued import lines_done
from megatron_post.rounds.score import _rows_key, score_file
from tests.unit.rounds.models import tiny_policy

ORIGIN = {"model": "m", "tokenizer": "t", "rows": "r"}
LINE = json.dumps({"row": 1, "scores": [0.5]}) + "\n"


def test_a_line_that_a_crash_cut_is_scored_again(tmp_path: Path) -> None:
    output = tmp_path / "new" / "scores.jsonl"
    assert lines_done(output, ORIGIN, key="scores") == 0
    assert lines_done(output, ORIGIN, key="scores") == 0  # killed before the first line
    output.write_text(LINE + LINE + LINE[:7])
    assert lines_done(output, ORIGIN, key="scores") == 2
    assert output.read_text() == LINE + LINE


@pytest.mark.parametrize("name", ORIGIN)
def test_another_origin_is_refused(tmp_path: Path, name: str) -> None:
    """Otherwise its lines would count as done, and the output would mix scores of two origins."""
    output = tmp_path / "scores.jsonl"
    lines_done(output, ORIGIN, key="scores")
    output.write_text(LINE + LINE[:7])
    with pytest.raises(
        ValueError, match=f"holds 1 lines with scores of another {name}; give another --output"
    ):
        lines_done(output, {**ORIGIN, name: "other"}, key="scores")
    assert output.read_text() == LINE + LINE[:7]


def test_a_call_that_failed_early_claims_nothing(tmp_path: Path) -> None:
    """For example the name of the rows was mistyped. Without scores, the output may get another origin."""
    output = tmp_path / "scores.jsonl"
    lines_done(output, ORIGIN, key="scores")
    assert lines_done(output, {**ORIGIN, "rows": "other"}, key="scores") == 0
    output.write_text(LINE)
    assert lines_done(output, {**ORIGIN, "rows": "other"}, key="scores") == 1


def test_a_language_model_scores_nothing(tmp_path: Path) -> None:
    """Such a model would get a new reward head with random weights."""
    with pytest.raises(ValueError, match=r"model is a language model without a reward head.*stage=reward"):
        score_file(tiny_policy(tmp_path / "model"), tmp_path / "rows", tmp_path / "scores")


@pytest.mark.parametrize("text", ["no json\n", '{"row": 1}\n', "[1]\n", LINE])
def test_what_holds_no_scores_is_kept(tmp_path: Path, text: str) -> None:
    """A file of scores without a recorded origin is refused and not changed."""
    output = tmp_path / "precious.jsonl"
    output.write_text(text)
    if text != LINE:
        (tmp_path / "precious.jsonl.origin.json").write_text(json.dumps(ORIGIN))
    with pytest.raises(ValueError, match=r"precious.jsonl exists and holds no scores"):
        lines_done(output, ORIGIN, key="scores")
    assert output.read_text() == text


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (_rows_key(tmp_path / name) for name in "abc")
    assert a == b != c
    assert _rows_key(Path("owner/name")) == "owner/name"
