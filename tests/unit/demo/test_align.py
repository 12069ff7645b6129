"""How answers to one problem are ranked."""

from typing import Any

import pytest

from megatron_post.demo.align import preference
from megatron_post.demo.task import Operation, Problem

WORKED = "37+25: 7+5=12, 3+2+1=6, so 62. The answer is 62."
ALSO_WORKED = "37+25=62. The answer is 62."
BRIEF = "The answer is 62."
WRONG = "The answer is 52."
WRONG_WORKED = "37+25: 7+5=12, 3+2=5, so 52. The answer is 52."
PROBLEM = Problem(
    messages=({"role": "user", "content": "37 and 25?"},),
    operations=(Operation(37, "+", 25),),
    solution=WORKED,
    answer=62,
    is_brief=False,
)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((WRONG, ALSO_WORKED, BRIEF), {"chosen": ALSO_WORKED, "rejected": WRONG}),
        ((BRIEF, WRONG_WORKED), {"edited": WORKED, "chosen": BRIEF, "rejected": WRONG_WORKED}),
        ((ALSO_WORKED, BRIEF), {"chosen": ALSO_WORKED, "rejected": BRIEF}),
        ((WRONG, WRONG_WORKED), {"chosen": WORKED, "rejected": WRONG}),
        ((BRIEF, BRIEF), {"chosen": WORKED, "rejected": BRIEF}),
        ((ALSO_WORKED, WORKED), None),
        (("", "  "), None),
    ],
)
def test_ranking(answers: tuple[str, ...], expected: dict[str, str] | None) -> None:
    row: dict[str, Any] | None = preference(PROBLEM, answers)
    if expected is None:
        assert row is None
        return
    assert row is not None
    assert row.pop("prompt") == list(PROBLEM.messages)
    assert {name: said[0]["content"] for name, said in row.items()} == expected
