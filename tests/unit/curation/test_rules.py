"""Tests of what the shipped cleaning rules find, and of the arithmetic of shares."""

from pathlib import Path

import pytest
import regex

from megatron_post.config.load import ConfigError
from megatron_post.curation.rules import Rule, balance, load_rules

RULES = load_rules(Path(__file__).resolve().parents[3] / "configs/curation/cleaning.yaml")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("I'm so sorry, but no.", ["apologetic opener"]),
        ("  I sincerely apologize.", ["apologetic opener"]),
        ("My apologies! Here it is!", ["apologetic opener", "exclamation marks"]),
        ("I’m really very sorry", ["apologetic opener"]),
        ("Sorry, I cannot.", ["apologetic opener"]),
        ("**I do apologise** for that", ["apologetic opener"]),
        ("Please accept my sincerest apologies.", ["apologetic opener"]),
        ("Sorrow is no apology. I apologized.", []),
        ("Say that you are sorry.", []),
        ("Great job 🎉", ["emojis"]),
        ("☀ and ⭐", ["emojis"]),
        ("🇩🇪 or 1️⃣ or ⏰ or ❤", ["emojis"]),
        ("✓ yes ✗ no → next ★★★ ♯ ♠ ☐ № ™ © ½ 中文 \u200d", []),
        ("Wow! Great!!", ["exclamation marks"]),
        ("太好了！真的！", ["exclamation marks"]),
        ("#!/bin/sh\nif (a != b) { !x } 5! = 120, vec![1] println!(x)", []),
        ("Hello!", []),
        ("Größe: 4 × 3 ≠ 13 → no", []),
    ],
)
def test_shipped_rules(text: str, names: list[str]) -> None:
    assert [rule.name for rule in RULES if rule.finds(text)] == names


def test_every_emoji_of_unicode_is_found() -> None:
    """The rule finds every character with Unicode's emoji property, and no other letter, digit or sign."""
    (rule,) = (rule for rule in RULES if rule.name == "emojis")
    shown, text = regex.compile(r"\p{Emoji_Presentation}"), regex.compile(r"[\p{L}\p{N}\p{P}\p{Sm}\p{Sc}]")
    # the ideographs in squares are shown as emojis although they are symbols of writing
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert not [c for c in characters if shown.match(c) and not rule.finds(c)]
    assert not [c for c in characters if text.match(c) and not shown.match(c) and rule.finds(c)]


def test_balanced_to_a_share() -> None:
    """30 of 100 are found. A share of 0.2 keeps floor(0.2 x 70 / 0.8) = 17, which is 0.195 of 87."""
    texts = [f"wow! {i}" if i % 10 < 3 else f"plain {i}" for i in range(100)]
    rule = Rule(name="wow", pattern="WOW", max_share=0.2)
    kept, (found,) = balance(texts, [rule], seed=1)
    assert (found.found, found.total, found.dropped) == (30, 100, 13)
    assert len(kept) == 87 and kept == sorted(kept)
    assert sum(rule.finds(texts[i]) for i in kept) == 17
    assert balance(texts, [rule], seed=1)[0] == kept != balance(texts, [rule], seed=2)[0]
    assert len(balance(texts, [Rule(name="w", pattern="wow", max_share=0)], seed=1)[0]) == 70
    assert len(balance(texts, [Rule(name="w", pattern="wow", max_share=1)], seed=1)[0]) == 100


def test_rules_are_applied_until_all_hold() -> None:
    """There are 10 texts with b, 10 with c and 20 without.

    With a share of 0.5 for b, 10 of 40 are allowed. With a share of 0 for c, all c are dropped. Then b is 10
    of 30, which is still allowed. With a share of 0.3 for b, 10 of 40 are allowed at first, but 10 of 30 are
    not, and floor(0.3 x 20 / 0.7) = 8 stay.
    """
    texts = [f"{kind} {i}" for kind, count in (("b", 10), ("c", 10), ("plain", 20)) for i in range(count)]
    none_of_c = Rule(name="c", pattern="^c", max_share=0)
    for share, expected in ((0.5, 30), (0.3, 28)):
        kept, _ = balance(texts, [Rule(name="b", pattern="^b", max_share=share), none_of_c], seed=0)
        assert len(kept) == expected


def test_bad_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("rules: [{name: a, pattern: '(', max_share: 2}]")
    with pytest.raises(ConfigError, match=r"(?s)no regular expression.*max_share"):
        load_rules(path)
