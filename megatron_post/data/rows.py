"""Reads local datasets and datasets on the hub into examples, and counts bad rows.

Local JSON Lines (.jsonl, .json, also gzipped) are read here line by line, strictly as UTF-8. `datasets` would
reject a whole file for one broken line without naming it, and Arrow would give all rows the same nested keys.
Parquet files, Arrow files and the hub are read with `datasets`, which also finds the files of a split in a
directory. CSV files are read with Python's csv module.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_post.config.data import Neutral, Reasoning, Source, TrainOn
from megatron_post.data.dialog import MAX_CHARACTERS, BadRow
from megatron_post.data.row_csv import csv_rows
from megatron_post.data.row_files import CSV_SUFFIXES, JSON_SUFFIXES, SUFFIXES, files_of
from megatron_post.data.row_formats import RowReader
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.step_example import Example
from megatron_post.storage.reading import did_you_mean_path, plain_file, reading

# JSON escapes a character with up to 6 bytes, or with 12 bytes outside Unicode's basic plane.
_MAX_LINE_BYTES = 8 * MAX_CHARACTERS
_MAX_ARRAY_BYTES, _PIECE_BYTES = 2**32, 2**24

# The row's number, its place ("file:line") and the row, or a `BadRow` if it could not be decoded. Bytes are a
# line of JSON that has not been decoded yet.
Record = tuple[int, str, Any]


class TooManyBadRows(ValueError):
    """There are more bad rows than `data.max_bad_rows` allows. The message lists the first ones."""


class BadRows:
    """Counts the bad rows of all sources of a store, and raises an error beyond `limit`."""

    NUM_EXAMPLES = 10

    def __init__(self, limit: int = 0, *, key: str = "data.max_bad_rows") -> None:
        """key: the setting that gives the limit, for the message."""
        self.limit, self._key = limit, key
        self.count = 0
        self.examples: list[str] = []
        self.by_source: Counter[str] = Counter()

    def add(self, source_name: str, where: str, reason: str) -> None:
        """Count a row. Raises `TooManyBadRows` beyond the limit."""
        self.count += 1
        self.by_source[source_name] += 1
        if len(self.examples) < self.NUM_EXAMPLES:
            self.examples.append(f"{where}: {reason}")
        if self.count > self.limit:
            raise TooManyBadRows(
                f"{self.summary()}\nMend the data, or allow more with {self._key} (now {self.limit})."
            )

    def summary(self) -> str:
        """The count, and one line for each of the first bad rows with its file, line and reason."""
        more = f"\n  and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.count} bad row(s)" + "".join(f"\n  {example}" for example in self.examples) + more


def read_rows(
    source: Source,
    *,
    bad_rows: BadRows,
    train_on: TrainOn = "all_turns",
    reasoning: Reasoning = "refuse",
    neutral: Neutral = "right",
    counts: KeyCounts | None = None,
    records: Iterable[Record] | None = None,
) -> Iterator[tuple[int, Example]]:
    """Yield (row number, example) for each good row, at most `source.max_rows` of them.

    train_on, reasoning: as in `Data`. `source.train_on` has priority. neutral: as `data.steps.neutral`.
    counts: collects unused keys. records: rows in place of those of `undecoded_rows`, such as a part of them.

    Row numbers start at 1 and are line numbers in a local JSON Lines file. They continue over the files of a
    directory. Raises `TooManyBadRows`, and `ValueError` for a source that cannot be found or read, and for
    columns that cannot make an example.
    """
    read = RowReader(source, train_on=train_on, reasoning=reasoning, neutral=neutral, counts=counts)
    num_good = 0
    for number, where, row in decoded(undecoded_rows(source) if records is None else records):
        try:
            if isinstance(row, BadRow):
                raise row
            example = read(row)
        except (BadRow, RecursionError) as error:
            reason = str(error) if isinstance(error, BadRow) else "its values are nested too deeply"
            bad_rows.add(source.name, where, reason)
            continue
        yield number, example
        num_good += 1
        if num_good == source.max_rows:
            return


def local_path(source: Source) -> Path | None:
    """The path of a source, or None if it is the name of a dataset on the hub.

    Raises `ValueError` for a path that does not exist.
    """
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"source {source.name!r}: path={source.path}: {error}") from error
    if path.exists():
        return path
    if path.name.endswith(SUFFIXES) or source.path.startswith(("/", ".", "~")):
        raise ValueError(f"source {source.name!r}: {path} does not exist{did_you_mean_path(path)}")
    return None


def raw_rows(source: Source) -> Iterator[tuple[int, str, Any]]:
    """Yield (row number, place, row) of every row, as it is. A row that cannot be decoded is its `BadRow`.

    Raises `ValueError` for a source that cannot be found or read.
    """
    return decoded(undecoded_rows(source))


def decoded(records: Iterable[Record]) -> Iterator[Record]:
    """The records of `undecoded_rows`, with rows in place of lines."""
    for number, where, row in records:
        yield number, where, _decode(row) if isinstance(row, bytes) else row


def undecoded_rows(source: Source) -> Iterator[Record]:
    """Yield the rows as `raw_rows` does, but a row of JSON Lines is still its line, as bytes.

    So one process can read a file and others can decode its lines.
    """
    path = local_path(source)
    if path is None:
        where = f"{source.path}[{source.split}]"
        yield from _numbered(
            where,
            lambda: _datasets().load_dataset(source.path, source.subset, split=source.split, streaming=True),
        )
        return
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if source.subset and (is_saved or not path.is_dir()):
        raise ValueError(f"source {source.name!r}: {path} has no subsets; leave out subset={source.subset}")
    if is_saved:
        saved = path / source.split if (path / "dataset_dict.json").is_file() else path
        yield from _numbered(str(saved), lambda: _datasets().load_from_disk(str(saved)))
        return
    before = 0
    files = files_of(path, source) if path.is_dir() else [plain_file(path, f"source {source.name!r}:")]
    for file in files:
        number = 0
        for number, where, row in _from_file(file):
            yield before + number, where, row
        before += number


def _from_file(file: Path) -> Iterator[Record]:
    if file.name.endswith(JSON_SUFFIXES):
        yield from _from_json(file)
    elif file.name.endswith(CSV_SUFFIXES):
        yield from _numbered(str(file), lambda: csv_rows(file))
    elif file.name.endswith((".parquet", ".arrow")):
        yield from _numbered(str(file), lambda: _load_file(file.suffix[1:], file))
    else:
        raise ValueError(f"{file}: cannot tell the kind of file; it must end in {', '.join(SUFFIXES)}")


def _load_file(kind: str, file: Path) -> Any:
    return _datasets().load_dataset(kind, data_files=[str(file)], split="train", streaming=True)


def _datasets() -> Any:
    """The library, which takes a second to import. Rows of JSON Lines do not need it."""
    import datasets

    return datasets


def _numbered(where: str, load: Callable[[], Any]) -> Iterator[Record]:
    number = 0
    try:
        for number, row in enumerate(load(), start=1):
            yield number, f"{where}:{number}", _without_padding(row)
    except Exception as error:  # builders raise many types of error, and none of them names the row
        raise ValueError(
            f"{where}: cannot be read after row {number}: {error or type(error).__name__}"
        ) from error


def _without_padding(value: Any) -> Any:
    """An Arrow value without the null keys that Arrow adds to give all structs the same keys."""
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value


def _from_json(file: Path) -> Iterator[Record]:
    """The rows of a file of JSON lines or of one JSON array. The place of an array's row is its index."""
    with reading(file), _open(file) as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        stream.seek(0)
        if start == b"[":
            content = bytearray()
            # In pieces, because one read of the whole limit would allocate that much memory at once.
            while piece := stream.read(_PIECE_BYTES):
                content += piece
                if len(content) > _MAX_ARRAY_BYTES:
                    raise ValueError(
                        f"an array of {_MAX_ARRAY_BYTES:,} bytes or more; write one row per line"
                    )
            rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=json_object)
            for number, row in enumerate(rows, start=1):
                yield number, f"{file}:{number}", row
            return
        for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE_BYTES), b""), start=1):
            row = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                # The limit has cut the line. Its rest must not be read as the next row.
                _skip_line(stream)
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, f"{file}:{number}", row


def _decode(line: bytes) -> Any:
    """The row in a line, or a `BadRow` that says why there is none. None: the line is blank, or null."""
    if len(line) == _MAX_LINE_BYTES:
        return BadRow(f"huge: a line of {_MAX_LINE_BYTES} bytes or more")
    try:
        text = line.decode()
        return json.loads(text, object_pairs_hook=json_object) if text.strip() else None
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON at character {error.pos} of the line: {error.msg}")
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        return BadRow(f"broken JSON: {error}")


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a duplicate key, whose first value would be lost silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice in an object")
    return found


def _skip_line(stream: IO[bytes]) -> None:
    while (rest := stream.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]
