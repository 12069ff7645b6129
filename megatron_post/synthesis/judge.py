"""Asks a model for its verdict on a text."""

from collections.abc import Sequence
from typing import Any

from megatron_post.synthesis.task import Task


async def ask_judge(task: Task[Any], step: str, prompt: str) -> str | None:
    """The judge's reply. If it is cut off, this returns None and the report counts it. Raises `Refused`."""
    reply = await task.ask(step, prompt, model="judge", temperature=0.0, top_p=1.0)
    if reply.finish != "stop":
        task.count(step, "cut off")
        return None
    return reply.text


async def verdict(task: Task[Any], step: str, prompt: str, scale: Sequence[str]) -> str:
    """A word of the scale, from the last line "Verdict: WORD"; "off scale" or "cut off" where there is none.

    The report counts it under the step. Raises `Refused`.
    """
    text = await ask_judge(task, step, prompt)
    if text is None:
        return "cut off"
    last = text.strip().splitlines()[-1].strip() if text.strip() else ""
    found = next((word for word in scale if last == f"Verdict: {word}"), "off scale")
    task.count(step, found)
    return found
