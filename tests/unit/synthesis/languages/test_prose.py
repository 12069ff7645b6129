"""Code and formulas are separated from prose, also in texts with amounts of dollars."""

import time

import pytest

from megatron_post.synthesis.languages.prose import code_of, formulas_of, prose_of


def test_prose_has_no_code_formulas_and_links() -> None:
    text = (
        "Run `x = 1`, and see https://example.org/a?b=1 now.\n```python\nprint('code')\n```\n"
        "So $a + b$ is $$c$$ or \\(d\\), and \\[e\n= f\\] too."
    )
    assert prose_of(text).split() == ["Run", ",", "and", "see", "now.", "So", "is", "or", ",", "and", "too."]
    assert code_of(text) == ["`x = 1`", "python\nprint('code')"]
    assert formulas_of(text) == ["\\(d\\)", "\\[e=f\\]", "a+b", "c"]


@pytest.mark.parametrize(
    ("block", "same"),
    [
        ("```python\nx = 1\n```", "~~~Python\r\n\r\nx = 1\r\n~~~"),
        ("```python\nx = 1\n```", "```python\n    x = 1\n```"),
        ("```python\nx = 1\n```", "```ruby\nx = 1\n```"),
        ("```python\nx = 1\ny = 2\n```", "```python\nx = 1\n    y = 2\n```"),
    ],
)
def test_a_block_of_code_keeps_its_language_and_indentation(block: str, same: str) -> None:
    assert (code_of(block) == code_of(same)) is ("\r" in same)


@pytest.mark.parametrize(
    "text", ["$5 and $6", "from $5-$6", "($5/$10)", "pay $5, $6 and $7.", "\\$5 and \\$6", "$ 5 $", "$$"]
)
def test_money_is_no_formula(text: str) -> None:
    assert formulas_of(text) == [] and prose_of(text) == text


@pytest.mark.parametrize(
    ("formula", "same"),
    [
        ("$x = 1{,}000.5$", "$x=1.000{,}5$"),
        ("$5\\text{ cakes}$", "$5 \\text{ Kuchen}$"),
        ("$\\boxed{12}$", "$\\boxed{१२}$"),
        ("$$a+b$$", "$a + b$"),
    ],
)
def test_what_a_translation_may_change_in_a_formula(formula: str, same: str) -> None:
    assert formulas_of(formula) == formulas_of(same) != []


@pytest.mark.parametrize("other", ["$a-b$", "$a+b+c$", "$b+a$", ""])
def test_what_it_may_not_change(other: str) -> None:
    assert formulas_of("$a+b$") != formulas_of(other)


@pytest.mark.parametrize("part", ["\\[", "\\(", "$$", "$a", "`", "$\\", "1,", "$1{,}"])
def test_marks_without_an_end_take_no_time(part: str) -> None:
    started = time.process_time()
    text = part * 20_000
    prose_of(text), formulas_of(text), code_of(text)
    assert time.process_time() - started < 5
