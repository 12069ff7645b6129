"""Reads prompt templates in promptsource's YAML format, and applies them to rows.

A template is Jinja text. It renders a prompt and a target with `|||` between them. Its answer choices are
another Jinja text with `|||` between them, which the template reads as the list `answer_choices`. Templates
run in Jinja's sandbox, and the file is read without Python objects.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field

from megatron_post.config.load import parse
from megatron_post.config.section import Line, Section
from megatron_post.config.yaml_text import read_yaml
from megatron_post.data.dialog import BadRow
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.reading import did_you_mean, plain_file, reading

SEPARATOR = "|||"
_PROTECTED = "\uf8ff\uf8fe\uf8ff"  # private characters that replace a separator in a row while it is rendered
_RANDOM = "|random"  # no name that a template can spell
_TAGS = ("!Template", "!TemplateMetadata")  # the tags of promptsource's own files


class _Entry(Section):
    """A template as promptsource writes it. Only name, jinja and answer_choices have an effect."""

    name: Line
    jinja: str = Field(min_length=1)
    answer_choices: str | None = None
    answer_choices_key: None = None
    id: str | None = None
    reference: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class _File(Section):
    dataset: str | None = None
    subset: str | None = None
    templates: dict[str, _Entry] = Field(min_length=1)


@dataclass(frozen=True)
class PromptedRow:
    """A row in the words of a template. choices: the possible completions, or None for an open question."""

    prompt: str
    completion: str
    choices: tuple[str, ...] | None


class PromptTemplate:
    """One template. `columns` are the columns of a row that it reads, and `digest` identifies its text."""

    def __init__(self, name: str, jinja: str, answer_choices: str | None = None) -> None:
        """Raises `ValueError` for a text that is not a template, and for one without `|||`."""
        self.name = name
        self.digest = sha256_of_json({"jinja": jinja, "answer_choices": answer_choices})
        if SEPARATOR not in jinja:
            raise ValueError(f"template {name!r} has no {SEPARATOR} between the prompt and the target")
        environment = _environment()
        try:
            self._jinja = environment.from_string(jinja)
            self._choices = None if answer_choices is None else environment.from_string(answer_choices)
            texts = (environment.parse(text) for text in (jinja, answer_choices or ""))
            names = set().union(*map(meta.find_undeclared_variables, texts))
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise ValueError(f"template {name!r}{where}: {error}") from None
        self.columns = names - {"answer_choices", *environment.globals}

    def apply(self, row: Mapping[str, Any], *, number: int) -> PromptedRow | None:
        """The prompt, target and choices of a row, or None if the template renders none for it.

        A template renders none if the prompt or the target is blank, which is how promptsource's templates
        leave out a row. number: the row's number, which seeds the filter `choice`. Raises `BadRow`.
        """
        if "answer_choices" in row:
            raise BadRow("the row has a column answer_choices, which is the list of choices in a template")
        for column in sorted(self.columns & row.keys()):
            if "label" in column and row[column] == -1:
                # Otherwise `answer_choices[label]` would give the last choice.
                raise BadRow(f"{column} is -1, which marks a row without a label")
        values = {**_protected(row), _RANDOM: Random(f"{self.digest} {number}")}
        try:
            choices = None if self._choices is None else _parts(self._choices.render(values))
            parts = _parts(self._jinja.render(values | {"answer_choices": _protected(choices)}))
        except Exception as error:  # a template can fail with any error, and the message names it
            raise BadRow(f"template {self.name!r}: {error or type(error).__name__}") from None
        if len(parts) > 2:
            raise BadRow(f"template {self.name!r} gives {len(parts) - 1} {SEPARATOR} and not one")
        if len(parts) < 2 or not all(parts):
            return None
        return PromptedRow(parts[0], parts[1], None if choices is None else tuple(choices))


def read_templates(path: str | Path, names: Sequence[str] = ()) -> list[PromptTemplate]:
    """The templates of a file in the order of their names. names: only these.

    Raises `ValueError` for a file that cannot be read, two templates of one name, and an unknown name.
    """
    path = plain_file(Path(path), "file of templates")
    with reading(path, "a file of templates"):
        tree = read_yaml(path.read_text(encoding="utf-8-sig"), mapping_tags=_TAGS)
    entries = sorted(parse(_File, tree, origin=str(path)).templates.values(), key=lambda entry: entry.name)
    known = [entry.name for entry in entries]
    if twice := [name for name, count in Counter(known).items() if count > 1]:
        raise ValueError(f"{path}: two templates have the name {twice[0]!r}; give each its own name")
    for name in names:
        if name not in known:
            raise ValueError(f"{path} has no template {name!r}{did_you_mean(name, known)}")
    with reading(path, "a file of templates"):
        return [
            PromptTemplate(entry.name, entry.jinja, entry.answer_choices)
            for entry in entries
            if not names or entry.name in names
        ]


class _Missing(StrictUndefined):
    """A missing column is false in a condition, because Arrow drops null columns. It cannot be printed."""

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    # Otherwise `answer_choices[label]` would report an element that is missing, and not the column.
    __index__ = StrictUndefined._fail_with_undefined_error


def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(undefined=_Missing, finalize=_printable)
    environment.globals["zip"] = zip
    environment.filters |= {"choice": _choice, "most_frequent": _most_frequent}
    return environment


def _printable(value: Any) -> Any:
    if value is None:
        raise ValueError("it prints a null value; test it with {% if %} first")
    return value


@pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    """promptsource's filter `choice`, drawn by the template and the row, so that a store can be repeated."""
    found: Random = context[_RANDOM]
    return found.choice(items)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """promptsource's filter `most_frequent`: the items that appear most often, in their order."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


def _protected(value: Any) -> Any:
    """A copy of a row's value in which no text has a separator."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED)
    if isinstance(value, Mapping):
        return {key: _protected(inner) for key, inner in value.items()}
    return [_protected(inner) for inner in value] if isinstance(value, list) else value


def _parts(text: str) -> list[str]:
    return [part.replace(_PROTECTED, SEPARATOR).strip() for part in text.split(SEPARATOR)]
