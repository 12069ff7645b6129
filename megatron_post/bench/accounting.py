"""Counts the tokens of packs by kind (real, trained, padding), and the load of their attention."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_post.data.batch import PackedBatch
from megatron_post.data.pack import Pack
from megatron_post.plan.activations import Segment
from megatron_post.plan.flops import Load
from megatron_post.stages.base import Stage

_NONE = Load(0, 0, 0)


@dataclass(frozen=True)
class Counts:
    """Counts of packs.

    capacity: all tokens that are computed. real: those that are not padding. trained: labels with loss, or
    for a reward model the scored responses. examples: dialogs, or preferences. useful: the load of the real
    tokens alone. computed: the load of all tokens, with the padding at the end of packs.
    """

    capacity: int = 0
    real: int = 0
    trained: int = 0
    examples: int = 0
    useful: Load = _NONE
    computed: Load = _NONE

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.capacity + other.capacity,
            self.real + other.real,
            self.trained + other.trained,
            self.examples + other.examples,
            self.useful + other.useful,
            self.computed + other.computed,
        )


def count_packs(packs: Iterable[Pack], stage: Stage, *, scalar_head: bool = False) -> Counts:
    """The counts of these packs, as the stage trains them."""
    return sum((_count(pack, stage.collate(pack), scores=scalar_head) for pack in packs), Counts())


def _count(pack: Pack, batch: PackedBatch, *, scores: bool) -> Counts:
    lengths, padded = batch.lengths.tolist(), batch.cu_seqlens.diff().tolist()
    spans = [(0, 0)] * len(lengths) if batch.seen is None else batch.seen.tolist()
    seen = [sum(lengths[first:last]) for first, last in spans]
    pairs, trained = batch.comparisons, int(batch.trained.sum())
    return Counts(
        capacity=sum(padded),
        real=sum(lengths),
        trained=int((pack.ranks >= 0).sum()) if scores and pairs is not None else trained,
        examples=sum(n > 0 for n in lengths) if pairs is None else int(pairs.examples),
        useful=Load.of(map(Segment, lengths, seen), trained=trained),
        computed=Load.of(map(Segment, padded, seen), trained=trained),
    )
