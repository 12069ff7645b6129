"""`data pack` turns sources into rows, rendered units, a mixture, packs and a store, in this order."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from megatron_post.config.data import Source
from megatron_post.config.layout import segment_multiple, store_layout
from megatron_post.config.schema import Config
from megatron_post.data.assembly import assemble
from megatron_post.data.examples import (
    DialogUnits,
    DocumentUnits,
    ExampleUnits,
    PreferenceUnits,
    SolutionUnits,
    documents_of,
)
from megatron_post.data.length_limit import LengthLimit
from megatron_post.data.mixture import Share, mix, shares
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.sources import PackedSource, PromptedRows, packed_sources
from megatron_post.data.step_example import Example
from megatron_post.data.store_format import DOCUMENTS, GROUPS, GroupName, SourceCounts, StoreSettings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import texts_of
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.data.units import UnitPile, Units
from megatron_post.display import make_progress

_ROWS_AT_ONCE = 512  # one call of the tokenizer encodes them, and it uses all cores


@dataclass(frozen=True)
class GroupSummary:
    """The result of `data pack` for one group. keys: the keys of each source's rows that nothing uses."""

    counts: list[SourceCounts]
    keys: list[KeyCounts]
    shares: list[Share]
    num_packs: int

    @property
    def tokens(self) -> int:
        """Real tokens, repeats counted."""
        return sum(share.tokens for share in self.shares)


def build_store(
    config: Config, *, console: Console, overwrite: bool = False, append: bool = False
) -> dict[GroupName, GroupSummary]:
    """Pack `data.sources` and `data.eval_sources` into `data.store`, and print a summary.

    Training sources are mixed by their epochs or weights. Rows of evaluation sources are used once. The same
    config and data give the same store, byte for byte. Raises `ValueError` (`StoreError`, `TooManyBadRows`)
    for an existing store, more bad or overlong rows than the config allows, and a source without usable rows.
    """
    _check_sources(config)
    tokenizer = tokenizer_of(config)
    settings = StoreSettings(
        pack_length=config.data.pack_length,
        segment_multiple=segment_multiple(config),
        tokenizer_fingerprint=tokenizer.fingerprint,
        pad_id=tokenizer.pad_id,
        seed=config.seed,
        layout=store_layout(config),  # type: ignore[arg-type]
        content_tokens=tokenizer.content_tokens,
        reasoning=config.data.reasoning,
        tokenizer_path=str(Path(config.tokenizer.path).resolve()),
    )
    bad_rows = BadRows(config.data.max_bad_rows)
    summaries: dict[GroupName, GroupSummary] = {}
    with (
        StoreWriter(config.data.store, settings, overwrite=overwrite, append=append) as writer,
        _progress(console) as progress,
    ):
        for group in GROUPS:
            sources = packed_sources(config, group)
            if group == "train" and not sources:
                raise ValueError("data.prompted.held_out_tasks holds out every source; name fewer tasks")
            units, counts, keys = _read(group, sources, config, tokenizer, bad_rows, progress)
            summaries[group] = _write(group, sources, units, counts, keys, writer, settings, progress)
    _print(summaries, bad_rows, config, console)
    return summaries


def _check_sources(config: Config) -> None:
    if not config.data.sources:
        raise ValueError("data.sources is empty: there is nothing to pack")
    repeated = [s.name for s in config.data.eval_sources if s.epochs is not None or s.weight is not None]
    if repeated:
        raise ValueError(
            f"data.eval_sources: {', '.join(repeated)} has epochs or weight; evaluation rows are used once, "
            "so leave them out"
        )


def _read(
    group: GroupName,
    sources: Sequence[PackedSource],
    config: Config,
    tokenizer: Tokenizer,
    bad_rows: BadRows,
    progress: Progress,
) -> tuple[Units, list[SourceCounts], list[KeyCounts]]:
    """Render every usable row of the sources. Also returns each source's counts and its unused keys."""
    pile, counts, keys = UnitPile(), [], [KeyCounts() for _ in sources]
    for number, packed in enumerate(sources):
        source = documents_of(packed.source) if config.traits.examples == "documents" else packed.source
        task = progress.add_task(f"{group}: reading {source.name}", total=None)
        prompted = PromptedRows(packed, keys[number]) if packed.prompting else None
        rows = read_rows(
            source,
            bad_rows=bad_rows,
            train_on=config.data.train_on,
            reasoning=config.data.reasoning,
            neutral=config.data.steps.neutral,
            counts=None if prompted else keys[number],
            records=prompted,
        )
        advance = partial(progress.advance, task)
        found = _render(rows, pile, source, number, config, tokenizer, bad_rows, advance)
        left_out = prompted.left_out if prompted else found.filtered
        if not found.rows:
            raise ValueError(
                f"source {source.name!r} ({source.path}) gave no usable row ({found.bad} bad, "
                f"{found.dropped} longer than data.pack_length, {left_out} left out by "
                f"{'its template' if prompted else 'data.preferences'}); remove it or mend it"
            )
        counts.append(replace(found, filtered=left_out, template=packed.template_digest))
        progress.update(task, total=progress.tasks[task].completed)
    return pile.units(), counts, keys


def _render(
    rows: Iterator[tuple[int, Example]],
    pile: UnitPile,
    source: Source,
    number: int,
    config: Config,
    tokenizer: Tokenizer,
    bad_rows: BadRows,
    advance: Callable[[int], None],
) -> SourceCounts:
    """Add the units of source `number` to the pile."""
    limit = LengthLimit(
        source.name,
        overlong=config.data.overlong,
        capacity=sys.maxsize if config.cuts_documents else config.data.pack_length,
        multiple=segment_multiple(config),
    )
    example_units = _example_units(config, source, tokenizer)
    before, spelled = len(pile), Counter[str]()
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        for (row, example), units in zip(batch, example_units(batch), strict=True):
            fitting = [fit for unit in units if (fit := limit.fit(unit, row=row)) is not None]
            for unit in fitting:
                pile.add(unit, source=number, sample=row, turns=example.turns)
            if fitting:
                spelled += tokenizer.spelled(texts_of(example))
        advance(len(batch))
    limit.check()
    bad, used = bad_rows.by_source[source.name], len(pile) - before
    return SourceCounts(
        source.name,
        rows=used,
        bad=bad,
        dropped=limit.dropped,
        truncated=limit.truncated,
        filtered=example_units.filtered,
        spelled=dict(spelled),
    )


def _example_units(config: Config, source: Source, tokenizer: Tokenizer) -> ExampleUnits:
    if config.traits.examples == "dialogs":
        return DialogUnits(source.name, tokenizer, stage=config.stage)
    if config.traits.examples == "documents":
        return DocumentUnits(tokenizer)
    if config.traits.examples == "steps":
        return SolutionUnits(source.name, tokenizer, separator=config.data.steps.separator)
    return PreferenceUnits(
        source.name,
        tokenizer,
        layout=store_layout(config),
        rules=config.data.preferences,
        pair_only=config.traits.examples == "pairs",
        seed=config.seed,
    )


def _write(
    group: GroupName,
    packed: Sequence[PackedSource],
    units: Units,
    counts: list[SourceCounts],
    keys: list[KeyCounts],
    writer: StoreWriter,
    settings: StoreSettings,
    progress: Progress,
) -> GroupSummary:
    """Mix, pack and write one group."""
    sources = [each.source for each in packed]
    real = units.lengths(multiple=1)
    lengths = [real[units.sources == number] for number in range(len(sources))]
    tokens = dict(zip((source.name for source in sources), lengths, strict=True))
    uses = mix(
        sources,
        {count.name: count.rows for count in counts},
        seed=settings.seed,
        tokens=tokens if settings.layout in DOCUMENTS else None,
    )
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *uses.values()])
    assembly = assemble(units, np.repeat(np.arange(len(units)), flat), group, settings)
    task = progress.add_task(f"{group}: writing packs", total=len(assembly))
    packs = progress.track(assembly.packs(), task_id=task)
    writer.write(
        group,
        sources=counts,
        columns=assembly.columns(),
        segments_per_pack=np.diff(assembly.segment_ends),
        packs=packs,
    )
    return GroupSummary(
        counts, keys, shares(list(uses), list(uses.values()), lengths), num_packs=len(assembly)
    )


def _progress(console: Console) -> Progress:
    return make_progress(console, MofNCompleteColumn(), TimeElapsedColumn())


def _print(
    summaries: dict[GroupName, GroupSummary], bad_rows: BadRows, config: Config, console: Console
) -> None:
    table = Table(box=SIMPLE)
    for heading in ("group", "source"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows", "epochs", "used", "% rows", "tokens", "% tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, summary in summaries.items():
        for share in summary.shares:
            table.add_row(
                group,
                share.name,
                f"{share.available:,}",
                f"{share.epochs:.2f}",
                f"{share.rows:,}",
                f"{100 * share.row_share:.2f}",
                f"{share.tokens:,}",
                f"{100 * share.token_share:.2f}",
            )
    console.print(table)
    for group, summary in summaries.items():
        for count in summary.counts:
            if count.bad or count.dropped or count.truncated:
                console.print(
                    f"{group}: {count.name}: {count.bad:,} bad rows left out, {count.dropped:,} longer than "
                    f"{config.data.pack_length:,} tokens dropped, {count.truncated:,} truncated"
                )
            if count.template and count.filtered:
                console.print(f"{group}: {count.name}: {count.filtered:,} rows left out by the template")
            if count.spelled:
                times = ", ".join(f"{token} {number:,} times" for token, number in count.spelled.items())
                console.print(
                    f"warning: {group}: the texts of {count.name} spell special tokens, which are encoded as "
                    f"text: {times}. Name those in tokenizer.content_tokens that texts should spell",
                    highlight=False,
                    soft_wrap=True,
                )
    for group, summary in summaries.items():
        for count, keys in zip(summary.counts, summary.keys, strict=True):
            for line in keys.summary():
                console.print(f"{group}: {count.name}: {line}", highlight=False)
    for group, summary in summaries.items():
        if summary.num_packs:
            capacity = summary.num_packs * config.data.pack_length
            console.print(
                f"{group}: {summary.num_packs:,} packs of {config.data.pack_length:,} tokens, "
                f"{100 * summary.tokens / capacity:.2f}% full"
            )
    if bad_rows.count:
        console.print(bad_rows.summary(), highlight=False)
