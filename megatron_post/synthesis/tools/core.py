"""The core tools of Llama 3, which really run: Python, a search engine and a mathematics engine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Distinct, Section, Whole
from megatron_post.data.dialog import CODE_INTERPRETER, BadRow, ToolCall
from megatron_post.synthesis.inputs import DocumentsInput
from megatron_post.synthesis.math.interpreter import code_of, has_ended, reached_limit, session, shown
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools.scripts import run_script
from megatron_post.synthesis.tools.search import Index, results_page

CoreTool = Literal["brave_search", "wolfram_alpha", "code_interpreter"]
CORE_TOOLS: tuple[CoreTool, ...] = get_args(CoreTool)  # in the order of Meta's system prompt
_SEARCH, _MATHEMATICS, _ = CORE_TOOLS
_DESCRIPTIONS = {
    "brave_search": "Searches documents and returns the passages that match best.",
    "wolfram_alpha": "Evaluates one mathematical expression, or solves one equation, in the notation of "
    "sympy, such as integrate(x^2, (x, 0, 1)), factorint(360) or x^2 - 5x + 6 = 0.",
    "code_interpreter": "Runs Python and returns what it prints. Variables stay from call to call.",
}


class ToolSettings(Section):
    """Keys of the recipes whose dialogs call core tools."""

    output: Count = Field(2000, description="largest number of characters of output that the model gets")
    calls: Count = Field(6, le=100, description="largest number of calls that run in one dialog")
    corrections: int = Field(
        1, ge=0, le=100, description="calls that may fail in one dialog. They stay in the row, untrained"
    )


class CoreSettings(ToolSettings):
    """Keys of a recipe that offers several core tools."""

    tools: Annotated[tuple[CoreTool, ...], Distinct] = Field(
        CORE_TOOLS, min_length=1, description="tools that the dialogs use"
    )
    documents: DocumentsInput | None = Field(
        None, description="documents that brave_search finds passages of, as in `input`"
    )
    bad_documents: Whole = Field(
        0, description="bad files among the documents that are allowed. They are skipped"
    )
    results: Count = Field(3, description="passages that a search returns, at most")

    @model_validator(mode="after")
    def _search_has_documents(self) -> "CoreSettings":
        if (_SEARCH in self.tools) != (self.documents is not None):
            raise ValueError(f"documents: {_SEARCH} in tools needs them, and nothing else uses them")
        return self


@dataclass(frozen=True)
class Output:
    """The output of a call, as the model gets it. ok: whether the call ran without an error."""

    text: str
    ok: bool


class Toolbox:
    """The core tools of one dialog."""

    def __init__(
        self, task: Task[Any], settings: ToolSettings, offered: Sequence[str], files: Files | None = None
    ) -> None:
        """offered: names of the tools. files: more files that programs find in their working directory."""
        self._task, self._settings, self._files = task, settings, files or {}
        self.offered = tuple(tool for tool in CORE_TOOLS if tool in offered)
        self._blocks: list[str] = []

    @property
    def announced(self) -> tuple[dict[str, Any], ...]:
        """The tools of the row, as Llama 3's system prompt announces them."""
        return tuple({"type": tool} for tool in self.offered)

    @property
    def asked(self) -> tuple[dict[str, Any], ...]:
        """The tools in the form of requests to a server."""
        return tuple({"type": "function", "function": _function(tool)} for tool in self.offered)

    def read(self, call: ToolCall) -> ToolCall:
        """The call with its one argument. Raises `Dropped` for another tool or other arguments."""
        if call.name not in self.offered:
            raise Dropped("a tool is called that is not offered", call.name[:100])
        name = _argument(call.name)
        argument = code_of(call) if call.name == CODE_INTERPRETER else _query_of(call)
        if argument is None:
            raise Dropped("the arguments of a call are wrong", f"{call.arguments!r:.200}")
        return ToolCall(call.name, {name: argument})

    async def call(self, call: ToolCall) -> Output:
        """The output of a call that `read` returned. What runs in the sandbox is computed twice.

        Raises `Dropped` if the outputs differ, and if a program ends the interpreter.
        """
        argument = call.parameters[_argument(call.name)]
        match call.name:
            case "brave_search":
                return await self._search(argument)
            case "wolfram_alpha":
                return await self._mathematics(argument)
            case _:
                return await self._python(argument)

    async def _search(self, query: str) -> Output:
        settings, index = self._settings, self._task.prepared
        assert isinstance(settings, CoreSettings) and isinstance(index, Index)
        most, longest = settings.results, settings.output // settings.results
        values = {"query": query, "most": most, "longest": longest, "documents": index.checksum}
        text = await self._task.use(
            _SEARCH, _SEARCH, values, lambda: results_page(query, index.best(query, most, longest=longest))
        )
        return Output(text, ok=bool(json.loads(text)["top_k"]))

    async def _mathematics(self, query: str) -> Output:
        files: Files = {"query.txt": query}
        outcome = await run_script(self._task, _MATHEMATICS, "mathematics.py", files, arguments=["query.txt"])
        error = "the computation ended" if outcome.ok else outcome.kind
        ended: dict[str, Any] = {"queryresult": {"success": False, "inputstring": query, "error": error}}
        found = json.loads(outcome.stdout)[0] if outcome.ok else [None, None]
        outputs = []
        for result in (each or ended for each in found):
            text = json.dumps(result, indent=4, ensure_ascii=False)
            outputs.append(Output(text, ok=result["queryresult"]["success"]))
        return _same(outputs, most=self._settings.output)

    async def _python(self, code: str) -> Output:
        files, command = session([*self._blocks, code])
        if taken := sorted(set(files) & set(self._files)):
            raise Dropped("a file has the name of one of the interpreter's", taken[0])
        found = []
        for run in (command, ("env", "RUN=2", *command)):
            outcome = await self._task.run(CODE_INTERPRETER, {**files, **self._files}, run)
            if has_ended(outcome):
                raise Dropped("a program ended the interpreter")
            found.append(Output(shown(outcome, most=self._settings.output), ok=outcome.ok))
        if not reached_limit(outcome):
            self._blocks.append(code)
        return _same(found)


def _query_of(call: ToolCall) -> str | None:
    """The one argument of a call, or None if it has others. Llama 3's format has no place for them."""
    try:
        values = call.parameters
    except BadRow:
        return None
    query = values.get("query")
    return query if isinstance(query, str) and len(values) == 1 else None


def _argument(tool: str) -> str:
    return "code" if tool == CODE_INTERPRETER else "query"


def _function(tool: str) -> dict[str, Any]:
    name = _argument(tool)
    schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}
    return {"name": tool, "description": _DESCRIPTIONS[tool], "parameters": schema}


def _same(found: Sequence[Output], most: int | None = None) -> Output:
    """The first of two outputs that are equal. Raises `Dropped` if they differ, and if it is too long.

    most: characters, for an output that would be unreadable if it was cut.
    """
    first, second = found
    if first != second:
        raise Dropped("a call has another output when it runs again", first.text[-200:])
    if most is not None and len(first.text) > most:
        raise Dropped("the output of a call is too long")
    return first
