"""Solutions that run Python between steps of reasoning, in Llama 3's format, filtered by their answer."""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import CODE_INTERPRETER, Message, ToolCall
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.math.interpreter import code_of, has_ended, reached_limit, session, shown
from megatron_post.synthesis.math.tries import Try, agreeing, known_answer, whole_try
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
SANDBOX = True
ANSWERS = True
_LLAMA = ({"type": CODE_INTERPRETER},)  # as Llama 3's prompt announces it
_PARAMETERS = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
_DESCRIPTION = "Runs Python and returns what it prints. Variables stay from call to call."
_FUNCTION = {"name": CODE_INTERPRETER, "description": _DESCRIPTION, "parameters": _PARAMETERS}
_ASKED = ({"type": "function", "function": _FUNCTION},)  # in the form of requests to a server


class Settings(Section):
    problem: Name = Field("problem", description="column of the problem")
    answer: Name | None = Field("answer", description="column of the known answer, if a row has one")
    answer_after: str = Field("", description="text in that column that the answer follows, such as ####")
    samples: Count = Field(4, description="K, number of solutions that are requested")
    agreement: float = Field(
        0.5, gt=0, le=1, description="share of the samples that must agree if no answer is known"
    )
    keep: Count = Field(2, description="largest number of solutions that are kept of a problem")
    calls: Count = Field(6, le=100, description="largest number of programs that one solution may run")
    output: Count = Field(2000, description="largest number of characters of output that the model gets")


@dataclass(frozen=True)
class _Solution(Try):
    """A solution that ran programs. turns: messages of the author and the interpreter before the last one."""

    turns: tuple[Message, ...] = ()


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    problem = column(row, settings.problem, key="problem")
    known = known_answer(row, settings.answer, settings.answer_after, key="answer")
    prompt = task.prompt("solve", problem=problem, calls=settings.calls)
    found = await unless_refused(task, *(_solved(task, prompt, seed) for seed in range(settings.samples)))
    tries = [one for one in found if one]
    agreed = await agreeing(task, tries, known, samples=settings.samples, agreement=settings.agreement)
    return [
        Row(
            [Message("user", problem), *one.turns, one.message],
            capability="math",
            kind="majority" if known is None else "known_answer",
            tools=_LLAMA,
            extra={
                "problem": problem,
                "answer": known or agreed[0].answer,
                "agreement": len(agreed) / settings.samples,
            },
        )
        for one in agreed[: settings.keep]
    ]


async def _solved(task: Task[Settings], prompt: str, seed: int) -> _Solution | None:
    """A solution that ran at least one program. Otherwise this returns None and the report counts why."""
    turns: list[Message] = []
    replayed: list[str] = []
    for _ in range(task.settings.calls + 1):
        reply = await task.ask("solve", [Message("user", prompt), *turns], seed=seed, tools=_ASKED)
        if not reply.message.tool_calls:
            one = whole_try(task, "solve", reply, in_steps=False)
            if one and not turns:
                task.count("solve", "no program")
            return _Solution(one.message, one.answer, (), tuple(turns)) if one and turns else None
        code = code_of(reply.message.tool_calls[0])
        if code is None:
            task.count("solve", "another tool is called")
            return None
        outcome = await task.run("run", *session([*replayed, code]))
        if has_ended(outcome):
            task.count("run", "a program ended the interpreter")
            return None
        if not reached_limit(outcome):
            replayed.append(code)
        call = ToolCall(CODE_INTERPRETER, {"code": code})
        turns.append(replace(reply.message, tool_calls=(call,)))
        turns.append(Message("ipython", shown(outcome, most=task.settings.output)))
    task.count("solve", "too many programs")
    return None
