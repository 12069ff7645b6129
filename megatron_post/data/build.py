"""`data pack` turns sources into rows, rendered units, a mixture, packs and a store, in this order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.config.layout import segment_multiple, store_layout
from megatron_post.config.load import SettingsSource, section_of
from megatron_post.config.schema import Config
from megatron_post.data.assembly import assemble
from megatron_post.data.mixture import Share, mix, shares
from megatron_post.data.render_pool import RenderPool
from megatron_post.data.render_sources import render_sources
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows
from megatron_post.data.sources import PackedSource, packed_sources
from megatron_post.data.spill import Spill
from megatron_post.data.store_format import DOCUMENTS, GROUPS, GroupName, SourceCounts, StoreSettings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.tokenizer import tokenizer_of
from megatron_post.data.units import Units
from megatron_post.display import make_console
from megatron_post.progress import WorkProgress


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


@dataclass(frozen=True)
class Packed:
    """The result of `build_store`: the directory of the store, and what each group holds."""

    store: Path
    groups: dict[GroupName, GroupSummary]


def build_store(
    config: Config | SettingsSource,
    *,
    console: Console | None = None,
    overwrite: bool = False,
    append: bool = False,
    workers: int | None = None,
) -> Packed:
    """Pack `data.sources` and `data.eval_sources` into `data.store`, and print a summary.

    Training sources are mixed by their epochs or weights. Rows of evaluation sources are used once. The same
    config and data give the same store, byte for byte, whatever the number of workers.

    config: also a YAML file, or its keys and values. workers: processes that render rows, by default one
    for each core. Rendered rows are kept in a hidden directory beside the store until the store is
    complete. A pack that was killed continues with them.

    Raises `ValueError` (`StoreError`, `TooManyBadRows`) for an existing store, more bad or overlong rows than
    the config allows, and a source without usable rows.
    """
    config, console = section_of(Config, config), console or make_console()
    _check_sources(config)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: give at least 1")
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
    with StoreWriter(config.data.store, settings, overwrite=overwrite, append=append) as writer:
        for group in GROUPS:
            sources = packed_sources(config, group)
            if group == "train" and not sources:
                raise ValueError("data.prompted.held_out_tasks holds out every source; name fewer tasks")
            with (
                Spill(writer.spill_directory, group) as spill,
                RenderPool(config, sources, tokenizer, spill, workers=workers or _num_cores()) as pool,
            ):
                counts, keys = render_sources(group, sources, config, pool, bad_rows, console)
                pool.close()
                units = spill.units()
                summaries[group] = _write(group, sources, units, counts, keys, writer, settings, console)
    _print(summaries, bad_rows, config, console)
    return Packed(Path(config.data.store), summaries)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_sources(config: Config) -> None:
    if not config.data.sources:
        raise ValueError("data.sources is empty: there is nothing to pack")
    repeated = [s.name for s in config.data.eval_sources if s.epochs is not None or s.weight is not None]
    if repeated:
        raise ValueError(
            f"data.eval_sources: {', '.join(repeated)} has epochs or weight; evaluation rows are used once, "
            "so leave them out"
        )


def _write(
    group: GroupName,
    packed: Sequence[PackedSource],
    units: Units,
    counts: list[SourceCounts],
    keys: list[KeyCounts],
    writer: StoreWriter,
    settings: StoreSettings,
    console: Console,
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
    what = f"{group}: writing packs"
    with WorkProgress(what, total=len(assembly), unit="packs", console=console) as progress:
        writer.write(
            group,
            sources=counts,
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=progress.track(assembly.packs()),
        )
    return GroupSummary(
        counts, keys, shares(list(uses), list(uses.values()), lengths), num_packs=len(assembly)
    )


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
