"""`data show` prints text, colours, segment boundaries, and underlined trained tokens."""

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_post.data.assembly import assemble
from megatron_post.data.dialog import Dialog, Message
from megatron_post.data.show import show_pack
from megatron_post.data.store_format import SourceCounts, StoreSettings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import TokenRole, render
from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer
from megatron_post.data.units import UnitPile


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one pack of 128 tokens, which has rows 1 and 2 of a source and padding at its end."""
    train_small_tokenizer(["naïve cat"] * 10, 280).save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    pile = UnitPile()
    for row in (1, 2):
        messages = (Message("user", f"cat {row}?"), Message("assistant", "naïve ☕"))
        pile.add([render(Dialog(messages), tokenizer)], source=0, sample=row, turns=1)
    settings = StoreSettings(
        128, 4, tokenizer.fingerprint, tokenizer.pad_id, 1, "dialogs", str(tmp_path / "tokenizer")
    )
    assembly = assemble(pile.units(), np.arange(2), "train", settings)
    with StoreWriter(tmp_path / "store", settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("cats", rows=2)],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    return tmp_path / "store"


def shown(store: Path, index: int = 0, *, colour: bool = False, **options: Any) -> str:
    output = StringIO()
    console = Console(
        file=output, width=100, force_terminal=colour, color_system="standard" if colour else None
    )
    show_pack(store, index, console=console, **options)
    return output.getvalue()


def test_text_boundaries_and_padding(store: Path) -> None:
    text = shown(store)
    assert "cats, row 1, tokens 0-" in text or "cats, row 2, tokens 0-" in text
    assert text.count("<|begin_of_text|>") == text.count("naïve ☕<|eot_id|>") == 2
    assert ": padding, tokens " in text
    answer = load_tokenizer(store.parent / "tokenizer").encode("naïve ☕")
    assert text.count(f", {len(answer) + 1} trained") == 2 and ", 0 trained" in text


def test_trained_tokens_are_underlined(store: Path) -> None:
    text = shown(store, colour=True)
    assert "\x1b[4;32mnaïve ☕" in text  # underlined, green
    assert "\x1b[4;35m<|eot_id|>" in text
    assert "\x1b[34m<|begin_of_text|>" in text
    without = shown(store, colour=True, trained_roles=[TokenRole.BODY])
    assert "\x1b[35m<|eot_id|>" in without


def test_a_pack_that_is_not_there(store: Path) -> None:
    with pytest.raises(ValueError, match=r"pack 7 does not exist: .* has 1 packs"):
        shown(store, 7)


def test_another_tokenizer(store: Path, tmp_path: Path) -> None:
    train_small_tokenizer(["dog"], 265).save(tmp_path / "other")
    with pytest.raises(ValueError, match="was made with tokenizer"):
        shown(store, tokenizer_path=str(tmp_path / "other"))
