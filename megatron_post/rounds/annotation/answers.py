"""Reads what people have answered about pairs, row by row, and makes preferences of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_post.config.data import Rating, Source
from megatron_post.data.dialog import BadRow
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.rows import BadRows, raw_rows
from megatron_post.rounds.annotation.export import PAIRS, lies_in
from megatron_post.rounds.annotation.pairs import Origin, Pair, Side, read_key, read_pairs
from megatron_post.storage.files import write_lines
from megatron_post.storage.reading import did_you_mean_path


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    pair: str


class _Rated(_Answer):
    """The better response of a pair, how much better it is, and its edited text if it was edited."""

    better: Side
    rating: Rating
    edited: str | None = None


class _LeftOut(_Answer):
    """A pair that cannot be compared."""

    left_out: Literal[True]


@dataclass(frozen=True)
class Imported:
    """The preferences in the order of the pairs.

    left_out, missing: numbers of other pairs. repeated: rows that repeat an earlier one.
    """

    preferences: list[dict[str, Any]]
    left_out: int
    missing: int
    repeated: int
    bad: int

    @property
    def answered(self) -> int:
        return len(self.preferences) + self.left_out

    @property
    def counts(self) -> dict[str, int]:
        edited = sum("edited" in row for row in self.preferences)
        pairs = {"preferences": len(self.preferences), "edited": edited, "pairs_left_out": self.left_out}
        rows = {"repeated_rows": self.repeated, "bad_rows": self.bad}
        return pairs | {"pairs_not_answered": self.missing} | rows

    def __str__(self) -> str:
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items())


def read_answers(directory: Path, key: Path, answers: Path, *, max_bad_rows: int = 0) -> Imported:
    """The preferences in a file of answers, or in all files of a directory.

    directory, key: what `export_pairs` has written. The texts of a preference are those of the export, and
    only an edited response is from the answers. A person may export the same answer twice, which counts once.

    Raises `TooManyBadRows` with the reason of each bad row: one that is no answer, is about an unknown pair
    or one with another answer, or has an edited text that could not be trained. Raises `ValueError` for
    files that cannot be read or do not belong together.
    """
    pairs, origins = read_pairs(directory / PAIRS), read_key(key)
    if pairs.keys() != origins.keys():
        raise ValueError(
            f"{key} is not the key of {directory / PAIRS}: {len(pairs.keys() ^ origins.keys())} pair(s) are "
            "only in one of them; give the key that was exported with these pairs"
        )
    bad_rows = BadRows(max_bad_rows, key="max_bad_rows")
    answered: dict[str, dict[str, Any] | None] = {}
    given: dict[str, tuple[str, _Rated | _LeftOut]] = {}
    repeated = 0
    for where, row in _rows(answers):
        try:
            answer = _answer(row)
            if answer.pair not in pairs:
                raise BadRow(f"pair {answer.pair!r} is not in {directory / PAIRS}")
            if answer.pair in given:
                earlier, same = given[answer.pair]
                if answer.model_dump() != same.model_dump():
                    raise BadRow(f"pair {answer.pair!r} has another answer in {earlier}; keep one of them")
                repeated += 1
                continue
            found = None
            if isinstance(answer, _Rated):
                found = _preference(answer, pairs[answer.pair], origins[answer.pair], where)
            answered[answer.pair], given[answer.pair] = found, (where, answer)
        except BadRow as error:
            bad_rows.add(answers.name, where, str(error))
    preferences = [row for pair in pairs if (row := answered.get(pair)) is not None]
    left_out, missing = len(answered) - len(preferences), len(pairs) - len(answered)
    return Imported(preferences, left_out, missing, repeated, bad_rows.count)


def import_answers(
    directory: Path,
    key: Path,
    answers: Path,
    output: Path,
    *,
    enough: int | None = None,
    max_bad_rows: int = 0,
) -> Imported:
    """Write the preferences in answers to `output`.

    enough: the number of answered pairs that suffices. None: all pairs must be answered. Raises `ValueError`
    as `read_answers` does, if too few pairs are answered, if all of these are left out, and if `output` would
    be among the files that are read.
    """
    if not answers.exists():
        raise ValueError(f"the answers {answers} do not exist{did_you_mean_path(answers)}")
    for read in (directory, key, answers):
        if lies_in(output, read):
            raise ValueError(f"the output {output} would be in {read}, which is read; choose another path")
    found = read_answers(directory, key, answers, max_bad_rows=max_bad_rows)
    total = found.answered + found.missing
    wanted = total if enough is None else min(enough, total)
    if found.answered < wanted:
        raise ValueError(
            f"waiting for people: {found.answered} of {total} pairs are answered in {answers}, and {wanted} "
            f"are needed. Compare the others on the pages in {directory}, add the files that the pages "
            "export, and run the same command again; or lower `enough`"
        )
    if not found.preferences:
        raise ValueError(f"{answers} has no preference, because every answer leaves its pair out")
    write_lines(output, found.preferences)
    return found


def _rows(answers: Path) -> Iterator[tuple[str, Any]]:
    """The place and the value of each row. An empty directory has none. Hidden files are not read."""
    files = [answers]
    if answers.is_dir():
        files = sorted(path for path in answers.iterdir() if not path.name.startswith("."))
    for file in files:
        for _, where, row in raw_rows(Source(name=file.name, path=str(file))):
            yield where, row


def _answer(row: Any) -> _Rated | _LeftOut:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"an answer is an object, not {type(row).__name__}")
    try:
        return _LeftOut.model_validate(row) if "left_out" in row else _Rated.model_validate(row)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BadRow("; ".join(found)) from None


def _preference(answer: _Rated, pair: Pair, origin: Origin, where: str) -> dict[str, Any]:
    """The row of a preference, for `data pack`. Raises `BadRow` if it could not be trained."""
    texts: dict[Side, str] = {"a": pair.a, "b": pair.b}
    other: Side = "b" if answer.better == "a" else "a"
    row: dict[str, Any] = {
        "prompt": [message.model_dump() for message in pair.prompt],
        "chosen": _assistant(texts[answer.better]),
        "rejected": _assistant(texts[other]),
        "rating": answer.rating,
    }
    if answer.edited is not None:
        if not answer.edited.strip():
            raise BadRow("edited is blank; leave it out where the response was not edited")
        for side, text in texts.items():
            if answer.edited.strip() == text.strip():
                raise BadRow(f"edited is the text of response {side}; leave it out")
        row["edited"] = _assistant(answer.edited)
    example_of_row(row, Source(name="answers", path="answers"))
    origins = {"chosen": getattr(origin, answer.better), "rejected": getattr(origin, other)}
    return row | {"provenance": {"pair": pair.pair, "by": "annotator", "answer": Path(where).name, **origins}}


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
