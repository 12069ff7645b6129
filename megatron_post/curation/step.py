"""What a step must give: `Step`, its settings in the YAML, and the passes that make its columns.

A step is a subclass of `Step` with a `kind` of its own. It is listed in `steps.AnyStep`. `Step.passes` gives
one pass or several. Each pass writes one column, a Parquet file with a value for every row in each field. The
last pass has the name of the step, and the others have names such as "clean.found". There are three kinds:

RowPass    `annotate` gets a batch of rows with their texts. All processes share the batches.
WholePass  `annotate` gets columns of all rows, and no texts. One process runs it.
BlockPass  `prepare` gets columns of all rows, and says how many blocks there are. All processes share the
           blocks, such as the clusters of rows.

A column is made again if its key changes, which is a hash of the pass's `version` and `settings`, and of the
keys of the columns that it depends on. So `settings` must have everything that changes its values, and must
not have anything else. A function that gives other values than before needs a new `version`.

Three fields of columns have a meaning, and their type is a string or null. Other fields are for later steps,
for the written rows and for reports. All of them may be null.

dropped    The reason why the row is not selected. null: this step keeps the row.
failed     The reason why the row has no annotation, such as an answer of a judge that cannot be read. The run
           ends with an error if there are more of them than `max_failed` allows.
rewritten  A JSON list with the new texts of the row, see `Row.texts`. null: the row is as it was.
           Later passes and the written rows have the new texts.

Every step has the key `sources`. Its passes do not see the rows of other sources, whose fields are null.

A pass with `kept_only` does not see the rows that an earlier step drops. Their fields are null. It is meant
for passes whose result depends on the other rows, such as quartiles and duplicates, and for passes that cost
much for each row, such as questions to a judge.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field

from megatron_post.config.section import Line, Section
from megatron_post.curation.columns import OF_THE_RUNNER
from megatron_post.curation.row import Row

if TYPE_CHECKING:
    from megatron_post.curation.tools import Tools

# The values of each field: a list, a numpy array or an Arrow array. NaN is not null.
Values = Mapping[str, Any]
ROWS = "rows"  # the name under which every pass can read the index, see `rows.INDEX`


@dataclass(frozen=True)
class Batch:
    """Rows with their texts. columns: by the names in `reads` and `ROWS`, tables with the same rows."""

    rows: Sequence[Row]
    columns: Mapping[str, pa.Table]
    tools: "Tools"


@dataclass(frozen=True)
class View:
    """All rows that a pass sees, without their texts.

    read: gives a table of these rows, from the name of a column in `reads` (or `ROWS`) and names of its
    fields. part: gives those of one part, from its number, a name and fields, with the place of its first
    row. scratch: a directory for files that the blocks of a `BlockPass` share. It is removed afterwards.
    """

    num_rows: int
    num_parts: int
    read: Callable[[str, Sequence[str]], pa.Table]
    part: Callable[[int, str, Sequence[str]], tuple[int, pa.Table]]
    scratch: Path
    tools: "Tools"

    def parts(self, name: str, fields: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yield what `part` gives for each part, where `read` would need too much memory."""
        for number in range(self.num_parts):
            yield self.part(number, name, fields)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Makes one column.

    settings: JSON values. fields: name and type of each field of the column. reads: names of columns of
    earlier passes. kept_only: see the module.
    """

    name: str
    version: int
    settings: Mapping[str, Any]
    fields: Mapping[str, pa.DataType]
    reads: Sequence[str] = ()
    kept_only: bool = False

    def __post_init__(self) -> None:
        for name, kind in OF_THE_RUNNER.items():
            assert self.fields.get(name, kind) == kind, f"{self.name}: {name} must be {kind}"


@dataclass(frozen=True, kw_only=True)
class RowPass(Pass):
    """annotate: the values of each field, one for each row of the batch, in order."""

    annotate: Callable[[Batch], Values | Awaitable[Values]]


@dataclass(frozen=True, kw_only=True)
class WholePass(Pass):
    """annotate: the values of each field, one for each row of the view, in order."""

    annotate: Callable[[View], Values]


@dataclass(frozen=True, kw_only=True)
class BlockPass(Pass):
    """prepare: runs in one process. It may write files into `View.scratch`, and returns the number of blocks.

    block: runs for each block from 0, in any process. It returns values of some rows: those of each field,
    and in "row" their places in the view, from 0. A row is in one block at most. The others have null.
    """

    prepare: Callable[[View], int]
    block: Callable[[View, int], Values]


def _is_a_name(name: str) -> str:
    if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii() or name == ROWS:
        raise ValueError(f"{name!r}: use letters, digits, _ and -, and not the name {ROWS!r}")
    return name


StepName = Annotated[Line, AfterValidator(_is_a_name)]


class Step(Section):
    """Base class of the settings of a step."""

    kind: str
    name: StepName | None = Field(None, description="name of its column and in reports. null: its kind")

    sources: tuple[Line, ...] = Field(
        (), description="names of the sources whose rows the step sees. Empty: all sources"
    )

    @property
    def named_sources(self) -> Sequence[str]:
        """Names of sources in the settings."""
        return self.sources

    @property
    def column(self) -> str:
        """The name of the step, and of the column of its last pass."""
        return self.name or self.kind

    @property
    def needs(self) -> Sequence[str]:
        """Names of earlier steps whose columns it reads."""
        return ()

    @property
    def needed_fields(self) -> Sequence[tuple[str, str]]:
        """Pairs of the name of an earlier step and a field of its column, which must have it."""
        return ()

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that it asks."""
        return ()

    @property
    def measures(self) -> Sequence[str]:
        """Fields of its column that are numbers, whose distributions the page shows."""
        return ()

    @property
    def uses_gpus(self) -> bool:
        """Whether it runs a model in the process that is not one of `models`, on a GPU if there is one."""
        return False

    def errors_with(self, earlier: Mapping[str, "Step"]) -> Sequence[str]:
        """What is wrong with the settings beside those of the steps before it, by their names."""
        return ()

    def passes(self, *, seed: int) -> Sequence[Pass]:
        """The passes in the order in which they run."""
        raise NotImplementedError

    def report(self, view: View) -> dict[str, Any]:
        """JSON values for the step's part of `report.json`. view: of all rows, and of all columns."""
        return {}
