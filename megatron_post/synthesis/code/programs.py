"""Finds the program in a reply, which must be the only one."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_post.inference.request import Reply
from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.unit_tests import MOST_CHARACTERS
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import blocks

TITLES: dict[Language, str] = {
    "python": "Python",
    "javascript": "JavaScript",
    "cpp": "C++",
    "java": "Java",
    "rust": "Rust",
    "bash": "Bash",
}
_TAGS: dict[Language, tuple[str, ...]] = {  # of fences, in addition to the name of the language
    "python": ("py", "python3"),
    "javascript": ("js", "node"),
    "cpp": ("c++", "cc", "cxx"),
    "java": (),
    "rust": ("rs",),
    "bash": ("sh", "shell"),
}


def text_of(row: dict[str, Any]) -> str:
    """The code in an input row. Raises `ValueError` if there is none, and `Dropped` if it is too long."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a row of the input needs `text`, which is code; it has {', '.join(row)}")
    if len(text) > MOST_CHARACTERS:
        raise Dropped("the code is too long", f"{len(text):,} characters, and at most {MOST_CHARACTERS:,}")
    return text


def fenced(code: str, tag: str) -> str:
    """A block of code. Its fence is longer than any fence in the code."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{tag}\n{code.rstrip()}\n{fence}"


def whole_text(reply: Reply, what: str) -> str:
    """The text of a reply. Raises `Dropped` if it is cut off or empty. what: its name in the reason."""
    if reply.finish != "stop":
        raise Dropped(f"{what} is cut off", f"the reply ended with {reply.finish!r}")
    if not reply.text.strip():
        raise Dropped(f"{what} is empty")
    return reply.text.strip()


def program_in(reply: Reply, language: Language, what: str = "the program") -> str:
    """The program in a reply. Raises `Dropped` if `block_in` does."""
    return block_in(reply, what, TITLES[language], (language, *_TAGS[language]))


def block_in(reply: Reply, what: str, title: str, tags: Sequence[str]) -> str:
    """The only block of a reply with one of these tags. If there is none, the only block without a tag.

    Raises `Dropped` with `what` in the reason if there is no such block, if there are several, or if the
    block is not closed. Such a reply is not trained on, because it is not clear which block is the answer.
    """
    found = blocks(whole_text(reply, what))
    named = [block for block in found if block.language in tags]
    wanted = named or [block for block in found if not block.language]
    if not wanted:
        raise Dropped(f"{what} is missing", f"no block of {title}: {reply.text[:200]!r}")
    if len(wanted) > 1:
        raise Dropped(f"{what} is ambiguous", f"{len(wanted)} blocks of {title}")
    if not wanted[0].is_closed:
        raise Dropped(f"{what} is cut off", "its block is not closed")
    if len(wanted[0].code) > MOST_CHARACTERS:
        raise Dropped(f"{what} is too long", f"more than {MOST_CHARACTERS:,} characters")
    if not wanted[0].code.strip():
        raise Dropped(f"{what} is empty")
    return wanted[0].code
