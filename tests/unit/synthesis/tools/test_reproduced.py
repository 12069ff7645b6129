"""Trajectories with all core tools: each stored output is what its call gives again, without the journal."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import TypeAdapter

from megatron_post.data.dialog import ToolCall
from megatron_post.data.template import render
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer
from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.sandbox import Sandbox, open_sandbox
from megatron_post.sandbox.settings import Limits, SandboxSettings
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools import inside
from megatron_post.synthesis.tools.core import CORE_TOOLS, CoreSettings, Output, Toolbox
from megatron_post.synthesis.tools.scripts import python
from megatron_post.synthesis.tools.search import Index
from tests.documentation import ROOT
from tests.scripted_server import Body
from tests.unit.data.test_template import ids_of_text
from tests.unit.synthesis.tools.author import call, towns
from tests.unit.synthesis.tools.conftest import ToolPlace, sandbox_with

_PUBLISHED = ROOT / "../shared/data/llama3_tokenizer/tokenizer.model"


class _Again:
    """Runs programs and tools without a journal, in place of a task.

    A program runs once here, where a task runs it twice to compare the outputs. mathematics: the outcome of
    each query. All queries are answered by one program, because sympy takes long to import.
    """

    def __init__(self, sandbox: Sandbox, index: Index, mathematics: Mapping[str, Outcome]) -> None:
        self._sandbox, self.prepared, self._mathematics = sandbox, index, mathematics
        self._last: Outcome | None = None

    async def run(self, step: str, files: Files, command: Sequence[str]) -> Outcome:
        if step == "wolfram_alpha":
            return self._mathematics[str(files["query.txt"])]
        if "RUN=2" in command:
            assert self._last is not None
            return self._last
        contents = {n: f.read_bytes() if isinstance(f, Path) else f for n, f in files.items()}
        self._last = await self._sandbox.run(contents, command)
        return self._last

    async def use(self, step: str, tool: str, values: Mapping[str, Any], make: Callable[[], str]) -> str:
        return make()


async def _answers_to(queries: Sequence[str], sandbox: Sandbox) -> dict[str, Outcome]:
    script = Path(inside.__file__).with_name("mathematics.py")
    files = {f"{number}.txt": query for number, query in enumerate(queries)}
    limits = Limits(seconds=300, cpu_seconds=120)
    whole = await sandbox.run(
        {script.name: script.read_bytes(), **files}, python(script.name, *files), limits
    )
    answers = json.loads(whole.stdout)
    return {
        query: replace(whole, stdout=json.dumps([answer]))
        for query, answer in zip(queries, answers, strict=True)
    }


def _calls_of(row: dict[str, Any]) -> list[ToolCall]:
    functions = [each["tool_calls"][0]["function"] for each in row["messages"] if "tool_calls" in each]
    return [ToolCall(each["name"], json.loads(each["arguments"])) for each in functions]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_every_stored_output_is_reproduced_by_its_call(tool_place: ToolPlace, count: int) -> None:
    corpus = tool_place.directory / "corpus"
    corpus.mkdir()
    mayors = random.Random(0)
    for number in range(count):
        mayor = mayors.choice(["Ada", "Bo", "Cy"])
        (corpus / f"{number}.txt").write_text(f"The mayor of town {number} is {mayor}.\n")
    documents = {"kind": "documents", "path": str(corpus)}
    rows = [{"text": f"A text about {number} towns."} for number in range(count)]
    packages = ["sympy", "mpmath"]
    tool_place.run("tool_use", towns, rows=rows, packages=packages, documents=documents)
    kept = tool_place.rows()
    assert len(kept) == count and tool_place.dropped() == {}
    kinds = Counter(row["kind"] for row in kept)
    assert set(kinds) == {"one step", "several steps"} and min(kinds.values()) >= count // 4
    assert {tool for row in kept for tool in row["called"]} == set(CORE_TOOLS)

    settings = CoreSettings.model_validate({"documents": documents})
    assert settings.documents is not None
    index = Index(settings.documents)
    sandboxes = TypeAdapter(SandboxSettings).validate_python(sandbox_with(*packages))

    calls = [_calls_of(row) for row in kept]
    queries = [call.parameters["query"] for row in calls for call in row if call.name == "wolfram_alpha"]

    async def again() -> list[list[str]]:
        with open_sandbox(sandboxes) as sandbox:
            mathematics = await _answers_to(queries, sandbox)

            async def outputs_of(row: list[ToolCall]) -> list[str]:
                task = cast(Task[Any], _Again(sandbox, index, mathematics))
                box = Toolbox(task, settings, CORE_TOOLS)
                return [(await box.call(call)).text for call in row]

            return await asyncio.gather(*map(outputs_of, calls))

    stored = [[m["content"] for m in row["messages"] if m["role"] == "tool"] for row in kept]
    assert asyncio.run(again()) == stored


def test_a_row_of_metas_example_has_its_published_ids(
    tool_place: ToolPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta's request, call and answer in "Built-in tools full interaction". sympy cannot give its output.

    Readers of rows remove blank lines around a message's content, and Meta's output has one on each side.
    """
    if not _PUBLISHED.is_file():
        pytest.skip("../shared/data has no tokenizer.model of Llama 3")
    page = (_PUBLISHED.parent / "prompt_format.md").read_text().partition("## Built-in tools full")[2]
    prompt, response = re.findall(r"Format\n```\n(.*?)\n```\n", page, re.DOTALL)[:2]
    output = prompt.partition("ipython<|end_header_id|>\n\n")[2].partition("<|eot_id|>")[0]

    answer = response.removesuffix("<|eot_id|>")

    def author(body: Body) -> str | dict[str, Any]:
        first = body["messages"][0]["content"]
        if "Verdict:" in first:
            return "Verdict: supported"
        if "tools" in body:
            if len(body["messages"]) > 1:
                return answer
            return call("wolfram_alpha", "100th decimal of pi")
        both = "must need wolfram_alpha" in first and "- brave_search" in first
        return "<request>What is the 100th decimal of pi?</request>" if both else "NONE"

    async def published(box: Toolbox, call: ToolCall) -> Output:
        return Output(output, ok=True)

    monkeypatch.setattr(Toolbox, "call", published)
    (tool_place.directory / "a.txt").write_text("Nothing.")
    documents = {"kind": "documents", "path": str(tool_place.directory / "a.txt")}
    settings = {"tools": ["brave_search", "wolfram_alpha"], "several": 0, "documents": documents}
    tool_place.run("tool_use", author, rows=[{"text": str(number)} for number in range(8)], **settings)
    tokenizer = load_tokenizer(_PUBLISHED)
    for dialog in tool_place.dialogs():
        expected = ids_of_text(prompt.replace(output, output.strip()) + response, tokenizer)
        assert render(dialog, tokenizer).tokens.tolist() == expected
    assert tool_place.rows()


def test_rows_are_rendered_as_metas_examples_are(tool_place: ToolPlace) -> None:
    """The text of a row has the form of "Built-in tools full interaction" in Meta's "Prompt Formats"."""
    if not _PUBLISHED.is_file():
        pytest.skip("../shared/data has no tokenizer.model of Llama 3")
    rows = [{"text": "A text about 6 towns."}]
    values = {"tools": ["wolfram_alpha"], "several": 0, "packages": ["sympy", "mpmath"]}
    tool_place.run("tool_use", towns, rows=rows, **values)  # type: ignore[arg-type]
    (dialog,), (row,) = tool_place.dialogs(), tool_place.rows()
    output = row["messages"][2]["content"]
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Environment: ipython\nTools: wolfram_alpha\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nUse wolfram_alpha on the 6 towns.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNow this.<|python_tag|>"
        'wolfram_alpha.call(query="integrate(x^6, (x, 0, 2))")<|eom_id|>'
        f"<|start_header_id|>ipython<|end_header_id|>\n\n{output}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThat is it.<|eot_id|>"
    )
    tokenizer: Tokenizer = load_tokenizer(_PUBLISHED)
    assert tokenizer.decode(render(dialog, tokenizer).tokens.tolist()) == expected
    assert output.startswith('{\n    "queryresult": {\n        "success": true,\n        "inputstring":')
