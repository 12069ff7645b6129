"""Replaces references such as `${run_dir}/store`, with which a value refers to another key of the config.

A reference can only name a key of the same config. It cannot read environment variables or call functions, so
a config from another person cannot read data of this machine. `$${` is a literal `${`.
"""

import json
import re
from typing import Any

from megatron_post.config.overrides import item_number

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<key>[^{}]*)(?P<end>\}?)")
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
# The limit of characters that all references together insert. References to texts with references multiply.
_MOST = 2**20
_DEEPEST = 16


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with all references replaced. Raises `ValueError` with a line for each invalid reference."""
    references = _References(tree)
    result = references.replaced(tree, key="")
    if references.errors:
        raise ValueError("\n".join(dict.fromkeys(references.errors)))
    assert isinstance(result, dict)
    return result


def escaped(value: Any) -> Any:
    """The value with every `${` escaped, so that `resolved` returns the original value."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


class _References:
    def __init__(self, tree: dict[str, Any]) -> None:
        self.errors: list[str] = []
        self._tree = tree
        self._found: dict[str, Any] = {}
        self._open: list[str] = []  # the chain of keys that are being resolved, to find cycles
        self._size = 0

    def replaced(self, value: Any, *, key: str) -> Any:
        """The value with all references replaced. key: the value's key, for messages."""
        if isinstance(value, dict):
            return {
                name: self.replaced(v, key=f"{key}.{name}".removeprefix(".")) for name, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.replaced(v, key=f"{key}.{number}") for number, v in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return self._text(value)
        except ValueError as error:
            self.errors.append(f"{key}: {error}")
            return value

    def _text(self, text: str) -> Any:
        """The text with references replaced. A single reference becomes a value of any type."""
        match = _REFERENCE.fullmatch(text)
        if match and match["key"] is not None:
            return self._value(match)
        return _REFERENCE.sub(self._piece, text)

    def _piece(self, match: re.Match[str]) -> str:
        if match["key"] is None:
            return "${"
        value = self._value(match)
        if value is None:
            raise ValueError(f"{match[0]} is null, which cannot be a part of a text")
        text = value if isinstance(value, str) else json.dumps(value)
        self._size += len(text)
        if self._size > _MOST:
            raise ValueError(f"references insert more than {_MOST:,} characters in total")
        return text

    def _value(self, match: re.Match[str]) -> Any:
        """The value of the key in a reference."""
        key = match["key"]
        if not match["end"] or not _KEY.fullmatch(key):
            raise ValueError(
                f"{match[0][:80]} names no key of this config; environment variables and functions are not "
                "read, and a literal ${ is written $${"
            )
        if key in self._found:
            return self._found[key]
        if key in self._open or len(self._open) == _DEEPEST:
            raise ValueError(
                f"references form a cycle or are nested too deeply: {' -> '.join([*self._open, key])}"
            )
        self._open.append(key)
        try:
            value = self._at(key)
            self._found[key] = self._text(value) if isinstance(value, str) and "${" in value else value
        finally:
            self._open.pop()
        return self._found[key]

    def _at(self, key: str) -> Any:
        value: Any = self._tree
        for part in key.split("."):
            if isinstance(value, list | tuple) and (number := item_number(part, value)) is not None:
                value = value[number]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                raise ValueError(f"${{{key}}} names no key of this config, which would have to be set in it")
        if isinstance(value, dict | list | tuple):
            raise ValueError(f"${{{key}}} is not a single value")
        return value
