"""The rows on the page about data are read as a user's rows are."""

import json
from pathlib import Path

from megatron_post.config.schema import Source
from megatron_post.data.rows import BadRows, read_rows
from tests.documentation import ROOT, blocks


def test_example_rows_are_read(tmp_path: Path) -> None:
    rows = [
        line
        for block in blocks(ROOT / "docs/data.md")
        if block.language == "json"
        for line in block.text.splitlines()
    ]
    assert len([json.loads(row) for row in rows]) == 8
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    found = list(read_rows(Source(name="s", path=str(path)), bad_rows=BadRows()))
    assert len(found) == len(rows)
