"""Rules that find responses in an overused style, and limit their share of all responses.

The report's examples are apologies, emojis and exclamation marks. None of them is wrong by itself, and a
model may apologize. So only the responses above a rule's share are dropped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from pydantic import Field, field_validator

from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Name, Section
from megatron_post.rounds.patterns import check_pattern, occurs


class Rule(Section):
    """A rule finds a response if its pattern matches at least `at_least` times."""

    name: Name = Field(description="name of the rule in the report")
    pattern: str = Field(min_length=1, description="regular expression, searched without regard to case")
    at_least: Count = Field(1, description="number of matches in one response")
    max_share: float = Field(ge=0, le=1, description="largest share of all rows that this rule may find")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        check_pattern(pattern)
        return pattern

    def finds(self, text: str) -> bool:
        return occurs(self.pattern, text, times=self.at_least)


class Rules(Section):
    """A file of rules."""

    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class RuleCounts:
    """The result of a rule. `found` of `total` rows match it, and `dropped` of these were dropped."""

    name: str
    found: int
    total: int
    dropped: int


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a file of rules. Raises `ConfigError` with every error at once."""
    return load_section(Rules, path).rules


def balance(texts: Sequence[str], rules: Sequence[Rule], *, seed: int) -> tuple[list[int], list[RuleCounts]]:
    """(the indices of the texts that stay, in order, and the result of each rule).

    If a rule with share s finds h of n texts, it keeps floor(s (n - h) / (1 - s)) of them. Then they are at
    most the share s of the texts that stay. A hash of the seed and the text decides which ones are kept.
    Rules are applied in turn until none drops a text, because dropping texts changes the shares of the other
    rules.
    """
    hits = [[rule.finds(text) for text in texts] for rule in rules]
    kept = list(range(len(texts)))
    dropped = [0] * len(rules)
    changed = True
    # Dropping rows for one rule lowers the total, so another rule may exceed its share again.
    while changed:
        changed = False
        for number, (rule, found) in enumerate(zip(rules, hits, strict=True)):
            hit = [i for i in kept if found[i]]
            allowed = _allowed(len(kept) - len(hit), rule.max_share, len(hit))
            if len(hit) > allowed:
                drawn = sorted(hit, key=lambda i: (_draw(seed, texts[i]), i))
                gone = set(drawn[allowed:])
                kept = [i for i in kept if i not in gone]
                dropped[number] += len(gone)
                changed = True
    summary = [
        RuleCounts(rule.name, sum(found), len(texts), count)
        for rule, found, count in zip(rules, hits, dropped, strict=True)
    ]
    return kept, summary


def _allowed(others: int, share: float, found: int) -> int:
    # 1e-9 makes up for rounding, since a decimal share and its complement may not sum to exactly 1.
    return found if share == 1 else floor(share * others / (1 - share) + 1e-9)


def _draw(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()
