"""A search engine over the user's documents, which is an index of SQLite's FTS5 ranked by BM25."""

import hashlib
import json
import re
import sqlite3
from threading import Lock
from typing import Any

from megatron_post.data.rows import BadRows
from megatron_post.synthesis.inputs import DocumentsInput, read_input

_WORD = re.compile(r"\w+")
_MOST_WORDS = 64  # of a query
_TABLE = "CREATE VIRTUAL TABLE passages USING fts5(file UNINDEXED, place UNINDEXED, text, tokenize='porter')"
_BEST = (
    "SELECT file, place, text, snippet(passages, 2, '', '', ' ... ', 64) "  # 64 words, the most it can give
    "FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?"
)


class Index:
    """Passages of documents, in a temporary database of this process.

    checksum: of all passages. Searches with equal checksum, query and number of results have equal results.
    """

    def __init__(self, documents: DocumentsInput, *, bad: int = 0) -> None:
        """bad: documents that may be bad, such as those that are not text.

        Raises `ValueError` (`TooManyBadRows`) if the documents cannot be read, if none has a passage, and if
        the database cannot be written.
        """
        self._database = sqlite3.connect("", check_same_thread=False)
        self._lock = Lock()
        try:
            self.checksum = self._write(documents, bad)
        except sqlite3.Error as error:
            raise ValueError(
                f"settings.documents: the index cannot be written to a temporary file: {error}. TMPDIR "
                "names its directory"
            ) from None

    def _write(self, documents: DocumentsInput, bad: int) -> str:
        self._database.execute(_TABLE)
        checksum, bad_rows = hashlib.sha256(), BadRows(bad, key="settings.bad_documents")
        for row in read_input(documents, bad_rows=bad_rows, key="settings.documents"):
            file, text = row.values["file"], row.values["text"].strip()
            place = f"{file}:{row.values['first_line']}-{row.values['last_line']}"
            self._database.execute("INSERT INTO passages VALUES (?, ?, ?)", (file, place, text))
            checksum.update(json.dumps([place, text]).encode())
        if self._database.execute("SELECT 1 FROM passages LIMIT 1").fetchone() is None:
            raise ValueError(f"settings.documents: {documents.path} has no passage that is taken")
        return checksum.hexdigest()

    def best(self, query: str, most: int, *, longest: int) -> list[dict[str, str]]:
        """At most `most` passages that have a word of the query, the best first.

        longest: characters of a passage. A longer one gives its part that has most words of the query. Words
        are compared by their stems. No part of the query is read as FTS5's syntax.
        """
        words = list(dict.fromkeys(_WORD.findall(query.lower())))[:_MOST_WORDS]
        if not words:
            return []
        expression = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            found = self._database.execute(_BEST, (expression, most)).fetchall()
        return [
            {"title": file, "url": place, "description": text if len(text) <= longest else part[:longest]}
            for file, place, text, part in found
        ]


def results_page(query: str, passages: list[dict[str, str]]) -> str:
    """The output of a search, in the form that Llama 3's reference code gives to brave_search."""
    top: list[dict[str, Any]] = [{**passage, "type": "search_result"} for passage in passages]
    return json.dumps({"query": query, "top_k": top}, ensure_ascii=False)
