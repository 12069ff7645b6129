"""The step `clean` applies rules to rows. It rewrites texts, and drops rows above a rule's share.

Its passes are NAME.text, which rewrites, NAME.found, which searches the rewritten texts, and NAME, which
decides what is dropped. A changed share repeats only the last one.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.section import Name
from megatron_post.curation.columns import DROPPED, REWRITTEN
from megatron_post.curation.row import Row
from megatron_post.curation.rules import Rule, balanced, load_rules, row_draw
from megatron_post.curation.step import ROWS, Batch, Pass, RowPass, Step, Values, View, WholePass
from megatron_post.data.dialog import BadRow, Message

_ROLES = {"ipython": "tool"}  # the name of a role in rules, if it differs
_FOUND = pa.list_(pa.string())


class Clean(Step):
    """Applies rules of patterns."""

    kind: Literal["clean"] = Field(description="selects this step")
    files: tuple[Name, ...] = Field((), description="files of rules, such as configs/curation/cleaning.yaml")
    rules: tuple[Rule, ...] = Field((), description="more rules, which come after those of the files")

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Clean":
        names = [rule.name for rule in self.all_rules]
        if not names:
            raise ValueError("it has no rule; give files or rules")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two rules have the name {twice[0]!r}")
        return self

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Those of the files and of the settings. Raises `ConfigError` for a file that cannot be read."""
        return (*(rule for file in self.files for rule in load_rules(file)), *self.rules)

    @property
    def named_sources(self) -> Sequence[str]:
        return (*self.sources, *(name for rule in self.all_rules for name in rule.sources))

    def passes(self, *, seed: int) -> Sequence[Pass]:
        rules = self.all_rules
        rewriting = [rule for rule in rules if rule.replace is not None]
        finding = [rule for rule in rules if rule.replace is None]
        made: list[Pass] = []
        if rewriting:
            made.append(
                RowPass(
                    name=self.column if not finding else f"{self.column}.text",
                    version=1,
                    settings={"rules": [rule.model_dump(mode="json") for rule in rewriting]},
                    fields={REWRITTEN: pa.string(), DROPPED: pa.string(), "replaced": _FOUND},
                    annotate=lambda batch: _rewrite(batch, rewriting),
                )
            )
        if finding:
            found = f"{self.column}.found"
            made += [
                RowPass(
                    name=found,
                    version=1,
                    # The share is left out, because it does not change what is found.
                    settings={"rules": [_pattern(rule) for rule in finding]},
                    fields={"found": _FOUND},
                    annotate=lambda batch: {"found": [_found(row, finding) for row in batch.rows]},
                ),
                WholePass(
                    name=self.column,
                    version=1,
                    settings={"shares": [[rule.name, rule.max_share] for rule in finding], "seed": seed},
                    fields={DROPPED: pa.string(), "found": _FOUND},
                    reads=(found,),
                    kept_only=True,
                    annotate=lambda view: _decide(view, found, finding, seed),
                ),
            ]
        return made

    def report(self, view: View) -> dict[str, Any]:
        """How many rows each rule has found or rewritten, of all rows that earlier steps keep."""
        names = {"found": [rule.name for rule in self.all_rules if rule.replace is None],
                 "replaced": [rule.name for rule in self.all_rules if rule.replace is not None]}  # fmt: skip
        report: dict[str, Any] = {}
        for field, rules in names.items():
            if rules:
                column = f"{self.column}.text" if field == "replaced" and names["found"] else self.column
                values = view.read(column, [field])[field].combine_chunks().flatten().to_pylist()
                counts = Counter(values)
                report[field] = {name: counts[name] for name in rules}
        return report


def _pattern(rule: Rule) -> dict[str, Any]:
    return rule.model_dump(mode="json", exclude={"max_share", "replace"})


def texts_of(messages: Sequence[Message], roles: Sequence[str]) -> list[str]:
    """The texts of the messages of some roles, with the reasoning and the calls in them."""
    return [
        "\n".join([message.text, *(str(call.arguments) for call in message.tool_calls)])
        for message in messages
        if _ROLES.get(message.role, message.role) in roles
    ]


def _found(row: Row, rules: Sequence[Rule]) -> list[str]:
    """The names of the rules that find a message of the row."""
    return [
        rule.name
        for rule in rules
        if rule.applies_to(row.source) and any(map(rule.finds, texts_of(row.messages, rule.roles)))
    ]


def _decide(view: View, column: str, rules: Sequence[Rule], seed: int) -> Values:
    lists = view.read(column, ["found"])["found"].to_pylist()
    index = view.read(ROWS, ["id", "source"])
    sources = index["source"].to_pylist()
    number = {rule.name: place for place, rule in enumerate(rules)}
    found = np.zeros((len(rules), len(lists)), bool)
    for row, names in enumerate(lists):
        for name in names:
            found[number[name], row] = True
    applies: Mapping[str, list[bool]] = {
        source: [rule.applies_to(source) for rule in rules] for source in {*sources}
    }
    searched = np.array([applies[source] for source in sources], bool).reshape(len(sources), len(rules)).T
    shares = [rule.max_share for rule in rules if rule.max_share is not None]
    dropped_by = balanced(found, searched, shares, row_draw(seed, index["id"].to_pylist()))
    return {DROPPED: [None if rule < 0 else rules[rule].name for rule in dropped_by], "found": lists}


def _rewrite(batch: Batch, rules: Sequence[Rule]) -> Values:
    values: dict[str, list[Any]] = {REWRITTEN: [], DROPPED: [], "replaced": []}
    for row in batch.rows:
        rewritten, dropped, names = _rewritten(row, [rule for rule in rules if rule.applies_to(row.source)])
        values[REWRITTEN].append(rewritten)
        values[DROPPED].append(dropped)
        values["replaced"].append(names)
    return values


def _rewritten(row: Row, rules: Sequence[Rule]) -> tuple[str | None, str | None, list[str]]:
    """The new texts as `REWRITTEN` has them, the reason for dropping the row, and the rules that matched.

    Calls of tools are not rewritten, because their text must stay JSON or code. A row is dropped if a rule
    would change one, or if it cannot be trained on after the change.
    """
    texts, names, dropped = list(row.texts), [], None
    for rule in rules:
        before = list(texts)
        for place, role in enumerate(row.roles):
            if _ROLES.get(role, role) in rule.roles:
                texts[place] = rule.rewritten(texts[place])
        calls = row.calls if "assistant" in rule.roles else []
        if any(rule.rewritten(call) != call for call in calls):
            dropped = dropped or f"{rule.name}, in the call of a tool"
        elif texts == before:
            continue
        names.append(rule.name)
    if texts == row.texts:
        return None, dropped, names
    try:
        row.rewritten(texts)
    except BadRow:
        # The row keeps its texts, because later passes must be able to read it.
        return None, f"{names[-1]}, which leaves a row that cannot be trained on", names
    return json.dumps(texts), dropped, names
