"""`data.prompted` packs a source once for each of its templates, with T0's cap and held-out tasks."""

import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.load import ConfigError, validate
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import TooManyBadRows
from megatron_post.data.sources import PromptedRows, held_out_sources, packed_sources, write_prompted
from megatron_post.data.store import PackStore, StoreError, open_store
from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer
from megatron_post.train.data_checks import check_sources

MOVIES = """\
dataset: movies
templates:
  1: !Template
    name: good or bad
    jinja: '{{text}} Good or bad? ||| {{answer_choices[label]}}'
    answer_choices: bad ||| good
    metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}
  2: !Template
    name: feel
    jinja: 'How does one feel about "{{text}}"? ||| {{answer_choices[label]}}'
    answer_choices: negative ||| positive
"""
PAIRS = """\
templates:
  1: {name: same, jinja: '{{a}} = {{b}}? ||| {% if same %}yes{% else %}no{% endif %}'}
"""


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["a film that is good or bad"] * 10, 300).save(path)
    return path


def config_for(
    tmp_path: Path, tokenizer_path: Path, *, source: dict[str, Any] | None = None, **prompted: Any
) -> Config:
    """A config with movies (12 rows, two templates), pairs (6 rows, one) and chat (5 rows without one)."""
    write(tmp_path / "movies.jsonl", [{"text": f"film {n}", "label": n % 2, "id": n} for n in range(12)])
    write(tmp_path / "pairs.jsonl", [{"a": n, "b": n // 2, "same": n == 0} for n in range(6)])
    write(tmp_path / "chat.jsonl", [{"prompt": f"hello {n}", "completion": "bye"} for n in range(5)])
    for name, text in (("movies", MOVIES), ("pairs", PAIRS)):
        if not (tmp_path / f"{name}.yaml").exists():
            (tmp_path / f"{name}.yaml").write_text(text)
    names = ("movies", "pairs", "chat")
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in names]
    sources[0] |= source or {}
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(tokenizer_path)},
        "data": {
            "store": str(tmp_path / "store"),
            "sources": sources,
            "pack_length": 256,
            "prompted": {
                "sources": [
                    {"source": "movies", "task": "sentiment", "templates": str(tmp_path / "movies.yaml")},
                    {"source": "pairs", "task": "paraphrase", "templates": str(tmp_path / "pairs.yaml")},
                ],
                **prompted,
            },
        },
        "train": {"steps": 1, "global_batch": 1},
    }
    return validate(values, origin="test")


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(config: Config, **modes: bool) -> tuple[str, PackStore, Counter[str]]:
    """The printed text, the store and the number of used rows of each source."""
    output = StringIO()
    build_store(config, console=Console(file=output, width=200), **modes)
    store = open_store(config.data.store, "train")
    names = [source.name for source in store.sources]
    used = Counter(names[number] for number in store.column("source"))
    return output.getvalue(), store, used


def texts(store: PackStore, tokenizer_path: Path) -> list[str]:
    tokenizer = load_tokenizer(tokenizer_path)
    return [tokenizer.decode(store.read(number).tokens.tolist()) for number in range(len(store))]


def test_each_template_gives_a_source_of_its_own(tmp_path: Path, tokenizer_path: Path) -> None:
    printed, store, used = build(config_for(tmp_path, tokenizer_path))
    assert used == {"movies/feel": 12, "movies/good or bad": 12, "pairs/same": 6, "chat": 5}
    text = "".join(texts(store, tokenizer_path))
    assert text.count('How does one feel about "film 7"?') == text.count("film 7 Good or bad?") == 1
    # Columns that the template does not read are listed, as keys of other rows are.
    assert "train: movies/feel: keys not used: id (12 rows)" in printed
    check_sources(config_for(tmp_path, tokenizer_path), store)


def test_a_dataset_counts_at_most_the_cap_divided_by_its_templates(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    """With 10 examples and two templates each gets 5 of the 12 rows. One template of 6 rows gets all 6."""
    config = config_for(tmp_path, tokenizer_path, max_examples=10)
    _, store, used = build(config)
    assert used == {"movies/feel": 5, "movies/good or bad": 5, "pairs/same": 6, "chat": 5}
    drawn = {
        name: {
            int(row) for row, n in zip(store.column("sample"), store.column("source"), strict=True) if n == i
        }
        for i, name in enumerate(source.name for source in store.sources)
    }
    assert drawn["movies/feel"] != drawn["movies/good or bad"]
    assert build(config, overwrite=True)[1].digest == store.digest
    with pytest.raises(ValueError, match=r"max_examples=1 leaves no example for each of the 2 templates"):
        build(config_for(tmp_path, tokenizer_path, max_examples=1), overwrite=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [({"epochs": 2}, (24, 24)), ({"max_rows": 4}, (4, 4)), ({"weight": 1}, (12, 12))],
)
def test_settings_of_the_source_hold_for_each_template(
    tmp_path: Path, tokenizer_path: Path, source: dict[str, Any], expected: tuple[int, int]
) -> None:
    _, _, used = build(config_for(tmp_path, tokenizer_path, source=source))
    assert (used["movies/feel"], used["movies/good or bad"]) == expected


def test_a_weight_is_the_share_of_all_templates_together(tmp_path: Path, tokenizer_path: Path) -> None:
    packed = packed_sources(config_for(tmp_path, tokenizer_path, source={"weight": 3}), "train")
    assert [each.source.weight for each in packed] == [1.5, 1.5, None, None]


def test_held_out_tasks_are_not_packed(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path, held_out_tasks=["sentiment"])
    assert set(build(config)[2]) == {"pairs/same", "chat"}
    held_out = held_out_sources(config)
    assert [each.name for each in held_out] == ["movies/feel", "movies/good or bad"]
    rendered = [row for _, _, row in PromptedRows(held_out[0], KeyCounts()).rendered()]
    assert len(rendered) == 12 and rendered[1].choices == ("negative", "positive")  # type: ignore[union-attr]


def test_the_rows_of_held_out_tasks_are_written_with_their_choices(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    config = config_for(tmp_path, tokenizer_path, held_out_tasks=["sentiment"])
    output = tmp_path / "rows.jsonl"
    assert write_prompted(config, output) == 24
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 24 and {row["dataset"] for row in rows} == {"movies"}
    assert rows[13] == {
        "dataset": "movies",
        "task": "sentiment",
        "template": "good or bad",
        "row": 2,
        "prompt": "film 1 Good or bad?",
        "completion": "good",
        "choices": ["bad", "good"],
    }
    assert write_prompted(config, output, "train") == 6
    with pytest.raises(ValueError, match=r"no source of data.prompted is in the group eval"):
        write_prompted(config, output, "eval")


def test_the_text_of_a_template_is_part_of_the_data(tmp_path: Path, tokenizer_path: Path) -> None:
    """Even a change that renders the same rows makes another store, and training refuses the old one."""
    config = config_for(tmp_path, tokenizer_path)
    _, store, _ = build(config)
    (tmp_path / "pairs.yaml").write_text(PAIRS.replace("{{a}}", "{{ a }}"))
    with pytest.raises(StoreError, match=r"another text of the template\(s\) pairs/same; run `megatron-post"):
        check_sources(config, store)
    before = store.digest
    _, again, _ = build(config, overwrite=True)
    check_sources(config, again)
    assert again.digest != before and texts(again, tokenizer_path) == texts(store, tokenizer_path)


def test_rows_that_a_template_leaves_out_are_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    only_same = "templates: {1: {name: same, jinja: '{% if same %}{{a}} = {{b}}? ||| yes{% endif %}'}}"
    (tmp_path / "pairs.yaml").write_text(only_same)
    printed, store, used = build(config)
    assert used["pairs/same"] == 1 and "train: pairs/same: 5 rows left out by the template" in printed
    assert {source.name: source.filtered for source in store.sources}["pairs/same"] == 5
    (tmp_path / "pairs.yaml").write_text(only_same.replace("if same", "if smae"))
    with pytest.raises(ValueError, match=r"gave no usable row \(0 bad, .* 6 left out by its template\)"):
        build(config, overwrite=True)


def test_a_row_that_cannot_be_rendered_is_a_bad_row(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    write(tmp_path / "pairs.jsonl", [{"a": 1, "b": 2, "same": 1}, {"a": 1}])
    with pytest.raises(TooManyBadRows, match=r"pairs.jsonl:2: template 'same': 'b' is undefined"):
        build(config)


@pytest.mark.parametrize(
    ("prompted", "source", "reason"),
    [
        (
            {"held_out_tasks": ["sentimant"]},
            {},
            "no source has the task 'sentimant' (did you mean 'sentiment'?)",
        ),
        ({}, {"name": "films"}, "data.prompted.sources.0.source: 'movies' is in neither data.sources nor"),
        (
            {},
            {"format": "messages"},
            "templates read the rows of 'movies', so leave out its format and columns",
        ),
        ({}, {"columns": {"user": "a", "assistant": "b"}}, "so leave out its format and columns"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, tokenizer_path: Path, prompted: dict[str, Any], source: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        config_for(tmp_path, tokenizer_path, source=source, **prompted)


def test_held_out_tasks_leave_something_to_train(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path, held_out_tasks=["sentiment", "paraphrase"])
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": config.data.sources[:2]})}
    )
    with pytest.raises(ValueError, match="holds out every source"):
        build(config)
