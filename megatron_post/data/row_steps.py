"""Turns rows of labelled steps into `StepExample`. The forms are TRL's and PRM800K's."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_post.config.data import Neutral
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_columns import Columns
from megatron_post.data.row_keys import Keys, as_list, text_of
from megatron_post.data.row_messages import MarkedMessages
from megatron_post.data.row_preferences import turns_of
from megatron_post.data.row_tools import tools_of
from megatron_post.data.step_example import Solution, StepExample

_RATINGS = (-1, 0, 1)


def is_prm800k(row: Keys) -> bool:
    """Whether a row has PRM800K's form."""
    label = row.peek("label")
    return "question" in row and isinstance(label, Mapping) and "steps" in label


def from_steps(row: Keys, read: Callable[[Any, str], MarkedMessages], *, neutral: Neutral) -> StepExample:
    """The example of a row in TRL's or PRM800K's form. neutral: what PRM800K's rating 0 says.

    Raises `BadRow`.
    """
    if is_prm800k(row):
        return _from_prm800k(row, neutral)
    prompt = read(turns_of(row.require("prompt"), "user"), "prompt")
    if any(prompt.marks):
        raise BadRow("a message of the prompt is marked as trained; only the steps are trained")
    solution = _solution(row.require("completions"), row.require("labels"), "completions", "labels")
    return StepExample(prompt.messages, (solution,), tools_of(row))


def from_step_columns(row: Keys, columns: Columns, names: Mapping[str, str]) -> StepExample:
    """The example of a row whose columns the source names. Raises `BadRow`."""
    found = {role: columns.value(role, row) for role in ("steps", "labels")}
    solution = _solution(found["steps"], found["labels"], names["steps"], names["labels"])
    return StepExample((Message("user", columns.text("user", row)),), (solution,))


def _solution(steps: Any, labels: Any, steps_name: str, labels_name: str) -> Solution:
    """A solution of a list of steps and a list of labels, which are true, false, 1, 0 or null."""
    for name, value in ((steps_name, steps), (labels_name, labels)):
        if not isinstance(value, list):
            raise BadRow(f"`{name}` must be a list with an entry for each step, not {value!r:.80}")
    texts = [text_of(step, f"{steps_name}.{number}").strip() for number, step in enumerate(steps)]
    for number, label in enumerate(labels):
        if label is not None and not (isinstance(label, bool | int | float) and label in (0, 1)):
            raise BadRow(
                f"`{labels_name}.{number}` is {label!r:.80}; the label of a step is true or 1, false or 0, "
                "or null for a step that is only context"
            )
    return Solution(tuple(texts), tuple(None if label is None else bool(label) for label in labels))


def _from_prm800k(row: Keys, neutral: Neutral) -> StepExample:
    """The solution that the labeler followed, and one solution for each other completion that was rated.

    The steps before such a completion are only context there, so every rating counts once.
    """
    question = row.nested(_mapping(row.get("question"), "question"), "question.")
    label = row.nested(_mapping(row.get("label"), "label"), "label.")
    problem = text_of(question.require("problem"), "question.problem").strip()
    finish = label.get("finish_reason")
    if finish == "bad_problem":
        raise BadRow(
            "label.finish_reason=bad_problem says that the problem cannot be solved as it is written"
        )
    steps: list[str] = []
    labels: list[bool | None] = []
    others: list[tuple[int, str, bool]] = []  # the number of steps before it, its text and its label
    entries = as_list(label.require("steps"))
    if not isinstance(entries, list):
        raise BadRow(f"label.steps must be a list, not {entries!r:.80}")
    for number, entry in enumerate(entries):
        place = f"label.steps.{number}"
        followed = _read_step(_mapping(entry, place), place, len(steps), others, neutral)
        if followed is None:
            if number + 1 < len(entries) and any(map(_has_text, entries[number + 1 :])):
                raise BadRow(f"{place} has no chosen completion, and steps follow it")
            break
        steps.append(followed[0])
        labels.append(followed[1])
    if others and others[-1][0] == len(steps):
        # The labeler stopped at a completion that nobody continued. It ends the solution.
        _, text, is_right = others.pop()
        steps.append(text)
        labels.append(is_right)
    found = [Solution(tuple(steps), tuple(labels))] if any(label is not None for label in labels) else []
    for before, text, is_right in others:
        found.append(Solution((*steps[:before], text), (*(None for _ in range(before)), is_right)))
    if not found:
        raise BadRow("no step has a rating")
    return StepExample((Message("user", problem),), tuple(found))


def _read_step(
    entry: Mapping[str, Any],
    place: str,
    before: int,
    others: list[tuple[int, str, bool]],
    neutral: Neutral,
) -> tuple[str, bool | None] | None:
    """The text and label of the completion that the labeler followed, or None if there is none.

    The other rated completions are added to `others`. A completion that the labeler wrote is right.
    """
    completions: Any = as_list(entry.get("completions")) or []
    if not isinstance(completions, list):
        raise BadRow(f"{place}.completions must be a list, not {completions!r:.80}")
    chosen, followed = entry.get("chosen_completion"), None
    if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(completions)):
        raise BadRow(f"{place}.chosen_completion={chosen!r:.80} is none of {len(completions)} completions")
    for index, completion in enumerate(completions):
        at = f"{place}.completions.{index}"
        completion = _mapping(completion, at)
        text, label = text_of(completion.get("text"), f"{at}.text").strip(), _label(completion, at, neutral)
        if index == chosen:
            followed = text, label
        elif label is not None:
            others.append((before, text, label))
    human = entry.get("human_completion")
    if followed is None and human is not None:
        written = human.get("text") if isinstance(human, Mapping) else human
        followed = text_of(written, f"{place}.human_completion").strip(), True
    return followed


def _label(completion: Mapping[str, Any], place: str, neutral: Neutral) -> bool | None:
    rating = completion.get("rating")
    if rating is None:
        return None
    if isinstance(rating, bool) or rating not in _RATINGS:
        raise BadRow(f"{place}.rating={rating!r:.80} is none of -1, 0, 1 and null")
    return {"right": True, "wrong": False, "unlabelled": None}[neutral] if rating == 0 else rating == 1


def _has_text(entry: Any) -> bool:
    """Whether a step of PRM800K has any completion. Some rows end with empty steps."""
    return isinstance(entry, Mapping) and bool(entry.get("completions") or entry.get("human_completion"))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"{name} must be a mapping, not {value!r:.80}")
    return value
