"""Rows of every form are read, harmful keys are refused by name, and unused keys are counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog, Message, Preference, ToolCall
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, TooManyBadRows, read_rows

USER, BLUE = Message("user", "Sky?"), Message("assistant", "Blue.")
SKY = Dialog((USER, BLUE))
TURNS = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
SAID = [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]
HI = (Message("user", "Hi"), Message("assistant", "Hello", trained=False))
CALL = {"name": "w", "arguments": '{"c": "SF", "d": null}'}
FUNCTION = {"name": "w", "parameters": {"type": "object", "properties": {"c": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
FRENCH = Message("system", "Speak French.")


def read(
    directory: Path, *rows: Any, reasoning: Any = "refuse", **fields: Any
) -> tuple[list[Dialog | Preference], list[str]]:
    """The examples of the rows, and the summary lines about unused keys."""
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = KeyCounts()
    source = Source(name="s", path=str(path), **fields)
    found = read_rows(source, bad_rows=BadRows(), reasoning=reasoning, counts=counts)
    return [example for _, example in found], counts.summary()


def reason(directory: Path, row: Any, **fields: Any) -> str:
    with pytest.raises(TooManyBadRows) as refused:
        read(directory, row, **fields)
    return str(refused.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": TURNS},
        {"conversations": SAID},
        {"messages": SAID},
        {"messages": json.dumps(TURNS)},
        {"conversations": json.dumps(SAID)},
        {"dialog": SAID},
        {"messages": TURNS, "conversations": SAID},
        {"messages": TURNS, "prompt": "Sky?", "completion": "Blue."},
        {"prompt": "Sky?", "completion": TURNS[1]},
        {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(SAID[1:])},
        {"query": json.dumps(SAID[:1]), "response": "Blue."},
        {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "completion": " Blue."},
        {"query": "Sky?", "response": "Blue."},
        {"query": "Sky?", "response": "Blue.", "history": [], "system": ""},
        {"query": "Sky?", "response": "Blue.", "history": None, "system": None},
        {"instruction": "Sky?", "input": "", "output": "Blue."},
        {"instruction": "Sky?", "input": None, "output": "Blue.", "history": "[]"},
        {"instruction": "Sky?", "output": "Blue."},
        {"messages": TURNS, "tools": "", "functions": None, "label": None, "weight": 1, "images": []},
        {"messages": [TURNS[0], TURNS[1] | {"tool_calls": None, "function_call": None, "refusal": None}]},
        {
            "messages": [
                TURNS[0] | {"weight": 0, "from": "human"},
                TURNS[1] | {"thinking": "", "value": "Blue."},
            ]
        },
    ],
)
def test_one_dialog_in_every_form(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == ([SKY], [])


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Sky?", "response": "Blue.", "history": [["Hi", "Hello"]]},
        {"prompt": "Sky?", "completion": "Blue.", "history": json.dumps([["Hi", "Hello"]])},
        {
            "instruction": "Sky?",
            "output": "Blue.",
            "history": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:", "completion": "Blue."},
    ],
)
def test_earlier_turns_are_context(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == ([Dialog((*HI, USER, BLUE))], [])


def test_instruction_and_input_are_joined(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}, {"instruction": "Add.", "output": "2"}]
    examples, said = read(tmp_path, *rows)
    assert [e.messages[0].content for e in examples if isinstance(e, Dialog)] == ["Add.\n\n1 + 1", "Add."]
    assert said == []


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": ""}])
def test_joined_columns_may_be_absent_or_null(tmp_path: Path, extra: dict[str, Any]) -> None:
    columns = {"user": "instruction+input", "assistant": "output", "system": "about"}
    examples, said = read(tmp_path, {"instruction": "Sky?", "output": "Blue."} | extra, columns=columns)
    assert examples == [SKY]
    absent = ["about"] if extra.get("input") == "" else ["about", "input"]
    assert said == [f"columns that no row has: {', '.join(absent)}"]
    assert "no column 'instruction+input'" in reason(tmp_path, {"output": "Blue."}, columns=columns)
    assert "no column 'output'" in reason(tmp_path, {"instruction": "Sky?"}, columns=columns)


def test_columns_may_name_messages_system_tools_and_history(tmp_path: Path) -> None:
    row = {"turns": SAID, "other": SAID, "about": "Speak French.", "can": [TOOL]}
    columns = {"messages": "turns", "system": "about", "tools": "can"}
    expected = Dialog((FRENCH, USER, BLUE), (TOOL,))
    assert read(tmp_path, row, columns=columns) == ([expected], ["keys not used: other (1 row)"])
    row = {"q": "Sky?", "a": "Blue.", "h": [["Hi", "Hello"]]}
    columns = {"user": "q", "assistant": "a", "history": "h"}
    assert read(tmp_path, row, columns=columns) == ([Dialog((*HI, USER, BLUE))], [])


@pytest.mark.parametrize("system", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"prompt": "Sky?", "completion": "Blue."}, {"query": "Sky?", "response": "Blue."}],
)
def test_a_system_prompt_beside_the_messages_is_used(
    tmp_path: Path, system: str, row: dict[str, Any]
) -> None:
    assert read(tmp_path, {system: "Speak French."} | row) == ([Dialog((FRENCH, USER, BLUE))], [])


def test_a_system_prompt_beside_a_preference_is_used(tmp_path: Path) -> None:
    prompt = (FRENCH, USER)
    ranked = Preference(prompt, ((Message("assistant", "Bleu."),), (BLUE,)))
    turns = [{"role": m.role, "content": m.content} for m in prompt]
    whole = [[turns[1], {"role": "assistant", "content": text}] for text in ("Bleu.", "Blue.")]
    for row in (
        {"system": "Speak French.", "prompt": "Sky?", "chosen": "Bleu.", "rejected": "Blue."},
        {"prompt": turns, "chosen": whole[0], "rejected": whole[1]},
        {"prompt": "Sky?", "chosen": [turns[0], *whole[0]], "rejected": [turns[0], *whole[1]]},
        {"system": "Speak French.", "chosen": whole[0], "rejected": whole[1]},
        {"prompt": turns, "chosen": whole[0][1], "rejected": whole[1][1]},
        {"conversations": turns, "chosen": whole[0][1], "rejected": whole[1][1]},
    ):
        assert read(tmp_path, row) == ([ranked], [])


def test_messages_beside_whole_responses_are_counted(tmp_path: Path) -> None:
    rejected = [TURNS[0], TURNS[1] | {"content": "Red."}]
    examples, said = read(tmp_path, {"chosen": TURNS, "rejected": rejected, "messages": TURNS})
    assert examples == [Preference((USER,), ((BLUE,), (Message("assistant", "Red."),)))]
    assert said == ["keys not used: messages (1 row)"]


def test_a_transcript_in_a_prompt_becomes_turns(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"}
    row |= {"chosen": " Blue.", "rejected": " Green.", "response": " Blue."}
    ((example,), said) = read(tmp_path, row)
    assert isinstance(example, Preference)
    assert [message.content for message in example.prompt] == ["Hi", "Hello", "Sky?"]
    assert said == ["keys not used: response (1 row)"]


def test_calls_in_the_older_form_and_in_sharegpts(tmp_path: Path) -> None:
    asked, found = {"role": "user", "content": "SF?"}, ToolCall("w", {"c": "SF", "d": None})
    result, answer = {"role": "function", "content": "21"}, {"role": "assistant", "content": "21."}
    expected = (
        Message("user", "SF?"),
        Message("assistant", "", (found,), end_of_turn=False),
        Message("ipython", "21"),
        Message("assistant", "21."),
    )
    for call in (
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL]), "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL | {"arguments": json.loads(CALL["arguments"])})},
        {"role": "tool_call", "content": json.dumps(CALL)},
    ):
        for tools in ({"functions": [FUNCTION]}, {"tools": [TOOL]}, {"tools": json.dumps([FUNCTION])}):
            row = {"messages": [asked, call, result, answer], **tools}
            assert read(tmp_path, row) == ([Dialog(expected, (TOOL,))], []), row


def test_a_text_before_an_older_call_stays(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "Let me look.", "function_call": CALL}
    result = {"role": "function", "name": "w", "content": "21"}
    row = {"messages": [TURNS[0], call, result, TURNS[1]], "functions": [FUNCTION]}
    ((dialog,), said) = read(tmp_path, row)
    assert isinstance(dialog, Dialog)
    found = (ToolCall("w", {"c": "SF", "d": None}),)
    assert dialog.messages[1] == Message("assistant", "Let me look.", found, end_of_turn=False)
    assert said == ["keys not used: messages.name (1 row)"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Sky?", "completion": "Green.", "label": False}, "label=False says that"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "kto_tag": "false"}, "kto_tag='false' says"),
        ({"messages": TURNS, "label": 0}, "label=0 says"),
        ({"messages": TURNS, "label": "Negative"}, "label='Negative' says"),
        ({"messages": TURNS, "label": [True, False]}, "label=[True, False] says"),
        ({"messages": TURNS, "isAccepted": "x", "is-correct": "0.0"}, "is-correct='0.0' says"),
        ({"messages": TURNS, "is_rejected": True}, "is_rejected=True says"),
        ({"messages": [TURNS[0], TURNS[1] | {"label": False}]}, "label=False of message 2 says"),
        ({"messages": TURNS, "use_for_training": False}, "the row has use_for_training=False, which seems"),
        ({"messages": TURNS, "train_on_turn": [0]}, "the row has train_on_turn=[0], which seems to say what"),
        ({"messages": [TURNS[0], TURNS[1] | {"no_loss": True}]}, "message 2 has no_loss=True, which seems"),
        ({"messages": [TURNS[0], TURNS[1] | {"isTrained": 0}]}, "message 2 has isTrained=0, which seems"),
        ({"messages": [TURNS[0], TURNS[1] | {"chain_of_thought": "Hm."}]}, "`chain_of_thought`, which seems"),
        ({"messages": [TURNS[0], TURNS[1] | {"reasoning_details": [{"text": "Hm."}]}]}, "to hold reasoning"),
        ({"messages": TURNS, "prompt": "Sea?"}, "`prompt`, which its form does not use and whose text"),
        ({"prompt": "Sky?", "completion": "Blue.", "input": "By night."}, "`input`, which its form does not"),
        ({"messages": TURNS, "documents": [{"title": "", "text": "It is grey."}]}, "`documents`, which its"),
        ({"messages": TURNS, "train": False}, "the row says that it is not trained: train=False"),
        ({"messages": TURNS, "weight": 0.5}, "the row has weight=0.5; it must be true"),
        ({"messages": TURNS, "chat_template_kwargs": {"system_message": "Hm."}}, "`chat_template_kwargs`"),
        ({"messages": TURNS, "images": ["a.png"]}, "the row has `images`; only text"),
        ({"prompt": "Sky?", "completion": "Blue.", "reasoning_content": "Hm."}, "has `reasoning_content`"),
        ({"system": "a", "system_prompt": "b", "messages": TURNS}, "`system` and `system_prompt` contradict"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]},
            "system prompt 'a' differs from the one in its messages",
        ),
        ({"messages": TURNS, "conversations": [SAID[0], SAID[1] | {"value": "Red."}]}, "hold different"),
        ({"messages": TURNS, "prompt": "Sky?", "completion": "Red."}, "hold different conversations"),
        ({"a": TURNS, "b": TURNS}, r"\['a', 'b'\] all hold messages; choose with columns={messages: a}"),
        ({"text": "### Human: Sky?### Assistant: Blue."}, "must be split into messages first"),
        ({"messages": "Sky?"}, "messages are not JSON"),
        ({"messages": [TURNS[0], TURNS[1] | {"from": "human"}]}, "of message 2 contradict each other"),
        ({"messages": [TURNS[0] | {"value": "See?"}, TURNS[1]]}, "`content` and `value` contradict"),
        ({"messages": [{"role": "user", "text": "Sky?"}, TURNS[1]]}, "message 1 from user has no content"),
        ({"messages": [TURNS[0], TURNS[1] | {"refusal": "No."}]}, "message 2 has `refusal`"),
        ({"messages": [TURNS[0], TURNS[1] | {"audio": {"id": "1"}}]}, "message 2 has `audio`"),
        ({"messages": [TURNS[0], TURNS[1] | {"train_detail": [{"end": 3}]}]}, "message 2 has `train_detail`"),
        ({"messages": [TURNS[0], TURNS[1] | {"loss_scale": 2}]}, "message 2 has loss_scale=2; it must be"),
        ({"instruction": "Sky?", "chosen": "Blue.", "rejected": "Red."}, "no `prompt` column; name it"),
        ({"messages": [TURNS[0], TURNS[1] | {"thinking": "Hm."}]}, "message 2 has `thinking`; data"),
        (
            {"messages": [TURNS[0], TURNS[1] | {"content": [{"type": "thinking", "thinking": "Hm."}]}]},
            "message 2 has `thinking`",
        ),
        (
            {"messages": [TURNS[0], TURNS[1] | {"tool_calls": [CALL], "function_call": {"name": "v"}}]},
            "`tool_calls` and `function_call` contradict",
        ),
        ({"messages": [TURNS[0], {"from": "function_call", "value": "w(SF)"}]}, "tool calls are not JSON"),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [CALL, CALL]}]}, "2 tool calls in one message"),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [CALL | {"type": "custom"}]}]}, "type 'custom'"),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [{"name": "w", "arguments": 0}]}]}, "not JSON"),
        ({"messages": TURNS, "tools": [TOOL], "functions": [{"name": "v"}]}, "tools and functions contr"),
        ({"query": "Sky?", "response": "Blue.", "history": [["Hi"]]}, "pairs of question and answer"),
        ({"prompt": TURNS, "completion": "Yes."}, "the prompt ends with the assistant"),
        (
            {"prompt": "See?", "chosen": TURNS, "rejected": [TURNS[0], TURNS[1] | {"content": "Red."}]},
            "`prompt` and the beginning of `chosen` and `rejected` contradict",
        ),
        (
            {"prompt": "Sky?", "chosen": [TURNS[1] | {"weight": 0}], "rejected": "Red."},
            "message 1 is marked as not trained; a preference compares",
        ),
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "", "chosen_score": 5}, "empty response"),
        ({"prompt": TURNS, "chosen": TURNS[1:], "rejected": "Red."}, "must end with a user or ipython"),
        ({"chosen": TURNS * 2, "rejected": [TURNS[0], SAID[1] | {"value": "Hm."}, *TURNS]}, "differ before"),
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": ["Red.", "Green."]}, "message 1 must be"),
    ],
)  # fmt: skip
def test_what_would_be_trained_wrongly_is_refused_by_name(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    found = reason(tmp_path, row)
    assert "rows.jsonl:1: " in found
    assert said.replace("\\", "") in found


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        (
            {"messages": TURNS},
            {"prompt": "Sky?", "question": " Sky?\n", "instruction": TURNS[:1], "input": ""},
        ),
        (
            {"prompt": "See. Sky?", "completion": "Blue."},
            {"question": "Sky?", "documents": [], "context": None},
        ),
        (
            {"messages": TURNS},
            {"label": "physics", "score": 0, "finish_reason": "stop", "loss_of_words": "x"},
        ),
    ],
)
def test_what_says_nothing_more_is_no_contradiction(
    tmp_path: Path, row: dict[str, Any], extra: dict[str, Any]
) -> None:
    plain, _ = read(tmp_path, row)
    assert read(tmp_path, row | extra)[0] == plain


def test_a_preference_may_be_messages_as_json_text(tmp_path: Path) -> None:
    texts = {"chosen": json.dumps(TURNS), "rejected": json.dumps([TURNS[0], TURNS[1] | {"content": "Red."}])}
    for prompt in ({}, {"prompt": "Sky?"}, {"prompt": json.dumps(TURNS[:1])}):
        ((example,), _) = read(tmp_path, texts | prompt)
        assert isinstance(example, Preference) and example.prompt == (USER,)
        assert [[m.content for m in response] for response in example.responses] == [["Blue."], ["Red."]]
    columns = {"user": "q", "assistant": "a"}
    row = {"q": json.dumps(TURNS[:1]), "a": "Blue."}
    assert "the user message holds 'messages as JSON'" in reason(tmp_path, row, columns=columns)
    assert len(read(tmp_path, row, columns=columns, templated="keep")[0]) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"chosen": TURNS, "rejected": [TURNS[0], TURNS[1] | {"content": "Red."}]},
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.", "rejected": "\n\nHuman: Sky?\n\nAssistant: Red."},
    ],
)
def test_history_beside_a_whole_conversation_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "`history`, which its form does not use" in reason(tmp_path, row | {"history": [["Hi", "Hello"]]})


def test_history_comes_before_the_prompt_of_a_preference(tmp_path: Path) -> None:
    row = {"history": [["Hi", "Hello"]], "prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    ((example,), said) = read(tmp_path, row)
    assert isinstance(example, Preference) and said == []
    assert [message.content for message in example.prompt] == ["Hi", "Hello", "Sky?"]


@pytest.mark.parametrize("key", ["system", "history", "tools", "label"])
def test_columns_leave_out_nothing_that_matters(tmp_path: Path, key: str) -> None:
    value = False if key == "label" else "Speak French."
    row, columns = {"q": "Sky?", "a": "Blue.", key: value}, {"user": "q", "assistant": "a"}
    assert key in reason(tmp_path, row, columns=columns)
    assert read(tmp_path, row, columns=columns, ignore=[key]) == ([SKY], [])


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nSky?<|eot_id|>",
        "<s>[INST] Sky? [/INST]",
        "<s>Sky?",
        "Blue.</s>",
        "Blue.<|end_of_text|>",
        "<|im_start|>user\nSky?<|im_end|>",
        "<start_of_turn>user\nSky?<end_of_turn>",
        "Human: Sky?\n\nAssistant:",
        "Answer.\nUser: Sky?\nAI:",
        "Sky?\nAssistant:",
        "Be kind.\n\nHuman: Sky?\n\nAssistant: Blue.",
        "### Human: Sky?### Assistant:",
        "Below is an instruction.\n\n### Instruction:\nSky?\n\n### Response:",
        "Sky?\n\n### Response:",
        "A curious user and an assistant. USER: Sky? ASSISTANT:",
        "[Human]: Sky?\n[Assistant]:",
        "GPT4 Correct User: Sky?<|end_of_turn|>GPT4 Correct Assistant:",
        "[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT]Sky?",
        "<|start_of_role|>user<|end_of_role|>Sky?",
    ],
)
def test_templated_texts_are_refused_unless_the_source_keeps_them(tmp_path: Path, text: str) -> None:
    for row in (
        {"prompt": text, "completion": "Blue."},
        {"messages": [TURNS[0], {"role": "assistant", "content": text}]},
        {"prompt": "Sky?", "chosen": text, "rejected": "Red."},
    ):
        assert "a chat template or a transcript is in the text" in reason(tmp_path, row)
        ((example,), _) = read(tmp_path, row, templated="keep")
        assert text.strip() in repr(example).encode().decode("unicode_escape")


def test_a_prompt_of_lines_of_both_sides_is_refused_and_a_response_is_not(tmp_path: Path) -> None:
    text = "Human: Sky?\nAssistant: Blue.\nHuman: Sea?"
    assert "holds 'Human:'" in reason(tmp_path, {"prompt": text, "completion": "Blue."})
    assert read(tmp_path, {"prompt": "Write a chat.", "completion": text})[1] == []


def test_a_transcript_in_which_the_assistant_speaks_twice_is_refused(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nAssistant:"
    assert "whose turn had ended with message 2" in reason(
        tmp_path, {"chosen": start + " a", "rejected": start + " b"}
    )


def test_a_response_that_begins_as_a_transcripts_is_refused_and_a_prompt_is_not(tmp_path: Path) -> None:
    text = "Assistant: Blue."
    assert "holds 'Assistant:'" in reason(tmp_path, {"prompt": "Sky?", "completion": text})
    assert read(tmp_path, {"prompt": text, "completion": "Hm?"})[1] == []


@pytest.mark.parametrize(
    "text",
    [
        "#### 4 <<2+2=4>>\n<s>old</s> f <| x |> g; our\nAssistant: Ann\n### Response: none",
        "Mend this job offer for an Assistant:",
        "What does this mean?\n\nUser: none; AI: off",
        "Which of the two is the response:",
    ],
)
def test_texts_that_only_look_like_templates_are_read(tmp_path: Path, text: str) -> None:
    assert len(read(tmp_path, {"prompt": text, "completion": text})[0]) == 1


def test_reasoning_is_left_out_where_the_configuration_says_so(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Blue."}]
    for message in (TURNS[1] | {"reasoning_content": "Hm."}, TURNS[1] | {"content": parts}):
        examples, said = read(tmp_path, {"messages": [TURNS[0], message]}, reasoning="drop")
        assert examples == [SKY]
        assert len(said) == 1 and said[0].startswith("keys not used: messages.")
    row = {"messages": [TURNS[0], {"role": "assistant", "reasoning_content": "Hm."}]}
    assert "empty response" in reason(tmp_path, row, reasoning="drop")


def test_every_other_key_is_counted_once_a_row(tmp_path: Path) -> None:
    tool = {"type": "function", "function": FUNCTION | {"strict": True}}
    call = {"id": "1", "type": "function", "function": CALL}
    messages = [
        TURNS[0] | {"name": "Ann"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "21", "tool_call_id": "1"},
        TURNS[1] | {"annotations": [], "audio": None},
    ]
    rows = [{"messages": messages, "tools": [tool], "id": n, "source": "x"} for n in range(2)]
    rows += [{"messages": [turn | {"name": "Bob"} for turn in TURNS], "id": 3, "source": None}]
    _, (said,) = read(tmp_path, *rows)
    assert set(said.removeprefix("keys not used: ").split(", ")) == {
        "id (3 rows)", "messages.name (3 rows)", "source (2 rows)", "messages.tool_calls.id (2 rows)",
        "messages.tool_call_id (2 rows)", "messages.annotations (2 rows)", "tools.function.strict (2 rows)",
    }  # fmt: skip
    assert read(tmp_path, rows[2], ignore=["id", "name"])[1] == []


def test_a_list_of_keys_has_an_end(tmp_path: Path) -> None:
    """Rows of generated names would fill the terminal."""
    rows = [{"messages": TURNS, "id": 1, f"{i}-{'x' * 999}": 1} for i in range(80)]
    _, (said,) = read(tmp_path, *rows)
    assert said.startswith("keys not used: id (80 rows), 0-xxx") and said.endswith(
        "xxx (1 row), and 31 others"
    )
    assert len(said) < 50 * 100


def test_the_examples_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/rows.md").read_text()
    rows = [json.loads(line) for line in text.split("```json\n")[1].split("```")[0].splitlines()]
    examples, said = read(tmp_path, *rows)
    assert len(examples) == len(rows) == 10 and said == []
    assert {type(example) for example in examples[:7]} == {Dialog}
    assert {type(example) for example in examples[7:]} == {Preference}
