"""Text from outside is printed without escape sequences and markup, and no module prints in another way."""

import ast
import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from megatron_post import display

PACKAGE = Path(display.__file__).parent
HOSTILE = (
    "[red]x[/red] [/] \x1b[2J \x1b]8;;http://evil\x07link \x1b]52;c;aGk=\x07 \x9b31m "
    "\u202egnp.exe \u2066 \x7f \x08 a\rhidden \udcff :smile: \U000e0041"
)
# escape sequences that `rich` writes itself, for colours and for the cursor of a progress bar
RICH = re.compile(r"\x1b\[[0-9;?]*[mAKhl]|\r")


def unsafe(text: str) -> list[str]:
    """Characters that must not reach a terminal."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [c for c in text if unicodedata.category(c) in kinds and c not in "\n\t\u200c\u200d"]


@given(st.text(st.characters()))
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = display.printable(text)
    assert not unsafe(shown)
    shown.encode()
    assert display.printable(shown) == shown
    if not unsafe(text):
        assert shown == text


def test_invisible_characters_become_visible() -> None:
    assert display.printable("a\x1b[31m\r\x9b\u202e\udcff\U000e0041") == (
        r"a\x1b[31m\r\x9b\u202e\udcff\U000e0041"
    )
    assert display.printable("कॢ 中文 می\u200cخواهم 👩\u200d🔬\n\té") == "कॢ 中文 می\u200cخواهم 👩\u200d🔬\n\té"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_obeys_neither_markup_nor_escape_sequences(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for lines, rules, tables, titles, lists and progress bars, on a terminal and in a file."""
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console = display.make_console(width=300)
    console.file = stream = io.StringIO()
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    for thing in (HOSTILE, table, [HOSTILE], {HOSTILE: 1}):
        console.print(thing)
    console.print(HOSTILE, style="bold", soft_wrap=True)
    console.rule(HOSTILE)
    with display.make_progress(console) as progress:
        progress.advance(progress.add_task(HOSTILE, total=2))
    written = stream.getvalue()
    text = RICH.sub("", written)
    assert not unsafe(text)
    assert text.count("[red]x[/red] [/]") >= 8 and text.count(":smile:") >= 6
    if is_terminal:
        assert written != text, "the console must have believed that this is a terminal"
    else:
        assert written == text


def test_json_is_ascii_and_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    display.say_json({"name": HOSTILE})
    shown = capsys.readouterr().out
    assert not unsafe(shown) and shown.isascii()
    assert json.loads(shown) == {"name": HOSTILE}


def test_every_module_prints_through_display() -> None:
    """A `print`, and rich's own `Console` and `Progress`, would obey escape sequences or markup."""
    forbidden = {"print", "Console", "Progress", "echo", "secho", "rprint"}
    allowed = {
        "display.py",
        # it may start with only the standard library, and it prints only the output of its own checks
        "bench/gpu_day",
        # another program reads what these programs print
        "synthesis/code/inside",
        "synthesis/tools/inside",
        "synthesis/math/answers_worker.py",
        "synthesis/math/session_driver.py",
    }
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if allowed.isdisjoint({str(path.relative_to(PACKAGE)), str(path.parent.relative_to(PACKAGE))})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")) in forbidden
        and not (isinstance(node.func, ast.Attribute) and node.func.attr == "print")
    ]
    assert not found, f"print through megatron_post.display: {found}"


def test_a_plain_console_would_fail_this_test() -> None:
    stream = io.StringIO()
    Console(file=stream, width=300).print(HOSTILE.replace("[/]", ""))
    assert unsafe(stream.getvalue()) and "[red]" not in stream.getvalue()
