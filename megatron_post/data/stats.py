"""`data stats` prints a store's contents by source, as the report's SFT table, and how full packs are."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import DOCUMENTS, GROUPS, ONE_SEGMENT, SEPARATE
from megatron_post.data.template import RESPONSE_ROLES, STEP_ROLES, TokenRole


@dataclass(frozen=True)
class SourceStats:
    """Statistics of one source, or of all. Rows count repeats, and the other fields are means over rows.

    tokens: real tokens, context + response. response: tokens of the assistant's last message and terminator.
    """

    name: str
    rows: int
    share: float
    turns: float
    tokens: float
    context: float
    response: float


@dataclass(frozen=True)
class PackingStats:
    """How the tokens of a group's packs are used. real + segment_padding + tail_padding = capacity."""

    packs: int
    segments: int
    capacity: int
    real: int
    segment_padding: int
    tail_padding: int
    trained: int

    @property
    def efficiency(self) -> float:
        """Real tokens / capacity."""
        return self.real / self.capacity if self.capacity else 0.0


@dataclass(frozen=True)
class RoleCounts:
    """Counts of tokens and messages by source. Repeated rows are counted every time.

    tokens: int64 [sources, roles]. trained, masked: int64 [sources], the numbers of assistant messages that
    are trained and that the rows mask.
    """

    tokens: np.ndarray
    trained: np.ndarray
    masked: np.ndarray


def role_counts(store: PackStore) -> RoleCounts:
    """Count roles and messages. It reads the roles of every pack."""
    sources = len(store.sources)
    tokens = np.zeros((sources, len(TokenRole)), dtype=np.int64)
    messages = {role: np.zeros(sources, dtype=np.int64) for role in (TokenRole.BODY, TokenRole.MASKED)}
    padded, source_of = store.column("padded"), store.column("source")
    for index, bounds in enumerate(zip(*store.index.segments(np.arange(len(store))), strict=True)):
        segments = slice(*bounds)
        ends = np.cumsum(padded[segments])
        source = np.repeat(source_of[segments], padded[segments])
        roles = store.read_row("roles", index)[: len(source)]
        tokens += np.bincount(source * len(TokenRole) + roles, minlength=tokens.size).reshape(tokens.shape)
        for role, count in messages.items():
            # A message is one run of tokens, because a header or the segment's start precedes every message.
            inside = np.isin(roles, RESPONSE_ROLES) if role is TokenRole.BODY else roles == role
            begins = inside & ~np.concatenate([[False], inside])[:-1]
            begins[ends[:-1]] = inside[ends[:-1]]
            count += np.bincount(source[begins], minlength=sources)
    return RoleCounts(tokens, trained=messages[TokenRole.BODY], masked=messages[TokenRole.MASKED])


def source_stats(store: PackStore) -> list[SourceStats]:
    """The statistics of each source of a group, then the total. A unit is a row with all its segments."""
    units, first = np.unique(store.column("unit"), return_index=True)
    contexts, responses = _contexts_and_responses(store, len(units))
    sources, turns = store.column("source")[first], store.column("turns")[first]
    everything = np.ones(len(units), dtype=bool)
    selections = [(counts.name, sources == number) for number, counts in enumerate(store.sources)]
    return [
        SourceStats(
            name=name,
            rows=int(rows.sum()),
            share=rows.sum() / max(len(units), 1),
            turns=_mean(turns[rows]),
            tokens=_mean((contexts + responses)[rows]),
            context=_mean(contexts[rows]),
            response=_mean(responses[rows]),
        )
        for name, rows in [*selections, ("total", everything)]
    ]


def packing_stats(
    store: PackStore,
    *,
    trained_roles: Collection[TokenRole] = RESPONSE_ROLES,
    counts: RoleCounts | None = None,
) -> PackingStats:
    """Real tokens and padding of a group. counts: the store's role counts, computed here if it is None."""
    real, padded = int(store.column("length").sum()), int(store.column("padded").sum())
    capacity = len(store) * store.settings.pack_length
    by_role = (role_counts(store) if counts is None else counts).tokens.sum(axis=0)
    return PackingStats(
        packs=len(store),
        segments=len(store.column("length")),
        capacity=capacity,
        real=real,
        segment_padding=padded - real,
        tail_padding=capacity - padded,
        trained=int(by_role[list(trained_roles)].sum()),
    )


def print_stats(
    path: str | Path, *, console: Console, trained_roles: Collection[TokenRole] | None = None
) -> None:
    """Print the tables of each group that has packs.

    trained_roles: by default those of the store's kind of examples.
    """
    for group in GROUPS:
        store = open_store(path, group)
        if len(store):
            console.print(f"{path}/{group}", highlight=False)
            counts, has_steps = role_counts(store), store.settings.layout == "steps"
            trained = trained_roles or (STEP_ROLES if has_steps else RESPONSE_ROLES)
            _print_sources(store, console)
            _print_trained(counts, trained, store, console)
            _print_packing(packing_stats(store, trained_roles=trained, counts=counts), store, console)


def _print_sources(store: PackStore, console: Console) -> None:
    table = Table(box=SIMPLE)
    table.add_column("source", overflow="fold")
    dialogs = store.settings.layout in ONE_SEGMENT
    rows = ("rows", "%", "turns", "tokens", "in context", "in final response")
    comparisons = ("comparisons", "%", "turns", "tokens an example", "in prompt", "in response")
    for heading in rows if dialogs else comparisons:
        table.add_column(heading, justify="right")
    for stats in source_stats(store):
        means = (stats.turns, stats.tokens, stats.context, stats.response)
        table.add_row(
            stats.name, f"{stats.rows:,}", f"{100 * stats.share:.2f}", *(f"{mean:,.1f}" for mean in means)
        )
    console.print(table)
    for counts in store.sources:
        if counts.bad or counts.dropped or counts.truncated or counts.filtered:
            console.print(
                f"{counts.name}: {counts.bad:,} bad rows left out, {counts.dropped:,} overlong dropped, "
                f"{counts.truncated:,} truncated, {counts.filtered:,} left out by "
                f"{'the template' if counts.template else 'data.preferences'}"
            )


def _print_trained(
    counts: RoleCounts, trained_roles: Collection[TokenRole], store: PackStore, console: Console
) -> None:
    tokens = counts.tokens[:, list(trained_roles)].sum(axis=1)
    real = counts.tokens.sum(axis=1) - counts.tokens[:, TokenRole.PADDING]
    for number, source in enumerate(store.sources):
        where = (
            f"{counts.trained[number]:,} documents and parts of documents"
            if store.settings.layout in DOCUMENTS
            else f"{counts.trained[number]:,} messages of the assistant; {counts.masked[number]:,} of its "
            "messages are masked"
        )
        console.print(
            f"{source.name}: {tokens[number]:,} of {real[number]:,} tokens are trained "
            f"({100 * tokens[number] / max(real[number], 1):.2f}%) in {where}",
            highlight=False,
            soft_wrap=True,
        )


def _print_packing(stats: PackingStats, store: PackStore, console: Console) -> None:
    table = Table(box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("packs", f"{stats.packs:,}", f"of {store.settings.pack_length:,} tokens")
    multiple = store.settings.segment_multiple
    padded = "not padded" if multiple == 1 else f"padded to multiples of {multiple}"
    table.add_row("segments", f"{stats.segments:,}", padded)
    for name, tokens in (
        ("real tokens", stats.real),
        ("padding inside segments", stats.segment_padding),
        ("padding at the tail", stats.tail_padding),
        ("trained tokens", stats.trained),
    ):
        table.add_row(name, f"{tokens:,}", f"{100 * tokens / max(stats.capacity, 1):.2f}%")
    console.print(table)


def _contexts_and_responses(store: PackStore, num_units: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before the final response and the tokens in it, float64 [units] each.

    A preference's prompt counts once, even if it is stored with every response. Its response is the mean of
    its responses.
    """
    unit, responses = store.column("unit"), store.column("response")
    contexts = store.column("length") - responses
    dialogs = store.settings.layout in ONE_SEGMENT
    ends = np.ones(len(unit)) if dialogs else store.column("rank") >= 0
    count = np.bincount(unit, weights=ends, minlength=num_units)
    context = np.bincount(unit, weights=contexts, minlength=num_units)
    if store.settings.layout == "isolated_pairs":  # the prompt's last token begins every response
        context -= count - 1
    copies = np.maximum(count, 1) if store.settings.layout in SEPARATE else 1.0
    return context / copies, np.bincount(unit, weights=responses, minlength=num_units) / np.maximum(count, 1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
