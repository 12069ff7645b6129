"""The sources of a store: those of the config, with one source for each template of `data.prompted`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from megatron_post.config.data import PromptedSource, Source
from megatron_post.config.schema import Config
from megatron_post.data.dialog import BadRow
from megatron_post.data.permutation import permutation
from megatron_post.data.prompt_templates import PromptedRow, PromptTemplate, read_templates
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import raw_rows
from megatron_post.data.store_format import GroupName
from megatron_post.storage.files import write_lines


@dataclass(frozen=True)
class Prompting:
    """A template that is applied to the rows of a source, at most to `most` of them.

    The seed draws the rows of a larger source. Each template of a source gets its own draw.
    """

    template: PromptTemplate
    task: str
    most: int
    seed: int


@dataclass(frozen=True)
class PackedSource:
    """A source as a store names it. prompting: the template that is applied to its rows, if any."""

    source: Source
    prompting: Prompting | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def template_digest(self) -> str:
        """The digest of the template's text, or "" without a template."""
        return self.prompting.template.digest if self.prompting else ""


def packed_sources(config: Config, group: GroupName) -> tuple[PackedSource, ...]:
    """The sources that are packed into a group, without those of held-out tasks.

    If `data.preferences.newest_batch_only` is set, they are only those of the newest batch. Raises
    `ValueError` for a file of templates that cannot be used.
    """
    held_out = config.data.prompted.held_out_tasks if group == "train" else ()
    named = config.data.sources if group == "train" else config.data.eval_sources
    if config.data.preferences.newest_batch_only:
        newest = max((source.batch for source in named), default=0)
        named = tuple(source for source in named if source.batch == newest)
    prompts = {entry.source: entry for entry in config.data.prompted.sources}
    return tuple(
        packed
        for source in named
        if source.name not in prompts or prompts[source.name].task not in held_out
        for packed in _with_templates(source, prompts.get(source.name), config)
    )


def held_out_sources(config: Config) -> tuple[PackedSource, ...]:
    """The sources of held-out tasks in `data.sources`, which are not packed."""
    prompts = {entry.source: entry for entry in config.data.prompted.sources}
    return tuple(
        packed
        for source in config.data.sources
        if source.name in prompts and prompts[source.name].task in config.data.prompted.held_out_tasks
        for packed in _with_templates(source, prompts[source.name], config)
    )


def _with_templates(source: Source, entry: PromptedSource | None, config: Config) -> list[PackedSource]:
    if entry is None:
        return [PackedSource(source)]
    templates = read_templates(entry.templates, entry.names)
    most = config.data.prompted.max_examples // len(templates)
    if not most:
        raise ValueError(
            f"data.prompted.max_examples={config.data.prompted.max_examples} leaves no example for each of "
            f"the {len(templates)} templates of {source.name!r}; raise it"
        )
    weight = None if source.weight is None else source.weight / len(templates)
    return [
        PackedSource(
            source.model_copy(update={"name": f"{source.name}/{template.name}", "weight": weight}),
            Prompting(template, entry.task, most, config.seed),
        )
        for template in templates
    ]


class PromptedRows:
    """The rows of a source in the words of its template, as `rows.raw_rows` gives rows.

    left_out: the number of rows for which the template renders no prompt or no target.
    """

    def __init__(self, packed: PackedSource, counts: KeyCounts) -> None:
        """counts: collects the keys of rows that the template does not read."""
        assert packed.prompting is not None
        self._source, self._prompting, self._counts = packed.source, packed.prompting, counts
        self.left_out = 0

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        for number, where, rendered in self.rendered():
            if isinstance(rendered, BadRow):
                yield number, where, rendered
            else:
                yield number, where, {"prompt": rendered.prompt, "completion": rendered.completion}

    def rendered(self) -> Iterator[tuple[int, str, PromptedRow | BadRow]]:
        """Yield (row number, place, rendered row) of every drawn row that the template applies to."""
        template, drawn = self._prompting.template, self._drawn()
        self._counts.columns.update(dict.fromkeys(sorted(template.columns), False))
        for place, (number, where, row) in enumerate(islice(raw_rows(self._source), self._source.max_rows)):
            if drawn is not None and place not in drawn:
                continue
            try:
                rendered = self._apply(row, number)
            except BadRow as error:
                yield number, where, error
                continue
            if rendered is None:
                self.left_out += 1
            else:
                yield number, where, rendered

    def _apply(self, row: Any, number: int) -> PromptedRow | None:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow(f"a row must be a mapping, not {type(row).__name__}")
        columns = self._prompting.template.columns
        rendered = self._prompting.template.apply(row, number=number)
        present = {key for key, value in row.items() if value is not None}
        self._counts.unused.update(present - columns - set(self._source.ignore))
        self._counts.columns.update(dict.fromkeys(sorted(columns & present), True))
        return rendered

    def _drawn(self) -> set[int] | None:
        """The places of the drawn rows among all rows, or None for all of them."""
        count = sum(1 for _ in islice(raw_rows(self._source), self._source.max_rows))
        if count <= self._prompting.most:
            return None
        order = permutation(count, self._prompting.seed, self._source.name)
        return set(order[: self._prompting.most].tolist())


def write_prompted(
    config: Config, output: str | Path, group: Literal["held_out", "train", "eval"] = "held_out"
) -> int:
    """Write the prompted rows of sources, with their choices, in the form that `evaluate choices` reads.

    group: sources of held-out tasks, or those that are packed into a group. Returns the number of rows.
    Raises `ValueError` for a group without prompted sources, and for a row that a template cannot render.
    """
    found = held_out_sources(config) if group == "held_out" else packed_sources(config, group)
    sources = [packed for packed in found if packed.prompting]
    if not sources:
        raise ValueError(f"no source of data.prompted is in the group {group}; give another --group")
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in chain.from_iterable(map(_rows_with_choices, sources)):
            count += 1
            yield row

    write_lines(Path(output), counted())
    return count


def _rows_with_choices(packed: PackedSource) -> Iterator[dict[str, Any]]:
    assert packed.prompting is not None
    name = packed.prompting.template.name
    for number, where, rendered in PromptedRows(packed, KeyCounts()).rendered():
        if isinstance(rendered, BadRow):
            raise ValueError(f"{where}: {rendered}")
        yield {
            "dataset": packed.name.removesuffix(f"/{name}"),
            "task": packed.prompting.task,
            "template": name,
            "row": number,
            "prompt": rendered.prompt,
            "completion": rendered.completion,
            "choices": rendered.choices,
        }
