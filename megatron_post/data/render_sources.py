"""Renders every usable row of a group's sources, and counts what was left out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from rich.console import Console

from megatron_post.config.schema import Config
from megatron_post.data.render_pool import RenderPool
from megatron_post.data.rendering import BatchCounts, batch_of, length_limit
from megatron_post.data.row_files import likely_rows
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, Record, undecoded_rows
from megatron_post.data.sources import PackedSource, PromptedRows
from megatron_post.data.store_format import GroupName, SourceCounts
from megatron_post.progress import WorkProgress

# Large enough to hide the cost of sending a batch to a process, and small enough for memory and progress.
_ROWS_IN_BATCH, _LINE_BYTES_IN_BATCH = 2048, 2**23


def render_sources(
    group: GroupName,
    sources: Sequence[PackedSource],
    config: Config,
    pool: RenderPool,
    bad_rows: BadRows,
    console: Console,
) -> tuple[list[SourceCounts], list[KeyCounts]]:
    """Render the sources into the pool's spill. Returns each source's counts and its unused keys.

    Raises `ValueError` for a source without usable rows, and `TooManyBadRows`.
    """
    counts, keys = [], [KeyCounts() for _ in sources]
    for number, packed in enumerate(sources):
        source = packed.source
        prompted = PromptedRows(packed, keys[number]) if packed.prompting else None
        records = iter(undecoded_rows(source) if prompted is None else prompted)
        what, total = f"{group}: reading {source.name}", likely_rows(source) if prompted is None else None
        with WorkProgress(what, total=total, is_estimate=True, unit="rows", console=console) as progress:
            batches = _rendered(records, number, source.max_rows, pool, progress.advance)
            found = _counts(batches, packed, config, bad_rows, keys[number])
        left_out = prompted.left_out if prompted else found.filtered
        if not found.rows:
            raise ValueError(
                f"source {source.name!r} ({source.path}) gave no usable row ({found.bad} bad, "
                f"{found.dropped} longer than data.pack_length, {left_out} left out by "
                f"{'its template' if prompted else 'data.preferences'}); remove it or mend it"
            )
        counts.append(replace(found, filtered=left_out))
    return counts, keys


def _rendered(
    records: Iterator[Record],
    number: int,
    max_rows: int | None,
    pool: RenderPool,
    advance: Callable[[int], None],
) -> Iterator[BatchCounts]:
    """The counts of the batches of a source, until `max_rows` rows are good or there are no more."""
    good, wanted = 0, max_rows
    while wanted is None or wanted > 0:
        # These rows may all be good. Only their results say how many more are needed.
        taken = 0
        for counts in pool.render(_batches(islice(records, wanted), number)):
            taken += counts.rows
            good += counts.good
            advance(counts.good)
            yield counts
        if max_rows is None or wanted is None or taken < wanted:
            return
        wanted = max_rows - good


def _batches(records: Iterator[Record], number: int) -> Iterator[bytes]:
    """Batches of a source's rows. There is at least one, so that its settings are checked."""
    batch: list[Record] = []
    num_batches, size = 0, 0
    for record in records:
        batch.append(record)
        size += len(record[2]) if isinstance(record[2], bytes) else 0
        if len(batch) == _ROWS_IN_BATCH or size >= _LINE_BYTES_IN_BATCH:
            yield batch_of(number, batch)
            batch, num_batches, size = [], num_batches + 1, 0
    if batch or not num_batches:
        yield batch_of(number, batch)


def _counts(
    batches: Iterator[BatchCounts],
    packed: PackedSource,
    config: Config,
    bad_rows: BadRows,
    keys: KeyCounts,
) -> SourceCounts:
    """The counts of a source from those of its batches, whose bad rows and keys are added in their order."""
    name, limit = packed.name, length_limit(config, packed.source)
    units, filtered, spelled = 0, 0, Counter[str]()
    for batch in batches:
        for where, reason in batch.bad:
            bad_rows.add(name, where, reason)
        keys.unused.update(batch.unused)
        for column, seen in batch.columns.items():
            keys.columns[column] = keys.columns.get(column, False) or seen
        longest, row = batch.longest
        limit.add(dropped=batch.dropped, truncated=batch.truncated, longest=(longest, row))
        units += batch.units
        filtered += batch.filtered
        spelled.update(batch.spelled)
    limit.check()
    return SourceCounts(
        name,
        rows=units,
        bad=bad_rows.by_source[name],
        dropped=limit.dropped,
        truncated=limit.truncated,
        filtered=filtered,
        spelled=dict(spelled),
        template=packed.template_digest,
    )
