"""Refuses rows whose contents would be trained wrongly. The message names the content and the remedy."""

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
# Keys of a row that cannot be used, and what to do instead.
_TEMPLATES = dict.fromkeys(
    ("chat_template", "chat_template_kwargs"),
    "there is one chat template; write its contents as messages",
)
# Keys that may hold a part of the prompt, in a row whose form has another key for it. Many rows repeat the
# same text there.
_ASKED = (
    *("prompt", "query", "question", "instruction", "input", "context", "contexts", "passage", "documents"),
)
_REASONING = dict.fromkeys(REASONING, "put it into its message, or leave it out with data.reasoning=drop")

# Markers of the chat templates of Llama 2, 3 and 4, Mistral, ChatML, Gemma, Phi, Zephyr, DeepSeek, GPT-OSS,
# Command, Granite, InternLM, OpenChat and OpenAssistant.
MARKERS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<|python_tag|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|start|>", "<|channel|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|User|>", "<|Bot|>", "<|end_of_turn|>", "<|prompter|>"),
)
# Llama 2's <s> and </s> are HTML tags too, so they count only at the start and the end of a text.
_MARKER = re.compile("|".join(map(re.escape, MARKERS)) + r"|\A\s*<s>|</s>\s*\Z")
# Transcripts have HH-RLHF's turns, or the two headings of Alpaca's and Vicuna's prompts.
_TURN = re.compile(r"\n\n\s*(?:Human|Assistant):")
_HEADINGS = re.compile(
    r"#{2,}\s*(?:Human|User|Instruction)\s*:.*#{2,}\s*(?:Assistant|Response|GPT)\s*:", re.DOTALL
)
# Lines of both speakers. A user may ask the assistant to write such a dialog, so only prompts are searched.
_SIDES = re.compile(r"\A\s*(?:Human|HUMAN|User|USER):.*\n\s*(?:Assistant|ASSISTANT|AI|Bot):", re.DOTALL)
# A prompt may end with a cue for the answer. It counts on a line of its own, or if the text also names the
# user. A response may begin with such a cue.
_CUE = re.compile(r"(\n\s*)?\[?(?:Assistant|ASSISTANT|AI|Bot)\]?\s*:\Z|#{2,}\s*(?:Response|Assistant)\s*:?\Z")
_ASKS = re.compile(r"\b(?:Human|HUMAN|User|USER)\]?\s*:")
_ANSWERS = re.compile(r"\A\s*(?:Assistant|ASSISTANT)\s*:")


def template_mark(text: str, *, role: str) -> str | None:
    """The sign that the text of a role has been templated before, or None."""
    if role != "ipython" and messages_in(text):
        return "messages as JSON"
    # A fast path, because most texts contain none of these. Every pattern below needs one of them.
    if not any(mark in text for mark in (":", "<", "[", "##")):
        return None
    for pattern in (_MARKER, _TURN, _HEADINGS, _ANSWERS if role == "assistant" else _SIDES):
        if found := pattern.search(text):
            return found[0].strip().partition(":")[0] + (":" if ":" in found[0] else "")
    cue = _CUE.search(text.rstrip()[-40:])
    if cue and (cue[1] or cue[0].startswith("#") or _ASKS.search(text)):
        return cue[0].strip()
    return None


def refuse_templated(message: Message) -> None:
    """Raise `BadRow` if a message holds the markers of a chat template."""
    if mark := template_mark(message.text, role=message.role):
        raise BadRow(
            f"the {message.role} message holds {mark!r}: a chat template or a transcript is in the text, and "
            "would be trained as text. Give the messages apart, or set templated=keep for the source if its "
            "texts are about templates"
        )


def refuse_harmful(row: Keys, columns: Columns, *, reasoning: Reasoning) -> None:
    """Raise `BadRow` for keys that change what should be trained and cannot be followed."""
    refuse_label(row, skip=columns)
    if row_mark(row, skip=columns) is False:
        marks = [f"{key}={row.peek(key)!r}" for key in row.among(MARKS) if key not in columns]
        raise BadRow(f"the row says that it is not trained: {', '.join(marks)}")
    refuse_unusable(row, "the row", skip=columns)
    remedies = _TEMPLATES if columns.by_role or reasoning == "drop" else _TEMPLATES | _REASONING
    for name in row.among(remedies):
        if name not in columns and row.has_value(name):
            raise BadRow(
                f"the row has `{name}`, which would not be used: {remedies[name]}, or list {name} under the "
                "source's `ignore`"
            )


def refuse_unused_context(row: Keys, texts: str, *, by_role: bool) -> None:
    """Raise `BadRow` for a part of the prompt that nothing has read. Without it the prompt would be another.

    texts: all texts of the example. A part that is repeated there is not missing. by_role: whether the source
    itself names the columns of the prompt.
    """
    for name in row.among((*SYSTEM, "history", "tools", "functions")):
        if row.has_value(name) and not row.is_used(name):
            raise BadRow(
                f"the row has `{name}`, which its form does not use: name it in the source's `columns` where "
                f"they can hold it, write it into the messages, or list {name} under the source's `ignore`"
            )
    for name in () if by_role else row.among(_ASKED):
        if not row.is_used(name) and not all(text in _one_line(texts) for text in _texts_in(row.peek(name))):
            raise BadRow(
                f"the row has `{name}`, which its form does not use and whose text is not in the messages: "
                "write it into them, name it in the source's `columns` where they can hold it, or list "
                f"{name} under the source's `ignore`"
            )


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, each on one line, without the values of `role`, `from` and `type`."""
    if isinstance(value, str):
        yield _one_line(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts_in(inner) if key not in ("role", "from", "type") else ()
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts_in, value))


def _one_line(text: str) -> str:
    return " ".join(text.split())
