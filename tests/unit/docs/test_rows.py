"""The rows on the page about data are read as a user's rows are."""

import json
from pathlib import Path

from megatron_post.config.data import Source
from megatron_post.data.rows import BadRows, read_rows
from tests.documentation import ROOT, blocks, json_values


def test_example_rows_are_read(tmp_path: Path) -> None:
    found = [block for block in blocks(ROOT / "docs/data.md") if block.language == "json"]
    rows = [row for block in found for row in json_values(block.text)]
    assert len(rows) == 9
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(read_rows(Source(name="s", path=str(path)), bad_rows=BadRows()))
    assert [number for number, _ in examples] == list(range(1, 10))
