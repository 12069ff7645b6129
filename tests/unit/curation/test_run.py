"""The runner: ids, parts, columns that are made again, shares of processes, and the written rows."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field

from megatron_post.config.data import Source
from megatron_post.config.load import ConfigError
from megatron_post.curation import steps
from megatron_post.curation.columns import DROPPED, FAILED, REWRITTEN
from megatron_post.curation.run import TooManyFailures, curate
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, Batch, BlockPass, Pass, RowPass, Step, Values, View, WholePass
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.rows import TooManyBadRows
from tests.unit.curation.place import Place, dialog

SHORT = {"kind": "lengths", "least_characters": 8}
RETURN = {"kind": "lengths", "name": "turns", "most_turns": 1}


def test_rows_are_kept_and_dropped_with_their_places(place: Place) -> None:
    place.add_source("chat", [dialog("a", "b"), dialog("question", "answer"), dialog("q", "a", "b", "c" * 9)])
    report = place.curate(SHORT, RETURN)
    assert [row["messages"][1]["content"] for row in place.rows()] == ["answer"]
    assert place.dropped() == ["too few characters", "too many turns"]
    places = [row["curation"]["place"] for row in place.rows("dropped.jsonl")]
    assert [each.rpartition(":")[2] for each in places] == ["1", "3"]
    counts = [(step["name"], step["rows"], step["dropped"]) for step in report["steps"]]
    assert counts == [("lengths", 3, 1), ("turns", 2, 1)]
    assert report["sources"] == [{"name": "chat", "rows": 3, "kept": 1}]


def test_equal_rows_have_ids_of_their_own_which_do_not_depend_on_other_rows(place: Place) -> None:
    rows = [dialog("one", "1"), dialog("two", "2"), dialog("one", "1"), dialog("one", "1")]
    place.add_source("chat", rows)
    place.add_source("other", rows[:1])
    place.curate(SHORT | {"least_characters": 1}, part_rows=2)
    first = [row["curation"]["id"] for row in place.rows()]
    assert len(set(first)) == 5
    moved = Place(place.directory / "moved")
    moved.directory.mkdir()
    moved.add_source("chat", [dialog("new", "0"), *rows])
    moved.curate(SHORT | {"least_characters": 1}, part_rows=3)
    assert [row["curation"]["id"] for row in moved.rows()][1:] == first[:4]


def test_a_changed_step_alone_is_done_again(place: Place) -> None:
    place.add_source("chat", [dialog("question", "answer" * n) for n in range(1, 8)])
    place.curate(SHORT, RETURN, part_rows=3)
    before = place.times()
    place.curate(SHORT | {"least_characters": 30}, RETURN)
    after = place.times()
    assert before.items() <= after.items()
    assert {path.split("/")[1].partition("-")[0] for path in after.keys() - before.keys()} == {"lengths"}
    assert len(place.rows()) == 4


def test_a_finished_run_does_nothing_and_a_changed_source_is_read_again(place: Place) -> None:
    place.add_source("chat", [dialog("question", "answer")])
    place.curate(SHORT)
    before = place.bytes()
    place.curate(SHORT)
    assert place.bytes() == before
    (place.directory / "chat.jsonl").write_text(json.dumps(dialog("a", "b")) + "\n")
    assert place.curate(SHORT)["kept"] == 0


def test_any_number_of_processes_writes_the_same_bytes(place: Place) -> None:
    rows = [dialog("question", "answer" * (n % 5)) if n % 5 else dialog("a", "b") for n in range(1, 40)]
    place.add_source("chat", rows)
    place.curate(SHORT, RETURN, part_rows=4)
    expected = place.bytes()
    shared = Place(place.directory)
    shared.values = {**place.values, "run": str(place.directory / "shared")}
    shared.run = place.directory / "shared"
    settings, console = shared.settings(), shared.console()
    threads = [
        threading.Thread(target=curate, args=[settings], kwargs={"rank": rank, "size": 3, "console": console})
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert shared.bytes() == expected


_HOLDER = """
import sys, time
from pathlib import Path
from megatron_post.storage.lock import claim
with claim(Path(sys.argv[1]), int(sys.argv[2])) as is_own:
    print(is_own, flush=True)
    time.sleep(600)
"""


def test_a_process_finishes_the_run_without_those_that_never_begin(place: Place) -> None:
    """Rank 1 of 3 alone, as the task of an array whose other tasks are over or have no node yet."""
    place.add_source("chat", [dialog("question", "answer" * n) for n in range(1, 40)])
    place.curate(SHORT, RETURN, part_rows=4)
    expected = place.bytes()
    shutil.rmtree(place.run)
    place.curate(SHORT, RETURN, part_rows=4, rank=1, size=3)
    assert place.bytes() == expected


def test_a_part_is_left_to_the_process_that_has_it_until_that_process_is_gone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.add_source("chat", [dialog("question", "answer" * n) for n in range(1, 40)])
    place.curate(SHORT, part_rows=4)
    expected = place.bytes()
    (column,) = place.run.glob("columns/lengths-*")
    shutil.rmtree(place.run)
    command = [sys.executable, "-c", _HOLDER, str(column / ".lock"), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        present = []

        def print_(text: str, **_: Any) -> None:
            if "waiting" in text:  # only this process can make the part, once the other one is gone
                assert text.startswith(
                    "waiting for other processes, which have not finished 1 parts of lengths"
                )
                present.append(sorted(path.name for path in column.glob("*.parquet")))
                other.kill()
                other.wait()

        console = place.console()
        monkeypatch.setattr(console, "print", print_)
        monkeypatch.setattr(place, "console", lambda: console)
        place.curate(SHORT, part_rows=4)
    assert present == [[f"part-{part:05d}.parquet" for part in range(10) if part != 2]]
    assert place.bytes() == expected


def test_bad_rows_are_counted_and_refused_beyond_the_limit(place: Place) -> None:
    place.add_source("chat", [dialog("question", "answer"), {"messages": []}, dialog("other", "answer")])
    with pytest.raises(TooManyBadRows, match=r"chat.jsonl:2.*\n.*allow more with max_bad_rows \(now 0\)"):
        place.curate(SHORT)
    report = place.curate(SHORT, max_bad_rows=1)
    assert (report["rows"], report["bad_rows"]) == (2, 1)


ROWS_OF_EACH_FORM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dialog("question", "answer"), {}),
    ({"messages": [*dialog("q", "a")["messages"], {"role": "user", "content": "more"},
                   {"role": "assistant", "content": "end", "train": False}, {"role": "user", "content": "x"},
                   {"role": "assistant", "content": "y"}]}, {}),
    ({"question": "2 + 2?", "answer": "4", "level": 3},
     {"columns": {"user": "question", "assistant": "answer"}}),
    ({"prompt": "p" * 9, "completion": "c"}, {}),
    ({"prompt": "p" * 9, "chosen": "good", "rejected": "bad", "edited": "best", "rating": "better"}, {}),
    ({"chosen": "\n\nHuman: hi there\n\nAssistant: a",
      "rejected": "\n\nHuman: hi there\n\nAssistant: b"}, {}),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "weather?"},
                   {"role": "assistant", "content": "", "tool_calls": [
                       {"type": "function", "function": {"name": "w", "arguments": "{\"a\": 1}"}}]},
                   {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}],
      "tools": [{"type": "function", "function": {"name": "w"}}]}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "keys"), ROWS_OF_EACH_FORM)
def test_a_written_row_trains_what_its_source_trains(
    place: Place, row: dict[str, Any], keys: dict[str, Any]
) -> None:
    place.add_source("chat", [row], **keys)
    place.curate(RETURN | {"most_turns": 3})
    (written,) = place.rows()
    plain = Source(name="chat", path="rows.jsonl")
    origin = Source(name="chat", path="rows.jsonl", **keys)
    assert example_of_row(written, plain) == example_of_row(row, origin)
    assert written.get("level") == row.get("level")


class _Scripted(Step):
    """Rewrites, fails, drops by a quantile of the rows that are kept, and numbers rows in blocks."""

    kind: Literal["scripted"]
    shout: bool = False
    fail: tuple[str, ...] = ()
    best_of_kept: bool = False
    blocks: bool = False

    def passes(self, *, seed: int) -> Sequence[Pass]:
        made: list[Pass] = []
        common = {"version": 1, "settings": self.model_dump(mode="json")}
        if self.shout:
            made.append(
                RowPass(
                    name=f"{self.column}.text", fields={REWRITTEN: pa.string()}, annotate=_shout, **common
                )
            )
        if self.blocks:
            made.append(BlockPass(name=self.column, fields={"block": pa.int64()}, kept_only=True,
                                  prepare=_prepare, block=_block, **common))  # fmt: skip
        elif self.best_of_kept:
            made.append(WholePass(name=self.column, fields={DROPPED: pa.string()}, kept_only=True,
                                  annotate=_longest, **common))  # fmt: skip
        else:
            made.append(RowPass(name=self.column, fields={"text": pa.string(), FAILED: pa.string()},
                                annotate=self._note, **common))  # fmt: skip
        return made

    async def _note(self, batch: Batch) -> Values:
        texts = [row.messages[-1].content for row in batch.rows]
        return {"text": texts, FAILED: ["told to" if text in self.fail else None for text in texts]}


def _shout(batch: Batch) -> Values:
    return {REWRITTEN: [json.dumps([t.upper() for t in row.texts]) if "loud" not in row.texts else None
                        for row in batch.rows]}  # fmt: skip


def _longest(view: View) -> Values:
    sizes = view.read(ROWS, ["characters"])["characters"].to_numpy()
    return {DROPPED: [None if size == sizes.max() else "not the longest" for size in sizes]}


def _prepare(view: View) -> int:
    sizes = view.read(ROWS, ["characters"])["characters"].to_numpy()
    np.save(view.scratch / "sizes.npy", sizes)
    return 3


def _block(view: View, block: int) -> Values:
    rows = np.flatnonzero(np.load(view.scratch / "sizes.npy") % 4 == block)
    return {"row": rows, "block": np.full(len(rows), block)}


@pytest.fixture
def scripted(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose settings may have the step `scripted`."""
    both = Annotated[_Scripted | steps.AnyStep, Field(discriminator="kind")]  # type: ignore[valid-type]

    class Settings(Curation):
        steps: tuple[both, ...]  # type: ignore[assignment]

    monkeypatch.setattr("megatron_post.curation.settings.Curation", Settings)
    return place


def test_later_steps_and_written_rows_have_the_rewritten_texts(scripted: Place) -> None:
    scripted.add_source("chat", [dialog("question", "answer"), dialog("be", "loud")])
    scripted.curate({"kind": "scripted", "shout": True}, {"kind": "scripted", "name": "after"})
    assert [note["text"] for note in scripted.notes("after")] == ["ANSWER", "loud"]
    assert [row["messages"][0]["content"] for row in scripted.rows()] == ["QUESTION", "be"]


def test_a_pass_of_kept_rows_does_not_see_dropped_ones(scripted: Place) -> None:
    """The longest row has too many turns. Of the others, the longer one is kept, in another part."""
    rows = [dialog("a", "b", "c", "d" * 20), dialog("question", "a"), dialog("question", "answer")]
    scripted.add_source("chat", rows)
    last = {"kind": "scripted", "name": "longest", "best_of_kept": True}
    scripted.curate(RETURN, last, part_rows=2)
    assert [row["messages"][1]["content"] for row in scripted.rows()] == ["answer"]
    scripted.curate(RETURN | {"most_turns": 2}, last)
    assert [len(row["messages"]) for row in scripted.rows()] == [4]


def test_blocks_give_each_row_its_values(scripted: Place) -> None:
    """Rows of 3, 4, 5, ... characters are in the blocks 3 (not made), 0, 1, 2, 3, 0."""
    scripted.add_source("chat", [dialog("a", "b" * n) for n in range(2, 8)])
    scripted.curate({"kind": "scripted", "blocks": True}, part_rows=4)
    assert [note.get("block") for note in scripted.notes("scripted")] == [None, 0, 1, 2, None, 0]
    assert not list(scripted.run.glob("columns/*/scratch"))


def test_failures_end_the_run_beyond_the_limit(scripted: Place) -> None:
    scripted.add_source("chat", [dialog("question", f"answer {n}") for n in range(9)])
    step = {"kind": "scripted", "fail": ["answer 3", "answer 8"]}
    with pytest.raises(TooManyFailures, match=r"2 of 9 rows could not .* max_failed=0\.1 allows 1"):
        scripted.curate(step, max_failed=0.1)
    report = scripted.curate(step, max_failed=0.2)
    assert (report["kept"], report["steps"][0]["failed"]) == (9, 2)


def test_settings_that_cannot_work_are_refused(place: Place) -> None:
    place.add_source("chat", [dialog("question", "answer")])
    place.values["models"] = {"judge": {"model": "m", "backend": {"kind": "transformers"}}}
    with pytest.raises(ConfigError) as error:
        place.curate(SHORT, SHORT, {"kind": "lengths", "name": "rows", "most_turns": 1})
    assert "not the name 'rows'" in str(error.value)
    with pytest.raises(ConfigError) as error:
        place.curate(SHORT, SHORT)
    assert "steps: 'lengths' is there twice" in str(error.value)
    assert "models.judge: no step asks it" in str(error.value)
    with pytest.raises(ConfigError, match="it has no limit, so it drops nothing"):
        place.curate({"kind": "lengths"}, models={})


def test_a_damaged_part_is_named(place: Place) -> None:
    place.add_source("chat", [dialog("question", "answer")])
    place.curate(SHORT)
    (part,) = place.run.glob("columns/lengths-*/part-*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    (place.run / "report.json").unlink()
    with pytest.raises(ValueError, match=f"{part}: not a part of a column; remove it"):
        place.curate(SHORT)
