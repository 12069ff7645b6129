"""Rules that find texts by a pattern. They rewrite what they find, drop it, or limit its share of all rows.

The report's examples are apologies, emojis and exclamation marks. None of them is wrong by itself, and a
model may apologize. So only the rows above a rule's share are dropped.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Line, Name, Section
from megatron_post.curation.patterns import check_pattern, check_replacement, occurs, replaced

Role = Literal["system", "user", "assistant", "tool"]


class Rule(Section):
    """A rule finds a text if its pattern matches at least `at_least` times."""

    name: Name = Field(description="name of the rule in the report")
    pattern: str = Field(min_length=1, description="regular expression, searched without regard to case")
    at_least: Count = Field(1, description="number of matches in one message")
    max_share: float | None = Field(
        None, ge=0, le=1, description="largest share of the rows that this rule may find. 0 drops all of them"
    )
    replace: str | None = Field(
        None, description=r"text in place of each match, in which \1 is the pattern's first group"
    )
    roles: tuple[Role, ...] = Field(
        ("assistant",), min_length=1, description="whose messages are searched. `select` reads responses only"
    )
    sources: tuple[Line, ...] = Field(
        (), description="names of the sources whose rows are searched, and of whose rows the share is. "
        "Empty: all"
    )  # fmt: skip

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        check_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _does_one_thing(self) -> "Rule":
        if (self.max_share is None) == (self.replace is None):
            raise ValueError(f"rule {self.name!r}: give either max_share or replace")
        if self.replace is not None:
            if self.at_least > 1:
                raise ValueError(f"rule {self.name!r}: at_least has no effect with replace; remove it")
            check_replacement(self.pattern, self.replace)
        return self

    def applies_to(self, source: str) -> bool:
        """Whether the rule searches rows of this source."""
        return not self.sources or source in self.sources

    def finds(self, text: str) -> bool:
        """Whether the rule finds a text. Raises `ValueError` if the search takes too long."""
        return occurs(self.pattern, text, times=self.at_least)

    def rewritten(self, text: str) -> str:
        """The text with the replacement. Raises `ValueError` if the search takes too long."""
        return text if self.replace is None else replaced(self.pattern, self.replace, text)


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


def load_response_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a file of rules for responses that have no source. Raises `ValueError` for other rules."""
    rules = load_rules(path)
    for rule in rules:
        if rule.replace is not None or rule.sources or rule.roles != ("assistant",):
            raise ValueError(
                f"{path}: rule {rule.name!r}: `select` only limits shares of responses; use rules with "
                "replace, sources or other roles in a step of `curate`"
            )
    return rules


def balance(texts: Sequence[str], rules: Sequence[Rule], *, seed: int) -> tuple[list[int], list[RuleCounts]]:
    """(the indices of the texts that stay, in order, and the result of each rule).

    A hash of the seed and the text decides which ones are kept, see `balanced`.
    """
    found = np.array([[rule.finds(text) for text in texts] for rule in rules], bool).reshape(
        len(rules), len(texts)
    )
    is_dropped_by = balanced(
        found, np.ones_like(found), _shares(rules), lambda row: _hash(f"{seed}/{texts[row]}")
    )
    summary = [
        RuleCounts(rule.name, int(found[number].sum()), len(texts), int((is_dropped_by == number).sum()))
        for number, rule in enumerate(rules)
    ]
    return np.flatnonzero(is_dropped_by < 0).tolist(), summary


def balanced(
    found: np.ndarray, searched: np.ndarray, shares: Sequence[float], draw: Callable[[int], bytes]
) -> np.ndarray:
    """The number of the rule that drops each row, or -1. int64 [N].

    found, searched: bool [R, N], whether each of R rules finds and searches each row. shares: the largest
    share of each rule. draw: gives a value for a row, and the rows with the lowest values stay.

    If a rule with share s finds h of the n rows that it searches, it keeps floor(s (n - h) / (1 - s)) of
    them. Then they are at most the share s of the rows that stay. Rules are applied in turn until none drops
    a row, because dropping rows changes the shares of the other rules.
    """
    dropped_by = np.full(found.shape[1], -1, np.int64)
    changed = True
    # Dropping rows for one rule lowers the total, so another rule may exceed its share again.
    while changed:
        changed = False
        for number, share in enumerate(shares):
            kept = dropped_by < 0
            hit = np.flatnonzero(kept & found[number]).tolist()
            others = int((kept & searched[number]).sum()) - len(hit)
            allowed = _allowed(others, share, len(hit))
            if len(hit) > allowed:
                drawn = sorted(hit, key=lambda row: (draw(row), row))
                dropped_by[drawn[allowed:]] = number
                changed = True
    return dropped_by


def row_draw(seed: int, ids: Sequence[bytes]) -> Callable[[int], bytes]:
    """A `draw` for `balanced` that depends on the ids of the rows."""
    return lambda row: _hash(f"{seed}/{ids[row].hex()}")


def _shares(rules: Sequence[Rule]) -> list[float]:
    return [rule.max_share for rule in rules if rule.max_share is not None]


def _allowed(others: int, share: float, found: int) -> int:
    # 1e-9 makes up for rounding, since a decimal share and its complement may not sum to exactly 1.
    return found if share == 1 else floor(share * others / (1 - share) + 1e-9)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
