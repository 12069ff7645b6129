"""Documents of continued pre-training, from rows to packs."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_post.config.data import Source
from megatron_post.data.build import build_store
from megatron_post.data.dialog import BadRow
from megatron_post.data.document import Document
from megatron_post.data.document_packs import Pieces, cut_documents, whole_documents
from megatron_post.data.mixture import mix, shares
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.rows import TooManyBadRows
from megatron_post.data.show import show_pack
from megatron_post.data.special_tokens import BOS, END_OF_TEXT
from megatron_post.data.stats import packing_stats, print_stats
from megatron_post.data.store import PackStore, StoreError, open_store
from megatron_post.data.template import TokenRole, render_documents
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, train_small_tokenizer
from tests.tiny import tiny_config

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(40)]


def _read(row: Any, **columns: str) -> Any:
    return example_of_row(row, Source(name="s", path="x.jsonl", columns=columns or {"text": "text"}))


# rows


def test_a_document_is_unchanged() -> None:
    """Leading and trailing blanks are a part of code. Markers of chat templates are text like any other."""
    assert _read({"text": "  a\n", "id": 3}) == Document("  a\n")
    assert _read({"content": "[INST] a"}, text="content") == Document("[INST] a")
    assert _read({"data": {"text": "a"}}, text="data.text") == Document("a")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " \n"}, "the text is blank"),
        ({"text": ""}, "the text is blank"),
        ({"text": ["a"]}, "'text' is list, not text"),
        ({"text": None}, "no column 'text'"),
        ({"content": "a"}, "no column 'text'; the row has \\['content'\\].*text: content"),
        ({"text": "a\ud800"}, "lone surrogate at character 1"),
        ({"text": "a" * 4_000_001}, "huge"),
        ({"text": "a", "train": False}, "the row says that it is not trained: train=False"),
        ({"text": "a", "weight": 0.5}, "weight=0.5; it must be true, false, 1 or 0"),
        ("a", "a row must be a mapping"),
    ],
)
def test_bad_rows(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        _read(row)


# packs


def _packs(pieces: Pieces) -> list[list[tuple[int, int, int]]]:
    rows = list(zip(pieces.documents, pieces.first, pieces.last, strict=True))
    ends = pieces.pack_ends.tolist()
    return [[tuple(map(int, row)) for row in rows[a:b]] for a, b in pairwise(ends)]


def test_the_examples_of_cut_documents() -> None:
    found = cut_documents(np.array([3, 4]), capacity=4, multiple=1)
    assert _packs(found) == [[(0, 0, 3)], [(1, 0, 4)]]
    found = cut_documents(np.array([6, 3]), capacity=4, multiple=1)
    assert _packs(found) == [[(0, 0, 4)], [(0, 3, 6)], [(1, 0, 3)]]


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("place", [cut_documents, whole_documents])
def test_every_token_is_a_label_once(place: Any, multiple: int) -> None:
    """All but a document's first token are trained once, and no pack is longer than the capacity."""
    rng = np.random.default_rng(multiple)
    lengths = rng.integers(2, 60 if place is whole_documents else 300, 200)
    found = place(lengths, capacity=64, multiple=multiple)
    times = [np.zeros(length, int) for length in lengths]
    for pack in _packs(found):
        assert pack and sum(-(-(last - first) // multiple) * multiple for _, first, last in pack) <= 64
        for document, first, last in pack:
            times[document][first + 1 : last] += 1
    assert all(not each[0] and (each[1:] == 1).all() for each in times)
    if place is cut_documents:
        # A pack is left with room for at most one token and the padding of its pieces.
        real = [sum(last - first for _, first, last in pack) for pack in _packs(found)]
        assert all(n >= 63 - multiple * len(pack) for n, pack in zip(real, _packs(found)[:-1], strict=False))


def test_packs_of_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.pack_length=1 has no room"):
        cut_documents(np.array([3]), capacity=1, multiple=1)


def test_packs_in_another_order() -> None:
    found = cut_documents(np.array([6, 3, 9]), capacity=4, multiple=1)
    order = np.array([3, 0, 2, 1, 5, 4])
    packs = _packs(found)
    assert _packs(found.with_packs(order)) == [packs[i] for i in order]


# the mixture


def test_weights_are_shares_of_tokens() -> None:
    """90% of the tokens come from `languages`, although its rows are ten times as long."""
    rng = np.random.default_rng(0)
    sources = [
        Source(name="languages", path="a", weight=9),
        Source(name="english", path="b", weight=1),
        Source(name="once", path="c"),
    ]
    tokens = {"languages": rng.integers(900, 1100, 400), "english": rng.integers(90, 110, 4000)}
    tokens["once"] = np.array([5, 5])
    available = {name: len(lengths) for name, lengths in tokens.items()}
    uses = mix(sources, available, seed=3, tokens=tokens)
    assert uses["languages"].all() and uses["once"].tolist() == [1, 1]
    found = {s.name: s for s in shares(list(uses), list(uses.values()), list(tokens.values()))}
    expected = found["languages"].tokens / 9
    assert abs(found["english"].tokens - expected) <= 110 / 2  # to the nearest row
    by_rows = mix(sources, available, seed=3)
    assert by_rows["english"].sum() == round(400 / 9)


# stores


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(TEXTS, 300).save(directory)
    return load_tokenizer(directory)


def _config(tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], **sections: Any) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(tmp_path / "tokenizer")
    source = {"name": "code", "path": str(tmp_path / "rows.jsonl"), **sections.pop("source", {})}
    return tiny_config(
        stage=sections.pop("stage", "pretrain"),
        model={"vocab_size": 512},
        tokenizer={"path": str(tmp_path / "tokenizer")},
        data={"store": str(tmp_path / "store"), "sources": [source], **sections.pop("data", {})},
        **sections,
    )


def _store(config: Any) -> PackStore:
    build_store(config, console=Console(quiet=True))
    return open_store(config.data.store, "train")


def test_tokens_and_roles(tokenizer: Tokenizer) -> None:
    """Begin-of-text, the text and end-of-text, as Llama 3 was pre-trained."""
    (found,) = render_documents(["a b"], tokenizer)
    ids = [tokenizer.special(BOS), *tokenizer.encode("a b"), tokenizer.special(END_OF_TEXT)]
    assert found.tokens.tolist() == ids
    roles = [TokenRole.HEADER, *[TokenRole.BODY] * (len(ids) - 2), TokenRole.TERMINATOR]
    assert found.roles.tolist() == roles


@pytest.mark.parametrize(
    ("documents", "attention", "context"),
    [("cut", "document", 1), ("cut", "document", 2), ("cut", "pack", 2), ("whole", "document", 2)],
)
def test_the_store_has_every_token(
    tmp_path: Path, tokenizer: Tokenizer, documents: str, attention: str, context: int
) -> None:
    """The pieces of each document, put together, are the document. Trained tokens are all but the first."""
    rows = [{"text": text} for text in TEXTS]
    config = _config(
        tmp_path,
        tokenizer,
        rows,
        pretrain={"documents": documents, "attention": attention},
        parallel={"context": context},
        data={"pack_length": 256 if documents == "whole" else 64},
    )
    store = _store(config)
    assert store.settings.segment_multiple == (2 * context if attention == "document" and context > 1 else 1)
    trained = 0
    rendered = render_documents(TEXTS, tokenizer)
    pieces: dict[int, list[list[int]]] = {}
    for index in range(len(store)):
        pack = store.read(index)
        for start, length, sample in zip(pack.cu_seqlens, pack.lengths, pack.sample_ids, strict=False):
            if length:
                pieces.setdefault(int(sample), []).append(pack.tokens[start : start + length].tolist())
                trained += int(np.isin(pack.roles[start + 1 : start + length], [3, 4]).sum())
                assert pack.roles[start] in (TokenRole.HEADER, TokenRole.PROMPT)
    assert trained == sum(len(each) - 1 for each in rendered)
    assert packing_stats(store).trained == trained
    for row, document in enumerate(rendered, start=1):
        whole = document.tokens.tolist()
        assert sum(len(piece) - 1 for piece in pieces[row]) == len(whole) - 1
        text = " ".join(map(str, whole))
        assert all(" ".join(map(str, piece)) in text for piece in pieces[row])
        assert documents == "cut" or pieces[row] == [whole]


def test_stats_and_show(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = _config(tmp_path, tokenizer, [{"text": text} for text in TEXTS], data={"pack_length": 64})
    _store(config)
    with Console(record=True, width=200, file=(tmp_path / "out").open("w")) as console:
        print_stats(config.data.store, console=console)
        show_pack(config.data.store, 0, console=console)
    text = console.export_text()
    assert "documents and parts of documents" in text and "code, row" in text


def test_a_store_of_whole_documents_is_not_one_of_cut_ones(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = _config(tmp_path, tokenizer, [{"text": text} for text in TEXTS], data={"pack_length": 256})
    _store(config)
    with pytest.raises(StoreError, match="holds examples as 'cut_documents', this stage needs 'whole_doc"):
        open_store(config.data.store, "train", layout="whole_documents")


def test_long_whole_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "word " * 300}, {"text": "def f"}]
    keys: Any = {"pretrain": {"documents": "whole"}}
    with pytest.raises(ValueError, match=r"longer than data.pack_length=128"):
        _store(_config(tmp_path, tokenizer, rows, **keys))
    store = _store(_config(tmp_path, tokenizer, rows, data={"overlong": "drop"}, **keys))
    assert (store.sources[0].rows, store.sources[0].dropped) == (1, 1)


@pytest.mark.parametrize(
    ("stage", "row", "source", "reason"),
    [
        ("sft", {"text": "a"}, {}, "cannot tell the format from the columns"),
        ("sft", {"text": "a"}, {"columns": {"text": "text"}}, "holds documents, stage=sft trains dialogs"),
        ("reward", {"text": "a"}, {"columns": {"text": "text"}}, "holds rows without ranked responses"),
        ("step_reward", {"text": "a"}, {"columns": {"text": "text"}}, "rows without labelled steps"),
        ("pretrain", {"prompt": "a", "completion": "b"}, {}, "no column 'text'"),
        ("pretrain", {"text": "a"}, {"format": "messages"}, "leave out format=messages"),
        ("pretrain", {"text": "a"}, {"columns": {"user": "a", "assistant": "b"}}, "trains plain texts"),
        ("pretrain", {"text": "a"}, {"columns": {"text": "text", "system": "b"}}, "nor a document"),
    ],
)
def test_rows_of_another_stage(
    tmp_path: Path, tokenizer: Tokenizer, stage: str, row: Any, source: Any, reason: str
) -> None:
    with pytest.raises((ValueError, TooManyBadRows), match=reason):
        _store(_config(tmp_path, tokenizer, [row], stage=stage, source=source))
