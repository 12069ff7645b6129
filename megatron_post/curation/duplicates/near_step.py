"""The step `near_duplicates`."""

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.duplicates.near import (
    NearDuplicates,
    band_groups,
    band_hashes,
    band_shape,
    colliding_rows,
)
from megatron_post.curation.duplicates.priority import Duplicates, reasons, row_names
from megatron_post.curation.duplicates.spared import KEYS, SPARE, Spare, SpareKeys, keys_of
from megatron_post.curation.duplicates.texts import texts_of
from megatron_post.curation.duplicates.words import WordHashes, ngram_hashes
from megatron_post.curation.step import Batch, Pass, RowPass, Values, View, WholePass
from megatron_post.installation import require

_NGRAMS = "ngrams"


class NearDuplicateRows(Duplicates):
    """Drops rows that share most n-grams of words with a row that is kept."""

    kind: Literal["near_duplicates"] = Field(description="selects this step")
    threshold: float = Field(
        0.7, gt=0, le=1, description="Jaccard similarity of n-grams from which a row is a duplicate"
    )
    ngram: Count = Field(3, le=100, description="words of an n-gram. A symbol such as + counts as a word")
    spare: Spare = SPARE

    def passes(self, *, seed: int) -> Sequence[Pass]:
        require("rensa", self.kind, "curate")
        signatures = f"{self.column}.signatures"
        bands, _ = band_shape(self.threshold)
        return [
            RowPass(
                name=signatures,
                version=1,
                settings={"ngram": self.ngram, "threshold": self.threshold},
                fields={
                    **{_band(number): pa.uint64() for number in range(bands)},
                    **KEYS,
                    "size": pa.int32(),
                    # half of each hash is enough to compare two rows
                    _NGRAMS: pa.list_(pa.uint32()),
                },
                annotate=self._sign,
            ),
            WholePass(
                name=self.column,
                version=1,
                settings={"threshold": self.threshold, "spare": self.spare, "order_by": self.order_by},
                fields={
                    DROPPED: pa.string(),
                    "duplicate_of": pa.string(),
                    "similarity": pa.float32(),
                    "crowded": pa.bool_(),
                },
                reads=[signatures, *self.needs],
                kept_only=True,
                annotate=lambda view: self._annotate(view, signatures),
            ),
        ]

    def _sign(self, batch: Batch) -> Values:
        texts = [texts_of(row) for row in batch.rows]
        words = WordHashes(symbols=True)
        ngrams = [
            np.unique(ngram_hashes(words.of(" ".join(text for _, text in row.dialog)), self.ngram))
            for row in texts
        ]
        bands = band_hashes(ngrams, threshold=self.threshold)
        stored = [np.unique(row.astype(np.uint32)) for row in ngrams]
        return {
            **{_band(number): bands[:, number] for number in range(bands.shape[1])},
            **keys_of(texts),
            "size": [len(row) for row in stored],
            _NGRAMS: _lists(stored),
        }

    def _annotate(self, view: View, signatures: str) -> Values:
        def bands() -> Iterator[np.ndarray]:
            for number in range(band_shape(self.threshold)[0]):
                yield view.read(signatures, [_band(number)])[_band(number)].to_numpy()

        sizes = view.read(signatures, ["size"])["size"].to_numpy()
        rows = colliding_rows(bands(), sizes > 0)
        keys = SpareKeys.of(view.read(signatures, list(KEYS))).take(rows)
        places = np.full(view.num_rows, -1)
        places[rows] = np.arange(len(rows))
        order = places[self.order(view)]
        with tempfile.TemporaryFile() as file:
            ngrams = _Ngrams(file, view, signatures, rows, sizes[rows])
            found = NearDuplicates(
                band_groups(bands(), rows),
                order[order >= 0].tolist(),
                ngrams.of,
                threshold=self.threshold,
                spared=lambda first, others: keys.spared(np.full(len(others), first), others, self.spare),
            )
        repeated = np.full(view.num_rows, -1)
        repeated[rows] = np.where(found.repeats < 0, -1, rows[found.repeats])
        similarity, crowded = np.zeros(view.num_rows), np.zeros(view.num_rows, bool)
        similarity[rows], crowded[rows] = found.similarity, found.crowded
        return {
            DROPPED: reasons(repeated >= 0, "near duplicate"),
            "duplicate_of": row_names(view, repeated),
            "similarity": pa.array(similarity, pa.float32(), mask=repeated < 0),
            "crowded": pa.array(crowded, mask=~crowded),
        }

    def report(self, view: View) -> dict[str, Any]:
        crowded = view.read(self.column, ["crowded"])["crowded"]
        return {"rows_with_too_many_candidates": len(crowded) - crowded.null_count}


class _Ngrams:
    """The n-grams of the rows that are compared, in a file, so that they do not fill the memory."""

    def __init__(
        self, file: IO[bytes], view: View, signatures: str, rows: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        for start, table in view.parts(signatures, [_NGRAMS]):
            first, last = np.searchsorted(rows, [start, start + table.num_rows])
            if first < last:
                own = table[_NGRAMS].take(pa.array(rows[first:last] - start))
                file.write(own.combine_chunks().flatten().to_numpy().tobytes())
        file.flush()
        is_empty = not len(rows)
        self._all = np.empty(0, np.uint32) if is_empty else np.memmap(file, np.uint32, mode="r")

    def of(self, place: int) -> np.ndarray:
        return self._all[self._starts[place] : self._ends[place]]


def _band(number: int) -> str:
    return f"band_{number:03d}"


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate([*arrays, np.empty(0, np.uint32)]))
    )
