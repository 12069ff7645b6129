"""A system prompt with the rules that it states. It is a seed, or a model wrote it."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_post.config.section import Section
from megatron_post.synthesis.steering.rules import Rules, unstated

Kind = Literal["length", "format", "tone", "persona", "language"]
_BY_KIND: dict[Kind, set[str]] = {
    "length": {
        *("least_words", "most_words", "least_sentences", "most_sentences", "least_paragraphs"),
        *("most_paragraphs", "most_characters"),
    },
    "format": {"format", "items", "keys", "case", "begins", "ends", "contains", "avoids"},
    "language": {"language"},
}


class SystemPrompt(Section):
    """kind: what it steers. The kinds length, format and language need a rule of their kind."""

    kind: Kind
    system: str = Field(min_length=1)
    rules: Rules = Rules()


def system_prompt(values: Any, kind: str | None = None) -> SystemPrompt:
    """The system prompt in a JSON object. kind: that of its seed, which then is not in the object.

    Raises `ValueError`, whose text is one of a few reasons, with the detail in `__cause__`.
    """
    if not isinstance(values, dict) or (kind is not None and "kind" in values):
        raise ValueError("no object with `system` and `rules`")
    try:
        found = SystemPrompt.model_validate({**values, **({"kind": kind} if kind is not None else {})})
    except ValidationError as error:
        first = error.errors()[0]
        detail = ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise ValueError("a system prompt or rules in another form") from detail
    wanted = _BY_KIND.get(found.kind)
    if wanted is not None and not wanted & found.rules.given.keys():
        raise ValueError(f"no rule on the {found.kind}")
    if name := unstated(found.rules, found.system):
        raise ValueError(f"a rule that its text does not state: {name}")
    return found
