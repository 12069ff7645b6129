"""Marks with which rows and messages say whether they are trained. Marks of unknown names are refused."""

import re
from collections.abc import Container
from functools import lru_cache

from megatron_post.data.dialog import BadRow
from megatron_post.data.row_keys import Keys

# Keys that say whether a message is trained. A true value of "mask" or "masked" means that it is not trained.
MARKS = (
    *("weight", "train", "training", "trainable", "trained", "loss", "loss_mask", "step_loss_mask"),
    *("loss_weight", "loss_scale", "mask", "masked"),
)
# An unknown key with one of these words in its name may be such a mark. The second set is for messages only.
_TRAINED = {"train", "trained", "trainable", "training", "loss", "mask", "masked"}
_TRAINED_MESSAGE = _TRAINED | {
    *("weight", "weights", "learn", "learned", "learnable", "supervise", "supervised", "supervision"),
    *("grad", "gradient", "backprop", "ignore", "ignored", "skip", "skipped"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def message_mark(message: Keys, number: int) -> bool | None:
    """Whether a message's marks say that it is trained, or None without a mark.

    Raises `BadRow` for contradictory marks, for weights between 0 and 1, and for marks of unknown names.
    """
    place = f"message {number}"
    _refuse_unknown(message, place, _TRAINED_MESSAGE)
    return _mark(message, place)


def row_mark(row: Keys, *, skip: Container[str]) -> bool | None:
    """Whether a row's marks say that it is trained, as `message_mark`. skip: names that `columns` uses."""
    _refuse_unknown(row, "the row", _TRAINED, skip=skip)
    return _mark(row, "the row", skip=skip)


@lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    """The words of a key in snake_case or camelCase, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(name))


def _mark(keys: Keys, place: str, *, skip: Container[str] = ()) -> bool | None:
    marks: dict[str, bool] = {}
    for key in keys.among(MARKS):
        if key in skip:
            continue
        value = keys.get(key)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(
                f"{place} has {key}={value!r:.80}; it must be true, false, 1 or 0. If it does not say "
                f"what is trained, list {key} under the source's `ignore`"
            )
        marks[key] = bool(value) != key.startswith("mask")
    if len(set(marks.values())) > 1:
        shown = ", ".join(f"{key}={keys.get(key)!r}" for key in marks)
        raise BadRow(f"{place} says that it is trained and that it is not: {shown}")
    return next(iter(marks.values()), None)


def _refuse_unknown(keys: Keys, place: str, words: set[str], *, skip: Container[str] = ()) -> None:
    """Raise `BadRow` for a value of true or false under an unknown name that contains one of `words`."""
    for key in keys:
        if key in MARKS or key in skip or words.isdisjoint(words_of(key)):
            continue
        value = keys.peek(key)
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(item, bool | int | float) and item in (0, 1) for item in values):
            raise BadRow(
                f"{place} has {key}={value!r:.80}, which seems to say what is trained and is not among the "
                f"known names ({', '.join(MARKS)}): rename it to `train`, or list {key} under the "
                "source's `ignore`"
            )
