"""A hook of mkdocs: README.md is the front page and CONTRIBUTING.md a page, so that each is written once."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links from docs/ to both pages, as seen inside of the site."""
    for name, target in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    return markdown


def on_files(files: Files, config: Any) -> Files:
    """Add both pages, with their links as seen from docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for name, target in PAGES.items():
            text = text.replace(f"]({name}", f"]({target}")
        text = re.sub(r"(\]\(|src=\"|srcset=\")docs/", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files
