"""The file of a taxonomy: coarse topics, each with its fine topics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from megatron_post.config.load import load_section
from megatron_post.config.section import Line, Section

SEPARATOR = " / "  # between the coarse and the fine label


def _is_a_label(text: str) -> str:
    if text != " ".join(text.split()) or "/" in text:
        raise ValueError(f"{text!r}: a label has no slash, and single blanks between its words")
    return text


Label = Annotated[Line, AfterValidator(_is_a_label)]


class Topic(Section):
    """A coarse topic."""

    about: Line | None = Field(None, description="what the topic is, for the judge")
    parts: dict[Label, Line | None] = Field(
        min_length=1, description="fine label -> what it is, for the judge, or null"
    )


class Taxonomy(Section):
    """A file of topics."""

    topics: dict[Label, Topic] = Field(min_length=1, description="coarse label -> topic")

    @model_validator(mode="after")
    def _labels_differ(self) -> "Taxonomy":
        for labels in (list(self.topics), *(list(topic.parts) for topic in self.topics.values())):
            folded = [label.casefold() for label in labels]
            if twice := next((label for label in labels if folded.count(label.casefold()) > 1), None):
                raise ValueError(f"two labels differ in case alone: {twice!r}")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The coarse and the fine label of every part, in the order of the file."""
        return [(coarse, fine) for coarse, topic in self.topics.items() for fine in topic.parts]

    def find(self, text: str) -> tuple[str, str] | None:
        """The labels in a text such as "mathematics / geometry", or None. The case does not matter."""
        wanted = " ".join(text.replace("/", SEPARATOR).split()).casefold()
        return next((pair for pair in self.pairs if SEPARATOR.join(pair).casefold() == wanted), None)

    def lines(self) -> Sequence[str]:
        """The topics as lines of a prompt."""
        lines = []
        for coarse, topic in self.topics.items():
            lines.append(f"{coarse}: {topic.about}" if topic.about else f"{coarse}:")
            lines += [f"- {coarse}{SEPARATOR}{fine}" + (f": {about}" if about else "")
                      for fine, about in topic.parts.items()]  # fmt: skip
        return lines


def load_taxonomy(path: str | Path) -> Taxonomy:
    """Read a taxonomy. Raises `ConfigError` with every error at once."""
    return load_section(Taxonomy, path)
