"""Dialogs with core tools: which are kept, and what their outputs are."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.data.dialog import Message
from megatron_post.synthesis.show import show_row
from megatron_post.synthesis.tools.core import CoreSettings
from tests.unit.synthesis.tools.author import Script, author
from tests.unit.synthesis.tools.conftest import ToolPlace

UNUSABLE = "the reply has no text, wrong arguments of a call, or several calls"
PYTHON, MATHEMATICS, SEARCH = "code_interpreter", "wolfram_alpha", "brave_search"


def _rows(scripts: dict[int, Script]) -> list[dict[str, Any]]:
    return [{"text": f"case {number}"} for number in scripts]


def test_one_step_takes_exactly_one_call_that_runs(tool_place: ToolPlace) -> None:
    scripts = {
        1: Script([(PYTHON, "print(6 * 7)")], answer="42."),
        2: Script([(PYTHON, "1 / 0"), (PYTHON, "print(1)")]),  # it corrects itself
        3: Script([(PYTHON, "1 / 0"), (PYTHON, "1 / 0"), (PYTHON, "print(1)")]),
        4: Script([(PYTHON, "1 / 0")], answer="It is infinite."),
        5: Script([]),
        6: Script([(PYTHON, "print(1)"), (PYTHON, "print(2)")]),
        7: Script([(PYTHON, "import time; print(time.time_ns())")]),
        8: Script([(PYTHON, "import os; os._exit(0)")]),
        9: Script([("rm", "-rf")]),
        10: Script([(PYTHON, {"code": "1", "shell": "2"})]),
        11: Script([(PYTHON, "print(1)")], verdict="unsupported"),
        12: Script([(PYTHON, "print(1)")], verdict="perhaps"),
        13: Script([(PYTHON, "print(1)")], answer=" "),
        14: Script([(PYTHON, "print(1)")], finish={1: "length"}),
        15: Script([(PYTHON, f"print({number})") for number in range(9)]),
        16: Script(request="NONE"),
        17: Script(request="I cannot do that."),
        18: Script(request="<request>case 18</request><request>case 18</request>"),
        19: Script([(PYTHON, "print('<|eot_id|>')")]),
        20: Script([(PYTHON, "import random; random.random()")]),  # the seed is fixed
        21: Script([(PYTHON, {"code": 1})]),
        22: Script([(PYTHON, {})]),
        23: Script([(PYTHON, "print(1)"), (PYTHON, "print(2)")], at_once=True),
        24: Script([], at_once=True),
        25: Script(
            [(PYTHON, "print(1)")], answer='{"name": "code_interpreter", "parameters": {"code": "1"}}'
        ),
        26: Script([(PYTHON, "print(1)")], finish={1: "tool_calls"}),
    }
    tool_place.run("tool_use", author(scripts), rows=_rows(scripts), tools=[PYTHON], several=0)
    dropped = tool_place.dropped()
    assert dropped == {
        3: ("call", "a call does not run"),
        4: ("solve", "the answer follows a call that does not run"),
        5: ("solve", "no tool is called"),
        6: ("solve", "the request takes more than one call"),
        7: (PYTHON, "a call has another output when it runs again"),
        8: (PYTHON, "a program ended the interpreter"),
        9: ("solve", "a tool is called that is not offered"),
        **dict.fromkeys((10, 21, 22), ("solve", "the arguments of a call are wrong")),
        11: ("judge", "the judge does not find the answer in the outputs"),
        12: ("judge", "the judge does not find the answer in the outputs"),
        13: ("solve", "the answer is empty"),
        14: ("solve", "a reply is cut off"),
        15: ("call", "tools are called too often"),
        16: ("write", "nothing to ask for"),
        17: ("write", "the reply has no request, or several"),
        18: ("write", "the reply has no request, or several"),
        19: ("judge", "`data pack` would refuse the row"),
        23: ("solve", UNUSABLE),
        24: ("solve", "no tool is called"),
        **dict.fromkeys((25, 26), ("solve", "the server has not read the call in a reply")),
    }
    first, second, last = tool_place.rows()
    assert [message.get("content") for message in first["messages"]] == [
        "Do case 1.",
        "I look.",
        "completed\n[stdout]\n42\n[/stdout]",
        "42.",
    ]
    assert (first["kind"], second["kind"], first["called"]) == ("one step", "one step, corrected", [PYTHON])
    assert first["tools"] == [{"type": PYTHON}] and "0.8444218515250481" in last["messages"][2]["content"]
    trained = [
        [m.trained for m in dialog.messages if m.role == "assistant"] for dialog in tool_place.dialogs()
    ]
    assert trained == [[True, True], [False, True, True], [True, True]]


def test_several_steps_take_two_calls_with_reasoning_between(tool_place: ToolPlace) -> None:
    two = [(PYTHON, "x = 20"), (PYTHON, "print(x + 1)")]
    scripts = {
        1: Script(two),
        2: Script(two[:1]),
        3: Script(two, says=""),
        4: Script([two[0], (PYTHON, "y"), (PYTHON, "print(x)")]),
    }
    tool_place.run("tool_use", author(scripts), rows=_rows(scripts), tools=[PYTHON], several=1)
    assert tool_place.dropped() == {
        2: ("solve", "the request takes fewer than two calls"),
        3: ("solve", "there is no reasoning between the calls"),
    }
    kept = tool_place.rows()
    assert [row["kind"] for row in kept] == ["several steps", "several steps, corrected"]
    assert kept[0]["messages"][4]["content"] == "completed\n[stdout]\n21\n[/stdout]"


def test_searches_and_mathematics(tool_place: ToolPlace) -> None:
    corpus = tool_place.directory / "corpus"
    corpus.mkdir()
    (corpus / "chess.txt").write_text("Ana Bole won the regional chess championship.\n")
    queries = {
        1: "integrate(x^2*exp(-x), (x, 0, 3))",
        2: "x^2 - 5x + 6 = 0",
        3: "factorint(360)",
        4: "the population of France",
        5: "unknown(3)",
        6: "integrate(x^x, x)",
        7: "2 +",
        8: "3/4",
        9: "Sum(1/n^2, (n, 1, oo)) + e",
        10: "print('hello')",
        11: "N(pi, 20)",
        12: "object()",  # whose address would be another one in another run
        13: "__import__('sys').exit(0)",
        14: "Matrix([[1, 2], [3, 4]]).det()",
        15: "sin",
        16: "__import__('time').time_ns()",
        17: "randMatrix(2)",
        18: "isprime(10007)",
        19: "(" * 500 + ")" * 500,
    }
    scripts = {number: Script([(MATHEMATICS, query)]) for number, query in queries.items()}
    tool_place.run(
        "tool_use",
        author(scripts),
        rows=_rows(scripts),
        packages=["sympy", "mpmath"],
        tools=[MATHEMATICS],
        several=0,
        corrections=0,
    )
    assert tool_place.dropped() == {
        **dict.fromkeys((4, 5, 6, 7, 10, 12, 13, 15, 19), ("call", "a call does not run")),
        **dict.fromkeys((16, 17), (MATHEMATICS, "a call has another output when it runs again")),
    }
    answers = [json.loads(row["messages"][2]["content"])["queryresult"] for row in tool_place.rows()]
    texts = [{pod["title"]: pod["subpods"][0]["plaintext"] for pod in each["pods"]} for each in answers]
    assert texts[0]["Result"] == "2 - 17*exp(-3)"
    assert texts[0]["Decimal approximation"].startswith("1.1536198377463")
    assert [text["Result"] for text in texts[1:]] == [
        "[2, 3]",
        "{2: 3, 3: 2, 5: 1}",
        "3/4",
        "pi**2/6 + E",
        "3.1415926535897932385",
        "-2",
        "True",
    ]
    assert answers[0]["success"] is True and answers[0]["inputstring"] == queries[1]

    scripts = {
        1: Script([(SEARCH, "chess champion")], answer="Ana Bole."),
        2: Script([(SEARCH, "volcano")]),
        3: Script([(SEARCH, "volcano"), (SEARCH, "championship")]),
        4: Script([(SEARCH, {"query": "chess", "count": 5})]),
        5: Script([(SEARCH, {"q": "chess"})]),
        6: Script([(SEARCH, {"query": ["chess"]})]),
    }
    documents = {"kind": "documents", "path": str(corpus)}
    tool_place.output = tool_place.directory / "searches"
    tool_place.run(
        "tool_use", author(scripts), rows=_rows(scripts), tools=[SEARCH], documents=documents, several=0
    )
    assert tool_place.dropped() == {
        2: ("solve", "the answer follows a call that does not run"),
        **dict.fromkeys((4, 5, 6), ("solve", UNUSABLE)),
    }
    found = json.loads(tool_place.rows()[0]["messages"][2]["content"])
    assert found["top_k"][0]["url"] == "chess.txt:1-1"
    assert tool_place.results("call") == {f"{SEARCH} runs": 2, f"{SEARCH} does not run": 2}


def test_a_replay_runs_nothing_and_writes_the_same_bytes(
    tool_place: ToolPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tool_place.directory / "corpus"
    corpus.mkdir()
    (corpus / "chess.txt").write_text("Ana Bole won the championship.\n")
    scripts = {1: Script([(SEARCH, "chess"), (SEARCH, "championship")]), 2: Script([(SEARCH, "chess")])}
    documents = {"kind": "documents", "path": str(corpus)}
    values: dict[str, Any] = {"tools": [SEARCH], "documents": documents, "several": 0, "rows": _rows(scripts)}
    tool_place.run("tool_use", author(scripts), **values)
    before = tool_place.bytes()
    console = Console(file=io.StringIO(), width=300, markup=False)
    show_row(tool_place.output / "rows.jsonl", 1, console=console)
    assert isinstance(console.file, io.StringIO)
    assert re.search(
        r"3\. brave_search: a tool: output.*\[brave_search: query=chess, most=3, .*Ana Bole",
        console.file.getvalue(),
        re.DOTALL,
    )
    for name in ("rows.jsonl", "summary.json"):
        (tool_place.output / name).unlink()
    for part in (tool_place.output / ".parts").glob("*"):
        part.unlink()
    monkeypatch.setattr("megatron_post.synthesis.tools.search.Index.best", None)
    tool_place.run("tool_use", author(scripts), **values)
    assert tool_place.bytes() == before


def test_changed_documents_make_the_rows_again(tool_place: ToolPlace) -> None:
    corpus = tool_place.directory / "corpus"
    documents = {"kind": "documents", "path": str(corpus)}
    scripts = {1: Script([(SEARCH, "chess")]), 2: Script(request="NONE")}
    values: dict[str, Any] = {"tools": [SEARCH], "documents": documents, "several": 0, "rows": _rows(scripts)}
    with pytest.raises(ValueError, match=r"settings\.documents\.path: .*corpus does not exist"):
        tool_place.run("tool_use", author(scripts), **values)
    assert tool_place.requests == []
    corpus.mkdir()
    for champion in ("Ana Bole", "Ida Cern"):
        (corpus / "chess.txt").write_text(f"{champion} won at chess.\n")
        tool_place.run("tool_use", author(scripts), **values)
        (row,) = tool_place.rows()
        assert champion in row["messages"][2]["content"]
    assert len(tool_place.requests) == 2  # the answer and the verdict, to which the outputs belong
    tool_place.run("tool_use", author(scripts), **values)
    assert tool_place.requests == []


def test_a_missing_package_is_named(tool_place: ToolPlace) -> None:
    scripts = {1: Script([(MATHEMATICS, "1 + 1")])}
    tool_place.run("tool_use", author(scripts), rows=_rows(scripts), tools=[MATHEMATICS], several=0)
    assert "programs cannot import 'sympy'" in tool_place.dropped()[1][1]
    assert "pip install --target DIRECTORY" in tool_place.dropped()[1][1]


@pytest.mark.parametrize(
    "values", [{}, {"tools": (PYTHON,), "documents": {"kind": "documents", "path": "x"}}, {"tools": ("rm",)}]
)
def test_settings_that_do_not_fit(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"documents|tools"):
        CoreSettings(**values)


def test_messages_of_the_tools_have_their_roles(tool_place: ToolPlace, tmp_path: Path) -> None:
    scripts = {1: Script([(PYTHON, "print(1)")], says="")}
    tool_place.run("tool_use", author(scripts), rows=_rows(scripts), tools=[PYTHON], several=0)
    dialog = tool_place.dialogs()[0]
    assert [message.role for message in dialog.messages] == ["user", "assistant", "ipython", "assistant"]
    assert [message.end_of_turn for message in dialog.messages] == [True, False, True, True]
    assert isinstance(dialog.messages[0], Message) and dialog.tools == ({"type": PYTHON},)
