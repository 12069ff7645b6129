"""`StepExample`, a prompt with solutions whose steps are labelled, and how a text is split into steps."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_post.data.dialog import BadRow, Dialog, Message, Preference
from megatron_post.data.document import Document

_NUMBERED = re.compile(r"^(?:#+ *)?Step +(\d{1,4}):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Solution:
    """The steps of a solution, and a label for each of them.

    labels: True for a right step, False for a wrong one, and None for a step that is only context. Raises
    `BadRow` for a blank step, another number of labels, and a solution without any label.
    """

    steps: tuple[str, ...]
    labels: tuple[bool | None, ...]

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.labels):
            raise BadRow(f"{len(self.steps)} steps have {len(self.labels)} labels")
        for number, step in enumerate(self.steps, start=1):
            if not isinstance(step, str) or not step.strip():
                raise BadRow(f"step {number} is {step!r:.80}, and not a text")
        if all(label is None for label in self.labels):
            raise BadRow("no step has a label")


@dataclass(frozen=True, slots=True)
class StepExample:
    """Solutions of one prompt. Each of them is rendered with the prompt, as an example of its own.

    Raises `BadRow` as `Dialog` does.
    """

    prompt: tuple[Message, ...]
    solutions: tuple[Solution, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for response in self.responses:
            Dialog((*self.prompt, *response), self.tools)

    @property
    def responses(self) -> tuple[tuple[Message, ...], ...]:
        """The text of each solution as the assistant's message."""
        return tuple((Message("assistant", "\n\n".join(each.steps)),) for each in self.solutions)

    @property
    def turns(self) -> int:
        """Number of user messages."""
        return sum(message.role == "user" for message in self.prompt)


Conversation = Dialog | Preference | StepExample
Example = Conversation | Document


def steps_of(text: str) -> tuple[str, ...]:
    """The steps of a text. They begin with "Step 1:", "Step 2:" and so on at the start of a line.

    Text before the first step is a part of it. The result is empty if the numbers are not 1, 2 and so on.
    """
    found = list(_NUMBERED.finditer(text))
    if [int(match[1]) for match in found] != list(range(1, len(found) + 1)):
        return ()
    starts = [0, *(match.start() for match in found[1:]), len(text)]
    return tuple(text[a:b].strip() for a, b in pairwise(starts)) if found else ()


def split_steps(text: str, separator: str) -> tuple[str, ...]:
    """The steps of a response. They are its numbered steps, or else its parts between separators."""
    return steps_of(text) or tuple(part.strip() for part in text.split(separator) if part.strip())
