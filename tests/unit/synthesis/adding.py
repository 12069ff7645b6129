"""Sums that a model computes with a tool, several samples at a time, for tests of kills."""

from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Section
from megatron_post.data.dialog import Message
from megatron_post.inference.model import Refused
from megatron_post.sandbox.languages import program
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
SANDBOX = True
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "description": "run a Python program",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
        },
    }
]


class Settings(Section):
    samples: Count = Field(3, description="samples of one sum")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    async def sample(seed: int) -> list[Message] | None:
        dialog = [Message("user", task.prompt("add", number=row["number"]))]
        try:
            reply = await task.ask("add", dialog, seed=seed, tools=TOOLS)
            if reply.finish == "tool_calls":
                code = reply.message.tool_calls[0].parameters["code"]
                outcome = await task.run("tool", *program("python", code))
                dialog += [reply.message, Message("ipython", outcome.stdout)]
                reply = await task.ask("answer", dialog, seed=seed, tools=TOOLS)
        except Refused:
            return None
        return [*dialog, reply.message] if reply.text == f"It is {row['number'] + 1}." else None

    samples = await task.together(*map(sample, range(task.settings.samples)))
    rows = [
        Row(dialog, "math", kind="tool" if len(dialog) > 2 else "plain", tools=TOOLS)
        for dialog in samples
        if dialog is not None
    ]
    if not rows:
        raise Dropped("no sample is right")
    return rows


def answer(body: dict[str, Any]) -> str | dict[str, Any]:
    """Adds with the tool, or in the head if number and seed have an odd sum, and then wrongly at times."""
    number, last = int(body["messages"][0]["content"].split()[-1]), body["messages"][-1]
    if last["role"] == "tool":
        return f"It is {last['content'].strip()}."
    if (number + body["seed"]) % 2:
        return f"It is {number + 1 + (number % 5 == 0)}."
    code = f"print({number} + 1)" if number % 7 else "print("
    call = {"name": "run", "arguments": f'{{"code": "{code}"}}'}
    return {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": call}]}
