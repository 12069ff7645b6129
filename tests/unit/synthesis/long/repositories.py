"""Small repositories, and an author who reads a prompt in the manner of the repository's name."""

import re
from pathlib import Path
from typing import Any

from tests.scripted_server import Body

CORE = (
    "class Shape:\n    sides = 0\n\n\ndef area(side):\n    return side * side\n\n\nLIMIT = 7\n_UNUSED = 3\n"
)
_IMPORTS = (
    "from shapes.core import Shape\n\nprint(Shape)\n",
    "from shapes import core\n\nprint(core.area(2))\n",
    "import shapes.core\n\nprint(shapes.core.LIMIT)\n",
    "from .core import Shape as S\n\nprint(S)\n",
    "def later():\n    from . import core as c\n\n    return c.area(3)\n",
)
_OTHER = "import os\n\nfrom shapes import name\n\nprint(os.sep, name, 'from shapes.core import area')\n"


_TESTS = """import sys, unittest
sys.path.insert(0, "src")

class Tests(unittest.TestCase):
    def test_area(self):
        from shapes import core
        self.assertEqual(core.area(3), 9)
        self.assertIsInstance(core.Shape(), core.Shape)
"""


def write_tests(directory: Path, manner: str) -> None:
    """Unit tests of shapes/core.py, which fail in `red` and do not import it in `apart`."""
    text = {"red": _TESTS.replace(", 9", ", 8"), "apart": _TESTS.replace("from shapes import core", "return")}
    (directory / manner / "test_core.py").write_text(text.get(manner, _TESTS))


def write_repository(directory: Path, manner: str, *, importers: int = 5) -> None:
    """shapes/core.py, the files that import it, and a few that do not."""
    package = directory / manner / "src/shapes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("name = 'shapes'\n")
    (package / "core.py").write_text(CORE)
    for number in range(importers):
        (package / f"user_{number}.py").write_text(_IMPORTS[number % len(_IMPORTS)])
    (directory / manner / "other.py").write_text(_OTHER)
    (directory / manner / "broken.py").write_text("def (:\n")
    (directory / manner / "latin.py").write_bytes(b"# \xe9\n")


def answer(body: Body) -> str | dict[str, Any]:
    first = body["messages"][0]["content"]
    found = re.search(r"Python repository (\w+)\. The file", first)
    assert found is not None, first
    if len(body["messages"]) == 1:
        return _listed(first, found[1], body["seed"])
    return _written(found[1], body["seed"])


def fault(body: Body, attempt: int) -> str | None:
    return "400" if "repository refused." in body["messages"][0]["content"] else None


def _listed(prompt: str, manner: str, seed: int) -> str | dict[str, Any]:
    paths = re.findall(r"^File `(src/shapes/user_\d\.py)`:$", prompt, re.MULTILINE)
    if "        from shapes import core" in prompt:
        paths.append("test_core.py")
    match manner:
        case "prose":
            return "I cannot tell."
        case "more":
            paths = [*paths, "other.py"]
        case "fewer":
            paths = paths[1:]
        case "second_list" if seed == 0:
            paths = ["other.py"]
    text = "These import it:\n```text\n" + "\n".join(reversed(paths)) + "\n```"
    return {"content": text, "finish_reason": "length" if manner == "cut" else "stop"}


def _written(manner: str, seed: int) -> str:
    code = CORE.replace("side * side", "side**2")
    match manner:
        case "no_code":
            return "It is lost."
        case "broken_code":
            code = "def area(:\n"
        case "wrong":
            code = code.replace("**2", "**3")
        case "exits":
            code = f"import os\nos._exit(0)\n{code}"
        case "rewritten":
            code = "Shape = type('Shape', (), {})\narea = lambda side: side * side\nLIMIT = 7\n"
        case "lacking":
            code = code.replace("LIMIT", "BOUND")
        case "stub":
            code = "Shape = area = LIMIT = None\n"
        case "second_code" if seed == 0:
            code = "x = 1\n"
        case "deep":
            code = "(" * 5000 + ")" * 5000 + "\n"
    return f"Here it is.\n\n```python\n{code}```\n"
