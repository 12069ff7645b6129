"""Functions become JSON schemas, as `transformers` makes them, and what has no schema is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_post.synthesis.tools import inside

pytest.importorskip("docstring_parser")
SCRIPT = Path(inside.__file__).with_name("signatures.py")

GOOGLE = '''
from typing import Any, Literal, Optional, Union

def plain(a: int, b: float, c: str, d: bool):
    """Do something.

    Args:
        a: The first.
        b: The second, which
            is long.
        c: The third.
        d: The last.
    """

def lists(a: list[int], b: dict[str, float], c: list[list[str]]):
    """Do something with lists.

    Args:
        a: Numbers.
        b: Weights.
        c: Words.
    """
'''


def _schemas(directory: Path, source: str) -> dict[str, Any]:
    (directory / "functions.py").write_text(source)
    # the script runs in a process of its own, with the packages of this one
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=directory,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_schemas_equal_those_of_transformers(tmp_path: Path) -> None:
    get_json_schema = pytest.importorskip("transformers.utils.chat_template_utils").get_json_schema
    names: dict[str, Any] = {}
    exec(GOOGLE, names)
    found = _schemas(tmp_path, GOOGLE)
    assert found["left_out"] == {}
    for tool in found["tools"]:
        function = tool["function"]
        assert function["parameters"].pop("additionalProperties") is False
        wanted = get_json_schema(names[function["name"]])
        wanted["function"].pop("return", None)
        assert tool == wanted


def test_annotations_and_docstrings(tmp_path: Path) -> None:
    source = '''
import typing
from typing import Any, Literal, Optional, Union

def numpy_style(a: int, b: "str" = "x"):
    """Do it.

    Parameters
    ----------
    a : int
        The first.
    """

def rest(a: Optional[int] = None, *, b: int | str | None, c: Literal["x", "y"] = "x", d: Any = 1):
    """Do it.

    :param a: The first.
    """

def nested(a: typing.List[int], b: Union[list[int], None], c: tuple[int, ...], d: dict) -> int:
    """Do it."""
'''
    tools = _schemas(tmp_path, source)["tools"]
    first, second, third = (tool["function"]["parameters"] for tool in tools)
    assert first["properties"] == {
        "a": {"type": "integer", "description": "The first."},
        "b": {"type": "string", "default": "x"},
    }
    assert first["required"] == ["a"] and second["required"] == ["b"]
    assert second["properties"] == {
        "a": {"type": ["integer", "null"], "description": "The first.", "default": None},
        "b": {"type": ["integer", "string", "null"]},
        "c": {"enum": ["x", "y"], "default": "x"},
        "d": {"default": 1},
    }
    integers = {"type": "array", "items": {"type": "integer"}}
    assert third["properties"] == {
        "a": integers,
        "b": {"anyOf": [integers, {"type": "null"}]},
        "c": integers,
        "d": {"type": "object"},
    }


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("def f(a: int): pass", "there is no docstring"),
        ('def f(a):\n    """Do it."""', "a parameter has no annotation"),
        ('def f(*a: int):\n    """Do it."""', "cannot be given by its name"),
        ('def f(a: int, /):\n    """Do it."""', "cannot be given by its name"),
        ('def f(a: Path):\n    """Do it."""', "the annotation Path has no JSON schema"),
        ('def f(a: dict[int, str]):\n    """Do it."""', "the annotation dict[...] has no JSON schema"),
        ('def f(a: int = now()):\n    """Do it."""', "now() is no JSON"),
        ('def f(a: bytes = b"x"):\n    """Do it."""', "the annotation bytes has no JSON schema"),
        ('@cache\ndef f(a: int):\n    """Do it."""', "it has a decorator"),
        (
            'def f(a: int):\n    """Do it.\n\n    Args:\n        b: The other.\n    """',
            "which is no parameter",
        ),
        ('from typing import Literal\ndef f(a: Literal[b"x"]):\n    """Do it."""', "b'x' is no JSON"),
        ('def f(a: int):\n    """:    :type a: int\n    """', "the docstring cannot be parsed"),
        ('async def f(a: int):\n    """Do it."""', "it is a coroutine"),
        ('def f(a: int):\n    """Do it."""\ndef f(a):\n    """Do it."""', "a parameter has no annotation"),
        ('def f(a: "int |"):\n    """Do it."""', "invalid syntax"),
    ],
)
def test_functions_without_a_schema_are_left_out(tmp_path: Path, function: str, reason: str) -> None:
    found = _schemas(tmp_path, function)
    assert found["tools"] == [] and reason in found["left_out"]["f"]


def test_the_last_function_of_a_name_counts(tmp_path: Path) -> None:
    source = 'def f(a: int):\n    """Do it."""\ndef f(b: str):\n    """Do that."""\n'
    (tool,) = _schemas(tmp_path, source)["tools"]
    assert tool["function"]["parameters"]["properties"] == {"b": {"type": "string"}}


def test_private_and_nested_functions_are_no_tools(tmp_path: Path) -> None:
    source = 'def _f(a: int):\n    """Do it."""\nclass C:\n    def g(self):\n        """Do it."""\n'
    assert _schemas(tmp_path, source) == {"tools": [], "left_out": {}}
