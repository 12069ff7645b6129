"""The record of a benchmark: figures with their samples, settings and environment, in a JSON file."""

import dataclasses
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from megatron_post.storage.reading import read_json

FORMAT = "megatron-post-bench"
VERSION = 1
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figure:
    """The samples of a quantity, one for each step or round."""

    unit: str
    samples: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    better: Better | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the median, with at least 95% confidence for any distribution.

        The bounds are two order statistics. The median lies between the k-th smallest and the k-th largest of
        n independent samples unless fewer than k of them fall on one of its sides. The probability of the
        former is 1 - 2 P(Binomial(n, 1/2) < k). With fewer than six samples no k reaches 95%, and the bounds
        are the smallest and the largest sample.
        """
        ordered, n = sorted(self.samples), len(self.samples)
        tail, k = 0.0, 0
        while k < n // 2 and tail + math.comb(n, k) / 2**n <= 0.025:
            tail += math.comb(n, k) / 2**n
            k += 1
        k = max(k, 1)
        return ordered[k - 1], ordered[n - k]

    def quantile(self, share: float) -> float:
        """The quantile of the samples, interpolated between neighbours. share: 0 to 1."""
        ordered, place = sorted(self.samples), share * (len(self.samples) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Record:
    """One run of a benchmark. Runs of the same benchmark and subject are compared.

    Settings and environment may differ between them. notes: facts that a reader of the figures must know.
    text: the output of a program that the benchmark ran.
    """

    benchmark: str
    subject: str
    settings: dict[str, str]
    figures: dict[str, Figure]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    text: str = field(default="")

    @property
    def date(self) -> str:
        return self.environment.get("date", "")


def write_record(directory: str | Path, record: Record) -> Path:
    """Write a new file in `directory`. Its name begins with the benchmark and the date."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", f"{record.benchmark}-{record.date.replace(':', '')}")
    content = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(record)}, indent=1)
    for number in range(1, 1000):
        path = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with path.open("x") as file:
                file.write(content + "\n")
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{directory} has a thousand records of the same second; choose another --output")


def read_records(directory: str | Path) -> list[Record]:
    """All records in `directory`, oldest first.

    Raises `ValueError` if there are none, and for a file that is damaged or of another version.
    """
    directory = Path(directory)
    files = sorted(path for path in directory.glob("*.json") if path.is_file())
    found = [(path, _content(path)) for path in files]
    records = [_record(path, content) for path, content in found if content.get("format") == FORMAT]
    if not records:
        there = "holds no records" if directory.is_dir() else "does not exist"
        raise ValueError(
            f"{directory} {there}; run `megatron-post bench step|data|... --output {directory}` first"
        )
    return sorted(records, key=lambda record: record.date)


def once(unit: str, value: float, better: Better | None = None) -> Figure:
    """A figure that was measured once."""
    return Figure(unit, (float(value),), better)


def changed(before: Figure, after: Figure) -> bool:
    """Whether the intervals of two figures do not overlap. False if either was measured once."""
    if min(len(before.samples), len(after.samples)) < 2:
        return False
    (low, high), (other_low, other_high) = before.interval, after.interval
    return high < other_low or other_high < low


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, "a whole record; remove it")
    return content if isinstance(content, dict) else {}


def _record(path: Path, content: dict[str, Any]) -> Record:
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')}, this program reads {VERSION}: remove it"
        )
    names = [item.name for item in dataclasses.fields(Record)]
    try:
        return TypeAdapter(Record).validate_python({n: content[n] for n in names if n in content})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is a damaged record, remove it: {place}: {first['msg']}") from None
