"""Exact duplicates: dialogs with the same roles and the same normalized texts."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_post.curation.columns import DROPPED
from megatron_post.curation.duplicates.priority import Duplicates, reasons, row_names
from megatron_post.curation.duplicates.texts import texts_of
from megatron_post.curation.duplicates.words import dialog_hash
from megatron_post.curation.step import Batch, Pass, RowPass, Values, View, WholePass


def exact_duplicates(hashes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The row that each row repeats, int64 [n]; -1 for a row that is kept.

    hashes: uint64 [n, 2], the two halves of each row's `words.dialog_hash`. order: int64 [m], the rows that
    take part, the one that is kept first in front. Rows that take no part are -1. This takes about 50 bytes
    of memory for each row.
    """
    repeated = np.full(len(hashes), -1, np.int64)
    if not len(order):
        return repeated
    first, second = hashes[order, 0], hashes[order, 1]
    by_hash = np.lexsort((second, first))  # stable, so equal rows stay in the order of their priority
    first, second = first[by_hash], second[by_hash]
    starts = np.r_[True, (first[1:] != first[:-1]) | (second[1:] != second[:-1])]
    kept = order[by_hash[np.flatnonzero(starts)]][np.cumsum(starts) - 1]
    rows = order[by_hash]
    repeated[rows[~starts]] = kept[~starts]
    return repeated


class ExactDuplicates(Duplicates):
    """Drops rows that repeat another row but for case, blanks and Unicode's form."""

    kind: Literal["exact_duplicates"] = Field(description="selects this step")

    def passes(self, *, seed: int) -> Sequence[Pass]:
        hashes = f"{self.column}.hashes"
        return [
            RowPass(
                name=hashes,
                version=1,
                settings={},
                fields={"first": pa.uint64(), "second": pa.uint64()},
                annotate=_hashes,
            ),
            WholePass(
                name=self.column,
                version=1,
                settings={"order_by": self.order_by},
                fields={DROPPED: pa.string(), "duplicate_of": pa.string()},
                reads=[hashes, *self.needs],
                kept_only=True,
                annotate=lambda view: self._annotate(view, view.read(hashes, ["first", "second"])),
            ),
        ]

    def _annotate(self, view: View, hashes: pa.Table) -> Values:
        both = np.stack([hashes[name].to_numpy() for name in ("first", "second")], axis=1)
        repeated = exact_duplicates(both, self.order(view))
        return {
            DROPPED: reasons(repeated >= 0, "exact duplicate"),
            "duplicate_of": row_names(view, repeated),
        }


def _hashes(batch: Batch) -> Values:
    pairs = [dialog_hash(texts_of(row).everything) for row in batch.rows]
    return {"first": [first for first, _ in pairs], "second": [second for _, second in pairs]}
