"""Makes stores whose packs have segments of given lengths, and so have unequal costs."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import SourceCounts, StoreLayout, StoreSettings
from megatron_post.data.store_writer import StoreWriter

PACK_LENGTH = 64


def uneven_store(
    path: Path,
    packs: Sequence[Sequence[int]],
    *,
    layout: StoreLayout = "dialogs",
    ranks: Sequence[Sequence[int]] | None = None,
) -> PackStore:
    """A store of `packs`, each given by the padded lengths of its segments.

    ranks: the rank of each segment, -1 by default. The first token of pack p is p.
    """
    lengths = np.array(list(chain.from_iterable(packs)), dtype=np.int64)
    zeros = np.zeros(len(lengths))
    settings = StoreSettings(
        pack_length=PACK_LENGTH,
        segment_multiple=1,
        tokenizer_fingerprint="f",
        pad_id=0,
        seed=0,
        layout=layout,
    )
    with StoreWriter(path, settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("a", rows=len(lengths))],
            columns={
                "padded": lengths,
                "length": lengths,
                "source": zeros,
                "sample": np.arange(len(lengths)),
                "unit": np.arange(len(lengths)),
                "rank": zeros - 1 if ranks is None else list(chain.from_iterable(ranks)),
                "turns": zeros,
                "response": zeros,
            },
            segments_per_pack=[len(pack) for pack in packs],
            packs=(
                (np.full(PACK_LENGTH, p, dtype=np.int32), np.full(PACK_LENGTH, 1, dtype=np.uint8))
                for p in range(len(packs))
            ),
        )
    return open_store(path, "train")


def cut_packs(count: int, *, seed: int = 0) -> list[list[int]]:
    """Lengths of the segments of packs of 1 to 8 segments that fill all or most of `PACK_LENGTH`."""
    draw = np.random.default_rng(seed)
    packs = []
    for _ in range(count):
        end = int(draw.integers(PACK_LENGTH // 2, PACK_LENGTH + 1))
        cuts = np.sort(draw.choice(np.arange(1, end), size=int(draw.integers(0, 8)), replace=False))
        packs.append(np.diff([0, *cuts, end]).tolist())
    return packs
