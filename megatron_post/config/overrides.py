"""Applies overrides from a command line (`key.path=value`) to the settings of files."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from megatron_post.config.validation_errors import cut, named, shown, shown_of
from megatron_post.config.yaml_text import DEEPEST, read_argument

_KEY = re.compile(r"[^\s=.\[\]-][^\s=.\[\]]*(\.[^\s=.\[\]]+)*")


def merged(under: Any, over: Any) -> Any:
    """`under` updated with `over`. Mappings are merged key by key. Any other value is replaced."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{key: merged(under.get(key), value) for key, value in over.items()}}


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with all overrides applied. A key names the item of a list by its index, from 0.

    Raises `ValueError` with a line for each override that is malformed, names an item that does not exist, or
    contradicts another override.
    """
    errors: list[str] = []
    given: dict[str, Any] = {}
    for text in overrides:
        try:
            key, value = _parsed(text)
        except ValueError as error:
            errors.append(str(error))
            continue
        # 1, 1.0 and true are equal in Python but are different settings, so their texts are compared.
        if repr(given.setdefault(key, value)) != repr(value):
            first, second = shown_of(key, given[key]), shown_of(key, value)
            errors.append(f"{key} is given twice, as {first} and as {second}; leave one out")
    for key in given:
        *above, _ = accumulate(key.split("."), "{}.{}".format)
        if outer := next((other for other in above if other in given), None):
            errors.append(f"{outer} and {key}, which is in it, are both given; leave one out")
    result = tree
    for key, value in given.items():
        try:
            result = _put(result, key.split("."), value, above="")
        except ValueError as error:
            errors.append(f"{named(key)}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
    return result


def item_number(name: str, items: Sequence[Any]) -> int | None:
    """The index in a list that a part of a key names, or None if the list has no such item."""
    if not re.fullmatch("0|[1-9][0-9]{0,8}", name) or int(name) >= len(items):
        return None
    return int(name)


def _parsed(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    bare = text.lstrip("-")
    if bare != text and _KEY.fullmatch(bare.partition("=")[0]):
        right = bare if equals else f"{bare}=VALUE"
        raise ValueError(f"{cut(text)}: write {cut(right)}, without the hyphens before it")
    if not equals:
        raise ValueError(f"overrides must have the form key=value: {cut(text)}")
    if not _KEY.fullmatch(key) or key.count(".") >= DEEPEST:
        raise ValueError(
            f"{cut(text)}: {shown(key)} is not a key such as optimizer.lr or data.sources.0.path"
        )
    if not value:
        raise ValueError(f"{shown(text)} has no value; write null for none, or '\"\"' for an empty text")
    try:
        return key, read_argument(value)
    except ValueError as error:
        raise ValueError(
            f"{cut(text)}: the value is not valid YAML: {error}; put a text that begins with {value[0]} in "
            "quotes"
        ) from None


def _put(tree: Any, path: Sequence[str], value: Any, *, above: str) -> Any:
    """A copy of the tree with the value at a path updated. above: the path of `tree` itself."""
    if not path:
        return merged(tree, value)
    name, rest, here = path[0], path[1:], f"{above}.{path[0]}".removeprefix(".")
    if isinstance(tree, list | tuple):
        number = item_number(name, tree)
        if number is None:
            known = f"with items 0 to {len(tree) - 1}" if tree else "without items"
            raise ValueError(f"{above} is a list {known}, and {shown(name)} is none of them")
        changed = _put(tree[number], rest, value, above=here)
        return [*tree[:number], changed, *tree[number + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{above} is {shown_of(above, tree)}, and holds no keys")
    keys = tree or {}
    return {**keys, name: _put(keys.get(name), rest, value, above=here)}
