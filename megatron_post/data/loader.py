"""Loads each rank's packs. Every rank computes the order of packs by itself, without communication.

The order follows from the store, the seed, the number of packs consumed and the number of ranks.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import Self

import numpy as np

from megatron_post.data.balance import deal, squares
from megatron_post.data.pack import Pack
from megatron_post.data.permutation import Permutation
from megatron_post.data.store import PackStore


class PackLoader:
    """An endless iterator over this rank's steps. A step is a list of microbatches, and each is one pack.

    Each epoch visits every pack once, in an order drawn from (seed, epoch). Epochs follow each other without
    a gap, so a global batch may hold the last packs of one epoch and the first of the next. A step takes the
    next `global_batch` packs of that sequence, whatever the number of ranks. `balance.deal` gives each rank
    the same number of them, so that all ranks take about equally long.

    `consumed_packs` is the position, counted over all ranks. It grows by `global_batch` in each step. A
    loader made with that number continues exactly where the other stopped. The number of ranks and
    `global_batch` may differ. One background thread reads `prefetch` packs ahead, and its errors are raised
    here. `close` (or `with`, or deleting the loader) ends the thread.

    Raises `ValueError` for an empty store, and for a global batch that is not divisible by the ranks.
    """

    def __init__(
        self,
        store: PackStore,
        *,
        seed: int,
        global_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        prefetch: int = 4,
        consumed_packs: int = 0,
    ) -> None:
        if not len(store):
            raise ValueError(
                f"store {store.path}/{store.group} has no packs; pack data.sources that have rows"
            )
        if global_batch % data_size:
            raise ValueError(
                f"train.global_batch={global_batch} is not a multiple of the {data_size} data-parallel ranks"
            )
        assert 0 <= data_rank < data_size
        self._store = store
        self._indices = _dealt_indices(
            store,
            pack_indices(len(store), seed=seed, start=consumed_packs),
            global_batch=global_batch,
            data_rank=data_rank,
            data_size=data_size,
        )
        self.packs_a_step = global_batch // data_size
        self._prefetch = prefetch
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack-loader")
        self._ahead: deque[Future[Pack]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Pack]:
        return [self._next_pack() for _ in range(self.packs_a_step)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread. The loader cannot be used afterwards."""
        self._reader.shutdown(cancel_futures=True)

    def _next_pack(self) -> Pack:
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._reader.submit(self._store.read, next(self._indices)))
        return self._ahead.popleft().result()


def pack_indices(num_packs: int, *, seed: int, start: int) -> Iterator[int]:
    """Pack numbers from position `start` on of the endless sequence of shuffled epochs."""
    # A global batch may have packs of two epochs, so the orders of two epochs are kept.
    order = lru_cache(maxsize=2)(lambda epoch: Permutation(num_packs, seed, "epoch", epoch))
    for position in count(start):
        epoch, index = divmod(position, num_packs)
        yield order(epoch)[index]


def _dealt_indices(
    store: PackStore, stream: Iterator[int], *, global_batch: int, data_rank: int, data_size: int
) -> Iterator[int]:
    """The packs that `balance.deal` gives to a rank, for each `global_batch` packs of an endless stream."""
    while True:
        batch = np.fromiter(islice(stream, global_batch), dtype=np.int64, count=global_batch)
        yield from batch[deal(squares(store, batch), ranks=data_size)[data_rank]].tolist()


def eval_packs(
    store: PackStore, limit: int, *, data_rank: int = 0, data_size: int = 1, multiple: int = 1
) -> Iterator[Pack]:
    """This rank's share of the first `limit` packs of the store, in its order. Ranks take them in turn.

    With 5 packs on 2 ranks, rank 0 gets 0, 2 and 4, and rank 1 gets 1 and 3. A rank gets a multiple of
    `multiple`, because the interleaved schedule requires a multiple of the pipeline ranks, and at least one
    microbatch, because its first forward pass gathers parameters together with the other ranks. Packs of
    padding are used only to reach these numbers. They add nothing to a sum over counts.
    """
    own = range(data_rank, min(limit, len(store)), data_size)
    yield from map(store.read, own)
    if limit and len(store):
        wanted = max(multiple, -(-len(own) // multiple) * multiple)
        yield from (store.empty() for _ in range(wanted - len(own)))
