"""Both sides pack the same rows into the same number of tokens, in every round."""

from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.bench.trl.packing import measure_packing, packing_record, packing_table


def test_both_sides_pack_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    found = measure_packing(tmp_path, rows=[40], workers=[1], rounds=2)
    assert sorted(each.side for each in found) == ["TRL", "TRL", "data pack", "data pack"]
    (tokens,) = {each.tokens for each in found}
    assert (
        tokens > 40 * 20
    )  # each row has a header of 10 tokens for both messages, and at least one word in each
    assert len(packing_record(found).figures) == 4
    console = Console(width=200, record=True)
    console.print(packing_table(found))
    assert "ratio" in console.export_text()


@pytest.mark.parametrize(("rows", "workers", "rounds"), [([0], [1], 1), ([1], [0], 1), ([1], [1], 0)])
def test_counts_without_a_measurement_are_refused(
    tmp_path: Path, rows: list[int], workers: list[int], rounds: int
) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        measure_packing(tmp_path, rows=rows, workers=workers, rounds=rounds)
