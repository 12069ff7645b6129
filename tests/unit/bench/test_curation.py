import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the comparison needs datatrove")
pytest.importorskip("rensa", reason="near duplicates need rensa, an extra of the package")
pytest.importorskip("faiss", reason="clusters need faiss, an extra of the package")

from megatron_post.bench.curation.side_by_side import curation_record, curation_table, measure_side_by_side
from megatron_post.bench.curation.workload import write_workload


def test_the_workload_has_what_it_says(tmp_path: Path) -> None:
    workload = write_workload(tmp_path, count=2000, words=100)
    rows = [json.loads(line)["messages"] for line in workload.rows.read_text().splitlines()]
    texts = [" ".join(message["content"] for message in row) for row in rows]
    assert len(texts) == workload.count == 2000
    assert {len(text.split()) for text in texts} == {100}
    counts = Counter(texts)
    assert sum(count - 1 for count in counts.values()) == workload.duplicates == 100
    questions = {json.loads(line)["question"] for line in workload.evaluation.read_text().splitlines()}
    assert sum(" ".join(text.split()[-30:]) in questions for text in texts) == workload.contaminated == 2


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rows 10, --words 60: want at least 1000 rows of 60 words"):
        write_workload(tmp_path, count=10, words=60)


@pytest.mark.slow
def test_both_sides_find_the_duplicates(tmp_path: Path) -> None:
    figures = measure_side_by_side(tmp_path, rows=2000, words=100, processes=2)
    assert figures.dropped["contamination"] == 2
    assert figures.dropped["exact_duplicates"] == 100
    # Three changed words of 100 leave a similarity of 0.83 or more, which MinHash finds in 99% of the pairs.
    assert 96 <= figures.dropped["near_duplicates"] <= 100
    assert 180 <= figures.dropped["datatrove"] <= 200
    assert "near_duplicates.signatures: time" in curation_record(figures).figures
    assert curation_table(figures).row_count == len(figures.own) + 3
