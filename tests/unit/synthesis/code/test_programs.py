"""The one program in a reply, and the reasons why there is none."""

import pytest

from megatron_post.inference.request import Reply, assistant_message
from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.programs import fenced, program_in, text_of
from megatron_post.synthesis.code.unit_tests import MOST_CHARACTERS
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import blocks


def _reply(text: str, finish: str = "stop") -> Reply:
    return Reply(assistant_message(text), finish, 1)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "Here:\n```python\na\n```\nIt prints:\n```\n3\n```\nRun it:\n```bash\npython a.py\n```"),
        ("python", "```py\na\n```"),
        ("python", "```\na\n```\n```bash\npython a.py\n```"),
        ("cpp", "```C++\na\n```"),
        ("bash", "```sh\na\n```"),
        ("javascript", "~~~js\na\n~~~"),
    ],
)
def test_the_block_of_the_language_is_the_program(language: Language, text: str) -> None:
    assert program_in(_reply(text), language) == "a\n"


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("I cannot help with this.", "stop", "the program is missing"),
        ("```rust\na\n```", "stop", "the program is missing"),
        ("", "stop", "the program is empty"),
        ("```python\n \n```", "stop", "the program is empty"),
        ("```python\na\n```", "length", "the program is cut off"),
        ("```python\na", "stop", "the program is cut off"),
        ("```python\na\n```\n```python\nb\n```", "stop", "the program is ambiguous"),
        ("```\na\n```\n```\nb\n```", "stop", "the program is ambiguous"),
        (f"```python\n{'a' * (MOST_CHARACTERS + 1)}\n```", "stop", "the program is too long"),
    ],
)
def test_a_reply_without_one_program_is_dropped(text: str, finish: str, reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        program_in(_reply(text, finish), "python")
    assert dropped.value.reason == reason


@pytest.mark.parametrize("code", ["a\n", "x\n```python\nb\n```\n", "````", ""])
def test_a_fence_is_longer_than_those_in_the_code(code: str) -> None:
    (block,) = blocks(f"before\n{fenced(code, 'python')}\nafter")
    assert (block.code.rstrip(), block.language, block.is_closed) == (code.rstrip(), "python", True)


def test_an_input_row_needs_code() -> None:
    assert text_of({"text": "a"}) == "a"
    with pytest.raises(ValueError, match="needs `text`, which is code; it has question"):
        text_of({"question": "a"})
    with pytest.raises(Dropped, match="the code is too long"):
        text_of({"text": "a" * (MOST_CHARACTERS + 1)})
