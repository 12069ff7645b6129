"""Makes text from outside safe to print on a terminal. `pages` does it for HTML.

Names of files and sources, rows of a dataset, answers of a model and messages of other libraries may hold
anything. A terminal obeys escape sequences, which can hide text, change the clipboard or give a link another
target. `rich` obeys markup such as `[red]`. So every command prints through `make_console` or `say`, which
obey neither. tests/unit/test_display.py finds a module that prints in another way.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

# Cc: C0 and C1 controls. Cf: invisible marks, those that reverse the direction of text among them. Cs: a byte
# of a file name that is not UTF-8. Zl, Zp: line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SAFE = "\n\t\u200c\u200d"  # the last two join letters, in Persian and in emojis
# A fast path of `printable`: text of printable ASCII and the letters of most alphabets is safe.
_ORDINARY = re.compile(r"[\n\t\x20-\x7e\xa1-\xac\xae-\u05ff]*")


def printable(text: object) -> str:
    r"""`str(text)` with every control character, invisible mark and undecodable byte written out, as `\x1b`.

    Line feeds and tabs stay. The result can be encoded as UTF-8.
    """
    text = str(text)
    if _ORDINARY.fullmatch(text):
        return text
    return "".join(_visible(character) for character in text)


def markdown_code(text: object) -> str:
    """`printable(text)` on one line as code of Markdown, in which nothing is interpreted.

    A vertical bar is written as `\\x7c`, because it would end a cell of a table.
    """
    shown = " ".join(printable(text).split()).replace("|", r"\x7c") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    blank = " " * (shown.startswith("`") or shown.endswith("`"))
    return f"{fence}{blank}{shown}{blank}{fence}"


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print one or more lines to `file`, which is standard output by default."""
    print(printable(text), file=file, flush=True)


def say_json(value: Any) -> None:
    """Print a value as JSON in ASCII, so that other programs read it unchanged."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"), flush=True)


def make_console(*, width: int | None = None, quiet: bool = False) -> Console:
    """A console for tables and coloured text. It does not interpret markup, so pass colours as `style`."""
    return _Console(width=width, quiet=quiet, markup=False, emoji=False)


def make_progress(on: Console, *columns: ProgressColumn) -> Progress:
    """A progress bar without markup. columns: those after the bar, by default the elapsed time."""
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                    *(columns or (TimeElapsedColumn(),)), console=on)  # fmt: skip


class _Console(Console):
    """Replaces control characters first in strings, so that columns stay aligned, and then in all output."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # rich's own control codes, which move the cursor under a progress bar, are marked as such
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def _visible(character: str) -> str:
    if character in _SAFE or unicodedata.category(character) not in _UNSAFE:
        return character
    return character.encode("unicode_escape", errors="backslashreplace").decode("ascii")
