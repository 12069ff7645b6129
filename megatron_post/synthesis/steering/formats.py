"""Whether a whole reply has a format, and how many items it has there."""

import json
import re
from typing import Any, Literal

from megatron_post.synthesis.replies import blocks

Format = Literal["json", "bullets", "numbers", "table", "plain"]
_ITEM = {"bullets": re.compile(r"( *)[-*•] +\S"), "numbers": re.compile(r"( *)(\d{1,6})[.)] +\S")}
_ROW = re.compile(r"\|.*\|")
_RULE = re.compile(r"\|(?: *:?-+:? *\|)+")
_MARKDOWN = re.compile(
    r"^ {0,3}(?:#{1,6} |`{3}|~{3}|\|.*\|[ \t]*$)|\*\*\S|(?<!`)`[^`\n]+`(?!`)|\[[^\[\]\n]*\]\(", re.MULTILINE
)
# plain text may have these too
_LIKE_MARKDOWN = re.compile(r"^ {0,3}(?:[-*+•] |\d{1,6}[.)] |>)|__|`|\*\S", re.MULTILINE)


def verdict_on_format(name: Format, text: str) -> Literal["follows", "breaks", "unclear"]:
    """Whether a reply has a format.

    A JSON value within a block of code is `unclear`, because only some readers accept it. A list in plain
    text is `unclear` too.
    """
    if name == "plain":
        return "breaks" if _MARKDOWN.search(text) else "unclear" if _LIKE_MARKDOWN.search(text) else "follows"
    if items_in(name, text) is not None:
        return "follows"
    if name == "json" and len(found := blocks(text)) == 1 and json_value(found[0].code) is not _NO_JSON:
        return "unclear"
    return "breaks"


def items_in(name: Format, text: str) -> int | None:
    """The number of items of a list, table or JSON array. None if the text does not have the format.

    The items of an inner list do not count. A JSON value that is not an array has 0 items.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if name == "json":
        value = json_value(text)
        return None if value is _NO_JSON else len(value) if isinstance(value, list) else 0
    if name == "table":
        is_table = len(lines) >= 3 and _RULE.fullmatch(lines[1]) and all(map(_ROW.fullmatch, lines))
        return len(lines) - 2 if is_table else None
    pattern = _ITEM.get(name)
    if pattern is None or not lines or not pattern.match(lines[0]):
        return None
    outer = len(lines[0]) - len(lines[0].lstrip())
    items = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        match = pattern.match(line)
        if indent > outer:
            continue  # within an item
        if indent < outer or match is None:
            return None
        items.append(match)
    if name == "numbers" and [int(match[2]) for match in items] != list(range(1, len(items) + 1)):
        return None
    return len(items)


_NO_JSON = object()


def json_value(text: str) -> Any:
    """The value of a JSON text, or `_NO_JSON` if the text is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NO_JSON


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
