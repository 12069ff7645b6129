"""A search engine over the user's documents, which is an index of SQLite's FTS5 ranked by BM25."""

import hashlib
import json
import re
import sqlite3
from functools import lru_cache
from typing import Any

from megatron_post.data.rows import BadRows
from megatron_post.synthesis.inputs import DocumentsInput, read_input

_WORD = re.compile(r"\w+")
_MOST_WORDS = 64  # of a query
_TABLE = "CREATE VIRTUAL TABLE passages USING fts5(file UNINDEXED, place UNINDEXED, text, tokenize='porter')"
_BEST = "SELECT file, place, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?"


class Index:
    """Passages of documents, in a temporary database of this process.

    checksum: of all passages. Searches with equal checksum, query and number of results have equal results.
    """

    def __init__(self, documents: DocumentsInput) -> None:
        """Raises `ValueError` if the documents cannot be read, or one of them is not text."""
        self._database = sqlite3.connect("")
        self._database.execute(_TABLE)
        checksum = hashlib.sha256()
        for row in read_input(documents, bad_rows=BadRows()):
            file, text = row.values["file"], row.values["text"].strip()
            place = f"{file}:{row.values['first_line']}-{row.values['last_line']}"
            self._database.execute("INSERT INTO passages VALUES (?, ?, ?)", (file, place, text))
            checksum.update(json.dumps([place, text]).encode())
        self.checksum = checksum.hexdigest()

    def best(self, query: str, most: int) -> list[dict[str, str]]:
        """At most `most` passages that have a word of the query, the best first.

        The words are compared by their stems. No part of the query is read as FTS5's syntax.
        """
        words = list(dict.fromkeys(_WORD.findall(query.lower())))[:_MOST_WORDS]
        if not words:
            return []
        expression = " OR ".join(f'"{word}"' for word in words)
        found = self._database.execute(_BEST, (expression, most)).fetchall()
        return [dict(zip(("title", "url", "description"), each, strict=True)) for each in found]


def index_of(documents: DocumentsInput) -> Index:
    """The index of documents. It is made at the first call with the same settings."""
    return _made(documents.model_dump_json())


@lru_cache(maxsize=1)
def _made(settings: str) -> Index:
    return Index(DocumentsInput.model_validate_json(settings))


def results_page(query: str, passages: list[dict[str, str]]) -> str:
    """The output of a search, in the form that Llama 3's reference code gives to brave_search."""
    top: list[dict[str, Any]] = [{**passage, "type": "search_result"} for passage in passages]
    return json.dumps({"query": query, "top_k": top}, ensure_ascii=False)
