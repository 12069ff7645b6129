"""Intervals computed by hand, changes, and records that are read back as they were written."""

import json
from pathlib import Path

import pytest

from megatron_post.bench.record import Figure, Record, changed, once, read_records, write_record


def _record(date: str = "2026-11-21T06:00:00+00:00", **values: object) -> Record:
    figures = {"step": Figure("s", (1.0, 2.0), "lower"), "memory": once("GiB", 3)}
    return Record("step", "sft, a.yaml", {"ranks": "2"}, figures, {"date": date}, ("a note",), **values)  # type: ignore[arg-type]


def test_interval_of_a_median() -> None:
    """The bounds are order statistics whose probability is computed by hand.

    Of 6 samples, the median is outside the smallest and largest with probability 2 / 64 = 3.1%. Of 20, fewer
    than 6 lie on one side with probability 2 x (1 + 20 + 190 + 1,140 + 4,845 + 15,504) / 2^20 = 4.1%, and
    fewer than 7 with 11.5%. So the bounds are the sixth from either end.
    """
    assert Figure("s", tuple(range(1, 7))).interval == (1, 6)
    assert Figure("s", tuple(range(20, 0, -1))).interval == (6, 15)
    assert Figure("s", (3.0, 1.0, 2.0)).interval == (1.0, 3.0)
    assert once("s", 2).interval == (2.0, 2.0)


def test_quantiles() -> None:
    """A tenth of the way over 10 gaps between 0 and 10 is 1. Between 1 and 2 it is 1.1."""
    assert Figure("s", tuple(range(10, -1, -1))).quantile(0.1) == 1
    assert Figure("s", (2.0, 1.0)).quantile(0.1) == pytest.approx(1.1)


def test_changed_only_if_intervals_do_not_overlap() -> None:
    """The median of 1 to 20 has the interval 6 to 15.

    Intervals from 16 on are changed, those from 15 overlap.
    """
    before = Figure("s", tuple(range(1, 21)))
    assert changed(before, Figure("s", tuple(range(11, 31))))  # 16 to 25
    assert not changed(before, Figure("s", tuple(range(10, 30))))  # 15 to 24
    assert not changed(once("GiB", 1), once("GiB", 100))


def test_records_are_read_as_written(tmp_path: Path) -> None:
    later, earlier = _record("2026-11-22T06:00:00+00:00", text="said"), _record()
    for record in (later, earlier, earlier):
        write_record(tmp_path, record)
    (tmp_path / "other.json").write_text("[1]")
    assert read_records(tmp_path) == [earlier, earlier, later]
    assert {path.name for path in tmp_path.glob("step*")} == {
        "step-2026-11-21T060000-0000.json",
        "step-2026-11-21T060000-0000-2.json",
        "step-2026-11-22T060000-0000.json",
    }


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing does not exist; run `megatron-post bench step"):
        read_records(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no records"):
        read_records(tmp_path)
    path = write_record(tmp_path, _record())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))
    with pytest.raises(ValueError, match="has version 9, this program reads 1"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figures": None}, "damaged record, remove it: figures"),
        ({"figures": {"step": {"unit": "s", "samples": [], "better": None}}}, "figures.step.samples"),
        ({"figures": {"step": {"unit": "s", "samples": [float("nan")], "better": None}}}, "finite"),
        ({"settings": None}, "settings"),
        ({"version": None}, "has version None"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_record(tmp_path, _record())
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"{path.name}.*{message}"):
        read_records(tmp_path)
    path.write_text(json.dumps(content)[:300])
    with pytest.raises(ValueError, match=rf"{path.name}: not a whole record; remove it"):
        read_records(tmp_path)
    path.write_text(json.dumps(content))
    (tmp_path / "folder.json").mkdir()
    assert read_records(tmp_path) == [_record()]
