"""Rules that find responses of an overused style, count them, and balance them to a share of all.

The report's are over-apologetic phrases, emojis and exclamation marks: none is wrong by itself, and a model
that never says sorry is no aim. So what exceeds a rule's share is dropped, and the rest stays.
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
    """A response is found by a rule where its pattern matches often enough."""

    name: Name = Field(description="what the report calls it")
    pattern: str = Field(min_length=1, description="regular expression, searched without regard to case")
    at_least: Count = Field(1, description="matches in one response")
    max_share: float = Field(ge=0, le=1, description="of all rows that may be found by this rule")

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
class Found:
    """What a rule did: rows that it found among `total`, and how many of them were dropped."""

    name: str
    found: int
    total: int
    dropped: int


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Raises `ConfigError` with every error at once."""
    return load_section(Rules, path).rules


def balance(texts: Sequence[str], rules: Sequence[Rule], *, seed: int) -> tuple[list[int], list[Found]]:
    """(numbers of the texts that stay, in order; what each rule did).

    Of n texts of which h are found, a rule with share s keeps floor(s (n - h) / (1 - s)) of those found: then
    they are at most the share s of what stays. Which, is drawn by a hash of seed and text. Rules are applied
    in turn until none drops any, for what one drops changes the others' shares.
    """
    hits = [[rule.finds(text) for text in texts] for rule in rules]
    kept = list(range(len(texts)))
    dropped = [0] * len(rules)
    changed = True
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
        Found(rule.name, sum(found), len(texts), count)
        for rule, found, count in zip(rules, hits, dropped, strict=True)
    ]
    return kept, summary


def _allowed(others: int, share: float, found: int) -> int:
    # the sum of a share that is written in decimals and its complement may miss 1 by a rounding
    return found if share == 1 else floor(share * others / (1 - share) + 1e-9)


def _draw(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()
