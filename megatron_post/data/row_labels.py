"""Labels that mark a response as good or bad. Rows with bad responses are refused."""

from collections.abc import Container
from functools import lru_cache
from typing import Any

from megatron_post.data.dialog import BadRow
from megatron_post.data.row_keys import Keys

# Names of labels, without a leading "is_", for which true means good, and those for which true means bad.
# Other columns may have a name of the second set too, so only the values true and 1 count there.
_GOOD_IF_TRUE = {
    *("label", "kto_tag", "kto_label", "completion_label", "response_label", "binary_label"),
    *("preference_label", "desirable", "desirability", "good", "correct", "accepted", "approved", "upvoted"),
    *("thumbs_up", "liked", "preferred", "positive", "safe"),
}
_BAD_IF_TRUE = {
    *("bad", "rejected", "undesirable", "incorrect", "wrong", "downvoted", "thumbs_down", "disliked"),
    "unsafe",
}
_GOOD = {
    *("true", "t", "yes", "y", "good", "desirable", "chosen", "accepted", "correct", "positive"),
    *("like", "up"),
}
_BAD = {
    *("false", "f", "no", "n", "bad", "undesirable", "rejected", "incorrect", "wrong", "negative", "unsafe"),
    *("dislike", "disliked", "down", "downvote", "downvoted", "thumbs_down", "thumbs down"),
}


def refuse_label(keys: Keys, place: str = "", *, skip: Container[str] = ()) -> None:
    """Raise `BadRow` if a label of a row or of a message marks a response as bad.

    A label that marks it as good counts as used. place: a phrase for the message that says where the label
    is. skip: names that the source's columns use.
    """
    for name in keys:
        if name in skip or (is_good := _is_good(_label(name), keys.peek(name))) is None:
            continue
        if not is_good:
            raise BadRow(
                f"{name}={keys.peek(name)!r:.80}{place} says that the response is bad, so it is not trained. "
                f"Raise data.max_bad_rows to leave such rows out. If {name} means something else, list it "
                "under the source's `ignore`"
            )
        keys.get(name)


@lru_cache(maxsize=4096)
def _label(name: str) -> str | None:
    """The name of a label in lower case, or None if `name` is not a known label."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain in ("is_chosen", "was_chosen"):  # `chosen` itself is a response
        return "label"
    plain = plain.removeprefix("is_")
    return plain if plain in _GOOD_IF_TRUE or plain in _BAD_IF_TRUE else None


def _is_good(label: str | None, value: Any) -> bool | None:
    """Whether the value of a label means good (True), bad (False), or neither (None)."""
    if label is None:
        return None
    if label in _BAD_IF_TRUE:
        return False if value is True or (isinstance(value, int | float) and value == 1) else None
    if isinstance(value, list):
        found = [_is_good(label, item) for item in value]
        return False if False in found else None
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _GOOD or text in _BAD:
            return text in _GOOD
        try:
            value = float(text)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not (value <= 0 or value == 1):
        return None
    return value == 1
