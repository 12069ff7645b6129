"""Labels that say whether a response is good. What is bad is refused: it is never trained as good."""

from collections.abc import Container
from functools import lru_cache
from typing import Any

from megatron_post.data.dialog import BadRow
from megatron_post.data.row_keys import Keys

# Names of labels for which true is good, and of those for which true is bad, without a leading "is_". The
# second are names of other things too, so that only true and 1 count there.
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
    """Raise `BadRow` where a label of a row or of a message says that a response is bad.

    A label that says that it is good counts as used. place: words for where the label
    stands. skip: names that the source's columns use.
    """
    for name in keys:
        if name in skip or (is_good := _is_good(_label(name), keys.peek(name))) is None:
            continue
        if not is_good:
            raise BadRow(
                f"{name}={keys.peek(name)!r:.80}{place} says that the response is bad: it is not trained. "
                f"data.max_bad_rows leaves such rows out; if {name} says something else, list it under the "
                "source's `ignore`"
            )
        keys.get(name)


@lru_cache(maxsize=4096)
def _label(name: str) -> str | None:
    """The name of a label in lower case, None for other names."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain in ("is_chosen", "was_chosen"):  # `chosen` itself is a response
        return "label"
    plain = plain.removeprefix("is_")
    return plain if plain in _GOOD_IF_TRUE or plain in _BAD_IF_TRUE else None


def _is_good(label: str | None, value: Any) -> bool | None:
    """What the value of a label says of a response, None where it says neither."""
    if label is None:
        return None
    if label in _BAD_IF_TRUE:
        return False if value is True or (isinstance(value, int | float) and value == 1) else None
    if isinstance(value, list):
        said = [_is_good(label, item) for item in value]
        return False if False in said else None
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
