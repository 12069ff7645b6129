"""Selections are compared with hand calculations, and files that do not belong together are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.data import Source
from megatron_post.config.load import ConfigError, parse
from megatron_post.data.dialog import Dialog, Preference
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.inference.failures import write_failures
from megatron_post.inference.prompts import Prompt
from megatron_post.rounds.select import rating, select
from megatron_post.rounds.select_settings import Select
from megatron_post.rounds.verifier import Command, ExactMatch, Verdict, judge

EXACT = {"kind": "exact", "pattern": r"is (\d+)\.\Z"}


def _files(
    directory: Path, responses: list[tuple[int, str, float | None]], *, checkpoint: str = "p", tag: str = ""
) -> dict[str, str]:
    """Write files of two prompts with the answers 4 and 9, and of responses given as (prompt, text, score).

    A text that ends in ~ was cut off.
    """
    prompts = [{"prompt": "2+2?", "answer": "4", "solution": "It is 4."}, {"prompt": "3*3?", "answer": "9"}]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows, scores = [], []
    for number, (prompt, text, score) in enumerate(responses, start=1):
        messages = [prompts[prompt - 1]["prompt"], text.removesuffix("~")]
        rows.append(
            {
                "prompt": prompt,
                "sample": number,
                "checkpoint": checkpoint,
                "seed": number,
                "tokens": len(text),
                "finish": "length" if text.endswith("~") else "stop",
                "messages": [
                    {"role": r, "content": c} for r, c in zip(("user", "assistant"), messages, strict=True)
                ],
            }
        )
        if score is not None:
            scores.append({"row": number, "scores": [score]})
    files = {"responses": directory / f"responses{tag}.jsonl", "scores": directory / f"scores{tag}.jsonl"}
    for path, lines in zip(files.values(), (rows, scores), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(path) for name, path in files.items()}


def _select(
    directory: Path, *files: dict[str, str], **more: Any
) -> tuple[dict[str, Any], list[Any], list[Any]]:
    values = {"prompts": str(directory / "prompts.jsonl"), "samples": list(files), **more}
    summary = select(parse(Select, values, origin="test"), directory / "out")
    read = [(directory / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("sft", "preferences")]
    return summary, *([json.loads(line) for line in lines] for lines in read)  # type: ignore[return-value]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


def test_prompts_that_failed_are_counted(tmp_path: Path) -> None:
    """Prompt 1 lacks a sample, and prompt 2 has none. The selection uses the others of prompt 1."""
    files = _files(tmp_path, [(1, "low", 1.0), (1, "high", 3.0)])
    failures = [
        {"prompt": prompt, "sample": sample, "reason": "no"} for prompt, sample in ((1, 2), (2, 0), (2, 1))
    ]
    write_failures(Path(files["responses"]), failures)
    summary, sft, preferences = _select(tmp_path, files)
    assert (summary["failed"], summary["prompts"], summary["responses"]) == (2, 1, 2)
    assert len(sft) == len(preferences) == 1


def test_best_and_worst_by_reward(tmp_path: Path) -> None:
    """Prompt 1 has the scores 1.0, 3.0 and 3.0. The first 3.0 wins the tie, and the margin over 1.0 is 2.0.

    For prompt 2 the highest score was cut off, and the blank response has no score. The best is 0.2, the
    worst
    -0.4, and the margin 0.6.
    """
    responses = [
        (1, "low", 1.0), (1, "high", 3.0), (1, "as high", 3.0),
        (2, "cut~", 9.0), (2, "", None), (2, "fine", 0.2), (2, "poor", -0.4),
    ]  # fmt: skip
    summary, sft, preferences = _select(tmp_path, _files(tmp_path, responses))
    assert [_text(row["messages"]) for row in sft] == ["high", "fine"]
    assert sft[0]["provenance"] == {
        "prompt": 1, "sample": 2, "checkpoint": "p", "seed": 2, "reward": 3.0, "correct": None, "score": 3.0,
        "of": 3, "tied": 1,
    }  # fmt: skip
    assert [(_text(r["chosen"]), _text(r["rejected"]), r["rating"]) for r in preferences] == [
        ("high", "low", "significantly_better"),
        ("fine", "poor", "slightly_better"),
    ]
    assert summary["ties"] == 1 and summary["blank"] == 1 and summary["cut_off"] == 1
    assert summary["margins"] == pytest.approx([2.0, 0.6])
    # within 2.5 all responses to prompt 1 tie, so there is no preference, and the first one is selected
    _, sft, preferences = _select(tmp_path, _files(tmp_path, responses), tie=2.5)
    assert [_text(row["messages"]) for row in sft] == ["low", "fine"] and not preferences


def test_earlier_responses_of_a_prompt_are_not_trained(tmp_path: Path) -> None:
    chat = [said("user", "1+1?"), said("assistant", "2"), said("user", "2+2?")]
    row = {"prompt": 1, "sample": 0, "checkpoint": "p", "seed": 0, "tokens": 1, "finish": "stop"}
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("prompts", "responses", "scores")}
    for name, line in (
        ("prompts", {"prompt": chat}),
        ("responses", row | {"messages": [*chat, said("assistant", "4")]}),
        ("scores", {"row": 1, "scores": [1.0]}),
    ):
        Path(files[name]).write_text(json.dumps(line) + "\n")
    _select(tmp_path, {"responses": files["responses"], "scores": files["scores"]})
    source = Source(name="s", path=str(tmp_path / "out/sft.jsonl"))
    ((_, dialog),) = read_rows(source, bad_rows=BadRows())
    assert isinstance(dialog, Dialog)
    answers = [(m.content, m.trained) for m in dialog.messages if m.role == "assistant"]
    assert answers == [("2", False), ("4", True)]


def test_responses_that_spell_a_template_are_not_selected(tmp_path: Path) -> None:
    """`data pack` refuses such texts, so a selected one would end the round."""
    responses = [
        (1, "4\n\nHuman: And 3+3?", 5.0), (1, "[INST] 4", 0.0), (1, "It is 4.", 2.0), (1, "It is 5.", 1.0),
    ]  # fmt: skip
    summary, sft, preferences = _select(tmp_path, _files(tmp_path, responses))
    assert [_text(row["messages"]) for row in sft] == ["It is 4."]
    assert [_text(row["rejected"]) for row in preferences] == ["It is 5."]
    assert summary["templated"] == 2


def test_what_was_drawn_most_often_wins_a_tie(tmp_path: Path) -> None:
    """Within 1.0 of the highest score, 3.0, are two "often" and one "rare", but not the three "worse"."""
    responses = [(1, "rare", 3.0), *[(1, "worse", 1.9)] * 3, (1, "often", 2.5), (1, "often", 2.4)]
    _, sft, preferences = _select(tmp_path, _files(tmp_path, responses), tie=1.0)
    assert [_text(row["messages"]) for row in sft] == ["often"]
    assert sft[0]["provenance"]["sample"] == 5 and sft[0]["provenance"]["tied"] == 1
    assert not preferences  # the distance of "worse" from "often" is not more than 1.0


def test_the_verifier_outweighs_the_reward_and_mends(tmp_path: Path) -> None:
    """For prompt 1 all responses are wrong. So the solution is `edited`, and SFT gets no row.

    For prompt 2 the right response has -1 + 10 and the wrong one 5, so the margin is 4.
    """
    responses = [(1, "It is 5.", 2.0), (1, "It is 6.", 1.0), (2, "It is 8.", 5.0), (2, "It is 9.", -1.0)]
    summary, sft, preferences = _select(tmp_path, _files(tmp_path, responses), verifier=EXACT)
    assert [_text(row["messages"]) for row in sft] == ["It is 9."]
    assert [_text(preferences[0][k]) for k in ("edited", "chosen", "rejected")] == [
        "It is 4.",
        "It is 5.",
        "It is 6.",
    ]
    assert preferences[1]["provenance"]["margin"] == 4.0 and "edited" not in preferences[1]
    assert (summary["correct"], summary["best_correct"], summary["edited"]) == (1, 1, 1)
    examples = [
        e
        for _, e in read_rows(
            Source(name="p", path=str(tmp_path / "out/preferences.jsonl")), bad_rows=BadRows()
        )
    ]
    assert all(isinstance(example, Preference) for example in examples) and len(examples) == 2
    rows = read_rows(Source(name="s", path=str(tmp_path / "out/sft.jsonl")), bad_rows=BadRows())
    assert all(isinstance(example, Dialog) for _, example in rows)
    _, sft, _ = _select(tmp_path, _files(tmp_path, responses), verifier=EXACT, only_correct=False)
    assert len(sft) == 2
    summary, sft, _ = _select(tmp_path, _files(tmp_path, responses), verifier=EXACT, train_edited=True)
    assert [_text(row["messages"]) for row in sft] == ["It is 4.", "It is 9."]
    assert sft[0]["provenance"] == {"prompt": 1, "by": "verifier"} and summary["sft_edited"] == 1


def test_ties_margins_and_ratings_by_hand(tmp_path: Path) -> None:
    """The scores are 2.0, 1.5, 1.9 and 0.9 with a tie of 0.25.

    2.0 and 1.9 are equal, and the first of them is the best, with a margin of 1.1 over 0.9. For prompt 2, 0.4
    and 0.2 are equal, so there is a row for SFT and no preference. A margin of 1.0 is `better` if its least
    margin is 1.0, and has no rating if all least margins are higher.
    """
    scores = [(1, "a", 2.0), (1, "b", 1.5), (1, "c", 1.9), (1, "d", 0.9), (2, "e", 0.4), (2, "f", 0.2)]
    summary, sft, preferences = _select(tmp_path, _files(tmp_path, scores), tie=0.25)
    assert [(_text(row["messages"]), row["provenance"]["tied"]) for row in sft] == [("a", 1), ("e", 1)]
    assert [(_text(r["chosen"]), _text(r["rejected"])) for r in preferences] == [("a", "d")]
    provenance = preferences[0]["provenance"]
    assert provenance["margin"] == pytest.approx(1.1) and preferences[0]["rating"] == "better"
    assert [provenance[name]["sample"] for name in ("chosen", "rejected")] == [1, 4]
    assert summary["ties"] == 2 and summary["preferences"] == 1
    assert rating(1.0, {"better": 1.0, "slightly_better": 0.5}) == "better"
    assert rating(0.99, {"better": 1.0, "slightly_better": 0.5}) == "slightly_better"
    assert rating(0.4, {"better": 1.0, "slightly_better": 0.5}) is None


def test_tool_calls_are_not_selected(tmp_path: Path) -> None:
    """A response that ends with <|eom_id|> is a tool call. It is never the best, and not cut off."""
    files = _files(tmp_path, [(1, "search(x)", 9.0), (1, "fine", 1.0), (2, "cut~", 3.0), (2, "fine", 0.0)])
    path = Path(files["responses"])
    path.write_text(path.read_text().replace('"finish": "stop"', '"finish": "tool_calls"', 1))
    summary, sft, _ = _select(tmp_path, files)
    assert [_text(row["messages"]) for row in sft] == ["fine", "fine"]
    assert (summary["tool_calls"], summary["cut_off"]) == (1, 1)


def test_without_rewards_the_verifier_alone(tmp_path: Path) -> None:
    """Both responses are wrong and tie. So the solution is chosen over the first of them."""
    files = _files(tmp_path, [(1, "It is 5.", None), (1, "It is 6.", None), (2, "It is 9.", None)])
    del files["scores"]
    _, sft, preferences = _select(tmp_path, files, verifier=EXACT)
    assert [_text(row["messages"]) for row in sft] == ["It is 9."]
    assert [(_text(r["chosen"]), _text(r["rejected"])) for r in preferences] == [("It is 4.", "It is 6.")]


def test_the_rejected_comes_from_another_model_where_one_is_worse(tmp_path: Path) -> None:
    """The newest model's best is 3 and its worst 0. The older model's response has 1, and it is rejected.

    For prompt 2 the older model's response is as good as the best, so the newest model's worst is rejected.
    """
    newest = _files(
        tmp_path, [(1, "a", 3.0), (1, "b", 0.0), (2, "c", 1.0), (2, "d", 0.0)], checkpoint="new", tag="1"
    )
    older = _files(tmp_path, [(1, "e", 1.0), (2, "f", 1.0)], checkpoint="old", tag="2")
    _, _, preferences = _select(tmp_path, newest, older)
    assert [_text(row["rejected"]) for row in preferences] == ["e", "d"]
    assert preferences[0]["provenance"]["rejected"]["checkpoint"] == "old"


def test_cleaning_is_counted(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{name: shout, pattern: '!', max_share: 0.0}]")
    files = _files(tmp_path, [(1, "yes!", 1.0), (2, "no", 1.0)])
    summary, sft, _ = _select(tmp_path, files, cleaning=str(rules))
    assert [_text(row["messages"]) for row in sft] == ["no"]
    assert summary["cleaning"] == [{"name": "shout", "found": 1, "total": 2, "dropped": 1}]


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    files = _files(tmp_path, [(1, "a", 1.0), (2, "b", 1.0)])
    Path(files["scores"]).write_text('{"row": 1, "scores": [1.0]}\n')
    with pytest.raises(ValueError, match=r"scores 1 rows, .* has 2 responses"):
        _select(tmp_path, files)
    Path(files["scores"]).write_text('{"row": 1, "scores": [1.0, 2.0]}\n')
    with pytest.raises(ValueError, match="no score of one response"):
        _select(tmp_path, files)
    files = _files(tmp_path, [(1, "a", 1.0)])
    Path(files["responses"]).write_text("{}\n")
    with pytest.raises(ValueError, match=r"responses.jsonl:1: no sample"):
        _select(tmp_path, files)
    files = _files(tmp_path, [(1, "", None), (2, "b~", 1.0)])
    with pytest.raises(ValueError, match="none of 2 prompts has a response to train on"):
        _select(tmp_path, files)
    files = _files(tmp_path, [(1, "a", 1.0)])
    (tmp_path / "prompts.jsonl").write_text('\n{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="no prompt in line 1 to which there is a response, or another one"):
        _select(tmp_path, files)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2 + 2?"}\n')  # changed after `generate`
    with pytest.raises(ValueError, match="or another one; select with the file from which the"):
        _select(tmp_path, files)
    files = _files(tmp_path, [(1, "a", 1.0), (2, "b", 1.0)])
    with pytest.raises(ValueError, match=r"sample 1 of prompt 1 by p is there twice"):
        _select(tmp_path, files, files)
    for score in ("NaN", "Infinity", '"high"', "null"):
        Path(files["scores"]).write_text(f'{{"row": 1, "scores": [{score}]}}\n')
        with pytest.raises(ValueError, match="no score of one response"):
            _select(tmp_path, files)
    with pytest.raises(ConfigError, match="no rule for the selection"):
        _select(tmp_path, {"responses": files["responses"]})


def test_verifiers() -> None:
    asked = [(Prompt(1, (), answer="4"), " It is 4.\n"), (Prompt(2, (), answer="4"), "It is 14.")]
    assert [v.correct for v in judge(ExactMatch(pattern=r"is (\d+)\.\Z"), asked)] == [True, False]
    with pytest.raises(ValueError, match="line 3 has no `answer`"):
        judge(ExactMatch(pattern="(.)"), [(Prompt(3, ()), "x")])
    with pytest.raises(ValueError, match="has no group"):
        ExactMatch(pattern="x")
    program = (
        "import json, sys\nfor line in sys.stdin:\n row = json.loads(line)\n"
        " print(json.dumps({'correct': row['answer'] in row['response'], 'edited': 'e'}))"
    )
    command = Command(kind="command", command=(sys.executable, "-c", program))
    assert judge(command, asked) == [Verdict(True, "e"), Verdict(True, "e")]
    program = program.replace("'e'}", "'e\u2028e'}, ensure_ascii=False").replace("import", "import io,", 1)
    program = program.replace("\nfor", "\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8')\nfor", 1)
    command = Command(kind="command", command=(sys.executable, "-c", program))
    # A line separator that does not end a line of JSON.
    assert judge(command, asked) == [Verdict(True, "e\u2028e")] * 2


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('broken')", "ended with status 1: broken"),
        ("print(1)", "wrote 1 lines for 2"),
        ("print('yes\\nno')", "line 1: no verdict"),
        ("import json; print(json.dumps({'correct': 1})); print()", "line 1: no verdict"),
        ("import time; time.sleep(9)", "not finished within timeout=0.5"),
    ],
)
def test_bad_verifiers(program: str, message: str) -> None:
    command = Command(
        kind="command", command=(sys.executable, "-c", program), timeout=0.5 if "time" in program else 60
    )
    with pytest.raises(ValueError, match=message):
        judge(command, [(Prompt(1, ()), "x"), (Prompt(2, ()), "y")])
    with pytest.raises(ValueError, match="No such file"):
        judge(Command(kind="command", command=("/no/program",)), [])


def _scored(directory: Path, name: str, scores: list[Any]) -> str:
    """A file of scores. A mapping is the line of a reward model of steps."""
    lines = [
        {"row": row, **(score if isinstance(score, dict) else {"scores": [score]})}
        for row, score in enumerate(scores, start=1)
    ]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory / f"{name}.jsonl")


def test_a_list_of_rewards(tmp_path: Path) -> None:
    """Two models of helpfulness and one of safety, which has a threshold of 0.

    The means are 2, 3 and 4. The response of 4 has a safety of -1, so that the one of 3 is the best, and the
    unsafe one is rejected, although its reward is higher.
    """
    files: dict[str, Any] = _files(tmp_path, [(1, "low", 0.0), (1, "high", 0.0), (1, "unsafe", 0.0)])
    files["scores"] = {
        "a": _scored(tmp_path, "a", [1.0, 2.0, 3.0]),
        "b": _scored(tmp_path, "b", [3.0, 4.0, 5.0]),
        "s": _scored(tmp_path, "s", [1.0, 0.0, -1.0]),
    }
    reward = [
        {"name": "helpful", "models": ["a", "b"]},
        {"name": "safe", "models": ["s"], "weight": 0, "at_least": 0},
    ]
    summary, sft, preferences = _select(tmp_path, files, reward=reward)
    assert [_text(row["messages"]) for row in sft] == ["high"] and summary["below_threshold"] == 1
    assert sft[0]["provenance"]["rewards"] == {"helpful": 3.0, "safe": 0.0}
    assert [(_text(r["chosen"]), _text(r["rejected"]), r["rating"]) for r in preferences] == [
        ("high", "unsafe", "significantly_better")
    ]
    assert preferences[0]["provenance"]["rejected"]["below"] == ["safe"]
    assert preferences[0]["provenance"]["margin"] == -1.0


@pytest.mark.parametrize(("of_steps", "best"), [("min", "even"), ("product", "short"), ("last", "ends well")])
def test_step_scores_rank(tmp_path: Path, of_steps: str, best: str) -> None:
    """The minima are 0.5, 0.4 and 0.1, the products 0.25, 0.4 and 0.09, the last ones 0.5, 0.4 and 0.9."""
    files: dict[str, Any] = _files(tmp_path, [(1, "even", 0.0), (1, "short", 0.0), (1, "ends well", 0.0)])
    scores = [
        {"steps": [steps], "min": [min(steps)], "product": [product], "last": [steps[-1]]}
        for steps, product in (([0.5, 0.5], 0.25), ([0.4], 0.4), ([0.1, 0.9], 0.09))
    ]
    files["scores"] = {"prm": _scored(tmp_path, "prm", scores)}
    reward = [{"name": "steps", "models": ["prm"], "of_steps": of_steps}]
    _, sft, _ = _select(tmp_path, files, reward=reward)
    assert [_text(row["messages"]) for row in sft] == [best]
    with pytest.raises(ValueError, match="the model scores steps, so its entry"):
        _select(tmp_path, files, reward=[{"name": "steps", "models": ["prm"]}])


@pytest.mark.parametrize(
    ("scores", "reward", "reason"),
    [
        ({"a": "a.jsonl"}, [], "has a file for each model, and there is no list `reward`"),
        ("a.jsonl", [{"name": "r", "models": ["a"]}], "give the file of each model as {model: file}"),
        ({"a": "a.jsonl"}, [{"name": "r", "models": ["a", "b"]}], "has no file of b"),
        (
            {"a": "a.jsonl", "b": "b.jsonl"},
            [{"name": "r", "models": ["a"]}],
            "has a file of b, which `reward`",
        ),
        ({"a": "a.jsonl"}, [{"name": "r", "models": ["a"]}] * 2, "'r' is there twice"),
    ],
)
def test_lists_that_do_not_fit_the_scores(tmp_path: Path, scores: Any, reward: Any, reason: str) -> None:
    samples = [{"responses": "r.jsonl", "scores": scores}]
    with pytest.raises(ConfigError, match=reason):
        parse(Select, {"prompts": "p.jsonl", "samples": samples, "reward": reward}, origin="test")
