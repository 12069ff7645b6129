"""Each recipe of mathematics with an author whose replies are right, wrong and broken in known ways."""

import shutil
from typing import Any

import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog
from megatron_post.data.rows import BadRows, read_rows
from tests.unit.synthesis.math.author import problem
from tests.unit.synthesis.math.conftest import MathPlace

pytest.importorskip("math_verify")


def _row(first: int, second: int, **script: str) -> dict[str, Any]:
    return {"problem": problem(first, second, **script), "answer": first + second}


def _sources(place: MathPlace) -> list[int]:
    """The input lines from which the rows are."""
    return [int(row["provenance"]["source"].rpartition(":")[2]) for row in place.rows()]


def _packed(place: MathPlace) -> list[Dialog]:
    """The rows as `data pack` reads them."""
    source = Source(name="s", path=str(place.output / "rows.jsonl"))
    found = [example for _, example in read_rows(source, bad_rows=BadRows())]
    assert all(isinstance(example, Dialog) for example in found)
    return found  # type: ignore[return-value]


def test_solutions_are_kept_by_the_known_answer_and_the_judge(math_place: MathPlace) -> None:
    rows = [
        _row(1, 2, solve="right,wrong,right,other"),  # two of the three right ones are one text
        _row(2, 2, solve="fraction,decimal,wrong,wrong"),
        _row(3, 2, solve="wrong"),
        _row(4, 2, solve="lucky,lucky,right,wrong"),  # the judge finds the wrong step
        _row(5, 2, solve="lucky"),
        _row(6, 2, solve="prose,no_box,no_steps,cut"),
        _row(7, 2, solve="bomb,long,right,cut"),
        _row(8, 2, judge="off_scale"),
        _row(9, 2, judge="short"),
        _row(1, 9, judge="endless"),
        _row(2, 9, judge="refused"),
        _row(3, 9, solve="refused"),
        _row(4, 9, solve="refused,right,refused,wrong"),
        {"problem": problem(5, 9), "answer": "5 + 9 = 14, so $\\boxed{14}$"},
    ]
    math_place.run("math_solutions", rows, samples=4, keep=2)
    assert _sources(math_place) == [1, 1, 2, 2, 4, 7, 13, 14]
    assert math_place.reasons() == {
        ("answers", "no solution has the known answer"): 1,
        ("judge", "the judge passes no solution"): 4,
        ("judge", "refused by a model"): 1,
        ("solve", "no reply is a whole solution with a final answer"): 1,
        ("solve", "refused by a model"): 1,
    }
    assert math_place.results("solve") == {
        "no final answer": 2,
        "not in steps": 1,
        "cut off": 2,
        "repeat of another reply": 20,
        "refused": 6,
    }
    answers = math_place.results("answers")
    assert answers["timeout"] == answers["too long"] == 1 and "unreadable" not in answers
    assert math_place.results("judge") == {
        "all steps right": 8,
        "a step is wrong": 2,
        "off scale": 2,
        "cut off": 1,
        "refused": 1,
    }
    first = math_place.rows()[0]
    assert first["messages"][0]["content"] == rows[0]["problem"]
    assert (first["answer"], first["agreement"], first["kind"]) == ("3", 0.75, "known_answer")
    assert [[m.trained for m in dialog.messages] for dialog in _packed(math_place)] == [[True, True]] * 8


def test_the_majority_decides_where_no_answer_is_known(math_place: MathPlace) -> None:
    scripts = ["right,fraction,decimal,wrong", "right,right,wrong,wrong", "right,cut,prose,no_box", "wrong"]
    rows = [
        {"problem": problem(number, 2, solve=script, judge="blind")} for number, script in enumerate(scripts)
    ]
    math_place.run("math_solutions", rows, samples=4)
    assert _sources(math_place) == [1, 1, 1, 4]  # a wrong answer that all agree to is kept
    assert math_place.reasons() == {
        ("answers", "no answer has the majority"): 1,
        ("solve", "no answer has the majority"): 1,
    }
    assert [row["answer"] for row in math_place.rows()] == ["2", "2", "2", "6"]
    assert {row["kind"] for row in math_place.rows()} == {"majority"}


def test_a_column_that_is_missing_fails_the_row(math_place: MathPlace) -> None:
    math_place.run("math_solutions", [{"question": "What is 1 + 1?"}], samples=1)
    (reason,) = math_place.reasons()
    assert reason == ("(before the first step)", "ValueError in the recipe")
    dropped = (math_place.output / "dropped.jsonl").read_text()
    assert "settings.problem=problem: this column has no text: the row has question" in dropped


def test_questions_are_complete_and_new_and_agreed_on(math_place: MathPlace) -> None:
    def document(*problems: str, reply: str = "") -> dict[str, Any]:
        text = " ".join(f"<problem>{each}</problem>" for each in problems)
        return {"text": f"On sums. REPLY: {reply or text}"}

    good, other = problem(1, 2, screen="answerable"), problem(2, 2, screen="answerable")
    rows = [
        document(good, good.replace("What", " what"), ""),
        document(other, good),  # the second one is of the first document
        document(good.lower().replace("what is", "What is")),  # as the first one, in other letters
        document(problem(3, 2, screen="incomplete"), problem(4, 2, screen="ambiguous")),
        document(
            problem(5, 2, screen="fine"), problem(6, 2, screen="answerable", solve="right,wrong,right,wrong")
        ),
        document(reply="NONE"),
        document(reply="I would rather not."),
        document("<b>", reply="<problem>What is 1 + 1?"),
        document(problem(7, 2, screen="refused")),
        document(*(problem(8, n, screen="answerable") for n in range(5))),
    ]
    math_place.run("math_questions", rows, samples=4, questions=2)
    assert _sources(math_place) == [1, 2, 10, 10]
    assert math_place.reasons() == {
        ("repeats", "every row repeats an earlier one"): 1,
        ("screen", "no problem of the document passes the checks"): 1,
        ("screen", "refused by a model"): 1,
        ("answers", "no problem of the document passes the checks"): 1,
        ("write", "the document has nothing to ask about"): 1,
        ("write", "the reply has no problem"): 2,
    }
    assert math_place.results("screen") == {
        "answerable": 7,
        "incomplete": 1,
        "ambiguous": 1,
        "off scale": 1,
        "refused": 1,
    }
    assert math_place.results("write") == {
        **{"repeated problem": 1, "blank problem": 1, "more problems than asked for": 3},
    }
    assert math_place.results("repeats") == {"repeat of an earlier row": 2}
    assert [row["answer"] for row in math_place.rows()] == ["3", "4", "8", "9"]
    assert len(_packed(math_place)) == 4


def test_steps_have_labels_of_rollouts_and_of_a_judge(math_place: MathPlace) -> None:
    keep = {"continue": "right,wrong,cut,prose"}
    rows = [
        _row(1, 2, solve="right,wrong,no_steps", **keep),
        _row(2, 2, solve="lucky", **{"continue": "wrong"}),
        _row(3, 2, judge="off_scale", **{"continue": "right"}),
        _row(4, 2, **{"continue": "refused"}),
        _row(5, 2, solve="prose"),
        {"problem": problem(6, 2)},
        _row(7, 2, judge="refused"),
    ]
    math_place.run("math_step_labels", rows, solutions=3, rollouts=4)
    rows = math_place.rows()
    assert _sources(math_place) == [1, 1, 2, 3]
    assert [(row["kind"], row["labels"], row["soft_labels"], row["judge_labels"]) for row in rows] == [
        ("right_answer", [True, True], [0.25, 1.0], [True, True]),
        ("wrong_answer", [True, False], [0.25, 0.0], [False, True]),
        ("right_answer", [False, True], [0.0, 1.0], [False, True]),
        ("right_answer", [True, True], [1.0, 1.0], None),
    ]
    assert rows[0]["completions"][0] == "## Step 1: add\n1 + 2 = 3" and len(rows[0]["completions"]) == 2
    assert math_place.reasons() == {
        ("continue", "refused by a model"): 1,
        ("judge", "refused by a model"): 1,
        ("solve", "no reply is a whole solution with a final answer"): 1,
        ("(before the first step)", "no answer is known"): 1,
    }


def test_labels_of_the_judge_alone(math_place: MathPlace) -> None:
    rows = [_row(1, 2, solve="wrong"), _row(3, 2, judge="off_scale")]
    math_place.run("math_step_labels", rows, solutions=1, rollouts=1, labels="judge")
    assert [row["labels"] for row in math_place.rows()] == [[False, True]]
    assert math_place.reasons() == {("judge", "the judge labels no solution"): 1}


def test_corrections_are_right_and_alone_trained(math_place: MathPlace) -> None:
    rows = [
        _row(1, 2, solve="right,wrong"),
        _row(2, 2, solve="wrong", judge="off_scale"),
        _row(3, 2, solve="wrong", correct="wrong,cut,right"),
        _row(4, 2, solve="wrong", correct="wrong"),
        _row(5, 2, solve="wrong", correct="lucky"),
        _row(6, 2, solve="right"),
        _row(7, 2, solve="prose"),
        _row(8, 2, solve="wrong", correct="refused"),
        _row(9, 2, solve="wrong", judge="blind"),
        {"problem": problem(6, 2)},
    ]
    math_place.run("math_corrections", rows, samples=2, corrections=3)
    assert _sources(math_place) == [1, 3, 9]
    assert [(row["kind"], row["wrong_step"]) for row in math_place.rows()] == [
        ("step_is_wrong", 1),
        ("step_is_wrong", 1),
        ("answer_is_wrong", None),
    ]
    assert math_place.reasons() == {
        ("judge", "the judge passes no solution"): 2,
        ("answers", "no correction has the known answer"): 1,
        ("answers", "no try is wrong"): 1,
        ("solve", "no reply is a whole solution with a final answer"): 1,
        ("correct", "refused by a model"): 1,
        ("(before the first step)", "no answer is known"): 1,
    }
    for dialog in _packed(math_place):
        assert [message.role for message in dialog.messages] == ["user", "assistant"] * 2
        assert [m.trained for m in dialog.messages if m.role == "assistant"] == [False, True]
    feedback = math_place.rows()[0]["messages"][2]["content"]
    assert feedback == "Step 1 is wrong. Say what the error is, and solve the problem again."


def test_interleaved_programs_are_run_and_false_answers_dropped(math_place: MathPlace) -> None:
    manners = ["right", "lies", "error", "exit", "loop", "many", "other_tool", "prose", "guess", "refused"]
    rows = [_row(number, 2, calls=manner) for number, manner in enumerate(manners, start=1)]
    math_place.run("math_interleaved", rows, judges=False, samples=1, calls=3)
    assert _sources(math_place) == [1, 3, 5]
    assert math_place.reasons() == {
        ("answers", "no solution has the known answer"): 1,
        ("run", "no reply is a whole solution with a final answer"): 1,
        ("solve", "no reply is a whole solution with a final answer"): 4,
        ("solve", "refused by a model"): 1,
    }
    assert math_place.results("solve") == {
        "too many programs": 1,
        "another tool is called": 1,
        "no program": 2,
        "refused": 1,
    }
    assert math_place.results("run")["a program ended the interpreter"] == 1
    right, error, loop = _packed(math_place)
    assert [message.role for message in right.messages] == [
        *("user", "assistant", "ipython", "assistant", "ipython", "assistant"),
    ]
    assert [m.content for m in right.messages if m.role == "ipython"] == [
        "completed",
        "completed\n[stdout]\n3\n[/stdout]",
    ]
    assert [m.end_of_turn for m in right.messages if m.role == "assistant"] == [False, False, True]
    assert all(m.trained for m in right.messages) and right.tools == ({"type": "code_interpreter"},)
    assert right.messages[1].tool_calls[0].parameters == {"code": "total = 1 + 2"}
    assert (
        error.messages[2].content.startswith("error\n[stderr]\n")
        and 'File "block_1.py", line 1' in error.messages[2].content
    )
    assert [m.content for m in loop.messages if m.role == "ipython"] == [
        "timeout",
        "completed\n[stdout]\n7\n[/stdout]",  # the loop is not replayed
    ]


_AGREED = [problem(number, 3, screen="answerable", solve="right,decimal") for number in range(2)]
RESUMED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "math_solutions": (
        [_row(1, 2, solve="right,bomb,wrong"), _row(2, 2, solve="fraction,cut", judge="off_scale")],
        {"samples": 3},
    ),
    "math_questions": (
        [{"text": f"REPLY: <problem>{_AGREED[number // 2]}</problem>"} for number in range(4)],
        {"samples": 2},
    ),
    "math_step_labels": (
        [_row(1, 2, solve="right,wrong", **{"continue": "right,wrong,decimal"}), _row(2, 2, judge="refused")],
        {"solutions": 2, "rollouts": 3},
    ),
    "math_corrections": (
        [
            _row(1, 2, solve="right,wrong", correct="decimal"),
            _row(2, 2, solve="decimal,wrong", correct="wrong"),
        ],
        {"samples": 2, "corrections": 2},
    ),
    "math_interleaved": (
        [_row(1, 2, calls="right,lies"), _row(2, 2, calls="exit,error"), _row(3, 2, calls="other_tool")],
        {"samples": 2, "calls": 3},
    ),
}


@pytest.mark.parametrize("recipe", RESUMED)
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(math_place: MathPlace, recipe: str) -> None:
    """A kill leaves a part of the journal, whose last line is torn. Two processes then end the run."""
    rows, settings = RESUMED[recipe]
    judges = recipe != "math_interleaved"
    math_place.run(recipe, rows, judges=judges, **settings)
    expected = math_place.bytes()
    assert math_place.rows()
    (journal,) = (math_place.output / "journal").glob("journal-*.jsonl")
    content = journal.read_bytes()
    asked = len(math_place.server.requests)
    assert asked == content.count(b'"kind":"reply"') + content.count(b'"kind":"refusal"')
    math_place.server.requests.clear()
    shutil.rmtree(math_place.output)
    journal.parent.mkdir(parents=True)
    kept = content[: len(content) // 2]
    journal.write_bytes(kept)
    math_place.run(recipe, rows, judges=judges, sizes=2, **settings)
    assert math_place.bytes() == expected
    answered = kept.count(b'"kind":"reply"') + kept.count(b'"kind":"refusal"')
    assert len(math_place.server.requests) in (asked - answered, asked - answered + 1)  # the torn line
