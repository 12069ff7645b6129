"""Tests of files of prompts, and of the messages about bad rows."""

from pathlib import Path

import pytest

from megatron_post.inference.prompts import read_prompts


def test_broken_prompts_are_named(tmp_path: Path) -> None:
    broken = [
        (b"{broken", "not JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        (b"[1]", "a row must be an object with `prompt`"),
        (b'{"question": "?"}', "a row must be an object with `prompt`"),
        (b'{"prompt": "x", "anwser": "1"}', r"unknown keys \['anwser'\]; known are "),
        (b'{"prompt": "Human: Hi\\n\\nAssistant:"}', "the user message holds 'Assistant:'"),
        (b'{"prompt": 7}', "a prompt is a text or a list of messages, not 7"),
        (b'{"prompt": "x", "answer": [1]}', "answer is list, neither text nor number"),
        (b'{"prompt": "x", "answer": true}', "answer is bool, neither text nor number"),
        (b'{"prompt": "x", "capability": 1}', "capability is int, not text"),
        (b'{"prompt": " "}', "the last message is blank"),
        (b'{"prompt": []}', "a prompt ends with a message of the user"),
        (
            b'{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "a prompt ends with a message of the user",
        ),
        (b'{"prompt": [{"role": "robot", "content": "x"}]}', "a prompt ends with a message of the user"),
        (b'{"prompt": "lone \\ud800"}', ".*lone surrogate"),
        (b'{"prompt": " fine ", "answer": "2"}', "asks what line 1 asks"),
    ]
    first = b'{"prompt": "fine"}'
    last = (
        b'{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " x "}], "answer": 7}'
    )
    path = tmp_path / "prompts.jsonl"
    for line, reason in broken:
        path.write_bytes(first + b"\n" + line)
        with pytest.raises(ValueError, match=rf"1 bad row.*\n.*prompts.jsonl:2: {reason}(.|\n)*max_bad_rows"):
            read_prompts(path)
    path.write_bytes(b"\r\n".join([first, *(line for line, _ in broken), b"", last]))
    prompts = read_prompts(path, max_bad_rows=len(broken))
    assert [(p.number, p.messages[-1].content, p.answer) for p in prompts] == [
        (1, "fine", None),
        (len(broken) + 3, "x", "7"),
    ]
    assert prompts[1].with_system({"default": "other"}) == prompts[1].messages
    with pytest.raises(ValueError, match="skip=2 leaves none of its 2 good rows"):
        read_prompts(path, max_bad_rows=len(broken), skip=2)


def test_a_prompt_of_another_capability_is_another_prompt(tmp_path: Path) -> None:
    """Another capability may have another system prompt."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "capability": "a"}\n{"prompt": "x", "capability": "b"}\n')
    first, second = read_prompts(path)
    system = {"a": "Count.", "default": "Be brief."}
    assert [p.with_system(system)[0].content for p in (first, second)] == ["Count.", "Be brief."]
    assert first.with_system({"b": "Other."}) == first.messages


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_without_a_prompt(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="no prompt in it; a line is"):
        read_prompts(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none")
