"""Chunks, spans and buckets in tokens."""

from pathlib import Path

import pytest

from megatron_post.config.load import ConfigError, parse
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.synthesis.long.tokens import DocumentSettings, chunks_of, found_once, token_span
from megatron_post.synthesis.recipe import Dropped


def _settings(path: Path, **values: int) -> DocumentSettings:
    return parse(DocumentSettings, {"tokenizer": str(path), **values}, origin="test")


def test_chunks_are_the_document_and_end_with_lines(tokenizer_path: Path, pages: str) -> None:
    settings = _settings(tokenizer_path, chunk=1000)
    chunks = chunks_of(pages[:60_000], settings)
    assert "".join(chunk.text for chunk in chunks) == pages[:60_000]
    assert all(pages[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert all(chunk.text.endswith("\n") for chunk in chunks[:-1])
    lengths = [len(settings.own_tokenizer.encode(chunk.text)) for chunk in chunks]
    # a token may be split where a chunk ends
    assert max(lengths) <= 1001 and min(lengths[:-1]) >= 499


@pytest.mark.parametrize("text", ["x" * 5000, "🗼" * 700, "né \u2028 à" * 400, " " * 3000, "1 " * 2000])
def test_chunks_of_a_text_without_lines(tokenizer_path: Path, text: str) -> None:
    chunks = chunks_of(text, _settings(tokenizer_path, chunk=100, least_chunks=1))
    assert "".join(chunk.text for chunk in chunks) == text and all(chunk.text for chunk in chunks)


def test_a_document_of_one_chunk_is_not_long(tokenizer_path: Path) -> None:
    with pytest.raises(Dropped, match="too few chunks"):
        chunks_of("A short text.", _settings(tokenizer_path))


def test_a_passage_is_found_once_or_not_at_all() -> None:
    assert found_once("b  c", "a b\nc d") == (2, 5)
    assert found_once("b c", "a b c, b c") is None
    assert found_once("aa", "aaa") is None  # twice, though both overlap
    assert found_once("x", "abc") is None and found_once(" ", "a b") is None
    assert found_once("(.*)", "all (.*) of it") == (4, 8)


@pytest.mark.parametrize("passage", ["noon", "é🗼", "🗼", "at noon.", "The"])
def test_the_tokens_of_a_passage_hold_it_and_no_token_more(tokenizer_path: Path, passage: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = "The bell of é🗼 rings at noon. It is loud."
    start = text.index(passage)
    first, behind = token_span(start, start + len(passage), text, tokenizer)
    ids = tokenizer.encode(text)
    assert passage in tokenizer.decode(ids[first:behind])
    assert passage not in tokenizer.decode(ids[first + 1 : behind])
    assert passage not in tokenizer.decode(ids[first : behind - 1])


def test_buckets_must_increase(tokenizer_path: Path) -> None:
    with pytest.raises(ConfigError, match="must increase"):
        parse(DocumentSettings, {"tokenizer": str(tokenizer_path), "buckets": [2, 2]}, origin="test")
