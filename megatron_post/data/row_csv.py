"""Reads rows of a CSV file. A row with more or fewer fields than the header is a bad row.

`datasets` is not used here because it reads CSV with pandas. If a row has too many fields, pandas silently
takes the first one as the row's name, and all others move one column to the left.
"""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_post.data.dialog import MAX_CHARACTERS, BadRow


def csv_rows(file: Path) -> Iterator[dict[str, str] | BadRow]:
    """Yield each row, in which every value is a text. Numbers and "NA" are not converted. Skips blank lines.

    Raises `ValueError` for duplicate names in the header, `csv.Error`, and errors of decoding.
    """
    csv.field_size_limit(MAX_CHARACTERS)  # a limit of the whole process, which is 131,072 by default
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
                    "comma or a line feed must be in double quotes"
                )
