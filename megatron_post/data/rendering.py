"""Renders batches of rows into blocks of units. A batch needs nothing of the batches before it."""

import hashlib
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from megatron_post.config.data import Source
from megatron_post.config.layout import segment_multiple, store_layout
from megatron_post.config.schema import Config
from megatron_post.data.examples import (
    DialogUnits,
    DocumentUnits,
    ExampleUnits,
    PreferenceUnits,
    SolutionUnits,
    documents_of,
)
from megatron_post.data.length_limit import LengthLimit
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, Record, read_rows
from megatron_post.data.template import texts_of
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.data.units import UnitBlock, UnitPile
from megatron_post.storage.checksums import sha256_of_json

_ROWS_AT_ONCE = 512  # one call of the tokenizer encodes them
# Settings of `data` that decide which rows are read or where they are written, but not how a row is rendered.
_NOT_RENDERING = {"store", "sources", "eval_sources", "prompted", "max_bad_rows"}

# A source, and the digest of the template that its rows come from, or "". `PackedSource` has the template,
# which cannot be sent to another process.
RowSource = tuple[Source, str]


@dataclass(frozen=True)
class BatchCounts:
    """The counts of a batch, as JSON can hold them.

    rows: rows of the batch. good: rows that gave an example. units: units of these that fit a pack. bad: the
    place and reason of each other row. unused, columns: as in `KeyCounts`. longest: as in `LengthLimit`.
    """

    rows: int
    good: int = 0
    units: int = 0
    bad: Sequence[Sequence[str]] = ()
    unused: dict[str, int] = field(default_factory=dict)
    columns: dict[str, bool] = field(default_factory=dict)
    dropped: int = 0
    truncated: int = 0
    filtered: int = 0
    longest: Sequence[int] = (0, 0)
    spelled: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RenderedBatch:
    """A rendered batch.

    digest: as `Renderer.digest` computes it. error: the error that ended the batch, which comes after the bad
    rows in `counts.bad`.
    """

    block: UnitBlock
    counts: BatchCounts
    digest: str
    error: ValueError | None


class Renderer:
    """Renders batches of rows of a group's sources. Threads and processes may have one each."""

    def __init__(self, config: Config, sources: Sequence[RowSource], tokenizer: Tokenizer) -> None:
        """Raises `ValueError` for a source whose columns do not hold what the stage trains."""
        if config.traits.examples == "documents":
            sources = [(documents_of(source), template) for source, template in sources]
        self._config, self._sources, self._tokenizer = config, sources, tokenizer
        self._keys = [_rendering_key(config, source, tokenizer) for source in sources]

    def digest(self, batch: bytes) -> str:
        """A digest of the batch and of every setting that its units depend on. batch: as `batch_of` gives."""
        number, _ = pickle.loads(batch)
        return self._digest(number, batch)

    def __call__(self, batch: bytes) -> RenderedBatch:
        """Render the rows of a batch, which `batch_of` has made."""
        number, records = pickle.loads(batch)
        (source, template), config = self._sources[number], self._config
        bad, keys, limit = _AllBadRows(), KeyCounts(), length_limit(config, source)
        units_of_rows = _example_units(config, source, self._tokenizer)
        pile, good, spelled, failure = UnitPile(), 0, Counter[str](), None
        try:
            rows = read_rows(
                source,
                bad_rows=bad,
                train_on=config.data.train_on,
                reasoning=config.data.reasoning,
                neutral=config.data.steps.neutral,
                # A template's rows have other columns than the source. `PromptedRows` counts those.
                counts=None if template else keys,
                records=records,
            )
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                good += len(some)
                for (row, example), units in zip(some, units_of_rows(some), strict=True):
                    fitting = [fit for unit in units if (fit := limit.fit(unit, row=row)) is not None]
                    for unit in fitting:
                        pile.add(unit, source=number, sample=row, turns=example.turns)
                    if fitting:
                        spelled += self._tokenizer.spelled(texts_of(example))
        except ValueError as error:
            failure = error
        counts = BatchCounts(
            rows=len(records),
            good=good,
            units=len(pile),
            bad=bad.rows,
            unused=dict(keys.unused),
            columns=keys.columns,
            dropped=limit.dropped,
            truncated=limit.truncated,
            filtered=units_of_rows.filtered,
            longest=limit.longest,
            spelled=dict(spelled),
        )
        return RenderedBatch(pile.block(), counts, self._digest(number, batch), failure)

    def _digest(self, number: int, batch: bytes) -> str:
        return hashlib.sha256(self._keys[number].encode() + batch).hexdigest()


def batch_of(number: int, records: Sequence[Record]) -> bytes:
    """A batch of rows of source `number`, in the form that other processes can read."""
    return pickle.dumps((number, records), protocol=pickle.HIGHEST_PROTOCOL)


def length_limit(config: Config, source: Source) -> LengthLimit:
    """The limit that `data.overlong` sets for the units of a source."""
    return LengthLimit(
        source.name,
        overlong=config.data.overlong,
        capacity=sys.maxsize if config.cuts_documents else config.data.pack_length,
        multiple=segment_multiple(config),
    )


class _AllBadRows(BadRows):
    """Keeps the place and reason of every bad row, and has no limit."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []

    def add(self, source_name: str, where: str, reason: str) -> None:
        self.rows.append((where, reason))


def _rendering_key(config: Config, row_source: RowSource, tokenizer: Tokenizer) -> str:
    source, template = row_source
    return sha256_of_json(
        {
            "source": source.model_dump(mode="json", exclude={"path", "epochs", "weight", "max_rows"}),
            "template": template,
            "data": config.data.model_dump(mode="json", exclude=_NOT_RENDERING),
            "stage": config.stage,
            "multiple": segment_multiple(config),
            "layout": store_layout(config),
            "seed": config.seed,
            "tokenizer": tokenizer.fingerprint,
        }
    )


def _example_units(config: Config, source: Source, tokenizer: Tokenizer) -> ExampleUnits:
    if config.traits.examples == "dialogs":
        return DialogUnits(source.name, tokenizer, stage=config.stage)
    if config.traits.examples == "documents":
        return DocumentUnits(tokenizer)
    if config.traits.examples == "steps":
        return SolutionUnits(source.name, tokenizer, separator=config.data.steps.separator)
    return PreferenceUnits(
        source.name,
        tokenizer,
        layout=store_layout(config),
        rules=config.data.preferences,
        pair_only=config.traits.examples == "pairs",
        seed=config.seed,
    )
