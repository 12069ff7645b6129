"""The step `semantic_duplicates`."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count, Distinct, Line, Name
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.duplicates import clusters
from megatron_post.curation.duplicates.embedding import Encoder
from megatron_post.curation.duplicates.priority import Duplicates, names_of, reasons, row_ids
from megatron_post.curation.duplicates.semantic import CompareTo, select
from megatron_post.curation.duplicates.spared import KEYS, SPARE, Spare, SpareKeys, keys_of
from megatron_post.curation.duplicates.texts import texts_of
from megatron_post.curation.step import Batch, BlockPass, Pass, RowPass, Values, View
from megatron_post.installation import require

_VECTOR = "vector"


class SemanticDuplicates(Duplicates):
    """Drops rows that mean the same as a row of higher priority, by the cosine of their embeddings."""

    kind: Literal["semantic_duplicates"] = Field(description="selects this step")
    encoder: Name = Field(
        "sentence-transformers/all-roberta-large-v1",
        description="directory or hub name of an encoder of Hugging Face or of sentence-transformers",
    )
    batch_size: Count = Field(64, description="texts that the encoder reads at once")
    devices: Annotated[tuple[Line, ...], Distinct] = Field(
        (),
        description="torch devices of a process, such as cuda:0. Empty: all visible GPUs, else the CPU",
    )
    clusters: Count | None = Field(
        None,
        description="clusters, whose rows are not compared with those of others. null: one for 20,000 rows",
    )
    threshold: float = Field(
        0.9, gt=-1, le=1, description="cosine from which a row is a duplicate of a row in its cluster"
    )
    compare_to: CompareTo = Field(
        "kept",
        description="rows of higher priority that a row is compared with. kept: those that are kept. "
        "seen: all of them",
    )
    spare: Spare = SPARE

    @property
    def uses_gpus(self) -> bool:
        return not self.devices or any(not device.startswith("cpu") for device in self.devices)

    @property
    def measures(self) -> Sequence[str]:
        return ("cosine",)

    def passes(self, *, seed: int) -> Sequence[Pass]:
        for package in ("sentence_transformers", "faiss"):
            require(package, self.kind, "curate")
        if self.encoder.startswith(("/", ".")) and not Path(self.encoder).is_dir():
            raise ValueError(f"{self.column}: encoder {self.encoder} is no directory")
        vectors, assigned = f"{self.column}.vectors", f"{self.column}.clusters"
        settings = {"encoder": self.encoder, "batch_size": self.batch_size}
        return [
            RowPass(
                name=vectors,
                version=1,
                settings=settings,
                fields={_VECTOR: pa.list_(pa.float16()), **KEYS},
                # All rows get a vector. Otherwise a change of an earlier step would embed the rows again.
                annotate=_Embedding(self).annotate,
            ),
            BlockPass(
                name=assigned,
                version=1,
                settings={"clusters": self.clusters, "seed": seed},
                fields={"cluster": pa.int32()},
                reads=[vectors],
                kept_only=True,
                prepare=lambda view: self._train(view, vectors, seed),
                block=lambda view, block: self._assign(view, vectors, block),
            ),
            BlockPass(
                name=self.column,
                version=1,
                settings={
                    "threshold": self.threshold,
                    "compare_to": self.compare_to,
                    "spare": self.spare,
                    "order_by": self.order_by,
                },
                fields={
                    DROPPED: pa.string(),
                    "cluster": pa.int32(),
                    "nearest": pa.string(),
                    "cosine": pa.float32(),
                },
                reads=[vectors, assigned, *self.needs],
                kept_only=True,
                prepare=lambda view: self._gather(view, vectors, assigned),
                block=self._select,
            ),
        ]

    def _train(self, view: View, vectors: str, seed: int) -> int:
        if not view.num_rows:
            return 0
        count = self.clusters or clusters.default_clusters(view.num_rows)
        wanted = clusters.sample_rows(np.arange(view.num_rows), count, seed=seed)
        sample = [
            _vectors(table)[wanted[(wanted >= start) & (wanted < start + table.num_rows)] - start]
            for start, table in view.parts(vectors, [_VECTOR])
            if table.num_rows
        ]
        centroids = clusters.train_centroids(np.concatenate(sample), count, seed=seed)
        np.save(view.scratch / "centroids.npy", centroids)
        return view.num_parts

    def _assign(self, view: View, vectors: str, part: int) -> Values:
        start, table = view.part(part, vectors, [_VECTOR])
        if not table.num_rows:
            return {"row": [], "cluster": []}
        found = clusters.assign(_vectors(table), np.load(view.scratch / "centroids.npy"))
        return {"row": np.arange(start, start + table.num_rows), "cluster": found}

    def _gather(self, view: View, vectors: str, assigned: str) -> int:
        """Write the vectors in the order of the clusters, so that a cluster is read in one piece."""
        if not view.num_rows:
            return 0
        cluster = view.read(assigned, ["cluster"])["cluster"].to_numpy()
        order = self.order(view)
        order = order[np.argsort(cluster[order], kind="stable")]  # within a cluster by priority
        place = np.empty(view.num_rows, np.int64)
        place[order] = np.arange(view.num_rows)
        gathered: np.memmap | None = None
        for start, table in view.parts(vectors, [_VECTOR]):
            if not table.num_rows:
                continue
            found = _vectors(table)
            if gathered is None:
                gathered = np.lib.format.open_memmap(
                    view.scratch / "vectors.npy", "w+", np.float16, (view.num_rows, found.shape[1])
                )
            gathered[place[start : start + table.num_rows]] = found
        assert gathered is not None
        gathered.flush()
        keys = SpareKeys.of(view.read(vectors, list(KEYS))).take(order)
        np.save(view.scratch / "keys.npy", np.stack([keys.prompt, keys.masked, keys.answer]))
        np.save(view.scratch / "rows.npy", order)
        np.save(view.scratch / "ids.npy", row_ids(view)[order])
        names, starts = np.unique(cluster[order], return_index=True)
        np.save(view.scratch / "clusters.npy", np.stack([names, starts, [*starts[1:], view.num_rows]]))
        return len(names)

    def _select(self, view: View, block: int) -> Values:
        def load(name: str) -> np.ndarray:
            return np.load(view.scratch / f"{name}.npy", mmap_mode="r")

        cluster, start, stop = load("clusters")[:, block]
        rows = np.array(load("rows")[start:stop])
        keys = SpareKeys(*np.array(load("keys")[:, start:stop]))
        found = select(
            np.array(load("vectors")[start:stop]),
            keys,
            threshold=self.threshold,
            compare_to=self.compare_to,
            spare=self.spare,
        )
        return {
            "row": rows,
            DROPPED: reasons(~found.kept, "semantic duplicate"),
            "cluster": np.full(len(rows), cluster, np.int32),
            "nearest": names_of(load("ids")[start:stop], found.nearest),
            "cosine": pa.array(found.cosine, pa.float32(), mask=np.isnan(found.cosine)),
        }

    def report(self, view: View) -> dict[str, Any]:
        sizes = view.read(self.column, ["cluster"])["cluster"].drop_null().value_counts().field("counts")
        counts = np.sort(sizes.to_numpy())
        return {
            "clusters": len(counts),
            "rows_of_the_largest_cluster": int(counts.max(initial=0)),
            "rows_of_the_median_cluster": float(np.median(counts)) if len(counts) else 0.0,
        }


class _Embedding:
    """Embeds rows. The encoder is loaded when it is first needed."""

    def __init__(self, step: SemanticDuplicates) -> None:
        self._step = step

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._step.encoder, batch_size=self._step.batch_size, devices=self._step.devices)

    def annotate(self, batch: Batch) -> Values:
        texts = [texts_of(row) for row in batch.rows]
        vectors = self._encoder.encode([row.dialog for row in texts])
        return {_VECTOR: _as_lists(vectors), **keys_of(texts)}


def _as_lists(vectors: np.ndarray) -> pa.Array:
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel()))


def _vectors(table: pa.Table) -> np.ndarray:
    """The vectors of one row or more, float16 [rows, dimensions]."""
    column = table[_VECTOR].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
