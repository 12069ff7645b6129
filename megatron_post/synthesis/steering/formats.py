"""Whether a whole reply has a format, and how many items it has there."""

import json
import re
from typing import Any, Literal

from megatron_post.synthesis.replies import blocks

Format = Literal["json", "bullets", "numbers", "table", "plain"]
_ITEM = {
    "bullets": re.compile(r" *[-*+•‣◦▪–] +\S"),
    "numbers": re.compile(r" *\(?(?P<number>\d{1,6})[.)] +\S"),
}
_RULE = re.compile(r"\|? *:?-+:? *(?:\| *:?-+:? *)*\|?")
_MARKDOWN = re.compile(
    r"^ {0,3}(?:#{1,6} |`{3}|~{3}|\|.*\|[ \t]*$)|\*\*\S|(?<!`)`[^`\n]+`(?!`)|\[[^\[\]\n]*\]\(", re.MULTILINE
)
# plain text may have these too
_LIKE_MARKDOWN = re.compile(r"^ {0,3}(?:[-*+•] |\d{1,6}[.)] |>)|__|`|\*\S", re.MULTILINE)


def verdict_on_format(name: Format, text: str) -> Literal["follows", "breaks", "unclear"]:
    """Whether a reply has a format.

    These are `unclear`, because only some readers accept them: a JSON value within a block of code, a list in
    plain text, a numbered list with other numbers than 1, 2 and so on, and an item that continues in the next
    line without indentation.
    """
    if name == "plain":
        return "breaks" if _MARKDOWN.search(text) else "unclear" if _LIKE_MARKDOWN.search(text) else "follows"
    if items_in(name, text) is not None:
        return "follows"
    if name == "json":
        is_like = len(found := blocks(text)) == 1 and json_value(found[0].code) is not _NO_JSON
    else:
        is_like = name in _ITEM and _items(name, text, continued=True) is not None
    return "unclear" if is_like else "breaks"


def items_in(name: Format, text: str) -> int | None:
    """The number of items of a list, table or JSON array. None if the text does not have the format.

    The items of an inner list do not count. A JSON value that is not an array has 0 items.
    """
    if name == "json":
        value = json_value(text)
        return None if value is _NO_JSON else len(value) if isinstance(value, list) else 0
    if name == "table":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        is_table = len(lines) >= 3 and _RULE.fullmatch(lines[1]) and all("|" in line for line in lines)
        return len(lines) - 2 if is_table else None
    items = _items(name, text) if name in _ITEM else None
    if items is None:
        return None
    if name == "numbers" and [int(item["number"]) for item in items] != list(range(1, len(items) + 1)):
        return None
    return len(items)


def _items(name: Format, text: str, *, continued: bool = False) -> list[re.Match[str]] | None:
    """The outer items of a list, or None if the text has other lines.

    continued: also allow lines that follow an item without a blank line and without indentation, which
    Markdown counts as a part of the item.
    """
    lines = text.splitlines()
    outer = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    items: list[re.Match[str]] = []
    after_blank = True
    for line in lines:
        is_inner = len(line) - len(line.lstrip()) > outer
        match = _ITEM[name].match(line)
        if match is not None and not is_inner:
            items.append(match)
        elif line.strip() and (not items or not (is_inner or (continued and not after_blank))):
            return None
        after_blank = not line.strip()
    return items or None


_NO_JSON = object()


def json_value(text: str) -> Any:
    """The value of a JSON text, or `_NO_JSON` if the text is not JSON, or if an object has a key twice."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return _NO_JSON


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is in the object twice")
    return found
