"""The rows that recipes make: dialogs and preferences for `data pack`, and labelled steps. Each has an id."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_post.config.data import Source
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_formats import example_of_row
from megatron_post.inference.request import messages_as_json
from megatron_post.storage.checksums import sha256_of_json

_OWN = (
    *("id", "messages", "tools", "prompt", "completions", "labels", "chosen", "rejected"),
    *("capability", "kind", "provenance"),
)
_SOURCE = Source(name="synthesis", path="rows.jsonl")


def check_texts(**values: object) -> None:
    """Check values that a recipe gives. Raises `TypeError` for a value that is not a string."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} is a text, and not {value!r:.80} of type {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class _Made:
    """The fields that all kinds of rows share.

    kind: distinguishes rows of one recipe, such as "first_try" and "correction". parents: ids of the rows
    that it was made from, without the input row. extra: more keys of the row, which `data pack` lists as
    unused. unique: only the first of the rows with the same text is kept. If it is empty, the row is kept.
    """

    kind: str = ""
    parents: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    unique: str = ""

    def as_json(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a JSON object. provenance: the origin of the row, to which its parents are added.

        Raises `BadRow` if it cannot be trained on, or if `extra` has a key that every row has. Raises
        `TypeError` for a value that must be a string and is not.
        """
        if taken := sorted(set(self.extra) & {*_OWN}):
            raise BadRow(f"extra has {', '.join(taken)}, which a row has already: choose another name")
        row: dict[str, Any] = {
            **self._content(),
            **({"kind": self.kind} if self.kind else {}),
            **self.extra,
        }
        check_texts(capability=row["capability"], kind=self.kind, unique=self.unique)
        check_texts(**{f"parents[{number}]": parent for number, parent in enumerate(self.parents)})
        self._check(row)
        _check_json(row)
        origin = {**provenance, "parents": [*provenance.get("parents", ()), *self.parents]}
        if self.unique:
            origin["unique"] = sha256_of_json(self.unique)[:32]
        return {"id": row_id(row), **row, "provenance": origin}

    def _content(self) -> dict[str, Any]:
        """The keys of this kind of row."""
        raise NotImplementedError

    def _check(self, row: dict[str, Any]) -> None:
        """Raises `BadRow`."""


@dataclass(frozen=True)
class Row(_Made):
    """A dialog to train on, which `data pack` takes as it is.

    messages: the last one is the assistant's. Only the assistant's messages after the last message of the
    user are trained, without those that have `trained=False`.
    """

    messages: Sequence[Message]
    capability: str
    tools: Sequence[dict[str, Any]] = ()

    def _content(self) -> dict[str, Any]:
        asked = [number for number, message in enumerate(self.messages) if message.role == "user"]
        first_trained = asked[-1] + 1 if asked else 0
        messages = messages_as_json(self.messages)
        for number, message in enumerate(self.messages):
            if message.role == "assistant":
                messages[number]["train"] = message.trained and number >= first_trained
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"messages": messages, **tools, "capability": self.capability}

    def _check(self, row: dict[str, Any]) -> None:
        example_of_row(row, _SOURCE, reasoning="render")


@dataclass(frozen=True)
class PreferenceRow(_Made):
    """A better and a worse response to a prompt. `data pack` takes it for the reward model and for DPO.

    A run writes such rows to a file of their own, because SFT does not train them.
    """

    prompt: Sequence[Message]
    chosen: Message
    rejected: Message
    capability: str

    def _content(self) -> dict[str, Any]:
        return {
            "prompt": messages_as_json(self.prompt),
            "chosen": messages_as_json([self.chosen]),
            "rejected": messages_as_json([self.rejected]),
            "capability": self.capability,
        }

    def _check(self, row: dict[str, Any]) -> None:
        example_of_row(row, _SOURCE, reasoning="render")


@dataclass(frozen=True)
class StepLabels(_Made):
    """A solution whose steps are labelled as right or wrong, in TRL's format for stepwise supervision.

    Such rows train a reward model of steps, with stage=step_reward.
    """

    prompt: str
    completions: Sequence[str]
    labels: Sequence[bool]
    capability: str

    def _content(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "completions": list(self.completions),
            "labels": list(self.labels),
            "capability": self.capability,
        }

    def _check(self, row: dict[str, Any]) -> None:
        if not self.completions or len(self.completions) != len(self.labels):
            raise BadRow(f"{len(self.completions)} steps have {len(self.labels)} labels")
        if not all(isinstance(label, bool) for label in self.labels):
            raise BadRow(f"labels are true or false, and not {self.labels!r:.80}")
        as_dialog = {"prompt": self.prompt, "completion": "\n\n".join(self.completions)}
        example_of_row(as_dialog, _SOURCE)  # raises if its texts cannot be trained on


def _check_json(row: Mapping[str, Any]) -> None:
    """Raises `BadRow` for values that other readers of JSON refuse, such as NaN and lone surrogates."""
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"a value of the row is not JSON: {error}") from None


@dataclass(frozen=True)
class Found:
    """What an input row hands on to the `generations` of its recipe, which make the next input rows from it.

    values: must be JSON.
    """

    values: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The values. Raises `BadRow` if they are not JSON."""
        _check_json(self.values)
        return dict(self.values)


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether a row in JSON comes from a `PreferenceRow`."""
    return "chosen" in row


def readable_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row in JSON.

    A preference gives the prompt and both responses. Labelled steps give the prompt and one message for each
    step.
    """
    if "messages" in row:
        found: list[dict[str, Any]] = row["messages"]
        return found
    if is_preference(row):
        responses = ({**message, "role": name} for name in ("chosen", "rejected") for message in row[name])
        return [*row["prompt"], *responses]
    steps = zip(row["completions"], row["labels"], strict=True)
    return [
        {"role": "user", "content": row["prompt"]},
        *({"role": f"step, {'right' if label else 'wrong'}", "content": step} for step, label in steps),
    ]


def row_id(row: Mapping[str, Any]) -> str:
    """The id of a row, which is the first 32 hexadecimal digits of a hash of its content.

    The hash leaves out `id` and `provenance`, so that a row keeps its id when it is the input of another
    recipe. Raises `BadRow` for a value that JSON cannot represent.
    """
    content = {key: value for key, value in row.items() if key not in ("id", "provenance")}
    try:
        return sha256_of_json(content)[:32]
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"a value of the row is not JSON: {error}") from None
