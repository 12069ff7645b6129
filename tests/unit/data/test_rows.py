import gzip
import json
from pathlib import Path

import datasets
import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import MAX_CHARACTERS, Dialog, Message, Preference, ToolCall
from megatron_post.data.rows import BadRows, TooManyBadRows, read_rows

SHARED = Path(__file__).resolve().parents[3] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is absent: real data is not tested")

SUM = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
SUM_DIALOG = Dialog((Message("user", "1 + 1?"), Message("assistant", "2")))
BEST, WORST = (Message("assistant", "2"),), (Message("assistant", "3"),)
QUESTION = (Message("user", "1 + 1?"),)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, *, bad_rows=None, **fields):
    return list(read_rows(Source(name="s", path=str(path), **fields), bad_rows=bad_rows or BadRows()))


def read_one(tmp_path, row, **fields):
    ((number, example),) = read(write(tmp_path / "rows.jsonl", [row]), **fields)
    assert number == 1
    return example


def said(role, content):
    return {"role": role, "content": content}


# formats


def test_openai_messages_with_tool_calls(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    row = {
        "messages": [
            said("developer", " Be brief.\n"),
            said("user", [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]),
            said("assistant", "Let me add."),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            said("assistant", "2"),
        ],
        "tools": [tool],
    }
    expected = Dialog(
        (
            Message("system", "Be brief."),
            Message("user", "1 + 1?"),
            Message("assistant", "Let me add.", end_of_turn=False),
            Message("assistant", "", (ToolCall("add", {"a": 1, "b": None}),), end_of_turn=False),
            Message("ipython", "2"),
            Message("assistant", "2"),
        ),
        (tool,),
    )
    assert read_one(tmp_path, row) == expected
    assert read_one(tmp_path, row | {"tools": json.dumps([tool])}) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "completion": " 2"},
        {"prompt": [said("user", "1 + 1?")], "completion": [said("assistant", "2")]},
        {"prompt": [said("user", "1 + 1?")], "completion": "2"},
    ],
)
def test_trl_prompt_and_completion(tmp_path, row):
    assert read_one(tmp_path, row) == SUM_DIALOG


WHOLE = [[said("user", "1 + 1?"), said("assistant", text)] for text in ("2", "3")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {
            "prompt": [said("user", "1 + 1?")],
            "chosen": [said("assistant", "2")],
            "rejected": [said("assistant", "3")],
        },
        {"chosen": WHOLE[0], "rejected": WHOLE[1]},
        {"prompt": "1 + 1?", "chosen": WHOLE[0], "rejected": WHOLE[1], "edited": None},  # as UltraFeedback's
        {"chosen": "\n\nHuman: 1 + 1?\n\nAssistant: 2", "rejected": "\n\nHuman: 1 + 1?\n\nAssistant: 3"},
    ],
)
def test_preferences_in_each_form(tmp_path, row):
    assert read_one(tmp_path, row) == Preference(QUESTION, (BEST, WORST))


def test_edited_ranks_first_and_rating_is_kept(tmp_path):
    row = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3", "edited": "two", "rating": "Slightly better"}
    expected = Preference(QUESTION, ((Message("assistant", "two"),), BEST, WORST), "slightly_better")
    assert read_one(tmp_path, row) == expected
    columns = {"user": "q", "edited": "e", "chosen": "c", "rejected": "r", "rating": "how"}
    row = {"q": "1 + 1?", "e": "two", "c": "2", "r": "3", "how": "slightly_better"}
    assert read_one(tmp_path, row, columns=columns) == expected
    assert len(read_one(tmp_path, row | {"e": ""}, columns=columns).responses) == 2


def test_common_prompt_of_transcripts_ends_before_the_last_reply(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    example = read_one(tmp_path, {"chosen": start + " d", "rejected": start + " e"})
    assert [message.content for message in example.prompt] == ["a", "b", "c"]
    assert example.responses == ((Message("assistant", "d"),), (Message("assistant", "e"),))


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"question": "1 + 1?", "answer": "2"}, {"user": "question", "assistant": "answer"}, "1 + 1?"),
        (
            {"instruction": "Add.", "input": "1 + 1?", "output": "2"},
            {"user": "instruction+input", "assistant": "output"},
            "Add.\n\n1 + 1?",
        ),
        (
            {"instruction": "1 + 1?", "input": "", "output": "2"},
            {"user": "instruction+input", "assistant": "output"},
            "1 + 1?",
        ),
        ({"a+b": "1 + 1?", "x": [{"y": "2"}]}, {"user": "a+b", "assistant": "x.0.y"}, "1 + 1?"),
        (
            {"prompt": "1 + 1?", "completion": "2<|endoftext|>"},
            {"user": "prompt", "assistant": "completion", "end_marker": "<|endoftext|>"},
            "1 + 1?",
        ),
    ],
)
def test_column_mappings(tmp_path, row, columns, expected):
    dialog = Dialog((Message("user", expected), Message("assistant", "2")))
    assert read_one(tmp_path, row, columns=columns) == dialog
    with_system = columns | {"system": "about"}
    about = Message("system", "Hm.")
    assert read_one(tmp_path, row | {"about": "Hm."}, columns=with_system).messages == (
        about,
        *dialog.messages,
    )


def test_end_of_text_marker_stays_unless_the_mapping_says_so(tmp_path):
    example = read_one(tmp_path, {"prompt": "1 + 1?", "completion": "2<|endoftext|>"})
    assert example.messages[-1].content == "2<|endoftext|>"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"columns": {"user": "q"}}, "columns \\['user'\\] make neither a dialog"),
        ({"columns": {"user": "q", "assistant": "a", "bot": "b"}}, "make neither a dialog"),
        ({"format": "columns"}, "make neither a dialog"),
        (
            {"format": "messages", "columns": {"user": "q", "assistant": "a"}},
            "columns go with format=columns",
        ),
    ],
)
def test_columns_that_make_no_row_are_refused(tmp_path, fields, reason):
    with pytest.raises(ValueError, match=reason):
        read(write(tmp_path / "rows.jsonl", [SUM]), **fields)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row must be a mapping, not list"),
        (
            {"question": "1", "answer": "2"},
            r"cannot tell the format from the columns \['question', 'answer'\]",
        ),
        ({"messages": []}, "a list that is not empty"),
        ({"messages": ["hi"]}, "message 1 must be a mapping with role and content, not 'hi'"),
        ({"messages": [said("user", "1"), said("robot", "2")]}, "role 'robot' is unknown"),
        ({"messages": [said("user", "1"), said("assistant", " ")]}, "empty response"),
        ({"messages": [said("user", {"a": 1}), said("assistant", "2")]}, "'content' is dict, not text"),
        ({"messages": [said("user", [{"type": "image_url"}])]}, r"parts of type \['image_url'\]"),
        (
            {"messages": [said("user", "1"), {"role": "assistant", "tool_calls": [{}]}]},
            "a function with a name",
        ),
        ({"messages": SUM["messages"], "tools": "{"}, "tools are not JSON"),
        ({"prompt": {"a": 1}, "completion": "2"}, "a text or a list of messages is wanted"),
        ({"prompt": None, "completion": "2"}, "no column 'prompt'"),
        ({"chosen": "2", "rejected": "3"}, "there is no `prompt` column"),
        ({"prompt": "1", "chosen": "2", "rejected": " 2"}, "two responses of a preference are equal"),
        ({"chosen": WHOLE[0], "rejected": WHOLE[0]}, "two responses of a preference are equal"),
        ({"prompt": "1", "chosen": "2", "rejected": "3", "rating": "so so"}, "rating 'so_so' is unknown"),
        ({"messages": [said("user", "x" * (MAX_CHARACTERS + 1)), said("assistant", "2")]}, "huge: 4000002"),
    ],
)
def test_bad_rows_are_refused_with_file_line_and_reason(tmp_path, row, reason):
    path = write(tmp_path / "rows.jsonl", [SUM, row])
    with pytest.raises(TooManyBadRows, match=rf"1 bad row\(s\)\n  {path}:2: .*{reason}"):
        read(path)


# files


def test_broken_lines_are_counted_and_named_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_post.data.rows._MAX_LINE_BYTES", 1000)
    good = json.dumps(SUM).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b'{"messages": [',
        b"",
        good.replace(b"1 +", b"\xff"),
        good.replace(b"1 +", b"\\ud800"),
        b'{"a": "' + b"x" * 5000 + b'"}',
        b"[" * 900,
        good,
        b"NaN",
        good,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))  # no newline at the end
    bad_rows = BadRows(limit=6)
    rows = read(path, bad_rows=bad_rows)
    assert rows == [(1, SUM_DIALOG), (8, SUM_DIALOG), (10, SUM_DIALOG)]
    assert (bad_rows.count, bad_rows.by_source) == (6, {"s": 6})
    assert [example.removeprefix(f"{path}:").split(":")[0] for example in bad_rows.examples] == list("245679")
    for example, reason in zip(
        bad_rows.examples,
        [
            "broken JSON",
            "invalid UTF-8 at byte",
            "lone surrogate",
            "huge",
            "broken JSON",
            "must be a mapping",
        ],
        strict=True,
    ):
        assert reason in example
    assert len(read(path, bad_rows=BadRows(limit=6), max_rows=2)) == 2
    with pytest.raises(TooManyBadRows, match=r"(?s)6 bad row.*:9: .*data\.max_bad_rows \(now 5\)"):
        read(path, bad_rows=BadRows(limit=5))


def test_a_line_with_null_is_a_bad_row_and_a_blank_line_is_none(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff\nnull\n \n")
    bad_rows = BadRows(limit=1)
    assert read(path, bad_rows=bad_rows) == []
    assert ":2: " in bad_rows.examples[0] and "must be a mapping" in bad_rows.examples[0]


def test_examples_of_bad_rows_are_bounded():
    bad_rows = BadRows(limit=100)
    for number in range(25):
        bad_rows.add("s", f"f:{number}", "why")
    assert len(bad_rows.examples) == 10
    assert bad_rows.summary().startswith("25 bad row(s)\n  f:0: why\n")
    assert bad_rows.summary().endswith("and 15 more")


TABLE = [{"question": "01", "answer": "NA"}, {"question": 'two\nlines, "quoted"', "answer": "2.50"}]


def store_jsonl(path):
    write(path / "train.jsonl", TABLE)
    return path / "train.jsonl"


def store_gzip(path):
    with gzip.open(path / "train.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in TABLE))
    return path / "train.jsonl.gz"


def store_array(path):
    (path / "train.json").write_text("\n " + json.dumps(TABLE, indent=1))
    return path / "train.json"


def store_csv(path):
    (path / "train.csv").write_text('question,answer\n01,NA\n"two\nlines, ""quoted""",2.50\n')
    return path / "train.csv"


def store_parquet(path):
    datasets.Dataset.from_list(TABLE).to_parquet(path / "train.parquet")
    return path / "train.parquet"


def store_saved(path):
    datasets.Dataset.from_list(TABLE).save_to_disk(path / "saved")
    return path / "saved"


def store_arrow(path):
    (file,) = store_saved(path).glob("*.arrow")
    return file


def store_saved_splits(path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(TABLE)}).save_to_disk(path / "splits")
    return path / "splits"


def store_directory(path):
    for name in ("train", "test", "other"):
        write(path / f"{name}.jsonl", TABLE if name == "train" else [{"wrong": 1}])
    (path / "LICENSE").write_text("free")
    return path


@pytest.mark.parametrize(
    "store",
    [
        store_jsonl,
        store_gzip,
        store_array,
        store_csv,
        store_parquet,
        store_saved,
        store_arrow,
        store_saved_splits,
        store_directory,
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, store):
    rows = read(store(tmp_path), columns={"user": "question", "assistant": "answer"})
    assert [number for number, _ in rows] == [1, 2]
    for (_, dialog), row in zip(rows, TABLE, strict=True):
        assert [message.content for message in dialog.messages] == [row["question"], row["answer"]]


@pytest.mark.parametrize("row", ["1,2,3", "1", "1,2,"])
def test_a_row_of_csv_has_the_fields_of_the_header(tmp_path, row):
    """With a field too many, pandas takes the first as the row's name, and all columns move to the left."""
    columns = {"user": "question", "assistant": "answer"}
    (tmp_path / "rows.csv").write_text(f"question,answer\n{row}\n\n5,6\n")
    with pytest.raises(TooManyBadRows, match=rf"rows\.csv:1: the row has {row.count(',') + 1} fields"):
        read(tmp_path / "rows.csv", columns=columns)
    ((number, dialog),) = read(tmp_path / "rows.csv", bad_rows=BadRows(1), columns=columns)
    assert (number, dialog.messages[0].content) == (2, "5")
    (tmp_path / "rows.csv").write_text("question,answer,question\n1,2,3\n")
    with pytest.raises(ValueError, match=r"rows\.csv: .* names 'question' more than once"):
        read(tmp_path / "rows.csv", columns=columns)
    (tmp_path / "rows.csv").write_text('question,answer\n1,"2\n')
    with pytest.raises(ValueError, match=r"rows\.csv: .*unexpected end of data"):
        read(tmp_path / "rows.csv", columns=columns)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_in_a_row_is_an_error(tmp_path, name):
    row = json.dumps({"prompt": "a", "completion": "b"})[:-1] + ', "prompt": "c"}'
    (tmp_path / name).write_text(f"[{row}]" if name.endswith("json") else row)
    with pytest.raises(ValueError, match=r"rows\.json.*the key 'prompt' appears twice"):
        read(tmp_path / name)


def test_row_numbers_run_on_over_the_files_of_a_directory(tmp_path):
    write(tmp_path / "b.jsonl", [SUM])
    write(tmp_path / "a.jsonl", [SUM, SUM])
    assert [number for number, _ in read(tmp_path)] == [1, 2, 3]
    write(tmp_path / "b.jsonl", [{}])
    with pytest.raises(TooManyBadRows, match=r"b\.jsonl:1: "):
        read(tmp_path)


def test_bad_rows_of_parquet_are_named_by_row(tmp_path):
    datasets.Dataset.from_list([SUM, {"messages": []}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(TooManyBadRows, match=r"rows\.parquet:2: messages must be a list"):
        read(tmp_path / "rows.parquet")


def test_keys_that_arrow_adds_to_arguments_are_dropped(tmp_path):
    """Arrow adds the argument names of one call to the other call, with null values."""
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")]
    rows = [
        {"messages": [said("user", "1") | {"tool_calls": None}, {"role": "assistant", "tool_calls": [call]}]}
        for call in calls
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    examples = [dialog.messages[-1].tool_calls[0] for _, dialog in read(tmp_path / "rows.parquet")]
    assert examples == [ToolCall("f", {"f": 1}), ToolCall("g", {"g": 1})]


def test_sources_that_cannot_be_read_are_refused_with_the_place(tmp_path):
    with pytest.raises(ValueError, match=r"source 's': .*none\.jsonl does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no files of split 'train'"):
        read(tmp_path)
    write(tmp_path / "test.jsonl", [SUM])
    with pytest.raises(ValueError, match=r"holds no files of split 'train'.*splits found: test"):
        read(tmp_path)
    with pytest.raises(ValueError, match="subset=x must be a configuration"):
        read(tmp_path, subset="x")
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="cannot tell the kind of file"):
        read(tmp_path / "rows.txt")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(SUM).encode())[:-10])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: cannot be read"):
        read(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.json").write_text("[{}")
    with pytest.raises(ValueError, match=r"rows\.json: cannot be read"):
        read(tmp_path / "rows.json")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rows\.parquet: cannot be read after row 0"):
        read(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_bytes(b"question,answer\n1,\xff\n")
    with pytest.raises(ValueError, match=r"rows\.csv: cannot be read after row 0"):
        read(tmp_path / "rows.csv", columns={"user": "question", "assistant": "answer"})


def test_hub_names_go_through_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [SUM, {}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TooManyBadRows, match=r"org/name\[test\]:2: cannot tell the format"):
        read("org/name", subset="main", split="test")
    assert asked == [(("org/name", "main"), {"split": "test", "streaming": True})]


# real data


@needs_shared
@pytest.mark.parametrize(
    ("path", "columns", "num_rows", "num_bad"),
    [
        ("gsm8k", {"user": "question", "assistant": "answer"}, 7473, 0),
        (
            "gsm8k/example_model_solutions.jsonl",
            {"user": "question", "chosen": "ground_truth", "rejected": "6b_verification.solution"},
            900,
            0,
        ),
        ("hh_rlhf", {}, 1492, 8),
        ("t0", {}, 2208, 0),
        (
            "self_instruct/seed_tasks.jsonl",
            {"user": "instruction+instances.0.input", "assistant": "instances.0.output"},
            175,
            0,
        ),
    ],
)
def test_real_datasets(path, columns, num_rows, num_bad):
    bad_rows = BadRows(limit=num_bad)
    rows = read(SHARED / path, columns=columns, bad_rows=bad_rows)
    assert (len(rows), bad_rows.count) == (num_rows, num_bad)


@needs_shared
def test_first_rows_of_gsm8k_and_hh():
    ((_, dialog),) = read(SHARED / "gsm8k", columns={"user": "question", "assistant": "answer"}, max_rows=1)
    assert dialog.messages[0].content.startswith("Natalia sold clips to 48 of her friends")
    assert dialog.messages[1].content.endswith("#### 72")
    ((_, pair),) = read(SHARED / "hh_rlhf", max_rows=1)
    assert [message.role for message in pair.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert [response[0].content[:20] for response in pair.responses] == [
        "No, sorry!  All of t",
        "There are lots of fu",
    ]
