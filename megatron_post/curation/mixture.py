"""The mixture of the selected rows: their categories beside the targets, and the sources that reach these.

The categories and their figures are those of the report's tables of SFT and preference data. Dialogs and
preferences have a table each, because a training stage uses one of them.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_post.config.load import to_yaml
from megatron_post.config.section import Count, Line, Name, NonNegative, Section
from megatron_post.curation.row import ANNOTATIONS, Row
from megatron_post.curation.step import Step
from megatron_post.curation.taxonomy import load_taxonomy
from megatron_post.curation.tokens import CONTEXT, RESPONSE, Tokens
from megatron_post.curation.topics import COARSE, FINE, Topics
from megatron_post.data.dialog import Dialog
from megatron_post.storage.files import line_writer, write_whole
from megatron_post.storage.reading import did_you_mean

DIRECTORY, OTHER, TOTAL = "mixture", "other", "total"
DIALOGS, PREFERENCES = "dialogs", "preferences"
MEANS = ("turns", "tokens", CONTEXT, RESPONSE)
_OF_TOKENS = MEANS[1:]
Annotations = Mapping[str, Mapping[str, Any]]


class Category(Section):
    """A category with its targets. A row belongs to the first category whose conditions it meets."""

    name: Name = Field(description="its name in tables, and that of its source")
    sources: tuple[Line, ...] = Field((), description="sources of its rows. Empty: all sources")
    # Strict types take no list for a tuple, and `Section` turns only its own lists into tuples.
    where: dict[Line, Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]] = Field(
        default_factory=dict,
        description="STEP.FIELD -> values of its rows, such as {topics.coarse: [code]}",
    )
    least_tokens: Count | None = Field(None, description="fewest tokens of its rows. It needs `tokens`")
    share: NonNegative = Field(description="target share of the rows, relative to that of other categories")
    turns: NonNegative | None = Field(None, description="target mean of turns, which is only shown")
    tokens: NonNegative | None = Field(None, description="target mean of tokens, which is only shown")
    context: NonNegative | None = Field(None, description="target mean of tokens in context, only shown")
    response: NonNegative | None = Field(
        None, description="target mean of tokens in the final response, only shown"
    )

    def has(self, row: Row, annotations: Annotations, tokens: float | None) -> bool:
        """Whether a row meets its conditions."""
        if self.sources and row.source not in self.sources:
            return False
        if self.least_tokens is not None and (tokens is None or tokens < self.least_tokens):
            return False
        pairs = ((key.partition("."), values) for key, values in self.where.items())
        return all(annotations.get(step, {}).get(name) in values for (step, _, name), values in pairs)


class Mixture(Section):
    """Which share each category shall have."""

    tokens: Line | None = Field(None, description="step `tokens` whose counts are shown. null: only turns")
    categories: tuple[Category, ...] = Field(min_length=1, description="categories, in their order")
    reach: Literal["epochs", "weights"] = Field(
        "epochs",
        description="how data.sources reach the shares. epochs: rows are repeated or left out. weights: no "
        "row is repeated",
    )
    rows: Count | None = Field(
        None, description="rows of the mixture with their repeats. null: as many as there are"
    )
    config: Name | None = Field(
        None, description="config that the written files have as their `base`. null: they have only sources"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Mixture":
        names = [category.name for category in self.categories]
        errors = [f"two categories have the name {n!r}" for n in dict.fromkeys(names) if names.count(n) > 1]
        errors += [f"a category must not have the name {n!r}" for n in (OTHER, TOTAL) if n in names]
        if not any(category.share for category in self.categories):
            errors.append("all shares are 0; give a category a share")
        if self.rows is not None and self.reach == "weights":
            errors.append("rows has no effect with reach: weights")
        for category in self.categories:
            given = [key for key in ("least_tokens", *_OF_TOKENS) if getattr(category, key) is not None]
            if given and self.tokens is None:
                errors.append(f"{category.name}: {given[0]} needs `tokens`, the name of a step")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def needed_fields(self) -> list[tuple[str, str]]:
        """Pairs of a step and a field of its column, which must have it."""
        keys = [key.partition(".") for category in self.categories for key in category.where]
        return [(step, name) for step, _, name in keys]

    def errors_with(self, steps: Sequence[Step], sources: Sequence[str]) -> list[str]:
        """What is wrong beside the steps and the names of the sources."""
        by_name = {step.column: step for step in steps}
        errors = []
        if self.tokens is not None and not isinstance(by_name.get(self.tokens), Tokens):
            errors.append(f"tokens={self.tokens}: there is no step of the kind `tokens` with this name")
        for category in self.categories:
            errors += [
                f"{category.name}: {name!r} is not in sources{did_you_mean(name, sources)}"
                for name in category.sources
                if name not in sources
            ]
            for key, values in category.where.items():
                errors += [
                    f"{category.name}: where.{key}: {e}" for e in _condition_errors(key, values, by_name)
                ]
        return errors

    def category(self, row: Row, annotations: Annotations, tokens: float | None) -> str:
        """The name of a row's category."""
        found = (each.name for each in self.categories if each.has(row, annotations, tokens))
        return next(found, OTHER)


def _condition_errors(key: str, values: Sequence[str], steps: Mapping[str, Step]) -> list[str]:
    name, _, field_ = key.partition(".")
    if name not in steps:
        return [f"{name!r} is no step{did_you_mean(name, list(steps))}; write STEP.FIELD"]
    step = steps[name]
    if isinstance(step, Topics):
        if field_ not in (COARSE, FINE):
            return [f"the step has the fields {COARSE} and {FINE}"]
        known = sorted({pair[field_ == FINE] for pair in load_taxonomy(step.taxonomy).pairs})
        unknown = [value for value in values if value not in known]
        return [f"{v!r} is no topic of {step.taxonomy}{did_you_mean(v, known)}" for v in unknown]
    return [] if field_ else ["give the field too, as STEP.FIELD"]


@dataclass
class _Sums:
    """The rows of a category so far.

    sums: the sum of each figure of `MEANS`. counts: the number of rows that have the figure.
    """

    rows: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEANS, 0))

    def add(self, values: Mapping[str, float]) -> None:
        self.rows += 1
        for name, value in values.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float | None]:
        """null for what no row has."""
        return {name: self.sums[name] / self.counts[name] if self.counts[name] else None for name in MEANS}


class MixtureWriter:
    """Writes the rows of each category to a file, and then `dialogs.yaml` or `preferences.yaml`.

    It is a context manager. A file is complete or absent.
    """

    def __init__(self, settings: Mixture, run: Path) -> None:
        self._settings, self._directory = settings, run / DIRECTORY
        self._sums: dict[str, dict[str, _Sums]] = {}
        self._writers: dict[Path, Callable[[dict[str, Any]], Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "MixtureWriter":
        shutil.rmtree(self._directory, ignore_errors=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, row: Row, annotations: Annotations, values: dict[str, Any]) -> None:
        """Add a row that is kept. values: as it is written."""
        figures: dict[str, float] = {"turns": row.example.turns}
        counts = annotations.get(self._settings.tokens or "", {})
        if CONTEXT in counts:
            figures |= {name: counts[name] for name in (CONTEXT, RESPONSE)}
            figures["tokens"] = counts[CONTEXT] + counts[RESPONSE]
        category = self._settings.category(row, annotations, figures.get("tokens"))
        kind = DIALOGS if isinstance(row.example, Dialog) else PREFERENCES
        for name in (category, TOTAL):
            self._sums.setdefault(kind, {}).setdefault(name, _Sums()).add(figures)
        if category == OTHER:
            return
        path = self._path(kind, category)
        if path not in self._writers:
            self._writers[path] = self._stack.enter_context(line_writer(path))
        self._writers[path](values)

    def _path(self, kind: str, category: str) -> Path:
        """The file of a category, whose number keeps similar names apart."""
        number = [each.name for each in self._settings.categories].index(category) + 1
        words = re.sub(r"[^a-z0-9]+", "-", category.lower()).strip("-")
        return self._directory / kind / f"{number:02d}-{words}.jsonl".replace("-.", ".")

    def finish(self) -> dict[str, Any]:
        """Close the files, and write the configs. Returns the tables for `report.json`."""
        self._stack.close()
        return {kind: self._table(kind, self._sums[kind]) for kind in sorted(self._sums)}

    def _table(self, kind: str, sums: Mapping[str, _Sums]) -> dict[str, Any]:
        uses = self._uses(sums)
        all_uses = sum(number for number, _ in uses.values())
        target = sum(category.share for category in self._settings.categories)
        rows = []
        for category in self._settings.categories:
            own = sums.get(category.name, _Sums())
            number, setting = uses.get(category.name, (0, None))
            rows.append(
                self._line(category.name, own, sums[TOTAL].rows)
                | {
                    "target": {"share": category.share / target}
                    | {name: getattr(category, name) for name in MEANS},
                    self._settings.reach: setting,
                    "mixed_rows": number,
                    "mixed_share": number / all_uses if all_uses else 0.0,
                }
            )
        if OTHER in sums:
            rows.append(self._line(OTHER, sums[OTHER], sums[TOTAL].rows))
        config = self._write_config(kind, {name: setting for name, (_, setting) in uses.items()})
        return {
            "categories": rows,
            TOTAL: self._line(TOTAL, sums[TOTAL], sums[TOTAL].rows) | {"mixed_rows": all_uses},
            "config": config,
            # Rows would have to come from elsewhere, so these targets are not reached.
            "without_rows": [c.name for c in self._settings.categories if c.share and c.name not in sums],
        }

    def _line(self, name: str, sums: _Sums, total: int) -> dict[str, Any]:
        return {"name": name, "rows": sums.rows, "share": sums.rows / total if total else 0.0, **sums.means()}

    def _uses(self, sums: Mapping[str, _Sums]) -> dict[str, tuple[int, float]]:
        """(rows with their repeats, the value of epochs or weight) of each category that is used."""
        used = {c.name: c.share for c in self._settings.categories if c.share and c.name in sums}
        if not used:
            return {}
        rows, whole = {name: sums[name].rows for name in used}, sum(used.values())
        if self._settings.reach == "weights":
            # As `data pack`: the scale at which one category is used completely.
            scale = min(rows[name] / share for name, share in used.items())
            return {name: (max(round(share * scale), 1), share) for name, share in used.items()}
        wanted = self._settings.rows or sum(rows.values())
        epochs = {name: share / whole * wanted / rows[name] for name, share in used.items()}
        return {name: (round(epochs[name] * rows[name]), epochs[name]) for name in used}

    def _write_config(self, kind: str, used: Mapping[str, float]) -> str | None:
        if not used:
            return None
        path = self._directory / f"{kind}.yaml"
        key = "epochs" if self._settings.reach == "epochs" else "weight"
        sources = [
            {"name": name, "path": str(self._path(kind, name)), key: value, "ignore": [ANNOTATIONS]}
            for name, value in used.items()
        ]
        config = self._settings.config
        base = {} if config is None else {"base": relpath(config, path.parent)}
        text = "# `megatron-post curate` wrote this file. It has the sources of a training run.\n"
        write_whole(path, text + to_yaml({**base, "data": {"sources": sources}}))
        return str(path)
