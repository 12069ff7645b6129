"""The figures of `data stats` are compared with numbers that were counted by hand."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_post.data.assembly import assemble
from megatron_post.data.stats import packing_stats, print_stats, role_counts, source_stats
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import SourceCounts, StoreSettings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import UnitPile, response_length


def segment(context: int, response: int) -> Rendered:
    roles = [TokenRole.HEADER] + [TokenRole.PROMPT] * (context - 1) + [TokenRole.BODY] * (response - 1)
    roles.append(TokenRole.TERMINATOR)
    return Rendered(np.ones(context + response, dtype=np.int32), np.array(roles, dtype=np.uint8))


def store_at(path: Path) -> PackStore:
    """A store with packs of 24 tokens.

    Source a has rows of 5 + 3 tokens (padded to 8) and 10 + 2 tokens (12). Source b has one row of 6 + 4
    tokens (padded to 12). The 32 padded tokens give two packs of 12 + 12 and of 8 + 16 of padding. There are
    8 + 12 + 10 = 30 real tokens.
    """
    pile = UnitPile()
    pile.add([segment(5, 3)], source=0, sample=1, turns=1)
    pile.add([segment(10, 2)], source=0, sample=2, turns=2)
    pile.add([segment(6, 4)], source=1, sample=1, turns=3)
    settings = StoreSettings(24, 4, "f", 0, 1)
    assembly = assemble(pile.units(), np.arange(3), "train", settings)
    with StoreWriter(path, settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("a", rows=2, dropped=7), SourceCounts("b", rows=1)],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    return open_store(path, "train")


def test_by_source(tmp_path: Path) -> None:
    a, b, total = source_stats(store_at(tmp_path / "s"))
    assert (a.name, a.rows, a.share, a.turns, a.tokens, a.context, a.response) == (
        "a",
        2,
        2 / 3,
        1.5,
        10,
        7.5,
        2.5,
    )
    assert (b.name, b.rows, b.share, b.turns, b.tokens, b.context, b.response) == ("b", 1, 1 / 3, 3, 10, 6, 4)
    assert (total.name, total.rows, total.share, total.turns, total.tokens) == ("total", 3, 1, 2, 10)
    assert (total.context, total.response) == (7, 3)


def test_packing(tmp_path: Path) -> None:
    stats = packing_stats(store_at(tmp_path / "s"))
    assert (stats.packs, stats.segments, stats.capacity, stats.real) == (2, 3, 48, 30)
    assert (stats.segment_padding, stats.tail_padding) == (2, 16)
    assert stats.efficiency == 30 / 48
    assert stats.trained == 3 + 2 + 4
    bodies = packing_stats(store_at(tmp_path / "t"), trained_roles=[TokenRole.BODY])
    assert bodies.trained == 2 + 1 + 3


def test_trained_and_masked_messages_by_source(tmp_path: Path) -> None:
    """Rows have two turns. In a the first is masked, so 3 of 12 tokens are trained. In b 5 of 12 are trained.

    Segments of 12 tokens need no padding. So the first token of one segment directly follows the last token
    of another one.
    """
    header, prompt, body, terminator = (
        TokenRole.HEADER,
        TokenRole.PROMPT,
        TokenRole.BODY,
        TokenRole.TERMINATOR,
    )
    pile = UnitPile()
    for source, first in enumerate(([TokenRole.MASKED] * 2, [body, terminator])):
        roles = [header, prompt, prompt, header, *first, header, prompt, header, body, body, terminator]
        row = Rendered(np.ones(12, dtype=np.int32), np.array(roles, dtype=np.uint8))
        pile.add([row], source=source, sample=1, turns=2)
    pile.add(
        [Rendered(np.ones(2, np.int32), np.array([body, terminator], np.uint8))], source=1, sample=2, turns=1
    )
    settings = StoreSettings(28, 4, "f", 0, 1)
    assembly = assemble(pile.units(), np.arange(3), "train", settings)
    with StoreWriter(tmp_path / "s", settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("a", rows=1), SourceCounts("b", rows=2)],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    counts = role_counts(open_store(tmp_path / "s", "train"))
    assert counts.trained.tolist() == [1, 3] and counts.masked.tolist() == [1, 0]
    output = StringIO()
    print_stats(tmp_path / "s", console=Console(file=output, width=120))
    expected = (
        "a: 3 of 12 tokens are trained (25.00%) in 1 messages of the assistant; 1 of its messages are masked"
    )
    assert expected in output.getvalue()
    assert "b: 7 of 14 tokens are trained (50.00%) in 3 messages" in output.getvalue()


def test_printed(tmp_path: Path) -> None:
    store_at(tmp_path / "s")
    output = StringIO()
    print_stats(tmp_path / "s", console=Console(file=output, width=120))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["a", "2", "66.67", "1.5", "10.0", "7.5", "2.5"] in lines
    assert ["padding", "at", "the", "tail", "16", "33.33%"] in lines
    assert "a: 0 bad rows left out, 7 overlong dropped, 0 truncated" in output.getvalue()
    assert "eval" not in output.getvalue()  # an empty group is left out


def test_the_final_response_is_what_follows_the_last_header() -> None:
    header, prompt, body, terminator = (
        TokenRole.HEADER,
        TokenRole.PROMPT,
        TokenRole.BODY,
        TokenRole.TERMINATOR,
    )
    two_turns = [header, prompt, header, body, terminator, header, prompt, header, body, body, terminator]
    assert response_length(np.array(two_turns, dtype=np.uint8)) == 3
    assert response_length(np.array([body, terminator], dtype=np.uint8)) == 2  # a response without its prompt


@pytest.mark.parametrize("layout", ["separate", "isolated", "isolated_pairs"])
def test_comparisons(tmp_path: Path, layout: str) -> None:
    """A comparison has a prompt of 5 tokens and responses of 3 and 2 tokens.

    The example counts 5 + 2.5 tokens, whether the prompt is stored once or twice.
    """
    pile = UnitPile()
    if layout == "separate":
        unit = [replace(segment(5, 3), rank=0), replace(segment(5, 2), rank=1)]
        pile.add(unit, source=0, sample=1, turns=1)
    else:
        prompt = [TokenRole.HEADER, *[TokenRole.PROMPT] * 3, TokenRole.HEADER]
        responses = [
            [TokenRole.BODY, TokenRole.BODY, TokenRole.TERMINATOR],
            [TokenRole.BODY, TokenRole.TERMINATOR],
        ]
        if layout == "isolated_pairs":
            responses = [[prompt[-1], *response] for response in responses]
            prompt = prompt[:-1]
        roles = [np.array(part, dtype=np.uint8) for part in (prompt, *responses)]
        unit = [
            Rendered(np.ones(len(part), dtype=np.int32), part, rank - 1) for rank, part in enumerate(roles)
        ]
        pile.add(unit, source=0, sample=1, turns=1)
    settings = StoreSettings(24, 4, "f", 0, 1, layout)
    assembly = assemble(pile.units(), np.arange(1), "train", settings)
    with StoreWriter(tmp_path / "s", settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("a", rows=1)],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    a, _ = source_stats(open_store(tmp_path / "s", "train"))
    assert (a.rows, a.tokens, a.context, a.response) == (1, 7.5, 5, 2.5)
