"""Which columns a run has: their keys, and what each depends on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.curation.columns import DROPPED, REWRITTEN, Column
from megatron_post.curation.rows import INDEX
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, Pass, Step
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.reading import did_you_mean, plain_file

_KEY_DIGITS = 16


@dataclass(frozen=True)
class Planned:
    """A pass with its column.

    drops: the columns of all passes before this one in which a row may be dropped. rewrites: those before
    this one that may have other texts. Both are in the order of the passes.
    """

    step: Step
    work: Pass
    key: str
    column: Column
    drops: tuple["Planned", ...]
    rewrites: tuple["Planned", ...]

    @property
    def record(self) -> dict[str, Any]:
        """What `column.json` says."""
        return {"name": self.work.name, "version": self.work.version, "settings": dict(self.work.settings)}

    @property
    def scratch(self) -> Path:
        """The directory of the files that the blocks of a pass share."""
        return self.column.directory / "scratch"


@dataclass(frozen=True)
class Plan:
    """The index and the passes of a run. key: hash of everything."""

    key: str
    index: Column
    index_record: Mapping[str, Any]
    passes: tuple[Planned, ...]

    def of_step(self, step: Step) -> Planned:
        """The last pass of a step."""
        return next(planned for planned in self.passes if planned.work.name == step.column)

    def column(self, name: str) -> Column:
        """The column of a pass, or the index under the name `ROWS`."""
        if name == ROWS:
            return self.index
        return next(planned.column for planned in self.passes if planned.work.name == name)

    @property
    def drops(self) -> list[Planned]:
        return [planned for planned in self.passes if DROPPED in planned.work.fields]

    @property
    def rewrites(self) -> list[Planned]:
        return [planned for planned in self.passes if REWRITTEN in planned.work.fields]


def plan_of(settings: Curation, index_record: Mapping[str, Any]) -> Plan:
    """The plan of a run. index_record: what the index depends on, see `Rows.record`.

    Raises `ValueError` for settings that name missing files, and fields that no step has.
    """
    directory = Path(settings.run) / "columns"
    index_key = sha256_of_json(index_record)[:_KEY_DIGITS]
    keys = {ROWS: index_key}
    # The backend is left out, because answers do not depend on where a model runs.
    models = {
        name: model.model_dump(mode="json", exclude={"backend"}) for name, model in settings.models.items()
    }
    planned: list[Planned] = []
    for step in settings.steps:
        passes = step.passes(seed=settings.seed)
        assert passes and passes[-1].name == step.column, f"{step.column}: the last pass has another name"
        _check_fields(step.column, step.needed_fields, planned)
        for work in passes:
            assert work.name not in keys, f"{step.column}: two passes have the name {work.name}"
            drops = tuple(each for each in planned if DROPPED in each.work.fields)
            rewrites = tuple(each for each in planned if REWRITTEN in each.work.fields)
            key = sha256_of_json(
                {
                    "kind": step.kind,
                    "version": work.version,
                    "settings": dict(work.settings),
                    "sources": list(step.sources),
                    "models": [models[name] for name in step.models],
                    "fields": {name: str(kind) for name, kind in work.fields.items()},
                    "rows": index_key,
                    "reads": [keys[name] for name in work.reads],
                    "drops": [each.key for each in drops] if work.kept_only else None,
                    "rewrites": [each.key for each in rewrites],
                }
            )[:_KEY_DIGITS]
            keys[work.name] = key
            column = Column(directory / f"{work.name}-{key}", work.fields)
            planned.append(Planned(step, work, key, column, drops, rewrites))
    if settings.mixture is not None:
        _check_fields("mixture", settings.mixture.needed_fields, planned)
        if settings.mixture.config is not None:
            plain_file(Path(settings.mixture.config), "mixture.config:")
    everything = sha256_of_json(
        [
            index_key,
            [[each.work.name, each.key] for each in planned],
            settings.seed,  # draws the rows of the page
            settings.mixture and settings.mixture.model_dump(mode="json"),
        ]
    )
    index = Column(directory / f"{ROWS}-{index_key}", INDEX)
    return Plan(everything[:_KEY_DIGITS], index, index_record, tuple(planned))


def _check_fields(reader: str, needed: Sequence[tuple[str, str]], before: Sequence[Planned]) -> None:
    """Raise `ValueError` if an earlier step has no field that the reader needs."""
    for name, field in needed:
        fields = next(list(each.work.fields) for each in reversed(before) if each.work.name == name)
        if field not in fields:
            raise ValueError(
                f"{reader} reads {name}.{field}, and the step {name} has {', '.join(fields)}"
                + did_you_mean(field, fields)
            )
