"""The step `difficulty` measures how hard a row is, in two ways that section 4.2.3 of the report combines.

InsTag (Lu et al. 2023) has a judge tag the intentions of the user. More tags are harder. Tags are normalized,
so that case, punctuation, white space and the plural of the last word do not matter. Tags of few rows can be
left out, because they are mostly noise. The other way is a judge's rating from 1 (easy) to 3 (hard).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.section import Count, Line, NonNegative
from megatron_post.curation.columns import DROPPED, FAILED
from megatron_post.curation.judge import OffScale, ask_about, line_of, prompt_checksum
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values, View, WholePass

TAGS, RATING, SCORE = "tags", "rating", "score"
_FIELDS = {TAGS: pa.list_(pa.string()), RATING: pa.int8(), SCORE: pa.float64(), DROPPED: pa.string()}
_COMBINE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean, "product": math.prod, "min": min, "max": max
}  # fmt: skip
_HARDEST = 3  # the highest rating
_MOST_TAGS = 50  # in an answer. A judge that repeats itself is off the scale
_LONGEST = 80  # characters of a tag


class Difficulty(Step):
    """Measures the difficulty of rows, and drops rows that are too easy if `at_least` is given."""

    kind: Literal["difficulty"] = Field(description="selects this step")
    tags: Line | None = Field(None, description="name of the model that tags intentions. null: no tags")
    rating: Line | None = Field(None, description="name of the model that rates from 1 to 3. null: no rating")
    combine: Literal["mean", "product", "min", "max"] = Field(
        "mean", description="how the score follows from tags / most_tags and rating / 3"
    )
    most_tags: Count = Field(6, description="number of tags that counts as 1. More tags count as 1 too")
    least_rows: Count = Field(1, description="rows that must have a tag, or it is left out. InsTag has 20")
    at_least: NonNegative | None = Field(
        None, le=1, description="rows with a lower score are dropped, and rows without a score are kept"
    )
    longest: Count | None = Field(
        None, description="characters of a dialog that the judge reads. A longer one loses its middle"
    )

    @model_validator(mode="after")
    def _measures(self) -> "Difficulty":
        if self.tags is None and self.rating is None:
            raise ValueError("it has neither tags nor rating, so it measures nothing; give one or both")
        given = self.model_fields_set
        if self.tags is None and given & {"most_tags", "least_rows"}:
            raise ValueError("most_tags and least_rows have no effect without tags")
        if (self.tags is None or self.rating is None) and "combine" in given:
            raise ValueError("combine has no effect without both tags and rating")
        return self

    @property
    def models(self) -> Sequence[str]:
        return [name for name in (self.tags, self.rating) if name is not None]

    @property
    def measures(self) -> Sequence[str]:
        return (RATING, SCORE)

    def passes(self, *, seed: int) -> Sequence[Pass]:
        made: list[Pass] = []
        for field, kind, model, prompt, parse in (
            (TAGS, pa.list_(pa.string()), self.tags, "intentions", _tags_in),
            (RATING, pa.int8(), self.rating, "difficulty", _rating_in),
        ):
            if model is not None:
                made.append(self._asking(field, kind, model, prompt, parse))
        decide = WholePass(
            name=self.column,
            version=1,
            settings=self.model_dump(mode="json", include={"combine", "most_tags", "least_rows", "at_least"}),
            fields=_FIELDS,
            reads=[each.name for each in made],
            kept_only=True,
            annotate=self._decide,
        )
        return [*made, decide]

    def _asking(self, field: str, kind: pa.DataType, model: str, prompt: str, parse: Any) -> RowPass:
        """A pass that asks a judge, with what it answers in a field."""

        async def annotate(batch: Batch) -> Values:
            found = await ask_about(batch, model, prompt, parse, longest=self.longest)
            return {field: [value for value, _ in found], FAILED: [reason for _, reason in found]}

        return RowPass(
            name=f"{self.column}.{field}",
            version=1,
            settings={"judge": model, "longest": self.longest, "prompt": prompt_checksum(prompt)},
            fields={field: kind, FAILED: pa.string()},
            kept_only=True,
            annotate=annotate,
        )

    def _decide(self, view: View) -> Values:
        count = view.num_rows
        tags: list[list[str] | None] = [None] * count
        parts = []
        if self.tags is not None:
            tags = _normalized(view.read(f"{self.column}.{TAGS}", [TAGS])[TAGS].to_pylist(), self.least_rows)
            parts.append([None if own is None else min(len(own) / self.most_tags, 1.0) for own in tags])
        ratings: list[int | None] = [None] * count
        if self.rating is not None:
            ratings = view.read(f"{self.column}.{RATING}", [RATING])[RATING].to_pylist()
            parts.append([None if rating is None else rating / _HARDEST for rating in ratings])
        scores = [self._combined(values) for values in zip(*parts, strict=True)]
        least = self.at_least
        return {
            TAGS: tags,
            RATING: ratings,
            SCORE: scores,
            DROPPED: [
                "too easy" if least is not None and score is not None and score < least else None
                for score in scores
            ],
        }

    def _combined(self, values: Sequence[float | None]) -> float | None:
        """The score of a row, or None if one of its values is unknown."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return float(_COMBINE[self.combine](known))

    def report(self, view: View) -> dict[str, Any]:
        """The number of rows by tags and by rating, and the most frequent tags."""
        table = view.read(self.column, [TAGS, RATING])
        tags = [own for own in table[TAGS].to_pylist() if own is not None]
        counts = Counter(tag for own in tags for tag in own)
        ratings = Counter(rating for rating in table[RATING].to_pylist() if rating is not None)
        sizes = Counter(map(len, tags))
        return {
            "rows_by_number_of_tags": {str(size): rows for size, rows in sorted(sizes.items())},
            "rows_by_rating": {str(rating): rows for rating, rows in sorted(ratings.items())},
            "tags": dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:100]),
        }


def _tags_in(reply: str) -> list[str]:
    """The normalized tags in an answer, each once. Raises `OffScale`."""
    tags = list(dict.fromkeys(filter(None, map(normalized_tag, re.split("[;,]", line_of(reply, "Tags"))))))
    if not tags:
        raise OffScale("the judge's answer has no tag")
    if len(tags) > _MOST_TAGS or any(len(tag) > _LONGEST for tag in tags):
        raise OffScale(f"the judge's answer is off the scale: {len(tags)} tags, the first {tags[0]:.40}")
    return tags


def normalized_tag(tag: str) -> str:
    """A tag in lower case, without punctuation, and with its last word in the singular."""
    words = re.sub(r"[\W_]+", " ", tag).casefold().split()
    last = words[-1] if words else ""
    if len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is")):
        words[-1] = f"{last[:-3]}y" if last.endswith("ies") else last[:-1]
    return " ".join(words)


def _normalized(tags: Sequence[list[str] | None], least_rows: int) -> list[list[str] | None]:
    """The tags of each row without those that fewer rows have."""
    counts = Counter(tag for own in tags if own is not None for tag in own)
    return [None if own is None else [tag for tag in own if counts[tag] >= least_rows] for own in tags]


def _rating_in(reply: str) -> int:
    """The rating in an answer. Raises `OffScale`."""
    value = line_of(reply, "Difficulty")
    if value not in ("1", "2", "3"):
        raise OffScale(f"the judge's answer is off the scale: Difficulty: {value:.40}")
    return int(value)
