"""`data pack` gives the same store with any number of processes, and after it was killed."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data import render_pool, render_sources
from megatron_post.data.build import build_store
from megatron_post.data.rendering import RenderedBatch, Renderer
from megatron_post.data.rows import TooManyBadRows
from megatron_post.data.tokenizer import train_small_tokenizer

ROWS, HELD_OUT, ROWS_IN_BATCH = 23, 6, 4


@pytest.fixture
def config(tmp_path: Path) -> Config:
    train_small_tokenizer(["the cat sat on a mat"] * 10, 300).save(tmp_path / "tokenizer")
    return _config(tmp_path)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four rows, which this process renders."""
    monkeypatch.setattr(render_sources, "_ROWS_IN_BATCH", ROWS_IN_BATCH)
    monkeypatch.setattr(render_pool, "_BATCHES_FOR_PROCESSES", 10**6)


def _config(tmp_path: Path, *, max_bad_rows: int = 0, **source: Any) -> Config:
    for name, rows in (("a", ROWS), ("held_out", HELD_OUT)):
        lines = [
            json.dumps({"prompt": f"{name} {row}", "completion": "mat " * (row % 5 + 1), "id": row})
            for row in range(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "data": {
            "store": str(tmp_path / "store"),
            "sources": [{"name": "a", "path": str(tmp_path / "a.jsonl"), "epochs": 1.5, **source}],
            "eval_sources": [{"name": "held_out", "path": str(tmp_path / "held_out.jsonl")}],
            "pack_length": 128,
            "max_bad_rows": max_bad_rows,
        },
        "train": {"steps": 1, "global_batch": 1},
    }
    return validate(values, origin="test")


def _build(config: Config, *, workers: int | None = None) -> tuple[dict[str, bytes], list[str]]:
    """The files of the store, and what was printed."""
    output, store = StringIO(), Path(config.data.store)
    build_store(config, console=Console(file=output, width=200), overwrite=True, workers=workers)
    assert not list(store.parent.glob(".store*"))
    files = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return files, [line for line in output.getvalue().splitlines() if "━" not in line]  # they have times


def _spoil(tmp_path: Path, *rows: int) -> None:
    """Replace rows, which count from 1, by rows without a completion."""
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    for row in rows:
        lines[row - 1] = json.dumps({"prompt": "no completion"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")


def test_the_store_does_not_depend_on_processes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 rows are one batch of this process, or six batches of two processes."""
    expected = _build(config)
    monkeypatch.setattr(render_sources, "_ROWS_IN_BATCH", ROWS_IN_BATCH)
    monkeypatch.setattr(render_pool, "_BATCHES_FOR_PROCESSES", 1)
    assert _build(config, workers=2) == expected
    with pytest.raises(ValueError, match="--workers 0: give at least 1"):
        build_store(config, console=Console(quiet=True), overwrite=True, workers=0)


@pytest.mark.parametrize("max_rows", [1, 4, 15, 18, 19, 100])
def test_the_store_does_not_depend_on_batches(
    tmp_path: Path, config: Config, request: pytest.FixtureRequest, max_rows: int
) -> None:
    """`max_rows` counts good rows, and rows behind the last of them are not counted as bad."""
    config = _config(tmp_path, max_rows=max_rows, max_bad_rows=5)
    _spoil(tmp_path, 2, 3, 4, 16, 23)
    expected = _build(config)
    request.getfixturevalue("small_batches")
    assert _build(config) == expected


def test_bad_rows_beyond_the_limit_give_the_same_error(
    tmp_path: Path, config: Config, request: pytest.FixtureRequest
) -> None:
    _spoil(tmp_path, 1, 6, 7, 22)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 1})})
    with pytest.raises(TooManyBadRows, match=r"2 bad row\(s\)(.|\n)*a\.jsonl:6: ") as expected:
        _build(config)
    request.getfixturevalue("small_batches")
    with pytest.raises(TooManyBadRows) as found:
        _build(config)
    assert str(found.value) == str(expected.value)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each batch that is rendered. A batch of -1 rows is the moment of a kill."""
    sizes: list[int] = []
    render = Renderer.__call__

    def recorded(self: Renderer, batch: bytes) -> RenderedBatch:
        if sizes and sizes[0] == -len(sizes):
            raise KeyboardInterrupt
        found = render(self, batch)
        sizes.append(found.counts.rows)
        return found

    monkeypatch.setattr(Renderer, "__call__", recorded)
    yield sizes


def _interrupt(config: Config, rendered: list[int], *, after: int) -> None:
    """Pack until `after` batches have been rendered. All but the last few of them are in the spill."""
    rendered[:] = [-1 - after]
    with pytest.raises(KeyboardInterrupt):
        build_store(config, console=Console(quiet=True), overwrite=True, workers=1)
    rendered.clear()


# Six batches of `a` and two of the held-out rows.
ALL = [4, 4, 4, 4, 4, 3, 4, 2]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("after", range(1, 8))
def test_finished_batches_are_not_rendered_again(config: Config, rendered: list[int], after: int) -> None:
    expected = _build(config)
    assert rendered == ALL
    _interrupt(config, rendered, after=after)
    assert _build(config) == expected
    # One worker has at most three batches that are rendered and not yet stored.
    assert len(rendered) <= len(ALL) - after + 3
    assert rendered == ALL[len(ALL) - len(rendered) :]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("change", ["row", "setting", "tail", "content", "journal"])
def test_a_batch_that_changed_is_rendered_again(
    tmp_path: Path, config: Config, rendered: list[int], change: str
) -> None:
    """Everything behind a changed row, setting or file of the spill is rendered again."""
    _interrupt(config, rendered, after=5)
    spill = tmp_path / ".store.rows"
    again = 5  # three of the five batches had been stored
    if change == "row":
        path = tmp_path / "a.jsonl"
        path.write_text(path.read_text().replace('"a 5"', '"another"'))
        again = 7
    elif change == "setting":
        config = config.model_copy(update={"data": config.data.model_copy(update={"pack_length": 64})})
        again = 8
    elif change == "tail":
        with (spill / "train.content").open("ab") as file:
            file.write(b"half a batch")
    elif change == "content":
        content = bytearray((spill / "train.content").read_bytes())
        content[0] ^= 1
        (spill / "train.content").write_bytes(content)
        again = 8
    else:
        journal = (spill / "train.journal").read_bytes()
        (spill / "train.journal").write_bytes(journal[:-5])
        again = 6
    found = _build(config)
    assert rendered == ALL[len(ALL) - again :]
    assert found == _build(config)
