"""Marks of rows and messages that say whether they are trained. Marks of unknown names are refused."""

import re
from collections.abc import Container
from functools import lru_cache

from megatron_post.data.dialog import BadRow
from megatron_post.data.row_keys import Keys

# Keys that say whether a message is trained; those of masks say the contrary.
MARKS = (
    *("weight", "train", "training", "trainable", "trained", "loss", "loss_mask", "step_loss_mask"),
    *("loss_weight", "loss_scale", "mask", "masked"),
)
# Words in the names of unknown keys that seem to say the same: of rows and messages, and of messages alone.
_TRAINED = {"train", "trained", "trainable", "training", "loss", "mask", "masked"}
_TRAINED_MESSAGE = _TRAINED | {
    *("weight", "weights", "learn", "learned", "learnable", "supervise", "supervised", "supervision"),
    *("grad", "gradient", "backprop", "ignore", "ignored", "skip", "skipped"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def message_mark(message: Keys, number: int) -> bool | None:
    """Whether a message says that it is trained; None: it does not say.

    Raises `BadRow` for contradictions, for weights between, and for names that are not known.
    """
    place = f"message {number}"
    _refuse_unknown(message, place, _TRAINED_MESSAGE)
    return _mark(message, place)


def row_mark(row: Keys, *, skip: Container[str]) -> bool | None:
    """As `message_mark`, of a row. skip: names that the source's columns use."""
    _refuse_unknown(row, "the row", _TRAINED, skip=skip)
    return _mark(row, "the row", skip=skip)


@lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    """The words of a key in snake_case or camelCase, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _mark(keys: Keys, place: str, *, skip: Container[str] = ()) -> bool | None:
    said: dict[str, bool] = {}
    for key in keys.among(MARKS):
        if key in skip:
            continue
        value = keys.get(key)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(
                f"{place} has {key}={value!r:.80}; it must be true, false, 1 or 0. If it does not say "
                f"what is trained, list {key} under the source's `ignore`"
            )
        said[key] = bool(value) != key.startswith("mask")
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{key}={keys.get(key)!r}" for key in said)
        raise BadRow(f"{place} says that it is trained and that it is not: {shown}")
    return next(iter(said.values()), None)


def _refuse_unknown(keys: Keys, place: str, words: set[str], *, skip: Container[str] = ()) -> None:
    """Raise `BadRow` for true or false under a name that is not known and has one of the words."""
    for key in keys:
        if key in MARKS or key in skip or words.isdisjoint(words_of(key)):
            continue
        value = keys.peek(key)
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(item, bool | int | float) and item in (0, 1) for item in values):
            raise BadRow(
                f"{place} has {key}={value!r:.80}, which seems to say what is trained and is not among the "
                f"names that are obeyed ({', '.join(MARKS)}): rename it to `train`, or list {key} under the "
                "source's `ignore`"
            )
