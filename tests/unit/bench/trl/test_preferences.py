"""TRL gets the pairs that we train, each side is compared with its like, and both learn the same."""

import math

import numpy as np
import pytest
from rich.console import Console

from megatron_post.bench.trl import preferences
from megatron_post.bench.trl.preferences import measure_pairs, pair_table, pair_workload, pairs
from megatron_post.bench.trl.side import Input, Round
from megatron_post.bench.trl.steps import OURS
from megatron_post.bench.trl.workload import Workload, count_tokens, make_workload, open_train_store


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bench")
    base = make_workload(directory, threads=1, steps_per_round=1, pack_length=512, packs_per_step=2, rows=40)
    return pair_workload(base, directory / "pairs", pack_length=2048, rows=16)


def test_both_sides_get_the_same_pairs(workload: Workload) -> None:
    """All real and all trained tokens of the packs, prompts counted twice, for the packs hold them twice."""
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


def test_like_is_compared_with_like(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 pairs in 2 seconds with a frozen reference, 1 with a stored one; TRL takes 3 and 2 with a pair a
    microbatch, else 4. So 4 / 2, 3 / 2 and 4 / 1, 2 / 1 times."""
    seconds = {OURS + ", frozen": 2.0, "TRL x 1, frozen": 3.0, OURS + ", store": 1.0, "TRL x 1, store": 2.0}

    def played(sides: dict, *_: object, **__: object) -> tuple[dict, dict]:
        rounds = {name: [Round(seconds.get(name, 4.0), 100, 4, 0.69)] for name in sides}
        return {name: Input(0.5, 1.0) for name in sides}, rounds

    monkeypatch.setattr(preferences, "interleave", played)
    figures = measure_pairs(workload, rounds=1)
    assert [side.speed for side in figures] == [1.0, 2.0, 1.5, 1.0, 4.0, 2.0]
    assert [side.trained_per_second for side in figures] == [2.0, 1.0, 4 / 3, 4.0, 1.0, 2.0]
    console = Console(record=True, width=80)
    console.print(pair_table(workload, figures, rounds=1))
    text = console.export_text()
    assert all(side.name in text for side in figures)


@pytest.mark.slow
def test_a_round_beside_trl(workload: Workload) -> None:
    """A warm-up step and a round, each over all pairs. Whatever packs, pads, runs or stores the reference,
    the second step's loss is one number, and no longer ln 2. Where the pairs are no multiple of TRL's
    microbatch its last one is smaller and weighs as much as the others, so that loss is only near."""
    pytest.importorskip("trl")
    losses = {side.name: side.loss for side in measure_pairs(workload, rounds=1)}
    first = losses[f"{OURS}, frozen"]
    assert abs(first - math.log(2)) > 0.01
    for name, loss in losses.items():
        exact = name.startswith((OURS, "TRL x 1,"))
        assert loss == pytest.approx(first, abs=2e-5 if exact else 2e-2), losses
