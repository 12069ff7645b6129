"""Questions that a model writes about a text, for a reader who does not have the text."""

import re
from collections.abc import Iterable
from typing import Any

from megatron_post.synthesis.task import Task

_PASSAGE = re.compile(
    r"\b(?:this|the|given|above|provided) (?:\w+ )?(?:passage|excerpt|chunk|snippet|extract)\b", re.IGNORECASE
)
# A question may name a text or an article itself, so fewer forms of these words count.
_DOCUMENT = re.compile(
    r"\b(?:this|given|above|provided) (?:text|document|article|page)\b"
    r"|\b(?:according to|mentioned in|described in) the (?:text|document|article|page|author)\b",
    re.IGNORECASE,
)


def points_at_passage(question: str) -> bool:
    """Whether a question refers to "this passage" or the like, which its reader does not have."""
    return _PASSAGE.search(question) is not None


def points_at_document(question: str) -> bool:
    """Whether a question refers to "this article" or the like, or to a passage."""
    return points_at_passage(question) or _DOCUMENT.search(question) is not None


def different(task: Task[Any], texts: Iterable[str], count: int, *, what: str) -> list[str]:
    """The first `count` different texts. The report counts the others under the step `write`.

    what: the name of one text, such as "problem".
    """
    found: dict[str, str] = {}
    for text in texts:
        key = plain(text)
        if not key or key in found:
            task.count("write", f"repeated {what}" if key else f"blank {what}")
        elif len(found) == count:
            task.count("write", f"more {what}s than asked for")
        else:
            found[key] = text.strip()
    return list(found.values())


def plain(text: str) -> str:
    """A text without case, white space and punctuation, to find repeats."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;?]", text.casefold()))
