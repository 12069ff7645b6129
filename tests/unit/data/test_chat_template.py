"""With the exported chat template, plain `transformers` gives the ids of `render`, or both raise an error."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_post.config.data import Reasoning, Source
from megatron_post.data.dialog import BadRow, Dialog
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.template import render, render_prompt
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, train_small_tokenizer
from tests.unit.data.thinking import THINK, save_with_think

transformers = pytest.importorskip("transformers")
jinja2 = pytest.importorskip("jinja2")

SEARCHES = ("brave_search", "wolfram_alpha")
WORDS = "system user assistant ipython Environment Tools Hello, 1 + 1 = 2. <think> parameters type function"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_small_tokenizer([WORDS] * 9, 330)


def exported(tokenizer: Tokenizer, directory: Path) -> Any:
    tokenizer.save(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(tokenizer, tmp_path_factory.mktemp("exported"))


def dialog_of(row: Mapping[str, Any], *, reasoning: Reasoning = "refuse") -> Dialog:
    source = Source(name="s", path="p", templated="keep")
    found = example_of_row(row, source, reasoning=reasoning)
    assert isinstance(found, Dialog)
    return found


def ids(theirs: Any, row: Mapping[str, Any], **options: Any) -> list[int]:
    found: list[int] = theirs.apply_chat_template(
        row["messages"], tools=row.get("tools"), tokenize=True, return_dict=False, **options
    )
    return found


def assert_equal(
    row: Mapping[str, Any], tokenizer: Tokenizer, theirs: Any, *, reasoning: Reasoning = "refuse"
) -> None:
    """Compare the ids of the whole row, and of each prompt in it that an assistant's header may follow."""
    dialog = dialog_of(row, reasoning=reasoning)
    assert ids(theirs, row) == render(dialog, tokenizer).tokens.tolist()
    for end, message in enumerate(dialog.messages, start=1):
        if message.role in ("user", "ipython") and dialog.messages[end].role == "assistant":
            prompt = ids(theirs, row | {"messages": row["messages"][:end]}, add_generation_prompt=True)
            expected = render_prompt(dialog.messages[:end], tokenizer, tools=dialog.tools)
            assert prompt == expected.tolist()


# Characters that split lines or words in some programs only, and characters that JSON or the template escape.
ODD = "\n\r\t \v\f\x1c\x1f\x85\xa0\u2028\u3000\u200b\ufeff\"'\\/{}[]<|>&é你😀\x00\x7f"
letters = st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8"), st.sampled_from("ab1 "))
# Hypothesis generates "<|eot_id|>" too. Texts that spell a control token have a test of their own.
texts = st.text(letters, max_size=12).map(lambda text: text.replace("<|", "<"))
said = texts.filter(str.strip)
names = st.sampled_from(["now", "items", "get_weather", "é", 'a"b', "self"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
mappings = st.dictionaries(texts | st.just("self"), values, max_size=3)


@st.composite
def json_texts(draw: st.DrawFn, mapping: st.SearchStrategy[dict[str, Any]]) -> str:
    separators = draw(st.sampled_from([None, (",", ":"), (" ,\n", "\t: ")]))
    indent = draw(st.sampled_from([None, 0, 3]))
    return json.dumps(draw(mapping), ensure_ascii=draw(st.booleans()), indent=indent, separators=separators)


def either(mapping: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    return mapping | json_texts(mapping)


code = texts.filter(lambda text: text and not text.lstrip().startswith("{"))
functions = st.one_of(
    st.tuples(names, either(mappings) | st.sampled_from([None, "", "{}"])),
    st.tuples(st.sampled_from(SEARCHES), either(st.fixed_dictionaries({"query": texts}))),
    st.tuples(st.just("code_interpreter"), code | either(st.fixed_dictionaries({"code": texts}))),
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    name, arguments = draw(functions)
    function = {"name": name, "arguments": arguments}
    return draw(st.sampled_from([{"type": "function", "function": function, "id": "c1"}, function]))


def contents(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """A content as a plain text or as a list of parts."""
    parts = text.map(lambda t: [{"type": "text", "text": t[:2]}, {"type": "text", "text": t[2:]}])
    return text | parts


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A user message, optional calls with results or earlier messages of the turn, and the answer."""
    turn = [{"role": "user", "content": draw(contents(texts))}]
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            turn.append({"role": "assistant", "content": draw(contents(said)), "tool_calls": None})
            continue
        content = draw(st.sampled_from([None, "", " \n"]) | contents(texts))
        turn.append({"role": "assistant", "content": content, "tool_calls": [draw(calls())]})
        role = draw(st.sampled_from(["tool", "ipython", "function"]))
        turn += [{"role": role, "content": draw(contents(texts))} for _ in range(draw(st.integers(1, 2)))]
    return [*turn, {"role": "assistant", "content": draw(contents(said))}]


@st.composite
def tools(draw: st.DrawFn) -> list[dict[str, Any]]:
    schema = st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("object"),
            "properties": st.none() | st.dictionaries(texts | st.just("items"), values, max_size=3),
            "required": st.none() | st.lists(texts, max_size=2),
        },
    )
    function = st.fixed_dictionaries(
        {"name": names}, optional={"description": st.none() | texts, "parameters": st.none() | schema}
    )
    wrapped = function.map(lambda f: {"type": "function", "function": f})
    built_in = st.sampled_from([*SEARCHES, "code_interpreter"]).map(lambda name: {"type": name})
    return draw(st.lists(wrapped | built_in, max_size=3))


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    roles = st.sampled_from(["system", "developer"])
    system = st.fixed_dictionaries({"role": roles, "content": contents(texts)})
    spoken = [message for turn in draw(st.lists(turns(), min_size=1, max_size=2)) for message in turn]
    row: dict[str, Any] = {"messages": draw(st.lists(system, max_size=1)) + spoken}
    return row | draw(st.sampled_from([{}, {"tools": None}]) | st.fixed_dictionaries({"tools": tools()}))


@given(row=rows())
@settings(max_examples=300, derandomize=True)
def test_every_form_of_a_row_gives_the_ids_of_training(
    row: dict[str, Any], tokenizer: Tokenizer, theirs: Any
) -> None:
    assert_equal(row, tokenizer, theirs)


@pytest.fixture(scope="module")
def read_json(theirs: Any) -> Callable[[str], str]:
    """Run the template's JSON reader in the environment of `transformers`. Returns the value as JSON."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    reader = "{%- set state = namespace() -%}{{- read_json(text, state) ~ state.value | tojson -}}"
    source = theirs.chat_template.split("{#- What follows <|python_tag|>. -#}")[0] + reader
    template = environment.from_string(source, globals={"raise_exception": raise_exception})
    return lambda text: template.render(text=text)


pieces = st.sampled_from(
    [
        *'{}[],:"\\ \n-+.eE0123u',
        "true",
        "null",
        "NaN",
        "-Infinity",
        '"a"',
        "\\u00e9",
        "\\ud83d",
        "\\ude00",
        "12",
    ]
)


@given(text=st.lists(pieces, max_size=12).map("".join) | json_texts(mappings))
@example(text='{"a": 1, "b": {"c": []}, "a": [{}, -0, -0.0, 1E400, 1e5]}')
@example(text='["\\ud83d\\ude00 \\\\u0041 \\" \\\\"]')
@example(text='["\\u12"]')
@settings(max_examples=1500, derandomize=True)
def test_json_is_read_as_python_reads_it(text: str, read_json: Callable[[str], str]) -> None:
    """The template gives the value of `json.loads`, or both raise. A lone surrogate is not valid text."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        with pytest.raises(jinja2.TemplateError, match="not JSON"):
            read_json(text)
    else:
        assert read_json(text) == json.dumps(value)


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


def called(*calls: Any, **more: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": list(calls)} | more]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (called({"name": "f"}, {"name": "g"}), None, "2 tool calls in one message; Llama 3's format"),
        (called({"name": "f", "arguments": "[1]"}), None, "not a JSON object"),
        (called({"name": "f", "arguments": "{'a': 1}"}), None, "not JSON"),
        (called({"name": "code_interpreter", "arguments": "{1: 2}"}), None, "not JSON"),
        (called({"name": "brave_search", "arguments": {"q": "x"}}), None, "brave_search.*query"),
        (called({"name": "brave_search", "arguments": {"query": "x", "n": 5}}), None, "brave_search.*query"),
        (called({"name": "code_interpreter", "arguments": {"code": 1}}), None, "code_interpreter.*code"),
        (called({"function": {}}), None, "a tool call needs a function with a name"),
        ([USER | {"tool_calls": [{"name": "f"}]}, ANSWER], None, "a user message calls a tool"),
        ([{"role": "narrator", "content": "?"}, ANSWER], None, "role '?narrator'? is unknown"),
        ([{"role": "user", "content": {"a": 1}}, ANSWER], None, "content"),
        ([{"role": "user", "content": 1}, ANSWER], None, "content"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], None, "content"),
        ([USER, ANSWER], [{"type": "retrieval"}], "tool"),
        ([USER, ANSWER], [{"type": "function", "function": {"name": "f", "parameters": [1]}}], "JSON schema"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_say_both_refuse(
    messages: list[dict[str, Any]], tools: Any, reason: str, theirs: Any
) -> None:
    with pytest.raises(BadRow, match=reason):
        dialog_of({"messages": messages, "tools": tools})
    with pytest.raises(jinja2.TemplateError, match=reason):
        theirs.apply_chat_template(messages, tools=tools)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "say <|eot_id|>"}, ANSWER]},
        {"messages": called({"name": "f", "arguments": {"a": "<|python_tag|>"}})},
        {"messages": called({"name": "f", "arguments": '{"a": "\\u003c|python_tag|>"}'})},
        {"messages": called({"name": "code_interpreter", "arguments": "print('<|eom_id|>')"})},
        {
            "messages": [USER, ANSWER],
            "tools": [{"type": "function", "function": {"name": "f", "description": "<|end_of_text|>"}}],
        },
    ],
)
def test_a_spelled_control_token_is_text_in_training_and_refused_here(
    row: dict[str, Any], tokenizer: Tokenizer, theirs: Any
) -> None:
    """`transformers` would turn the text into the token, so a user's text could end the turn."""
    control = [
        tokenizer.special(name) for name in ("<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>")
    ]
    plain = json.loads(re.sub(r"(<|\\\\u003c)\|[a-z_]+\|>", "words", json.dumps(row)))

    def count(of: dict[str, Any]) -> int:
        return int(np.isin(render(dialog_of(of), tokenizer).tokens, control).sum())

    assert count(row) == count(plain)
    with pytest.raises(jinja2.TemplateError, match="control token"):
        ids(theirs, row)
    assert_equal(plain, tokenizer, theirs)


def test_content_tokens_are_spelled_in_both_and_others_in_neither(tmp_path: Path) -> None:
    """The tokens are at both ends of the content, next to the header's newlines and the message's end."""
    row = {
        "messages": [
            {"role": "user", "content": "<think> a\n</think>"},
            {"role": "assistant", "content": "</think>\n\n<think>", "tool_calls": [{"name": "f<think>"}]},
        ]
    }
    named = load_tokenizer(save_with_think(tmp_path), content_tokens=THINK)
    for directory, ours in (("named", named), ("plain", load_tokenizer(tmp_path))):
        theirs = exported(ours, tmp_path / directory)
        spelled = np.isin(render(dialog_of(row), ours).tokens, named.encode("".join(THINK))).sum()
        if ours is named:
            assert_equal(row, ours, theirs)
            assert spelled == 5
        else:
            assert spelled == 0
            with pytest.raises(jinja2.TemplateError, match=r"a text holds </?think>"):
                ids(theirs, row)


THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@pytest.fixture(scope="module", params=["plain", "named"])
def of_each_rule(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Reasoning, Any]:
    """For each data.reasoning, a tokenizer for which <think> is text or a token, and the exported one."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "plain":
        train_small_tokenizer([WORDS] * 9, 330).save(directory)
    else:
        save_with_think(directory)
    names = THINK if request.param == "named" else ()
    found: dict[Reasoning, Any] = {}
    for rule in get_args(Reasoning):
        ours = load_tokenizer(directory, content_tokens=names, reasoning=rule)
        found[rule] = ours, exported(ours, directory / rule)
    return found


@given(
    row=rows(),
    places=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    thoughts=st.lists(texts, min_size=3, max_size=3),
    key=st.sampled_from([*THOUGHTS, "part"]),
)
@settings(max_examples=100, derandomize=True)
def test_reasoning_is_what_the_configuration_makes_of_it(
    row: dict[str, Any], places: list[int], thoughts: list[str], key: str, of_each_rule: dict[Reasoning, Any]
) -> None:
    messages = [dict(message) for message in row["messages"]]
    row = row | {"messages": messages}
    speakers = [message for message in messages if message["role"] == "assistant"]
    for place, thought in zip(places, thoughts, strict=False):
        message = speakers[place % len(speakers)]
        if key == "part" and isinstance(message["content"], list):
            message["content"] = [{"type": "thinking", "thinking": thought}, *message["content"]]
        elif key != "part":
            message[key] = thought
    for rule in ("drop", "render"):
        assert_equal(row, *of_each_rule[rule], reasoning=rule)
    dropped, rendered = (dialog_of(row, reasoning=rule) for rule in ("drop", "render"))
    if dropped != rendered:
        with pytest.raises(BadRow, match=r"data.reasoning says"):
            dialog_of(row)
        with pytest.raises(jinja2.TemplateError, match=r"has reasoning, and .* data.reasoning=refuse"):
            ids(of_each_rule["refuse"][1], row)


def test_reasoning_stands_before_the_answer_and_the_call(of_each_rule: dict[Reasoning, Any]) -> None:
    ours, theirs = of_each_rule["render"]
    call = {"name": "brave_search", "arguments": {"query": "x"}}
    said = {
        "role": "assistant",
        "reasoning_content": " one\n\ntwo ",
        "content": "\nI look. ",
        "tool_calls": [call],
    }
    row = {"messages": [USER, said]}
    text = ours.decode(render(dialog_of(row, reasoning="render"), ours).tokens.tolist())
    assert text.endswith(
        "assistant<|end_header_id|>\n\n<think>\none\n\ntwo\n</think>\n\nI look."
        '<|python_tag|>brave_search.call(query="x")<|eom_id|>'
    )
    assert ids(theirs, row) == render(dialog_of(row, reasoning="render"), ours).tokens.tolist()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ANSWER | {"reasoning_content": "a", "thinking": "b"}, "contradict each other"),
        (ANSWER | {"reasoning_content": ["a"]}, "no(t)? text"),
        (USER | {"reasoning_content": "a"}, "the user message has reasoning; only the assistant's can"),
    ],
)
def test_reasoning_that_cannot_be_rendered_both_refuse(
    message: dict[str, Any], reason: str, of_each_rule: dict[Reasoning, Any]
) -> None:
    messages = [USER, message] if message["role"] == "assistant" else [message, ANSWER]
    with pytest.raises(BadRow, match=reason):
        dialog_of({"messages": messages}, reasoning="render")
    with pytest.raises(jinja2.TemplateError, match=reason):
        ids(of_each_rule["render"][1], {"messages": messages})


def test_the_template_is_part_of_the_package() -> None:
    setup = Path(__file__).resolve().parents[3] / "setup.py"
    assert "**/*.jinja" in setup.read_text()
