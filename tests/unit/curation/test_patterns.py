"""Patterns of users match as in Python's `re`, and a search that takes too long ends with an error."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_post.curation import patterns
from megatron_post.curation.patterns import check_pattern, first_group, occurs
from megatron_post.curation.rules import Rule
from megatron_post.inference.prompts import Prompt
from megatron_post.rounds.verifier import ExactMatch, judge
from tests.unit.curation.test_rules import RULES

HOSTILE = (r"((a|aa)+)$", r"((a|a)*)b", r"(?:(a?){40})c", r"^((?:a|a|a)+)+$")
TEXT = "a" * 60 + "!"


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_ends_with_a_message(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    began = time.process_time()
    prompt = Prompt(1, ({"role": "user", "content": "?"},), answer="2")
    for act in (
        lambda: judge(ExactMatch(pattern=pattern), [(prompt, TEXT)]),
        lambda: Rule(name="a", pattern=pattern, max_share=1.0, at_least=2).finds(TEXT),
    ):
        try:
            act()
        except ValueError as error:
            assert "takes more than 0.2 s on a text of 61 characters" in str(error) and pattern in str(error)
    assert time.process_time() - began < 5


def test_at_least_one_of_them_would_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s"):
        first_group(HOSTILE[0], TEXT)
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s"):
        occurs(HOSTILE[0], TEXT, times=1)


@pytest.mark.parametrize("pattern", ["(", "a**", "[", "\\", "a{99999999999}", "(" * 5000, "a" * 10_001])
def test_an_invalid_regular_expression(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is no regular expression|no more than 10,000"):
        check_pattern(pattern)


@given(st.text("The answer is 12.\n so,Sorry!ſK", max_size=40))
def test_as_python_s_own_finds_them(text: str) -> None:
    for pattern in (r"is (\d+)\.\Z", r"(?m)^(\w+)$", r"(sorry)(?!\s)", r"([^\W\d]+)", r"(\s|\b)s"):
        match = re.search(pattern, text)
        assert first_group(pattern, text) == (match[1] if match else None)
        times = len(list(re.finditer(pattern, text, re.IGNORECASE)))
        assert [occurs(pattern, text, times=n) for n in (times, times + 1)] == [True, False]


def test_the_shipped_rules_find_what_python_s_own_does() -> None:
    texts = (
        "I'm so sorry, but",
        "My sincere apologies!",
        "a != b!!",
        "🎉 done",
        "Nothing.",
        "5! Great!!",
    )
    for rule in RULES:
        for text in texts:
            count = sum(1 for _ in re.finditer(rule.pattern, text, re.IGNORECASE))
            assert rule.finds(text) == (count >= rule.at_least), (rule.name, text)
