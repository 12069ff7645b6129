"""A judge's verdict, which is the last line of its reply."""

from collections.abc import Sequence
from typing import Any

from megatron_post.synthesis.math.tries import ask_judge
from megatron_post.synthesis.task import Task


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
