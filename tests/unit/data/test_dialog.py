import pytest

from megatron_post.data.dialog import MAX_CHARACTERS, BadRow, Dialog, Message, Preference, ToolCall

SYSTEM = Message("system", "Be brief.")
USER = Message("user", "1 + 1?")
ASSISTANT = Message("assistant", "2")
CALL = Message("assistant", "", (ToolCall("wolfram_alpha", {"query": "1 + 1"}),), end_of_turn=False)
OUTPUT = Message("ipython", "2")


@pytest.mark.parametrize(
    "messages",
    [
        (USER, ASSISTANT),
        (SYSTEM, USER, ASSISTANT, USER, ASSISTANT),
        (USER, CALL, OUTPUT, ASSISTANT),
        (USER, CALL),
        (USER, Message("assistant", "Let me see.", end_of_turn=False), CALL, OUTPUT, OUTPUT, ASSISTANT),
    ],
)
def test_sensible_orders_of_roles_are_accepted(messages):
    assert Dialog(messages).messages == messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((), "no assistant message"),
        ((USER,), "no assistant message"),
        ((ASSISTANT,), "message 1 is from assistant; first comes system or user"),
        ((USER, SYSTEM, ASSISTANT), "message 2 is from system; after user comes assistant"),
        ((USER, USER, ASSISTANT), "message 2 is from user; after user comes assistant"),
        ((SYSTEM, ASSISTANT), "message 2 is from assistant; after system comes user"),
        ((USER, OUTPUT, ASSISTANT), "message 2 is from ipython"),
        ((USER, ASSISTANT, ASSISTANT), "message 3 is from assistant, whose turn had ended with message 2"),
        ((USER, CALL, USER, ASSISTANT), "message 3 is from user, but message 2 says that its turn continues"),
        ((USER, CALL, OUTPUT, USER, ASSISTANT), "message 4 is from user; after ipython"),
        ((USER, ASSISTANT, USER), "the last message is from user"),
        ((USER, Message("assistant", " \n")), "empty response: assistant message 2"),
        ((Message("user", "x" * (MAX_CHARACTERS + 1)), ASSISTANT), "huge: 4000002 characters"),
    ],
)
def test_wrong_dialogs_are_refused_with_the_reason(messages, reason):
    with pytest.raises(BadRow, match=reason):
        Dialog(messages)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Message("robot", "x"), "role 'robot' is unknown"),
        (lambda: Message("user", None), "content of the user message is NoneType, not text"),
        (lambda: Message("user", "ab\ud800"), "lone surrogate at character 2"),
        (lambda: Message("user", "x", end_of_turn=False), "a user message cannot continue a turn"),
        (lambda: Message("user", "x", CALL.tool_calls), "a user message calls a tool"),
        (lambda: Message("assistant", "", CALL.tool_calls * 2), "2 tool calls in one message"),
        (
            lambda: Message("assistant", "", (ToolCall("brave_search", {"q": 1}),)),
            "takes one text argument, 'query'",
        ),
        (
            lambda: Message("assistant", "", (ToolCall("brave_search", {"query": "x", "count": 5}),)),
            "takes one text argument, 'query'",
        ),
        (lambda: Message("assistant", "", (ToolCall("f", "[1]"),)), "not a JSON object"),
        (lambda: Message("assistant", "", (ToolCall("f", "{"),)), "are not JSON"),
        (lambda: Message("assistant", "", (ToolCall("f", {"a": "\ud800"}),)), "cannot be written as JSON"),
        (lambda: Message("assistant", "", (ToolCall("\ud800", {}),)), "cannot be written as JSON"),
        (lambda: Dialog((USER, ASSISTANT), ({"type": "teapot"},)), "neither built in"),
        (lambda: Dialog((USER, ASSISTANT), ({"function": {"name": "\ud800"}},)), "cannot be written as JSON"),
        (
            lambda: Dialog(
                (USER, ASSISTANT), ({"function": {"name": "f", "parameters": {"properties": [1]}}},)
            ),
            "parameters of function 'f' are not a JSON schema",
        ),
    ],
)
def test_wrong_messages_and_tools_are_refused_with_the_reason(make, reason):
    with pytest.raises(BadRow, match=reason):
        make()


def test_arguments_of_a_call_are_read_in_all_three_forms():
    assert ToolCall("f", {"a": 1}).parameters == {"a": 1}
    assert ToolCall("f", '{"a": 1}').parameters == {"a": 1}
    assert ToolCall("code_interpreter", "print(1)").parameters == {"code": "print(1)"}


@pytest.mark.parametrize(
    ("prompt", "responses", "rating", "reason"),
    [
        ((), ((ASSISTANT,), (CALL,)), None, "must end with a user or ipython"),
        ((USER, ASSISTANT), ((ASSISTANT,), (CALL,)), None, "must end with a user or ipython"),
        ((USER,), ((ASSISTANT,),), None, "ranks 2 or 3 responses, not 1"),
        ((USER,), ((ASSISTANT,), (ASSISTANT,)), None, "two responses of a preference are equal"),
        ((USER,), ((ASSISTANT,), ()), None, "must end with an assistant"),
        ((USER,), ((ASSISTANT,), (Message("assistant", "3"), USER, ASSISTANT)), None, "holds a user message"),
        ((USER,), ((ASSISTANT,), (Message("assistant", ""),)), None, "empty response"),
        ((USER,), ((ASSISTANT,), (CALL,)), "great", "rating 'great' is unknown"),
    ],
)
def test_wrong_preferences_are_refused_with_the_reason(prompt, responses, rating, reason):
    with pytest.raises(BadRow, match=reason):
        Preference(prompt, responses, rating)


def test_a_response_may_hold_several_messages_of_one_turn():
    preference = Preference((USER,), ((CALL, OUTPUT, ASSISTANT), (ASSISTANT,)), "better")
    assert [len(response) for response in preference.responses] == [3, 1]
