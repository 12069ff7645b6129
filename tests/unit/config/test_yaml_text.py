"""YAML values have no surprising types, dangerous documents are refused, and nothing takes long."""

import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_post.config.yaml_text import DEEPEST, LARGEST, read_argument, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("+5", 5),
        ("0", 0),
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'5'", "5"),
        # numbers, booleans and dates of YAML 1.1 alone
        ("0777", "0777"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("24:00:00", "24:00:00"),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-31", "2026-01-31"),
        ("inf", "inf"),
        ("nan", "nan"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    for found in (
        read_yaml(text),
        read_argument(text),
        read_yaml(f"a: {text}")["a"],
        read_yaml(f"[{text}]")[0],
    ):
        assert (found, type(found)) == (value, type(value))


def test_keys_are_texts_as_they_are_written() -> None:
    assert read_yaml("{1: a, on: b, null: c, 1.0: d}") == {"1": "a", "on": "b", "null": "c", "1.0": "d"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' already appears in line 1"),
        ("x: {a: 1, 'a': 1}", "line 1, column 11: the key 'a' already appears in line 1"),
        ("1: a\n'1': b", "line 2, column 1: the key '1' already appears"),
        (
            "x: !!python/object/apply:os.system ['true']",
            "line 1, column 4: the tag !!python/object/apply:os.system",
        ),
        ("x: !!str 5", "the tag !!str is refused"),
        ("!x y: 5", "a key must be a plain word"),
        ("<<: {a: 1}", "the merge key << is refused; inherit with `base:`"),
        ("? [a]\n: 1", "a key must be a plain word"),
        ("a: &a [*a]", "the alias \\*a has no finished value"),
        ("a: *b", "the alias \\*b has no finished value"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document"),
        ("a:\n\t- 1", "line 2, column 1: .*indent with spaces"),
        ("a: 'b\0'", "line 1: the character '\\\\x00' is not allowed"),
        ("a: [1", "line 1, column 6"),
        ("a: b: c", "line 1, column 5"),
        ("[" * 10_000, f"more than {DEEPEST} nested mappings and lists"),
        ("- " * 10_000, f"more than {DEEPEST} nested mappings and lists"),
        ("{a: " * 10_000, f"more than {DEEPEST} nested mappings and lists"),
        ("x" * (LARGEST + 1), "characters, and no more than 262,144 are read"),
        ("[" + "1," * 110_000 + "]", "more than 100,000 values"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_yaml(text)


def test_values_of_aliases_are_counted_at_each_use() -> None:
    """9 lists, each with 9 times the values of the previous one, give 9^9 values in 300 characters.

    Without the count, copies of these values would fill the memory.
    """
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert len(read_yaml("\n".join(lines[:4]))["a3"]) == 9
    began = time.monotonic()
    with pytest.raises(ValueError, match="more than 100,000 values, counting each use of an alias"):
        read_yaml("\n".join(lines))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/exp #3", "runs/exp #3"),
        ("a: b", "a: b"),
        ("*a", "*a"),
        ("&a", "&a"),
        ("!a", "!a"),
        ("- a", "- a"),
        ("| a", "| a"),
        ("@a", "@a"),
        ("%a", "%a"),
        ("a\nb", "a\nb"),
        ("[a, 1]", ["a", 1]),
        ("{a: [1, {b: c}]}", {"a": [1, {"b": "c"}]}),
        ('"a #3"', "a #3"),
        ("'it''s'", "it's"),
        ("${a}/b", "${a}/b"),
    ],
)
def test_arguments(text: str, value: Any) -> None:
    assert read_argument(text) == value


@pytest.mark.parametrize("text", ["[a, b", "{a", '"a" b', "[a] #3", "'a", "[a]: b", "[0-9]+"])
def test_arguments_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"column|follows the end of the value"):
        read_argument(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value
