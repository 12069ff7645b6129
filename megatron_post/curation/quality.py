"""The step `quality` keeps rows that a reward model or a judge finds good, as section 4.2.3 of the report.

A row is kept if its reward is in the top quartile OR if it has the judge's full marks. The report found that
the two disagree often, and that their union recalls most. These cases are defined:

- The top part of n rows with a reward has ceil(top x n) rows, and all rows that tie with the last of them. So
  one row alone is in it, and so are all rows if their rewards are equal. With `per_topic` this holds for each
  coarse topic, and rows without a topic are one more.
- A row without a reward (none in the file, null, NaN, infinite) is not in the top part, and is not one of the
  n rows. A row whose marks cannot be read (see `judge`) has no full marks, and counts as a failure.
- A row whose reward is below the threshold `at_least` of an entry is dropped, whatever the judge says. It is
  one of the n rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.rewards import Reward, Total, check_capabilities, combine, list_errors
from megatron_post.config.section import Line
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.marks import FULL, MARKS, POINTS, MarkSettings, marks_pass
from megatron_post.curation.rewards import CAPABILITY, ScoresOf, score_fields, scores_pass
from megatron_post.curation.step import ROWS, Pass, Step, Values, View, WholePass
from megatron_post.curation.taxonomy import load_taxonomy
from megatron_post.curation.topics import COARSE, Topics
from megatron_post.storage.reading import did_you_mean

TOP, REWARD, SCORE = "top", "reward", "score"


class Quality(Step):
    """Keeps the union of the best rows by reward and of those with a judge's full marks."""

    kind: Literal["quality"] = Field(description="selects this step")
    reward: tuple[Reward, ...] = Field((), description="reward models, whose names are in `scores`")
    scores: dict[Line, ScoresOf] = Field(
        default_factory=dict, description="name of a reward model -> where its scores are"
    )
    top: float = Field(0.25, gt=0, le=1, description="share of the rows with a reward that are kept for it")
    topics: Line | None = Field(
        None, description="step `topics` whose coarse labels are the capabilities of `reward`. null: the key "
        "`capability` of a row"
    )  # fmt: skip
    per_topic: bool = Field(False, description="take the top part of each coarse topic. It needs `topics`")
    marks: MarkSettings | None = Field(None, description="a judge's marks. null: no judge is asked")

    @model_validator(mode="after")
    def _can_decide(self) -> "Quality":
        errors = list_errors(self.reward)
        named = {model for reward in self.reward for model in reward.models}
        if not self.reward and self.marks is None:
            errors.append("it has neither reward nor marks, so it cannot decide; give one or both")
        errors += [f"scores has no {model!r}, which reward names" for model in sorted(named - {*self.scores})]
        unused = [model for model in self.scores if model not in named]
        errors += [f"scores: no reward names {model!r}; remove it" for model in unused]
        if not self.reward and (self.per_topic or "top" in self.model_fields_set):
            errors.append("top and per_topic have no effect without reward")
        if self.topics is None and (self.per_topic or (self.marks is not None and self.marks.code_topics)):
            errors.append("per_topic and code_topics need topics, the name of a step")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def needs(self) -> Sequence[str]:
        return () if self.topics is None else (self.topics,)

    @property
    def models(self) -> Sequence[str]:
        return () if self.marks is None else (self.marks.judge,)

    @property
    def named_sources(self) -> Sequence[str]:
        of_code = () if self.marks is None else self.marks.code_sources
        return (*self.sources, *of_code, *(name for each in self.scores.values() for name in each.files))

    def errors_with(self, earlier: Mapping[str, Step]) -> Sequence[str]:
        if self.topics is None or self.topics not in earlier:
            return []
        step = earlier[self.topics]
        if not isinstance(step, Topics):
            return [f"topics={self.topics}: this step is of the kind {step.kind}, and not `topics`"]
        known = list(load_taxonomy(step.taxonomy).topics)
        named = {name for reward in self.reward for name in reward.capabilities}
        named |= {*(() if self.marks is None else self.marks.code_topics)}
        return [
            f"{name!r} is no coarse topic of {step.taxonomy}{did_you_mean(name, known)}"
            for name in sorted(named - {*known})
        ]

    @property
    def measures(self) -> Sequence[str]:
        return (REWARD, SCORE)

    def passes(self, *, seed: int) -> Sequence[Pass]:
        made: list[Pass] = []
        if self.reward:
            made.append(scores_pass(f"{self.column}.scores", self.reward, self.scores))
        if self.marks is not None:
            made.append(marks_pass(f"{self.column}.marks", self.marks, self.topics))
        decide = WholePass(
            name=self.column,
            version=1,
            settings={
                "reward": [reward.model_dump(mode="json") for reward in self.reward],
                "top": self.top,
                "per_topic": self.per_topic,
            },
            fields={
                REWARD: pa.float64(),
                TOP: pa.bool_(),
                MARKS: pa.list_(pa.string()),
                FULL: pa.bool_(),
                SCORE: pa.float64(),
                DROPPED: pa.string(),
            },
            reads=(*(each.name for each in made), *self.needs),
            kept_only=True,
            annotate=self._decide,
        )
        return [*made, decide]

    def _decide(self, view: View) -> Values:
        count = view.num_rows
        labels: list[str | None] = [None] * count
        if self.topics is not None:
            labels = view.read(self.topics, [COARSE])[COARSE].to_pylist()
        totals = self._totals(view, labels)
        rewards = np.array([math.nan if total is None else total.value for total in totals], np.float64)
        groups = labels if self.per_topic else [None] * count
        top, ranks = top_part(rewards, groups, self.top)
        marks, full, shares = self._marks(view)
        is_known = ~np.isnan(rewards)
        parts = np.stack([ranks, shares])
        has_part = ~np.isnan(parts)
        sums, counts = np.where(has_part, parts, 0.0).sum(axis=0), has_part.sum(axis=0)
        return {
            REWARD: pa.array(rewards, mask=~is_known),
            TOP: pa.array(top, mask=~is_known),
            MARKS: marks,
            FULL: full,
            SCORE: pa.array(sums / np.maximum(counts, 1), mask=counts == 0),
            DROPPED: [
                _reason(total, in_top, is_full)
                for total, in_top, is_full in zip(totals, top.tolist(), full, strict=True)
            ],
        }

    def _totals(self, view: View, labels: Sequence[str | None]) -> list[Total | None]:
        if not self.reward:
            return [None] * view.num_rows
        fields = [field for reward in self.reward for field in score_fields(reward)]
        table = view.read(f"{self.column}.scores", [*fields, CAPABILITY])
        scores = [[table[field].to_pylist() for field in score_fields(reward)] for reward in self.reward]
        capabilities = labels
        if self.topics is None:
            capabilities = table[CAPABILITY].to_pylist()
            check_capabilities(self.reward, {name or "" for name in capabilities}, origin="the rows")
        return combine(self.reward, scores, [capability or "" for capability in capabilities])

    def _marks(self, view: View) -> tuple[list[Any], list[bool | None], np.ndarray]:
        """The marks, whether they are full, and their share of the points (NaN without marks)."""
        if self.marks is None:
            return [None] * view.num_rows, [None] * view.num_rows, np.full(view.num_rows, np.nan)
        table = view.read(f"{self.column}.marks", [MARKS, POINTS, FULL])
        marks, points = table[MARKS].to_pylist(), table[POINTS].to_pylist()
        shares = [
            math.nan if own is None else len(own) / most for own, most in zip(marks, points, strict=True)
        ]
        return marks, table[FULL].to_pylist(), np.array(shares, np.float64)

    def report(self, view: View) -> dict[str, Any]:
        """How often the reward and the judge agree, by source, of the rows that the step has seen."""
        table = view.read(self.column, [TOP, FULL, SCORE])
        sources = view.read(ROWS, ["source"])["source"].to_pylist()
        names = {True: "yes", False: "no", None: "unknown"}
        counts: dict[str, dict[str, dict[str, int]]] = {}
        values = zip(sources, table[TOP].to_pylist(), table[FULL].to_pylist(), strict=True)
        for source, top, full in values:
            own = counts.setdefault(source, {a: dict.fromkeys(names.values(), 0) for a in names.values()})
            own[names[top]][names[full]] += 1
        return {"top_and_full_marks": counts}


def top_part(
    rewards: np.ndarray, groups: Sequence[str | None], share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(whether each row is in the top part of its group, the share of its group that is not better).

    rewards: float64 [n], NaN for unknown ones, which are in no top part and have the rank NaN.
    """
    top, ranks = np.zeros(len(rewards), bool), np.full(len(rewards), np.nan)
    members: dict[str | None, list[int]] = {}
    for row, group in enumerate(groups):
        if not np.isnan(rewards[row]):
            members.setdefault(group, []).append(row)
    for rows in members.values():
        own = rewards[rows]
        ascending = np.sort(own)
        # 1e-9 makes up for rounding, so that 0.1 of 30 rows are 3.
        count = math.ceil(share * len(own) - 1e-9)
        top[rows] = own >= ascending[-max(count, 1)]
        ranks[rows] = np.searchsorted(ascending, own, side="right") / len(own)
    return top, ranks


def _reason(total: Total | None, top: bool, full: bool | None) -> str | None:
    if total is not None and total.below:
        return f"{total.below[0]} below its threshold"
    if top or full:
        return None
    if total is None and full is None:
        return "neither a reward nor marks"
    known = [*(["reward"] if total is not None else []), *(["marks"] if full is not None else [])]
    return f"low {' and '.join(known)}"
