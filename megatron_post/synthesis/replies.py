"""What recipes look for in a reply."""

import re
from typing import NamedTuple

# as in Markdown: a fence of three marks or more, closed by one that is as long, or by the end of the text.
# A fence with a language in it closes nothing
_FENCE = re.compile(
    r"^(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^\n`]*\n"
    r"(?P<code>.*?)(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|(?P<end>\Z))",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block. language: as it is written, in lower case; empty if there is none.

    is_closed: False if the text ends before its fence.
    """

    language: str
    code: str
    is_closed: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order. A block within a block is a part of the outer one.

    What the fence is indented by, its lines are not.
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


def code_blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of a text, in order; of these languages alone, if some are given.

    The names of languages are compared in lower case. A block that names none counts for each.
    """
    wanted = {"", *(language.lower() for language in languages)}
    return [block.code for block in blocks(text) if not languages or block.language in wanted]
