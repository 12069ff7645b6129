"""What recipes look for in a reply."""

import re

# as in Markdown: a fence of three backticks or more, closed by one that is as long, or by the end of the text
_FENCE = re.compile(
    r"^ {0,3}(?P<fence>`{3,})[ \t]*(?P<language>[^\s`]*)[^\n`]*\n"
    r"(?P<code>.*?)(?:^ {0,3}(?P=fence)`*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)


def code_blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of a text, in order; of these languages alone, if some are given.

    The names of languages are compared in lower case. A block that names none counts for each.
    """
    wanted = {"", *(language.lower() for language in languages)}
    found = [(block["language"].lower(), block["code"]) for block in _FENCE.finditer(text)]
    return [code for language, code in found if not languages or language in wanted]
