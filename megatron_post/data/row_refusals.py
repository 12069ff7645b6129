"""What a row may hold that would be trained wrongly: refused by name, with what to do about it."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from megatron_post.config.data import Reasoning
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_columns import Columns
from megatron_post.data.row_keys import Keys, messages_in
from megatron_post.data.row_labels import refuse_label
from megatron_post.data.row_marks import MARKS, row_mark
from megatron_post.data.row_messages import REASONING, refuse_unusable

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt")
# What cannot be used where it stands, and what to do instead.
_TEMPLATES = dict.fromkeys(
    ("chat_template", "chat_template_kwargs"),
    "there is one chat template; give what it should say as messages",
)
# Of the prompt, beside a form that has another name for it; often the same text once more.
_ASKED = (
    *("prompt", "query", "question", "instruction", "input", "context", "contexts", "passage", "documents"),
)
_REASONING = dict.fromkeys(REASONING, "put it into its message, or leave it out with data.reasoning=drop")

# Of chat templates: Llama 2, 3 and 4, Mistral, ChatML, Gemma, Phi, Zephyr, DeepSeek, GPT-OSS, Command,
# Granite, InternLM, OpenChat, OpenAssistant.
_MARKERS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<|python_tag|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|start|>", "<|channel|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|User|>", "<|Bot|>", "<|end_of_turn|>", "<|prompter|>"),
)
# Llama 2's <s> and </s> are tags of HTML as well, but not around a whole text.
_MARKER = re.compile("|".join(map(re.escape, _MARKERS)) + r"|\A\s*<s>|</s>\s*\Z")
# A transcript: HH-RLHF's turns, or the two headings of Alpaca's and Vicuna's prompts.
_TURN = re.compile(r"\n\n\s*(?:Human|Assistant):")
_HEADINGS = re.compile(
    r"#{2,}\s*(?:Human|User|Instruction)\s*:.*#{2,}\s*(?:Assistant|Response|GPT)\s*:", re.DOTALL
)
# Lines of both sides. An assistant may be asked to write such, so this is of prompts alone.
_SIDES = re.compile(r"\A\s*(?:Human|HUMAN|User|USER):.*\n\s*(?:Assistant|ASSISTANT|AI|Bot):", re.DOTALL)
# A cue at the end, in a line of its own or after who asks, and a response that begins with it.
_CUE = re.compile(r"(\n\s*)?\[?(?:Assistant|ASSISTANT|AI|Bot)\]?\s*:\Z|#{2,}\s*(?:Response|Assistant)\s*:?\Z")
_ASKS = re.compile(r"\b(?:Human|HUMAN|User|USER)\]?\s*:")
_ANSWERS = re.compile(r"\A\s*(?:Assistant|ASSISTANT)\s*:")


def template_mark(text: str, *, role: str) -> str | None:
    """What shows that the text of a role has been templated before; None where nothing does."""
    if role != "ipython" and messages_in(text):
        return "messages as JSON"
    if not any(mark in text for mark in (":", "<", "[", "##")):  # as in many texts
        return None
    for pattern in (_MARKER, _TURN, _HEADINGS, _ANSWERS if role == "assistant" else _SIDES):
        if found := pattern.search(text):
            return found[0].strip().partition(":")[0] + (":" if ":" in found[0] else "")
    cue = _CUE.search(text.rstrip()[-40:])
    if cue and (cue[1] or cue[0].startswith("#") or _ASKS.search(text)):
        return cue[0].strip()
    return None
    for pattern in (_MARKER, _TURN, _HEADINGS, *(() if role == "assistant" else (_SIDES,))):
        if found := pattern.search(text):
            return found[0].strip().partition(":")[0] + (":" if ":" in found[0] else "")
    return None


def refuse_templated(message: Message) -> None:
    """Raise `BadRow` if a message holds another template's marks."""
    if mark := template_mark(message.text, role=message.role):
        raise BadRow(
            f"the {message.role} message holds {mark!r}: a chat template or a transcript is in the text, and "
            "would be trained as text. Give the messages apart, or set templated=keep for the source if its "
            "texts are about templates"
        )


def refuse_harmful(row: Keys, columns: Columns, *, reasoning: Reasoning) -> None:
    """Raise `BadRow` for keys of a row whose neglect would train what should not be trained."""
    refuse_label(row, skip=columns)
    if row_mark(row, skip=columns) is False:
        marks = [f"{key}={row.peek(key)!r}" for key in row.among(MARKS) if key not in columns]
        raise BadRow(f"the row says that it is not trained: {', '.join(marks)}")
    refuse_unusable(row, "the row", skip=columns)
    remedies = _TEMPLATES if columns.by_role or reasoning == "drop" else _TEMPLATES | _REASONING
    for name in row.among(remedies):
        if name not in columns and row.says(name):
            raise BadRow(
                f"the row has `{name}`, which would not be used: {remedies[name]}, or list {name} under the "
                "source's `ignore`"
            )


def refuse_unused_context(row: Keys, said: str, *, by_role: bool) -> None:
    """Raise `BadRow` for a part of the prompt that nothing has read: the rest would be another prompt.

    said: all texts of the example. What stands there again is no other part. by_role: the source names the
    columns of the prompt itself.
    """
    for name in row.among((*SYSTEM, "history", "tools", "functions")):
        if row.says(name) and not row.is_used(name):
            raise BadRow(
                f"the row has `{name}`, which its form does not use: name it in the source's `columns` where "
                f"they can hold it, write it into the messages, or list {name} under the source's `ignore`"
            )
    for name in () if by_role else row.among(_ASKED):
        if not row.is_used(name) and not all(text in _one_line(said) for text in _texts_in(row.peek(name))):
            raise BadRow(
                f"the row has `{name}`, which its form does not use and whose text is not in the messages: "
                "write it into them, name it in the source's `columns` where they can hold it, or list "
                f"{name} under the source's `ignore`"
            )


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, in one line, without the names of roles and kinds."""
    if isinstance(value, str):
        yield _one_line(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts_in(inner) if key not in ("role", "from", "type") else ()
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts_in, value))


def _one_line(text: str) -> str:
    return " ".join(text.split())
