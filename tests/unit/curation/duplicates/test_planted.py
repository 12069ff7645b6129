"""Planted duplicates, and how many of them each step finds. `make planted` has 10,000 rows."""

from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="embeddings need sentence-transformers, an extra")
pytest.importorskip("faiss", reason="clusters need faiss, an extra of the package")

from tests.planted import (
    THRESHOLD,
    Planted,
    directly_selected,
    found,
    lost_problems,
    plant,
    run_with,
    write,
)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(1000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, encoder: Path, planted: Planted) -> Path:
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("planted")
    write(planted, directory)
    run_with(directory, encoder, clusters=None)
    return directory


def test_a_thousand_rows_have_what_was_planted(planted: Planted) -> None:
    assert len(planted.rows) == 1000
    assert {kind: len(pairs) for kind, pairs in planted.pairs.items()} == dict.fromkeys(planted.pairs, 50)
    assert (len(planted.numbers), len(planted.contaminated)) == (20, 5)


def test_each_step_finds_what_was_planted_for_it(planted: Planted, place: Path) -> None:
    results = {each.step: each for each in found(planted, place / "run")}
    for step in ("contamination", "exact_duplicates"):
        assert (results[step].precision, results[step].recall) == (1, 1)
    # MinHash finds at least 99% of the pairs, and the true similarity decides.
    assert results["near_duplicates"].precision == 1
    assert results["near_duplicates"].recall >= 0.96
    assert results["semantic_duplicates"].precision >= 0.9
    assert results["semantic_duplicates"].recall >= 0.9


def test_no_problem_with_other_numbers_is_dropped(planted: Planted, place: Path) -> None:
    assert lost_problems(planted, place / "run") == 0


def test_greedy_selection_equals_the_definition_in_every_cluster(encoder: Path, place: Path) -> None:
    run_with(place, encoder, clusters=8)
    kept, expected = directly_selected(place / "run", threshold=THRESHOLD)
    assert kept == expected
    assert False in kept
