"""Rounds are interleaved, counted and summarised, and both trainers learn the same from the same tokens."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_post.bench.trl import steps
from megatron_post.bench.trl.figures import MEGATRON_POST, side_record, summarise
from megatron_post.bench.trl.side import Gate, Input, Round, interleave
from megatron_post.bench.trl.steps import all_sides, measure, measure_beside_trl, step_table
from megatron_post.bench.trl.workload import Workload, count_tokens, make_workload, open_train_store, segments


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bench")
    return make_workload(directory, threads=1, steps_per_round=2, pack_length=512, packs_per_step=2, rows=60)


def _write_names(workload: Workload, gate: Gate, *, name: str, path: Path) -> None:
    """Writes its name at each step, until no more rounds are requested."""
    is_wanted, step = gate.ready(Input(1.0, 1.0)), 0
    while is_wanted:
        step += 1
        with path.open("a") as file:
            file.write(name)
        is_wanted = gate.step(tokens=10, trained=step, loss=1.0 / step)


def test_rounds_alternate(workload: Workload, tmp_path: Path) -> None:
    """A warm-up and two rounds of two steps give AABB three times. Steps 3 + 4 and 5 + 6 are counted."""
    path = tmp_path / "steps"
    sides = {name: partial(_write_names, name=name, path=path) for name in "AB"}
    _, results = interleave(sides, workload, rounds=2)
    assert path.read_text() == "AABB" * 3
    for rounds in results.values():
        assert [(r.tokens, r.trained, r.loss) for r in rounds] == [(20, 7, 1 / 4), (20, 11, 1 / 6)]


def _broken(workload: Workload, gate: Gate) -> None:
    raise OSError("no disk")


def test_a_failing_side_is_named(workload: Workload) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)B failed.*no disk"):
        interleave({"B": _broken}, workload, rounds=1)


def test_medians_and_ratios() -> None:
    """100, 50 and 25 trained tokens/s beside 50, 50 and 5 are speedups of 2, 1 and 5, with the median 2.

    The ratio of the medians, 50 / 50, would hide that the machine had slowed down for both.
    """
    own = [Round(1.0, 200, 100, 2.0), Round(2.0, 200, 100, 1.9), Round(4.0, 200, 100, 1.8)]
    other = [Round(2.0, 400, 100, 2.1), Round(2.0, 400, 100, 1.9), Round(20.0, 400, 100, 1.7)]
    figures = summarise("TRL", Input(0.5, 9.0), other, own_rounds=own)
    assert figures.speed == 2.0
    assert (figures.tokens_per_second, figures.trained_per_second, figures.loss) == (200.0, 50.0, 1.7)
    assert figures.ratios == (2.0, 1.0, 5.0) and figures.rates == (50.0, 50.0, 5.0)


def test_a_record_of_both_sides(workload: Workload) -> None:
    """The record has the rates of both sides, and one ratio."""
    own, other = [Round(1.0, 200, 100, 2.0)], [Round(2.0, 400, 100, 2.1)]
    sides = [
        summarise(name, Input(0.5, 9.0), rounds, own_rounds=own)
        for name, rounds in ((MEGATRON_POST, own), ("TRL", other))
    ]
    figures = side_record("trl", workload, sides, unit="trained tokens/s").figures
    assert {name: f.samples for name, f in figures.items()} == {
        f"{MEGATRON_POST}: trained tokens/s": (100.0,),
        f"{MEGATRON_POST}: fill": (50.0,),
        "TRL: trained tokens/s": (50.0,),
        "Megatron-Post / TRL": (2.0,),
        "TRL: fill": (50.0,),
    }


def test_both_sides_get_the_same_tokens(workload: Workload) -> None:
    """The dialogs that TRL gets hold exactly the real and the trained tokens of the packs."""
    store = open_train_store(workload.config)
    real, trained = count_tokens([store.read(i) for i in range(len(store))])
    dialogs = list(segments(store))
    assert len(dialogs) == 60
    assert sum(len(tokens) for tokens, _ in dialogs) == real
    assert sum(int((labels != -100).sum()) for _, labels in dialogs) == trained > 0
    for tokens, labels in dialogs:
        assert labels[0] == -100 and labels[-1] == tokens[-1]  # a header opens, the terminator is trained
        np.testing.assert_array_equal(labels[labels != -100], tokens[labels != -100])


def test_sft_then_dpo(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT and DPO each yield a table and a record with their own unit. The sides run in the slow tests."""
    rounds = [Round(1.0, 200, 100, 2.0)]
    sides = [summarise(MEGATRON_POST, Input(0.5, 9.0), rounds, own_rounds=rounds)]
    monkeypatch.setattr(steps, "all_sides", dict)
    monkeypatch.setattr(steps, "make_workload", lambda *_, **__: workload)
    monkeypatch.setattr(steps, "measure", lambda *_, **__: sides)
    monkeypatch.setattr(steps, "pair_workload", lambda base, _: base)
    monkeypatch.setattr(steps, "measure_pairs", lambda *_, **__: sides)
    found = list(measure_beside_trl(threads=1, rounds=1, steps=1, pair_rounds=1))
    assert [record.benchmark for _, record in found] == ["steps beside TRL", "DPO beside TRL"]
    assert [next(iter(record.figures)) for _, record in found] == [
        f"{MEGATRON_POST}: trained tokens/s",
        f"{MEGATRON_POST}: pairs/s",
    ]
    with pytest.raises(ValueError, match="want at least 1 of each"):
        next(measure_beside_trl(threads=1, rounds=0, steps=1, pair_rounds=1))


@pytest.mark.slow
def test_a_round_beside_trl(workload: Workload) -> None:
    """After four steps the losses of both sides have fallen by about as much.

    An untrained model has about the loss of a guess, ln 2048 = 7.62.
    """
    pytest.importorskip("trl")
    figures = measure(workload, all_sides(), rounds=1)
    losses = {side.name: side.loss for side in figures}
    assert figures[0].name == MEGATRON_POST and figures[0].speed == 1.0
    assert all(4.0 < loss < 7.5 for loss in losses.values()), losses
    assert max(losses.values()) - min(losses.values()) < 0.4, losses
    console = Console(record=True, width=90)
    console.print(step_table(workload, figures, rounds=1))
    text = console.export_text()
    assert all(side.name in text for side in figures)
