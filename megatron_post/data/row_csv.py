"""Rows of a CSV file. A row whose fields are not those of the header is a bad row.

pandas, through which `datasets` reads CSV, takes the first field of a row that is too long for the name of
the row: the others then move to the column before theirs, in silence.
"""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_post.data.dialog import MAX_CHARACTERS, BadRow


def csv_rows(file: Path) -> Iterator[dict[str, str] | BadRow]:
    """Every column is text, as it is written: no numbers, no "NA" for nothing. Blank lines do not count.

    Raises `ValueError` for names that stand twice in the header, `csv.Error` and errors of decoding.
    """
    csv.field_size_limit(MAX_CHARACTERS)  # it holds for the process, and by default is 131,072
    open_file: Any = gzip.open if file.suffix == ".gz" else open
    with open_file(file, "rt", encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        header = next(lines, [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise ValueError(f"the header names {', '.join(map(repr, twice))} more than once")
        for values in filter(None, lines):
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            else:
                yield BadRow(
                    f"the row has {len(values)} fields, and the header names {len(header)}; a field with a "
                    "comma or a line feed stands in double quotes"
                )
