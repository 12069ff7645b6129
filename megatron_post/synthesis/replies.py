"""Waits for replies, and reads their whole text and the fenced blocks of code in it."""

import re
from collections.abc import Awaitable
from typing import Any, NamedTuple, TypeVar

from megatron_post.inference.model import Refused
from megatron_post.inference.request import Reply
from megatron_post.synthesis.task import Task

# As in Markdown, a fence has three marks or more. A fence that is as long closes it, and so does the end of
# the text. A fence with a language cannot close a block.
_FENCE = re.compile(
    r"^(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^\n`]*\n"
    r"(?P<code>.*?)(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|(?P<end>\Z))",
    re.MULTILINE | re.DOTALL,
)
R = TypeVar("R")


class Block(NamedTuple):
    """A fenced block.

    language: the language of the fence in lower case, or empty. is_closed: False if the closing fence is
    missing.
    """

    language: str
    code: str
    is_closed: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order. A block within a block is a part of the outer one.

    The indentation of the fence is removed from the block's lines.
    """
    found = []
    for match in _FENCE.finditer(text.replace("\r\n", "\n")):
        code = (
            re.sub(rf"^ {{1,{len(match['indent'])}}}", "", match["code"], flags=re.MULTILINE)
            if match["indent"]
            else match["code"]
        )
        found.append(Block(match["language"].lower(), code, match["end"] is None))
    return found


def outside_blocks(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("\n", text.replace("\r\n", "\n"))


def code_blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of a text, in order. If languages are given, only their blocks count.

    The names of languages are compared in lower case. A block without a language matches every language.
    """
    wanted = {"", *(language.lower() for language in languages)}
    return [block.code for block in blocks(text) if not languages or block.language in wanted]


def whole_reply(task: Task[Any], step: str, reply: Reply) -> str:
    """The text of a reply. If it is cut off or empty, this returns "" and the report counts it."""
    text = reply.text.strip()
    if reply.finish == "stop" and text:
        return text
    task.count(step, "empty" if reply.finish == "stop" else "cut off")
    return ""


async def unless_refused(task: Task[Any], *work: Awaitable[R]) -> list[R | None]:
    """The results of several requests in order. A request that the model refuses gives None.

    Raises `Refused` if the model refuses all.
    """

    refusals: list[Refused] = []

    async def result(one: Awaitable[R]) -> R | None:
        try:
            return await one
        except Refused as refused:
            refusals.append(refused)
            return None

    found = await task.together(*(result(one) for one in work))
    if refusals and len(refusals) == len(found):
        raise min(refusals, key=lambda refused: refused.key)  # the order of the list depends on timing
    return found
