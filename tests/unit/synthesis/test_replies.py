"""Blocks of code in replies, as Markdown has them."""

import pytest

from megatron_post.synthesis.replies import Block, blocks, code_blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no block, and `one` in a line", []),
        ("```python print(1)```", []),
        ("```python\nprint(1)\n```", [Block("python", "print(1)\n", True)]),
        ("a\r\n```Python  title=x\r\nb\r\n```\r\nc", [Block("python", "b\n", True)]),
        ("```\na\n```\n~~~js\nb\n~~~", [Block("", "a\n", True), Block("js", "b\n", True)]),
        ("````md\n```python\na\n```\n````", [Block("md", "```python\na\n```\n", True)]),
        ("```md\n```python\na\n```", [Block("md", "```python\na\n", True)]),
        ("~~~\n```\n~~~", [Block("", "```\n", True)]),
        ("```rust\nfn main() {", [Block("rust", "fn main() {", False)]),
        ("```bash\na\n``` b\n```", [Block("bash", "a\n``` b\n", True)]),
        ("1. first\n\n   ```py\n   if a:\n       b\n   ```", [Block("py", "if a:\n    b\n", True)]),
        ("```py\n```", [Block("py", "", True)]),
    ],
)
def test_blocks(text: str, expected: list[Block]) -> None:
    assert blocks(text) == expected


def test_blocks_of_a_language() -> None:
    text = "```python\na\n```\n```\nb\n```\n```rust\nc\n```"
    assert code_blocks(text, "Python") == ["a\n", "b\n"] and len(code_blocks(text)) == 3


@pytest.mark.parametrize(
    "text", ["`" * 100_000, "```\n" * 30_000, "```a\n" * 30_000, "~~~" + "\n ```" * 30_000]
)
def test_hostile_replies_take_linear_time(text: str) -> None:
    assert len(blocks(text)) <= 15_000
