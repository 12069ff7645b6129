"""Renders dialogs in Llama 3.1's chat format, as token ids with a role for each token.

The format is the one that Meta published (llama-models, "Llama 3.1 - Prompt Formats"). Header names, the two
newlines, contents and tool calls are encoded separately, as in Meta's ChatFormat. So no token spans two of
them.

A tool's output (`ipython`) ends with <|eot_id|>, as published. If a message has both text and a call, the
text comes first, and <|python_tag|> precedes only the call. Meta's code puts the tag before both.

Contents are rendered unchanged. The Llama 3.0 reference strips them. The 3.1 reference, which made the
published examples (one has a system prompt that ends in a newline), does not. `rows` strips the texts that it
reads, so training data is the same under both references and under Hugging Face's chat templates, which trim.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np

from megatron_post.data.dialog import Dialog, Message, Preference
from megatron_post.data.document import Document
from megatron_post.data.special_tokens import (
    BOS,
    END_HEADER,
    END_OF_MESSAGE,
    END_OF_TEXT,
    END_OF_TURN,
    PYTHON_TAG,
    START_HEADER,
)
from megatron_post.data.step_example import Example, Solution
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.data.tools import call_text, with_tools


class TokenRole(IntEnum):
    """The part of the format that a token belongs to. It decides whether the token carries loss."""

    PADDING = 0
    HEADER = 1  # begin of text, and <|start_header_id|>role<|end_header_id|>\n\n of every message
    PROMPT = 2  # system, user and ipython bodies with their terminators
    BODY = 3  # the assistant's text and calls, with <|python_tag|>, or a document's text
    TERMINATOR = 4  # the assistant's <|eot_id|> or <|eom_id|>, or a document's <|end_of_text|>
    MASKED = 5  # bodies and terminators of assistant messages that the row masks, which are never trained
    RIGHT_STEP = 6  # the last token of a step that is labelled right
    WRONG_STEP = 7  # the last token of a step that is labelled wrong


STEP_ROLES = (TokenRole.RIGHT_STEP, TokenRole.WRONG_STEP)
RESPONSE_ROLES = (TokenRole.BODY, TokenRole.TERMINATOR, *STEP_ROLES)  # of a response that is not masked


@dataclass(frozen=True, slots=True)
class Rendered:
    """A segment, which is a dialog, a prompt or a response.

    tokens: int32 [n]. roles: uint8 [n], of `TokenRole`. rank: 0 for the best response of a preference, and
    -1 for a segment that is not ranked.
    """

    tokens: np.ndarray
    roles: np.ndarray
    rank: int = -1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Rendered":
        """Some of the tokens with their roles, and the same rank."""
        return Rendered(self.tokens[part], self.roles[part], self.rank)


# A run of tokens of one role. It is a text to encode, or the ids of control tokens and headers.
_Segment = tuple[str | list[int], TokenRole]


def render(dialog: Dialog, tokenizer: Tokenizer) -> Rendered:
    """Token ids and roles of a whole dialog."""
    return render_batch([dialog], tokenizer)[0]


def render_batch(dialogs: Iterable[Dialog], tokenizer: Tokenizer) -> list[Rendered]:
    """Render many dialogs. All their texts are encoded in one call, which uses all cores."""
    template = _Template(tokenizer)
    return _encode([list(template.opening(with_tools(d.messages, d.tools))) for d in dialogs], tokenizer)


def render_documents(texts: Iterable[str], tokenizer: Tokenizer) -> list[Rendered]:
    """Each text between begin-of-text and end-of-text. All texts are encoded in one call.

    Begin-of-text is the only token that is not trained. It always follows end-of-text, so there is nothing to
    learn.
    """
    begin: _Segment = ([tokenizer.special(BOS)], TokenRole.HEADER)
    end: _Segment = ([tokenizer.special(END_OF_TEXT)], TokenRole.TERMINATOR)
    return _encode([[begin, (text, TokenRole.BODY), end] for text in texts], tokenizer)


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[dict] = ()
) -> np.ndarray:
    """Token ids, int32 [n], of a conversation and the header of the assistant's answer."""
    template = _Template(tokenizer)
    segments = [*template.opening(with_tools(tuple(messages), tools)), template.header("assistant")]
    return _encode([segments], tokenizer)[0].tokens


def texts_of(example: Example) -> Iterator[str]:
    """Yield every text that is encoded for an example."""
    if isinstance(example, Document):
        yield example.text
        return
    responses = () if isinstance(example, Dialog) else example.responses
    opening = example.messages if isinstance(example, Dialog) else example.prompt
    for message in chain(with_tools(opening, example.tools), *responses):
        yield message.text
        yield from map(call_text, message.tool_calls)


def render_preferences(
    preferences: Iterable[Preference], tokenizer: Tokenizer
) -> list[tuple[Rendered, tuple[Rendered, ...]]]:
    """The rendered prompt and responses of each preference. Prompt + response is the rendering of the dialog.

    The prompt ends with the header of the response. Its assistant turns are not compared, so their BODY and
    TERMINATOR become PROMPT. All texts are encoded in one call, which uses all cores.
    """
    template = _Template(tokenizer)
    rows: list[list[_Segment]] = []
    counts = []
    for preference in preferences:
        prompt = template.opening(with_tools(preference.prompt, preference.tools))
        rows.append([(piece, _as_history(role)) for piece, role in prompt] + [template.header("assistant")])
        rows.extend(list(template.messages(response))[1:] for response in preference.responses)
        counts.append(len(preference.responses))
    rendered = iter(_encode(rows, tokenizer))
    return [(next(rendered), tuple(next(rendered) for _ in range(count))) for count in counts]


def render_solutions(
    solutions: Iterable[tuple[Sequence[Message], Solution, Sequence[dict]]],
    tokenizer: Tokenizer,
    *,
    separator: str,
) -> list[Rendered]:
    """Each prompt with the steps of a solution. The last token of a labelled step has one of `STEP_ROLES`.

    solutions: (prompt, solution, tools). separator: the text between two steps, which belongs to the step
    before it. A step is encoded separately, so no token spans two steps. All texts are encoded in one call.
    """
    template = _Template(tokenizer)
    rows: list[list[_Segment]] = []
    for messages, solution, tools in solutions:
        prompt = template.opening(with_tools(tuple(messages), tuple(tools)))
        *steps, last = solution.steps
        texts = [*(step + separator for step in steps), last]
        rows.append(
            [(piece, _as_history(role)) for piece, role in prompt]
            + [template.header("assistant")]
            + [(text, _role_of_step(label)) for text, label in zip(texts, solution.labels, strict=True)]
            + [template.end_of_turn]
        )
    return _encode(rows, tokenizer)


def _role_of_step(label: bool | None) -> TokenRole:
    return TokenRole.BODY if label is None else STEP_ROLES[not label]


def _as_history(role: TokenRole) -> TokenRole:
    return TokenRole.PROMPT if role in (TokenRole.BODY, TokenRole.TERMINATOR) else role


class _Template:
    """Splits messages into segments. It encodes the headers once, when it is made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special
        self._headers = {
            role: [
                tokenizer.special(START_HEADER),
                *tokenizer.encode(role),
                tokenizer.special(END_HEADER),
                *tokenizer.encode("\n\n"),
            ]
            for role in ("system", "user", "assistant", "ipython")
        }

    def header(self, role: str) -> _Segment:
        return self._headers[role], TokenRole.HEADER

    @property
    def end_of_turn(self) -> _Segment:
        return [self._special(END_OF_TURN)], TokenRole.TERMINATOR

    def opening(self, messages: Sequence[Message]) -> Iterator[_Segment]:
        """The segments of begin-of-text and of the messages."""
        yield [self._special(BOS)], TokenRole.HEADER
        yield from self.messages(messages)

    def messages(self, messages: Sequence[Message]) -> Iterator[_Segment]:
        for message in messages:
            body, end = _roles_of(message)
            yield self.header(message.role)
            yield message.text, body
            for call in message.tool_calls:
                yield [self._special(PYTHON_TAG)], body
                yield call_text(call), body
            terminator = self._special(END_OF_TURN if message.end_of_turn else END_OF_MESSAGE)
            yield [terminator], end


def _roles_of(message: Message) -> tuple[TokenRole, TokenRole]:
    """Roles of a message's body and of its terminator."""
    if message.role != "assistant":
        return TokenRole.PROMPT, TokenRole.PROMPT
    if not message.trained:
        return TokenRole.MASKED, TokenRole.MASKED
    return TokenRole.BODY, TokenRole.TERMINATOR


def _encode(rows: Sequence[Sequence[_Segment]], tokenizer: Tokenizer) -> list[Rendered]:
    # Equal texts, such as a system prompt, are encoded once.
    texts = list(dict.fromkeys(piece for row in rows for piece, _ in row if isinstance(piece, str)))
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    rendered = []
    for row in rows:
        tokens: list[int] = []
        roles = bytearray()
        for piece, role in row:
            ids = ids_of[piece] if isinstance(piece, str) else piece
            tokens += ids
            if role in STEP_ROLES:  # only the last token of a step carries its label
                roles += bytes((TokenRole.BODY,)) * (len(ids) - 1) + bytes((role,))
            else:
                roles += bytes((role,)) * len(ids)
        rendered.append(Rendered(np.array(tokens, dtype=np.int32), np.frombuffer(roles, dtype=np.uint8)))
    return rendered
