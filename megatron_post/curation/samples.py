"""The rows that the page of a run shows, drawn while the rows are written: a few, however many there are."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_post.curation.columns import DROPPED
from megatron_post.curation.duplicates.semantic_step import SemanticDuplicates
from megatron_post.curation.row import ANNOTATIONS
from megatron_post.curation.step import Step, View
from megatron_post.curation.topics import COARSE, Topics

OF_A_TOPIC = 10  # rows that are kept
OF_A_STEP = 5  # rows that it drops
_CLUSTERS = 8  # those that drop the most rows
_PAIRS = 3  # dropped rows of a cluster, each with the row that it is most similar to
_LONGEST = 1500  # characters of a text
_MOST_TEXTS = 8  # of a row


@dataclass(frozen=True)
class Pair:
    """A dropped row and the row that it is most similar to, by their ids."""

    dropped: str
    nearest: str
    cosine: float


@dataclass(frozen=True)
class Cluster:
    """A cluster of a step with some of its dropped rows."""

    step: str
    number: int
    rows: int
    dropped: int
    pairs: Sequence[Pair]


class _Drawn:
    """The rows of a group with the smallest draws."""

    def __init__(self, most: int) -> None:
        self._most, self._heap = most, list[tuple[int, str, Any]]()

    def add(self, draw: int, row: Mapping[str, Any]) -> None:
        entry = (-draw, row["id"], row)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    @property
    def rows(self) -> list[Any]:
        return [row for _, _, row in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


@dataclass
class Samples:
    """Random kept rows of each topic, dropped rows of each step, and pairs of the clusters."""

    steps: Sequence[Step]
    seed: int
    clusters: list[Cluster] = field(default_factory=list)
    of_pairs: dict[str, Any] = field(default_factory=dict)
    _topics: dict[str, _Drawn] = field(default_factory=dict)
    _dropped: dict[str, _Drawn] = field(default_factory=dict)

    def draw_clusters(self, view: View) -> None:
        """Choose the pairs of clusters, before the rows are added. view: of all rows."""
        for step in self.steps:
            if isinstance(step, SemanticDuplicates):
                self.clusters += _clusters(step.column, view)
        pairs = [pair for cluster in self.clusters for pair in cluster.pairs]
        self.of_pairs = {name: None for pair in pairs for name in (pair.dropped, pair.nearest)}

    def add(self, written: Mapping[str, Any]) -> None:
        """Add a row as it is written, whether it is kept or dropped."""
        notes = written[ANNOTATIONS]
        dropped_by = notes.get("dropped_by")
        draw = int.from_bytes(hashlib.sha256(f"{self.seed} {notes['id']}".encode()).digest()[:8], "big")
        if notes["id"] in self.of_pairs:
            self.of_pairs[notes["id"]] = _shown(written)
        if dropped_by:
            self._dropped.setdefault(dropped_by["step"], _Drawn(OF_A_STEP)).add(draw, _shown(written))
            return
        for topic in self._topics_of(notes):
            self._topics.setdefault(topic, _Drawn(OF_A_TOPIC)).add(draw, _shown(written))

    def _topics_of(self, notes: Mapping[str, Any]) -> list[str]:
        """The coarse topic. Without a step `topics` it is the source."""
        labelling = [step.column for step in self.steps if isinstance(step, Topics)]
        if not labelling:
            return [notes["source"]]
        return [notes["steps"].get(name, {}).get(COARSE) or "without a topic" for name in labelling[:1]]

    @property
    def by_topic(self) -> dict[str, list[Any]]:
        return {topic: drawn.rows for topic, drawn in sorted(self._topics.items())}

    @property
    def by_step(self) -> dict[str, list[Any]]:
        return {name: drawn.rows for name, drawn in self._dropped.items()}


def _clusters(step: str, view: View) -> list[Cluster]:
    """The clusters that drop the most rows, with the most similar pairs of each."""
    table = view.read(step, ["id", "cluster", DROPPED, "nearest", "cosine"])
    sizes = _counts(table["cluster"])
    dropped = table.filter(table[DROPPED].is_valid())
    most = sorted(_counts(dropped["cluster"]).items(), key=lambda pair: (-pair[1], pair[0]))
    found = []
    for number, count in most[:_CLUSTERS]:
        # Arrow chooses the rows, so that only those of this cluster become Python objects.
        own = dropped.filter(pc.equal(dropped["cluster"], number))
        rows = sorted(own.to_pylist(), key=lambda row: (-(row["cosine"] or 0), row["id"]))
        some = rows[:: max(1, len(rows) // _PAIRS)][:_PAIRS]  # from the most to the least similar
        pairs = [Pair(row["id"].hex(), row["nearest"], row["cosine"]) for row in some if row["nearest"]]
        found.append(Cluster(step, number, sizes[number], count, pairs))
    return found


def _counts(numbers: pa.ChunkedArray) -> dict[int, int]:
    """How often each number occurs."""
    found = numbers.drop_null().value_counts()
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


def _shown(written: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that the page shows, with shortened texts."""
    notes = written[ANNOTATIONS]
    texts = []
    for key in ("messages", "prompt", "edited", "chosen", "rejected"):
        for message in written.get(key) or ():
            role = message["role"] if key in ("messages", "prompt") else f"{message['role']}, {key}"
            texts += [(f"{role}, reasoning", message.get("reasoning_content") or "")]
            texts += [(role, message["content"] or "")]
            for call in message.get("tool_calls") or ():
                texts += [(f"{role}, call", f"{call['function']['name']}({call['function']['arguments']})")]
    texts = [(role, text) for role, text in texts if text]
    return {
        "id": notes["id"],
        "source": notes["source"],
        "place": notes["place"],
        "dropped_by": notes.get("dropped_by"),
        "texts": [(role, _cut(text)) for role, text in texts[:_MOST_TEXTS]],
        "others": len(texts[_MOST_TEXTS:]),
        "notes": [
            (f"{step}.{name}", _cut(str(value)))
            for step, values in notes["steps"].items()
            for name, value in values.items()
        ],
    }


def _cut(text: str) -> str:
    left = len(text) - _LONGEST
    return text if left <= 0 else f"{text[:_LONGEST]} [... {left:,} more characters]"
