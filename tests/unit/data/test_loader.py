"""A step's packs do not depend on the number of ranks, and the sequence of packs can start anywhere."""

import gc
import threading
import time
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_post.data.balance import squares
from megatron_post.data.loader import PackLoader, eval_packs, pack_indices
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore, StoreError
from tests.unit.data.small_store import small_store
from tests.unit.data.uneven_store import cut_packs, uneven_store

NUM_PACKS = 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackStore:
    return small_store(tmp_path_factory.mktemp("loader") / "s", NUM_PACKS)


def number(pack: Pack) -> int:
    return int(pack.tokens[0]) // 1000


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def steps(store: PackStore, count: int, **keys: int) -> list[list[int]]:
    keys = {"seed": 5, "global_batch": 4, **keys}
    with PackLoader(store, **keys) as loader:  # type: ignore[arg-type]
        return [[number(pack) for pack in packs] for packs in islice(loader, count)]


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_a_steps_packs_do_not_depend_on_the_ranks(store: PackStore, data_size: int) -> None:
    whole = steps(store, 8)
    ranks = [steps(store, 8, data_rank=rank, data_size=data_size) for rank in range(data_size)]
    for step in range(8):
        assert all(len(rank[step]) == 4 // data_size for rank in ranks)
        assert sorted(flat(rank[step] for rank in ranks)) == sorted(whole[step])


def test_every_epoch_visits_every_pack_once_in_another_order(store: PackStore) -> None:
    # with batches of 4 from 10 packs, the third and the eighth batch continue into the next epoch
    stream = flat(steps(store, 15))
    epochs = [stream[start : start + NUM_PACKS] for start in range(0, 60, NUM_PACKS)]
    assert all(sorted(epoch) == list(range(NUM_PACKS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_larger_than_the_store_walks_over_epochs(store: PackStore) -> None:
    (batch,) = steps(store, 1, global_batch=25)
    assert sorted(batch[:10]) == sorted(batch[10:20]) == list(range(NUM_PACKS))
    assert batch[20:] == flat(steps(store, 3, global_batch=10))[20:25]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7])
def test_restarting_goes_on_where_it_stopped(store: PackStore, step: int) -> None:
    for rank in range(2):
        whole = steps(store, 10, data_rank=rank, data_size=2)
        assert steps(store, 10 - step, data_rank=rank, data_size=2, consumed_packs=4 * step) == whole[step:]


def test_a_resumed_run_may_change_ranks_and_batch(store: PackStore) -> None:
    stream = flat(steps(store, 12))
    resumed = [
        steps(store, 3, global_batch=6, data_rank=rank, data_size=3, consumed_packs=8) for rank in range(3)
    ]
    batches = [sorted(flat(rank[step] for rank in resumed)) for step in range(3)]
    assert batches == [sorted(stream[8 + 6 * step : 14 + 6 * step]) for step in range(3)]


UNEVEN_PACKS = 23


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> PackStore:
    return uneven_store(tmp_path_factory.mktemp("loader") / "u", cut_packs(UNEVEN_PACKS))


def dealt(store: PackStore, count: int, *, batch: int, size: int, consumed: int = 0) -> list[list[list[int]]]:
    """Packs by [step][rank], named by their first token."""
    ranks = []
    for rank in range(size):
        with PackLoader(
            store, seed=5, global_batch=batch, data_rank=rank, data_size=size, consumed_packs=consumed
        ) as loader:
            ranks.append([[int(pack.tokens[0]) for pack in packs] for packs in islice(loader, count)])
    return [list(step) for step in zip(*ranks, strict=True)]


@given(
    phases=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=25)
def test_a_changing_number_of_ranks_sees_the_same_packs(
    uneven: PackStore, phases: list[tuple[int, int, int]]
) -> None:
    """Each of several runs of (ranks, packs per rank, steps) resumes at the previous run's position.

    Every step takes the next packs of the plain sequence, and every rank gets the same number of packs.
    """
    stream = list(islice(pack_indices(UNEVEN_PACKS, seed=5, start=0), 300))
    consumed = 0
    for size, places, count in phases:
        batch = size * places
        for step in dealt(uneven, count, batch=batch, size=size, consumed=consumed):
            assert all(len(packs) == places for packs in step)
            assert sorted(flat(step)) == sorted(stream[consumed : consumed + batch])
            consumed += batch


def test_ranks_have_nearly_equal_costs(uneven: PackStore) -> None:
    """The loader is compared with giving every second pack to each rank, for 16 packs on 2 ranks.

    Over 20 steps the larger sum is nearer to the mean by a factor of ten.
    """
    costs = squares(uneven, np.arange(UNEVEN_PACKS))
    stream = np.array(list(islice(pack_indices(UNEVEN_PACKS, seed=5, start=0), 20 * 16))).reshape(20, 8, 2)
    plain = costs[stream].sum(axis=1)
    balanced = np.array([costs[step].sum(axis=1) for step in dealt(uneven, 20, batch=16, size=2)])
    assert balanced.sum(axis=1).tolist() == plain.sum(axis=1).tolist()
    excess = [np.mean(sums.max(axis=1) / sums.mean(axis=1)) - 1 for sums in (plain, balanced)]
    assert excess[1] < excess[0] / 10


def test_the_costliest_pack_comes_first(uneven: PackStore) -> None:
    costs = squares(uneven, np.arange(UNEVEN_PACKS))
    for step in dealt(uneven, 5, batch=8, size=2):
        assert all((np.diff(costs[packs]) <= 0).all() for packs in step)


def test_the_seed_decides(store: PackStore) -> None:
    assert steps(store, 5) == steps(store, 5)
    assert steps(store, 5) != steps(store, 5, seed=6)


def test_arrays_belong_to_the_reader(store: PackStore) -> None:
    with PackLoader(store, seed=1, global_batch=1) as loader:
        pack = next(loader)[0]
        first = pack.tokens.copy()
        pack.tokens[:] = 0
        index = int(first[0]) // 1000
        assert np.array_equal(store.read(index).tokens, first)


def test_the_readers_exception_reaches_the_consumer(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", 4)
    next((tmp_path / "s/train/roles").rglob("c/0/0")).unlink()
    with (
        PackLoader(store, seed=1, global_batch=1) as loader,
        pytest.raises(StoreError, match="cannot be read"),
    ):
        next(loader)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pack-loader")]


def test_the_thread_ends_on_close_and_when_dropped(store: PackStore) -> None:
    loader = PackLoader(store, seed=1, global_batch=2)
    next(loader)
    assert loader_threads()
    loader.close()
    assert not loader_threads()
    dropped = PackLoader(store, seed=1, global_batch=2)
    next(dropped)
    del dropped
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def test_a_batch_that_the_ranks_do_not_divide(store: PackStore) -> None:
    with pytest.raises(ValueError, match="global_batch=4 is not a multiple of the 3"):
        PackLoader(store, seed=1, global_batch=4, data_size=3)


def test_an_empty_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no packs"):
        PackLoader(small_store(tmp_path / "s", 0), seed=1, global_batch=1)


def numbers_or_empty(packs: list[Pack]) -> list[int | None]:
    return [number(pack) if pack.roles.any() or pack.sources[0] >= 0 else None for pack in packs]


def test_evaluation_deals_packs_in_turn(store: PackStore) -> None:
    """A rank runs a pack of padding only if it has no other, or for the interleaved schedule."""
    ranks = [numbers_or_empty(list(eval_packs(store, 5, data_rank=r, data_size=2))) for r in range(2)]
    assert ranks == [[0, 2, 4], [1, 3]]
    ranks = [numbers_or_empty(list(eval_packs(store, 2, data_rank=r, data_size=4))) for r in range(4)]
    assert ranks == [[0], [1], [None], [None]]


def test_evaluation_rounds_up_for_the_interleaved_schedule(store: PackStore) -> None:
    """5 packs on 2 ranks are 3 and 2 microbatches. Groups of 2 make them 4 and 2."""
    ranks = [
        numbers_or_empty(list(eval_packs(store, 5, data_rank=r, data_size=2, multiple=2))) for r in range(2)
    ]
    assert ranks == [[0, 2, 4, None], [1, 3]]


def test_evaluation_of_fewer_packs_than_asked(store: PackStore, tmp_path: Path) -> None:
    assert numbers_or_empty(list(eval_packs(store, 64))) == list(range(NUM_PACKS))
    assert list(eval_packs(small_store(tmp_path / "s", 0), 64)) == []
