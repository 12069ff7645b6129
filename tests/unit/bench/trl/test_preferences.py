"""TRL gets the same pairs, each side is compared with its like, and both learn the same."""

import math

import numpy as np
import pytest
from rich.console import Console

from megatron_post.bench.trl import preferences
from megatron_post.bench.trl.figures import MEGATRON_POST
from megatron_post.bench.trl.preferences import measure_pairs, pair_table, pair_workload, pairs
from megatron_post.bench.trl.side import Input, Round
from megatron_post.bench.trl.workload import Workload, count_tokens, make_workload, open_train_store


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bench")
    base = make_workload(directory, threads=1, steps_per_round=1, pack_length=512, packs_per_step=2, rows=40)
    return pair_workload(base, directory / "pairs", pack_length=2048, rows=16)


def test_both_sides_get_the_same_pairs(workload: Workload) -> None:
    """The pairs hold all real and all trained tokens of the packs. The packs hold each prompt twice."""
    store = open_train_store(workload.config)
    real, trained = count_tokens([store.read(i) for i in range(len(store))])
    rows = list(pairs(store))
    assert len(rows) > 8
    assert sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows) == real
    assert sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows) == trained
    assert len({tuple(r["prompt_ids"] + r["chosen_ids"]) for r in rows}) == len(rows)
    best = next(s for s, rank in enumerate(store.read(0).ranks) if rank == 0)
    start = store.read(0).cu_seqlens[best]
    row = np.array(rows[0]["prompt_ids"] + rows[0]["chosen_ids"])
    np.testing.assert_array_equal(row, store.read(0).tokens[start : start + len(row)])


def test_sides_with_the_same_reference_are_compared(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 pairs take 2 s with a frozen reference and 1 s with a stored one.

    Rows with each prompt once take half as long. TRL takes 3 s and 2 s with one pair in a microbatch, and
    otherwise 4 s. The speedups are 1 / 2, 4 / 2, 3 / 2, 0.5 / 1, 4 / 1 and 2 / 1.
    """
    seconds = {
        MEGATRON_POST + ", frozen": 2.0,
        MEGATRON_POST + ", isolated, frozen": 1.0,
        "TRL x 1, frozen": 3.0,
        MEGATRON_POST + ", store": 1.0,
        MEGATRON_POST + ", isolated, store": 0.5,
        "TRL x 1, store": 2.0,
    }

    def played(sides: dict, *_: object, **__: object) -> tuple[dict, dict]:
        rounds = {name: [Round(seconds.get(name, 4.0), 100, 4, 0.69)] for name in sides}
        return {name: Input(0.5, 1.0) for name in sides}, rounds

    monkeypatch.setattr(preferences, "interleave", played)
    figures = measure_pairs(workload, rounds=1)
    assert [side.speed for side in figures] == [1.0, 0.5, 2.0, 1.5, 1.0, 0.5, 4.0, 2.0]
    assert [side.trained_per_second for side in figures] == [2.0, 4.0, 1.0, 4 / 3, 4.0, 8.0, 1.0, 2.0]
    console = Console(record=True, width=80)
    console.print(pair_table(workload, figures, rounds=1))
    text = console.export_text()
    assert all(side.name in text for side in figures)


@pytest.mark.slow
def test_a_round_beside_trl(workload: Workload) -> None:
    """After a warm-up step and a round over all pairs, all sides have the same loss.

    The loss of the second step is no longer ln 2. If TRL's microbatch does not divide the pairs, its last
    microbatch is smaller and weighs as much as the others, so that loss is only close.
    """
    pytest.importorskip("trl")
    losses = {side.name: side.loss for side in measure_pairs(workload, rounds=1)}
    first = losses[f"{MEGATRON_POST}, frozen"]
    assert abs(first - math.log(2)) > 0.01
    for name, loss in losses.items():
        exact = name.startswith((MEGATRON_POST, "TRL x 1,"))
        assert loss == pytest.approx(first, abs=2e-5 if exact else 2e-2), losses
