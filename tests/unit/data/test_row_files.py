"""The files of a split are found in a directory, and the null keys that Arrow adds to rows are removed."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog, ToolCall
from megatron_post.data.rows import BadRows, TooManyBadRows, read_rows
from megatron_post.data.template import render
from megatron_post.data.tokenizer import train_small_tokenizer

README = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
  - split: test
    path: "socratic/held_out/*.jsonl"
---
# Sums
"""


def answers(directory: Path, **fields: Any) -> list[str]:
    columns = {"user": "question", "assistant": "answer"}
    source = Source(name="s", path=str(directory), columns=columns, **fields)
    examples = [example for _, example in read_rows(source, bad_rows=BadRows())]
    return [example.messages[-1].content for example in examples if isinstance(example, Dialog)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a hub dataset with two configurations, whose file names do not show the split."""
    for name in ("main", "socratic"):
        (tmp_path / name / "held_out").mkdir(parents=True)
        rows = datasets.Dataset.from_list([{"question": "q", "answer": name}])
        rows.to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
        line = json.dumps({"question": "q", "answer": f"held out {name}"})
        (tmp_path / name / "held_out/a.jsonl").write_text(line)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_a_clone_is_read_as_its_readme_says(clone: Path) -> None:
    assert answers(clone) == ["main"]
    assert answers(clone, subset="main") == ["main"]
    assert answers(clone, subset="socratic") == ["socratic"]
    assert answers(clone, subset="socratic", split="test") == ["held out socratic"]


def test_datasets_reads_the_same_rows(clone: Path) -> None:
    for name in ("main", "socratic"):
        rows = datasets.load_dataset(str(clone), name, split="train", streaming=True)
        assert [row["answer"] for row in rows] == answers(clone, subset=name)


def test_a_subset_may_be_a_directory(clone: Path) -> None:
    (clone / "README.md").write_text("# No configurations")
    assert answers(clone, subset="socratic") == ["socratic"]
    with pytest.raises(ValueError, match=r"subset=x must be a configuration.*directories: main, socratic"):
        answers(clone, subset="x")
    with pytest.raises(ValueError, match="has none of that name"):
        answers(clone / "main", subset="../socratic")


@pytest.mark.parametrize(
    ("readme", "fields", "said"),
    [
        (README, {"subset": "x"}, "has no configuration 'x'; give subset, one of main, socratic"),
        (README.replace("  default: true\n", ""), {}, "names no default configuration; give subset"),
        (README, {"split": "test"}, "no files of split 'test'.*splits found: train"),
        (
            README.replace("  default: true", "  sep: ';'"),
            {"subset": "main"},
            "sets sep, which is not supported",
        ),
        (README.replace("main/train-*", "none/*"), {}, "holds no files of split 'train'"),
        (README.replace("main/train-*", "https://a.b/c.parquet"), {}, "names files elsewhere"),
        ("---\nconfigs: [\n---\n", {}, "its dataset configurations cannot be read"),
        ("---\nconfigs: 3\n---\n", {}, "its dataset configurations cannot be read"),
    ],
)
def test_a_readme_that_cannot_be_followed(
    clone: Path, readme: str, fields: dict[str, Any], said: str
) -> None:
    (clone / "README.md").write_text(readme)
    with pytest.raises(ValueError, match=said):
        answers(clone, **fields)


def test_files_that_cannot_be_read_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    (tmp_path / "train-1.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-1\.jsonl\.zst is of split 'train' and cannot be read"):
        answers(tmp_path)


def test_a_file_has_no_subset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(ValueError, match="has no subsets; leave out subset=x"):
        answers(tmp_path / "a.jsonl", subset="x")


# Arrow gives every struct all keys of the column, with null for the keys that a row does not have.


def tool(name: str, argument: str, schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: schema}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def calling(name: str, arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]


TOOL_ROWS = [
    {
        "messages": calling("weather", {"where": {"city": "Oslo"}, "days": [{"at": 1}]}),
        "tools": [tool("weather", "where", {"type": "object"})],
    },
    {
        "messages": calling("price", {"where": {"ticker": "ACME"}, "days": [{"on": 2}]}),
        "tools": [tool("price", "ticker", {"type": "string", "enum": ["ACME"]})],
    },
    {
        "messages": [
            *calling("price", {}),
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "1"},
        ]
    },
]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrow_and_json_lines_give_the_same_tokens(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TOOL_ROWS))
    rows = datasets.Dataset.from_list(TOOL_ROWS)
    if suffix == "parquet":
        rows.to_parquet(tmp_path / "rows.parquet")
    else:
        rows.save_to_disk(tmp_path / "saved")
    paths = {
        "jsonl": tmp_path / "rows.jsonl",
        suffix: tmp_path / ("rows.parquet" if suffix == "parquet" else "saved"),
    }
    tokenizer = train_small_tokenizer([json.dumps(TOOL_ROWS)] * 3, 300)
    found = {}
    for name, path in paths.items():
        examples = read_rows(Source(name="s", path=str(path)), bad_rows=BadRows())
        found[name] = [render(e, tokenizer) for _, e in examples if isinstance(e, Dialog)]
    assert len(found[suffix]) == 3
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.roles.tolist() == theirs.roles.tolist()


@pytest.mark.parametrize("name", ["messages", "dialog"])
def test_a_sequence_of_mappings_is_a_list(tmp_path: Path, name: str) -> None:
    """`datasets` gives features of type `Sequence` as a mapping of lists."""
    text = datasets.Value("string")
    part = datasets.Sequence({"type": text, "text": text})
    message = {"role": text, "content": part, "weight": datasets.Value("float32")}
    tools = datasets.Sequence({"type": text, "function": {"name": text}})
    features = datasets.Features({name: datasets.Sequence(message), "tools": tools})
    contents = [{"type": ["text"], "text": [word]} for word in ("a", "b", "c", "d")]
    roles, weights = ["user", "assistant"] * 2, [None, 0.0, None, 1.0]
    said = {"role": roles, "content": contents, "weight": weights}
    row = {name: said, "tools": {"type": ["function"], "function": [{"name": "f"}]}}
    table = datasets.Dataset.from_list([row], features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    assert isinstance(table[0][name], dict)
    ((_, dialog),) = read_rows(Source(name="s", path=str(tmp_path / "rows.parquet")), bad_rows=BadRows())
    assert isinstance(dialog, Dialog) and dialog.tools == ({"type": "function", "function": {"name": "f"}},)
    assert [message.content for message in dialog.messages] == ["a", "b", "c", "d"]
    assert [message.trained for message in dialog.messages[1::2]] == [False, True]


@pytest.mark.parametrize("arguments", ['{"a": null, "b": [null]}', {"a": None, "b": [None]}])
def test_a_null_of_json_stays(tmp_path: Path, arguments: Any) -> None:
    """A null is kept in a JSON text of any source, and in JSON Lines."""
    row = {"messages": calling("f", arguments)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    paths = [tmp_path / "rows.jsonl"]
    if isinstance(arguments, str):
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
        paths.append(tmp_path / "rows.parquet")
    for path in paths:
        ((_, dialog),) = read_rows(Source(name="s", path=str(path)), bad_rows=BadRows())
        assert isinstance(dialog, Dialog)
        assert dialog.messages[-1].tool_calls == (ToolCall("f", {"a": None, "b": [None]}),)


def test_rows_of_the_hub_are_arrows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": calling("f", {"a": 1, "b": None}), "prompt": None, "completion": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row, {}])
    rows = read_rows(Source(name="s", path="org/name"), bad_rows=BadRows())
    (_, dialog) = next(rows)
    assert isinstance(dialog, Dialog)
    assert dialog.messages[-1].tool_calls == (ToolCall("f", {"a": 1}),)
    with pytest.raises(TooManyBadRows):
        next(rows)
