"""The step `semantic_duplicates` in a run, with a real encoder."""

import pkgutil
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="embeddings need sentence-transformers, an extra")
pytest.importorskip("faiss", reason="clusters need faiss, an extra of the package")

from megatron_post.curation.run import curate
from tests.unit.curation.place import Place, dialog

PROBLEM = "Tom buys {} boxes with {} eggs each and breaks {} eggs on the way home. How many eggs are left?"


@pytest.fixture
def step(encoder: Path) -> dict[str, Any]:
    return {"kind": "semantic_duplicates", "encoder": str(encoder), "threshold": 0.8, "clusters": 2}


def add_rows(place: Place) -> None:
    """Rows 2 and 5 mean the same as rows 1 and 4, and row 7 is row 6 with other numbers."""
    place.add_source(
        "chat",
        [
            dialog("How do I bake bread?", "Mix flour, water and yeast, and bake the dough."),
            dialog("How can I bake a bread?", "Mix flour with water and yeast, then bake the dough."),
            dialog("Who wrote Hamlet?", "William Shakespeare wrote it around 1600."),
            dialog("Why is the sky blue?", "Air scatters blue light more than red light."),
            dialog("Why does the sky look blue?", "The air scatters blue light more than red light."),
            dialog(PROBLEM.format(3, 12, 5), "There are 31 eggs left."),
            dialog(PROBLEM.format(4, 10, 6), "There are 34 eggs left."),
        ],
    )


def kept(place: Place) -> list[int]:
    return [int(row["curation"]["place"].rpartition(":")[2]) for row in place.rows()]


def test_rows_of_the_same_meaning_are_dropped_and_other_numbers_are_spared(
    place: Place, step: dict[str, Any]
) -> None:
    add_rows(place)
    report = place.curate(step, part_rows=3)
    assert kept(place) == [1, 3, 4, 6, 7]
    assert report["steps"][0]["report"]["clusters"] == 2
    dropped = place.rows("dropped.jsonl")
    assert place.dropped() == ["semantic duplicate"] * 2
    names = {row["curation"]["id"]: row for row in place.rows()}
    for row in dropped:
        notes = row["curation"]["steps"]["semantic_duplicates"]
        nearest = names[notes["nearest"]]["curation"]
        assert nearest["steps"]["semantic_duplicates"]["cluster"] == notes["cluster"]
        assert 0.8 <= notes["cosine"] <= 1
    place.curate(step | {"spare": []})
    assert kept(place) == [1, 3, 4, 6]


def test_another_threshold_does_not_embed_the_rows_again(place: Place, step: dict[str, Any]) -> None:
    add_rows(place)
    place.curate(step)
    before = place.times()
    place.curate(
        {"kind": "lengths", "most_characters": 100}, step | {"threshold": 0.99, "compare_to": "seen"}
    )
    after = place.times()
    again = {path.split("/")[1].rpartition("-")[0] for path in after.keys() - before.keys()}
    assert again == {"lengths", "semantic_duplicates.clusters", "semantic_duplicates"}
    assert before.items() <= after.items()
    assert kept(place) == [1, 2, 3, 4, 5]


def test_any_number_of_processes_writes_the_same_bytes(place: Place, step: dict[str, Any]) -> None:
    add_rows(place)
    place.curate(step, part_rows=2)
    expected = place.bytes()
    shared = Place(place.directory)
    shared.run = place.directory / "shared"
    shared.values = {**place.values, "run": str(shared.run)}
    settings, console = shared.settings(), shared.console()
    ranks = [
        threading.Thread(target=curate, args=[settings], kwargs={"rank": rank, "size": 2, "console": console})
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert shared.bytes() == expected


def test_all_rows_of_a_part_may_be_dropped_before(place: Place, step: dict[str, Any]) -> None:
    add_rows(place)
    place.curate({"kind": "lengths", "least_characters": 60}, step, part_rows=1)
    assert kept(place) == [1, 4, 6, 7]


def test_all_rows_may_be_dropped_before(place: Place, step: dict[str, Any]) -> None:
    add_rows(place)
    report = place.curate({"kind": "lengths", "most_characters": 1}, step)
    assert report["kept"] == 0
    assert report["steps"][1]["report"]["clusters"] == 0


def test_an_encoder_that_does_not_exist_is_named(place: Place, step: dict[str, Any]) -> None:
    add_rows(place)
    with pytest.raises(ValueError, match="semantic_duplicates: encoder /no/such/encoder is no directory"):
        place.curate(step | {"encoder": "/no/such/encoder"})
    assert not place.run.exists()


@pytest.mark.parametrize("function", ["clusters.train_centroids", "clusters.assign", "select"])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(
    place: Place, step: dict[str, Any], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call of a function fails, or the only one. A cluster, a part and the training are redone."""
    add_rows(place)
    place.curate(step, part_rows=2)
    expected = place.bytes()
    shutil.rmtree(place.run)
    target = f"megatron_post.curation.duplicates.semantic_step.{function}"
    calls = iter([] if "train" in function else [None])

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if next(calls, "end") == "end":
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    module, _, name = target.rpartition(".")
    original = getattr(pkgutil.resolve_name(module), name)
    with monkeypatch.context() as patched:
        patched.setattr(target, interrupted)
        with pytest.raises(KeyboardInterrupt) as stopped:
            place.curate(step, part_rows=2)
    place.curate(step, part_rows=2)  # the traceback still exists, and must not hold a lock
    assert stopped.tb
    assert place.bytes() == expected
