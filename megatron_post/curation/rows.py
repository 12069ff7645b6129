"""The rows of a run: their ids, their places, and how they are read again for each step.

Rows stay in their sources. The first column of a run, the index, lists all good rows in the order of the
sources. A part of it ends after `part_rows` rows or `_PART_CHARACTERS` characters, and every other column has
the same parts. So a process holds the texts of one part at a time.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_post.config.data import Dataset, Reasoning, Source
from megatron_post.curation.columns import REWRITTEN, Column
from megatron_post.curation.row import OWN_KEYS, Row, all_messages
from megatron_post.data.dialog import BadRow, Dialog, Preference
from megatron_post.data.document import Document
from megatron_post.data.row_files import files_of
from megatron_post.data.row_formats import RowReader
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, raw_rows
from megatron_post.data.step_example import StepExample
from megatron_post.storage.checksums import sha256_of_file, sha256_of_json

INDEX_VERSION = 1
INDEX = {
    "source": pa.string(),
    "number": pa.int64(),  # of the row in its source, from 1
    "place": pa.string(),  # file and line
    "turns": pa.int32(),  # messages of the user
    "characters": pa.int64(),  # of all messages, and of all responses of a preference
}
_PART_CHARACTERS = 2**26


class Rows:
    """The rows of a run's sources."""

    def __init__(self, sources: Sequence[Dataset], reasoning: Reasoning, *, part_rows: int) -> None:
        self._sources, self._reasoning, self._part_rows = sources, reasoning, part_rows
        self.counts = KeyCounts()  # of keys that the format does not use

    def record(self) -> dict[str, Any]:
        """What the index depends on: the settings and the contents of the sources.

        The content of a dataset on the hub is not known. Raises `ValueError` for missing files.
        """
        return {
            "version": INDEX_VERSION,
            "reasoning": self._reasoning,
            "part_rows": self._part_rows,
            "sources": [
                source.model_dump(mode="json") | {"files": checksums(source)} for source in self._sources
            ],
        }

    def write_index(self, column: Column, bad_rows: BadRows) -> int:
        """Write the index. Returns the number of its parts.

        This holds 16 bytes of each row in memory. Raises `ValueError` as `read_rows` does.
        """
        draft = Column(column.directory / "draft", INDEX)
        hashes, num_parts = array("B"), 0
        for table in self._parts(bad_rows):
            draft.write(num_parts, table)
            hashes.frombytes(b"".join(table["id"].to_pylist()))
            num_parts += 1
        ids = _distinct_ids(hashes)
        start = 0
        for part in range(num_parts):
            table = draft.read(part, draft.schema.names)
            own = ids[16 * start : 16 * (start + table.num_rows)]
            values = [own[i : i + 16] for i in range(0, len(own), 16)]
            column.write(part, table.set_column(0, "id", pa.array(values, pa.binary(16))))
            start += table.num_rows
        return num_parts

    def read(
        self, index: Column, parts: Iterable[int], rewrites: Sequence[Column] = ()
    ) -> Iterator[tuple[int, list[Row]]]:
        """Yield the number and the rows of some parts, in one pass over the sources.

        parts: ascending. The next one is taken after the rows of the one before it have been used.
        rewrites: columns whose `REWRITTEN` is applied, in this order. Raises `ValueError` if a source has
        changed since the index was written.
        """
        records = self._records()
        for part in parts:
            fields = ("id", "source", "number", "place")
            table = index.read(part, fields)
            rows = []
            for id_, name, number, place in zip(*(table[f].to_pylist() for f in fields), strict=True):
                wanted = (name, number)
                match = ((r, raw) for r, n, _, raw in records if (r.source.name, n) == wanted)
                reader, raw = next(match, (None, {}))
                if reader is None:
                    raise ValueError(f"{place}: this row is gone: a source changed while it was read")
                example, extra = reader.read(raw)
                rows.append(Row(id_, name, number, place, raw, example, extra))
            for column in rewrites:
                rows = _apply(rows, column.read(part, [REWRITTEN])[REWRITTEN].to_pylist())
            yield part, rows

    def _records(self) -> Iterator[tuple["_Reader", int, str, Any]]:
        for dataset in self._sources:
            reader = _Reader(dataset, self._reasoning, self.counts)
            for number, where, raw in raw_rows(reader.source):
                yield reader, number, where, raw

    def _parts(self, bad_rows: BadRows) -> Iterator[pa.Table]:
        """Yield the parts of the index, whose ids are hashes of the rows alone."""
        schema = Column(Path(), INDEX).schema
        values: list[tuple[Any, ...]] = []
        characters = 0
        for reader, number, where, raw in self._records():
            if reader.is_full:
                continue
            try:
                example, _ = reader.read(raw)
                id_ = _hash(reader.source.name, raw)
            except (BadRow, RecursionError) as error:
                reason = str(error) if isinstance(error, BadRow) else "its values are nested too deeply"
                bad_rows.add(reader.source.name, where, reason)
                continue
            reader.num_good += 1
            size = sum(len(message.text) for message in all_messages(example))
            values.append((id_, reader.source.name, number, where, example.turns, size))
            characters += size
            if len(values) == self._part_rows or characters >= _PART_CHARACTERS:
                yield pa.table(list(map(list, zip(*values, strict=True))), schema=schema)
                values, characters = [], 0
        if values:
            yield pa.table(list(map(list, zip(*values, strict=True))), schema=schema)


class _Reader:
    """Reads the rows of a source one at a time."""

    def __init__(self, dataset: Dataset, reasoning: Reasoning, counts: KeyCounts) -> None:
        self.source = Source(**dataset.model_dump())
        self._own, self._counts = KeyCounts(), counts
        self._read = RowReader(self.source, train_on="all_turns", reasoning=reasoning, counts=self._own)
        self.num_good = 0

    @property
    def is_full(self) -> bool:
        return self.num_good == self.source.max_rows

    def read(self, raw: Any) -> tuple[Dialog | Preference, dict[str, Any]]:
        """The example and the keys that it does not use. Raises `BadRow`."""
        if isinstance(raw, BadRow):
            raise raw
        self._own.unused.clear()
        example = self._read(raw)
        if isinstance(example, StepExample | Document):
            kind = "labelled steps" if isinstance(example, StepExample) else "a document"
            raise BadRow(f"the row has {kind}; curation reads dialogs and preferences")
        self._counts.unused.update(self._own.unused)
        self._counts.columns |= self._own.columns
        return example, {key: raw[key] for key in raw if key in self._own.unused and key not in OWN_KEYS}


def _apply(rows: list[Row], rewritten: Sequence[str | None]) -> list[Row]:
    return [
        row if texts is None else row.rewritten(json.loads(texts))
        for row, texts in zip(rows, rewritten, strict=True)
    ]


def _hash(name: str, raw: Any) -> bytes:
    try:
        return bytes.fromhex(sha256_of_json([name, raw])[:32])
    except (TypeError, ValueError) as error:
        raise BadRow(f"a value of the row is not JSON: {error}") from None


def _distinct_ids(hashes: "array[int]") -> bytes:
    """The ids of rows with these hashes of 16 bytes. The n-th row of equal ones has n in its id, from 2."""
    found = bytearray(hashes.tobytes())
    pairs = np.frombuffer(bytes(found), "<u8").reshape(-1, 2)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))  # stable, so equal rows keep their order
    is_equal = (pairs[order[1:]] == pairs[order[:-1]]).all(axis=1)
    occurrence = 1
    for row, again in zip(order[1:].tolist(), is_equal.tolist(), strict=True):
        occurrence = occurrence + 1 if again else 1
        if again:
            own = slice(16 * row, 16 * (row + 1))
            found[own] = hashlib.sha256(bytes(found[own]) + str(occurrence).encode()).digest()[:16]
    return bytes(found)


def checksums(source: Dataset) -> dict[str, str]:
    """SHA-256 of each local file of a source."""
    path = Path(source.path)
    if path.is_file():
        return {str(path): sha256_of_file(path)}
    if not path.is_dir():
        return {}
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    named = Source(**source.model_dump())
    files = sorted(file for file in path.rglob("*") if file.is_file()) if is_saved else files_of(path, named)
    return {str(file): sha256_of_file(file) for file in files}
