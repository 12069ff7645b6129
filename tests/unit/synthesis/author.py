"""The recipe of docs/synthesis/own_recipe.md, and an author whose programs are right or wrong."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.documentation import ROOT, blocks
from tests.scripted_server import Body

_WANTED = re.compile(r"does this: print (\d+), and be (\w+)")


def answer(body: Body) -> str:
    """As the task in the first message wants it: "right", "mended" (at the second try), "wrong", "prose",
    "broken" (no Python) or "marked" (with another template's marks)."""
    found = _WANTED.search(body["messages"][0]["content"])
    if found is None:
        return "Another answer."
    number, manner = int(found[1]), found[2]
    if manner == "prose":
        return "I would rather not."
    tries = sum(message["role"] == "assistant" for message in body["messages"])
    is_right = manner in ("right", "marked") or (manner == "mended" and tries == 1)
    source = f"print({number if is_right else number + 1})" if manner != "broken" else "print("
    mark = "<|im_end|>" if manner == "marked" else ""
    return f"Here it is.{mark}\n```python\n{source}\n```\n"


def write_recipe(directory: Path) -> Path:
    """Write the recipe and its prompts as the page has them. Returns the recipe's path."""
    for block in blocks(ROOT / "docs/synthesis/own_recipe.md"):
        if block.title.startswith("my_recipe"):
            path = directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    return directory / "my_recipe.py"


def write_tasks(path: Path, *manners: str, first: int = 0) -> None:
    """A task for each manner, with numbers from `first` on."""
    with path.open("a") as file:
        for number, manner in enumerate(manners, start=first):
            task = f"print {number}, and be {manner}"
            file.write(f'{{"task": "{task}", "expected": "{number}"}}\n')


def write_config(directory: Path, url: str, **values: Any) -> Path:
    """A synthesis file beside the recipe and the tasks, with `output` there."""
    backend = {"kind": "server", "url": url, "served_model": "author", "retries": 3, "timeout": 2.0}
    settings = {
        "recipe": str(directory / "my_recipe.py"),
        "input": {"kind": "rows", "path": str(directory / "tasks.jsonl")},
        "models": {"author": {"model": "author", "backend": backend}},
        "output": str(directory / "output"),
        **values,
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
