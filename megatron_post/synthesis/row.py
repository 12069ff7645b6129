"""What a recipe makes: a row that `data pack` takes as it is, with an id and where it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_post.config.data import Source
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_formats import example_of_row
from megatron_post.inference.request import messages_as_json
from megatron_post.storage.checksums import sha256_of_json

_OWN = ("id", "messages", "tools", "capability", "kind", "provenance")
_SOURCE = Source(name="synthesis", path="rows.jsonl")


@dataclass(frozen=True)
class Row:
    """A dialog to train on.

    messages: end with the assistant. What the assistant says after the last message of the user is trained,
    and nothing before it. A message with `trained=False` is not trained there either.
    kind: tells rows of one recipe apart, such as "first_try" and "correction". parents: ids of other rows
    that it was made from, beside the input row. extra: more keys of the row, which `data pack` lists as not
    used.
    """

    messages: Sequence[Message]
    capability: str
    kind: str = ""
    tools: Sequence[dict[str, Any]] = ()
    parents: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a line of JSON has it. provenance: where it comes from, beside its parents.

        Raises `BadRow` if `data pack` would refuse it, or if `extra` has a key that a row has already.
        """
        if taken := sorted(set(self.extra) & {*_OWN}):
            raise BadRow(f"extra has {', '.join(taken)}, which a row has already: choose another name")
        asked = [number for number, message in enumerate(self.messages) if message.role == "user"]
        first_trained = asked[-1] + 1 if asked else 0
        messages = messages_as_json(self.messages)
        for number, message in enumerate(self.messages):
            if message.role == "assistant":
                messages[number]["train"] = message.trained and number >= first_trained
        row: dict[str, Any] = {
            "messages": messages,
            **({"tools": list(self.tools)} if self.tools else {}),
            "capability": self.capability,
            **({"kind": self.kind} if self.kind else {}),
            **self.extra,
        }
        example_of_row(row, _SOURCE, reasoning="render")
        parents = [*provenance.get("parents", ()), *self.parents]
        return {"id": row_id(row), **row, "provenance": {**provenance, "parents": parents}}


def row_id(row: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that follow from the content of a row. Its `id` and `provenance` do not count, so
    that a row keeps its id when it is the input of another recipe.

    Raises `BadRow` for a value that JSON does not have.
    """
    content = {key: value for key, value in row.items() if key not in ("id", "provenance")}
    try:
        return sha256_of_json(content)[:32]
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"a value of the row is not JSON: {error}") from None
