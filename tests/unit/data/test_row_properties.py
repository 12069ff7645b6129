"""Every form of a random dialog gives the same tokens and roles, and none of its keys is lost silently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_post.config.data import Source
from megatron_post.data.dialog import BadRow, Dialog
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.template import render_batch
from megatron_post.data.tokenizer import Tokenizer, train_small_tokenizer

few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text('ab 1?.\n"\\ä', min_size=1, max_size=12).filter(str.strip)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_small_tokenizer(["system user assistant ipython ab 1?. name parameters"] * 9, 300)


@st.composite
def dialogs(draw: st.DrawFn, *, calls: bool) -> Row:
    """Rows with `messages` in OpenAI's form. Some have tools, calls, marks and a separate system prompt."""
    messages: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if calls and draw(st.booleans()):
            arguments = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9), min_size=1))
            call = {
                "type": "function",
                "function": {"name": draw(st.sampled_from("fg")), "arguments": arguments},
            }
            messages.append({"role": "assistant", "content": draw(WORDS), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(WORDS)})
        messages.append({"role": "assistant", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages[-1]["train"] = draw(st.booleans())
    messages[-1]["train"] = True
    return {"messages": messages} | ({"system": draw(WORDS)} if draw(st.booleans()) else {})


def sharegpt(row: Row) -> Row:
    """The same conversation with ShareGPT's keys and roles. It has no message with text and a call."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    said = []
    for message in row["messages"]:
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        said.append({"from": names[message["role"]], "value": message["content"], **rest})
    return {key: value for key, value in row.items() if key != "messages"} | {"conversations": said}


def as_text(row: Row) -> Row:
    return row | {"messages": json.dumps(row["messages"])}


def calls_as_text(row: Row) -> Row:
    """Arguments as OpenAI's API returns them."""
    messages = json.loads(json.dumps(row["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return row | {"messages": messages}


def parts(row: Row) -> Row:
    messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
    return row | {"messages": messages}


def system_inside(row: Row) -> Row:
    first = [{"role": "developer", "content": row["system"]}] if "system" in row else []
    return {"messages": [*first, *row["messages"]]}


def renamed(row: Row) -> Row:
    return {("talk" if key == "messages" else key): value for key, value in row.items()}


FORMS = [sharegpt, as_text, calls_as_text, parts, system_inside, renamed]


def rendered(rows: list[Row], directory: Path, tokenizer: Tokenizer, **fields: Any) -> list[Any]:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rendered_from(path, tokenizer, **fields)


def rendered_from(path: Path, tokenizer: Tokenizer, **fields: Any) -> list[Any]:
    counts = KeyCounts()
    rows = read_rows(Source(name="s", path=str(path), **fields), bad_rows=BadRows(), counts=counts)
    found = render_batch([example for _, example in rows if isinstance(example, Dialog)], tokenizer)
    assert counts.summary() == []
    return [(each.tokens.tolist(), each.roles.tolist()) for each in found]


@pytest.mark.parametrize("form", FORMS)
@few
@given(rows=st.lists(dialogs(calls=True), min_size=1, max_size=4))
def test_every_form_of_messages_gives_the_same_tokens(
    tmp_path: Path, tokenizer: Tokenizer, form: Callable[[Row], Row], rows: list[Row]
) -> None:
    expected = rendered(rows, tmp_path, tokenizer)
    assert len(expected) == len(rows)
    assert rendered([form(row) for row in rows], tmp_path, tokenizer) == expected


@few
@given(rows=st.lists(dialogs(calls=True), min_size=1, max_size=4))
def test_parquet_gives_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer, rows: list[Row]) -> None:
    for row in rows:  # all structs of an Arrow column have the same order of keys
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = dict(sorted(call["function"]["arguments"].items()))
    expected = rendered(rows, tmp_path, tokenizer)
    padded = [{"system": None} | row for row in rows]
    schema_first = {"messages": [_EVERY_KEY], "system": "x"}
    table = pyarrow.Table.from_pylist([schema_first, *padded]).slice(1)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rendered_from(tmp_path / "rows.parquet", tokenizer) == expected


_EVERY_KEY = {
    "role": "",
    "content": "",
    "tool_calls": [{"type": "", "function": {"name": "", "arguments": {"a": 1, "b": 1}}}],
    "train": True,
}


@few
@given(rows=st.lists(dialogs(calls=False), min_size=1, max_size=4))
def test_prompts_with_completions_train_as_the_last_turn_does(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Row]
) -> None:
    for row in rows:
        for message in row["messages"]:
            message.pop("train", None)
    expected = rendered(rows, tmp_path, tokenizer, train_on="last_turn")
    for asked, answer, plain in (
        (("prompt", "completion"), ("prompt", "completion"), False),
        (("query", "history"), ("response",), True),
        (("instruction", "history"), ("output",), True),
    ):
        found = []
        for row in rows:
            *context, last = row["messages"]
            other: Row = {"system": row["system"]} if "system" in row else {}
            if plain:
                texts = [message["content"] for message in context]
                other |= {asked[0]: texts[-1], answer[0]: last["content"]}
                other["history"] = [list(pair) for pair in zip(texts[:-1:2], texts[1::2], strict=True)]
            else:
                other |= {"prompt": context, "completion": [last]}
            found.append(other)
        assert rendered(found, tmp_path, tokenizer) == expected


KNOWN = [
    *("system", "system_prompt", "system_message", "tools", "functions", "history", "query", "response"),
    *("prompt", "completion", "chosen", "rejected", "edited", "rating", "instruction", "input", "output"),
    *("label", "kto_tag", "weight", "train", "loss", "mask", "images", "audio", "refusal", "thinking"),
    *("reasoning_content", "chat_template", "chat_template_kwargs", "conversations", "text"),
]
NAMES = st.sampled_from(
    ["id", "source", "score", "name", "meta", "tags", "text", "label2", "index", "prompt_id"]
)
EXTRAS = st.dictionaries(NAMES, st.one_of(st.integers(), WORDS, st.lists(WORDS)), max_size=4)


@few
@given(row=dialogs(calls=True), extra=EXTRAS, inner=EXTRAS, data=st.data())
def test_every_key_is_used_refused_or_counted(row: Row, extra: Row, inner: Row, data: st.DataObject) -> None:
    """An added key of a row, a message or a call changes the example, makes the row bad, or is listed."""
    place = data.draw(st.sampled_from(range(len(row["messages"]))))
    row["messages"][place] |= {
        key: value for key, value in inner.items() if key not in row["messages"][place]
    }
    counts = KeyCounts()
    source = Source(name="s", path="s")
    example_of_row(row | extra, source, counts=counts)
    listed = {key for key in counts.unused}
    assert listed == {*extra, *(f"messages.{key}" for key in inner)}


@pytest.mark.parametrize("key", KNOWN)
@pytest.mark.parametrize("value", ["x y", 0, ["x"], {"x": 1}])
def test_no_known_name_of_a_key_vanishes(key: str, value: Any) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    counts = KeyCounts()
    source = Source(name="s", path="s")
    plain = example_of_row(row, source)
    try:
        changed = example_of_row(row | {key: value}, source, counts=counts)
    except BadRow as error:
        assert key in str(error) or "message 1 must be a mapping" in str(error)
    else:
        # The mark says that the message is trained.
        assert changed != plain or key in counts.unused or (key, value) == ("mask", 0)
