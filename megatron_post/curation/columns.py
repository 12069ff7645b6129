"""The files of a column. A column has a part for each part of the rows, and a part is complete or absent.

A part is a Parquet file. Its first field is the `id` of the row, and its rows have the order of the rows. The
directory of a column has a `column.json` for readers of the directory, which says what the column depends on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_post.storage.files import whole_file, write_whole
from megatron_post.storage.reading import reading

ID = pa.binary(16)
DROPPED, FAILED, REWRITTEN = "dropped", "failed", "rewritten"
# The type of each field that the runner itself reads. See `step.Pass`.
OF_THE_RUNNER = {DROPPED: pa.string(), FAILED: pa.string(), REWRITTEN: pa.string()}


class Column:
    """A column in a directory, `part-00000.parquet` and so on."""

    def __init__(self, directory: Path, fields: Mapping[str, pa.DataType]) -> None:
        """fields: names and types without `id`."""
        self.directory = directory
        self.schema = pa.schema({"id": ID, **fields})

    @property
    def fields(self) -> list[str]:
        """The names of the fields without `id`."""
        return self.schema.names[1:]

    def path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.parquet"

    def missing(self, num_parts: int) -> list[int]:
        """The numbers of the parts that have not been written."""
        return [part for part in range(num_parts) if not self.path(part).exists()]

    def is_complete(self, num_parts: int) -> bool:
        return all(self.path(part).exists() for part in range(num_parts))

    def write(self, part: int, table: pa.Table) -> None:
        """Write a part. Raises `DiskFull`."""
        write_table(self.path(part), table.select(self.schema.names).cast(self.schema))

    def read(self, part: int, fields: Sequence[str] | None = None) -> pa.Table:
        """The fields of a part, by default all but `id`. Raises `ValueError` for a damaged file."""
        return read_table(self.path(part), list(fields or self.fields))

    def read_all(self, num_parts: int, fields: Sequence[str] | None = None) -> pa.Table:
        """The fields of all parts in one table."""
        return pa.concat_tables([self.read(part, fields) for part in range(num_parts)])

    def describe(self, record: Mapping[str, Any]) -> None:
        """Write `column.json`, unless it is there."""
        path = self.directory / "column.json"
        if not path.exists():
            write_whole(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is complete or absent, with checksums of its pages. Raises `DiskFull`."""
    with whole_file(path) as growing:
        pq.write_table(table, growing, compression="zstd", write_page_checksum=True)


def read_table(path: Path, fields: Sequence[str] | None = None) -> pa.Table:
    """A file that `write_table` wrote. Raises `ValueError` if it is damaged."""
    with reading(path, "a part of a column; remove it, and it is written again"):
        columns = None if fields is None else list(fields)
        return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)


def aligned(
    values: Mapping[str, Any], schema: pa.Schema, positions: np.ndarray | None, ids: pa.ChunkedArray
) -> pa.Table:
    """A table of all rows from the values of some of them. The fields of the others are null.

    positions: int64 [n], ascending, the places in `ids` of the n rows that have values. None: all of them.
    Raises `ValueError` if the fields or the number of values are not those of the schema and the rows.
    """
    names = schema.names[1:]
    if set(values) != set(names):
        raise ValueError(f"a step gave the fields {sorted(values)}, and its column has {sorted(names)}")
    table = pa.table({name: _array(values[name], schema.field(name).type) for name in names})
    if positions is not None:
        if table.num_rows != len(positions):
            raise ValueError(f"a step gave {table.num_rows} values for {len(positions)} rows")
        where = np.full(len(ids), -1, np.int64)
        where[positions] = np.arange(len(positions))
        table = table.take(pa.array(where, mask=where < 0))
    if table.num_rows != len(ids):
        raise ValueError(f"a step gave {table.num_rows} values for {len(ids)} rows")
    return table.add_column(0, "id", ids)


def _array(values: Any, kind: pa.DataType) -> Any:
    is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
    return values.cast(kind) if is_arrow else pa.array(values, kind)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table, without the fields that are null."""
    for row in table.to_pylist():
        yield {name: value for name, value in row.items() if value is not None}
