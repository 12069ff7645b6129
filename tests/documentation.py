"""Reads blocks, commands, links and headings from docs/ and from the pages beside code, for tests."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {"bash", "json", "jinja", "python", "text", "yaml"}
_FENCE = re.compile(r"^ *```(?P<info>.*)$")
_END = {"&&", "||", "|", ";", ">", ">>", "&", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block. `title` is the name of the file that the reader writes from it, or empty."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launchers/README.md"]
    return [*files, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    start, info, lines = 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and not start:
            start, info, lines = number, fence["info"], []
        elif fence:
            title = re.search(r'title="([^"]+)"', info)
            language = info.split()[0] if info.strip() else ""
            found.append(Block(page, start, language, title[1] if title else "", "\n".join(lines) + "\n"))
            start = 0
        else:
            lines.append(line)
    assert not start, f"{page}:{start}: a block without an end"
    return found


def json_values(text: str) -> list[Any]:
    """The JSON values in a text, one after another."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Texts between single backticks."""
    return [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text as lists of words.

    Comments, assignments and redirections are left out. Text between <<'WORD' and WORD is skipped, because it
    is the content of a file.
    """
    text = re.sub(r"<<-?'?(\w+)'?[^\n]*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in _END:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            for inner in words:  # sbatch --wrap "megatron-post ..."
                if "megatron-post " in inner:
                    yield from commands(inner)
            words = []


def arguments(words: list[str]) -> list[str] | None:
    """The words after `megatron-post` or `-m megatron_post` in a command. None if it has neither."""
    if "megatron-post" in words:
        return words[words.index("megatron-post") + 1 :]
    if "megatron_post" in words and words[words.index("megatron_post") - 1] == "-m":
        return words[words.index("megatron_post") + 1 :]
    return None


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and mkdocs both make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[\s]+", "-", text))
    return found
