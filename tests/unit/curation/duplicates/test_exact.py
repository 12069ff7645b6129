import numpy as np

from megatron_post.curation.duplicates.exact import exact_duplicates
from megatron_post.curation.duplicates.priority import order_by_priority


def hashes(*names: int) -> np.ndarray:
    """The second half tells apart rows whose first halves are equal."""
    return np.array([[7, name] for name in names], np.uint64)


def test_the_first_of_equal_rows_is_kept() -> None:
    repeated = exact_duplicates(hashes(1, 2, 1, 3, 1, 2), np.arange(6))
    assert repeated.tolist() == [-1, -1, 0, -1, 0, 1]


def test_the_best_of_equal_rows_is_kept() -> None:
    quality = np.array([0.1, 0.5, 0.9, 0.2, 0.9, np.nan])
    repeated = exact_duplicates(hashes(1, 2, 1, 3, 1, 2), order_by_priority(6, [quality]))
    assert repeated.tolist() == [2, -1, -1, -1, 2, 1]


def test_rows_that_take_no_part_are_neither_kept_nor_repeats() -> None:
    repeated = exact_duplicates(hashes(1, 1, 1), np.array([1, 2]))
    assert repeated.tolist() == [-1, -1, 1]
    assert exact_duplicates(hashes(1, 1), np.array([], np.int64)).tolist() == [-1, -1]
    assert len(exact_duplicates(np.empty((0, 2), np.uint64), np.array([], np.int64))) == 0


def test_priority_is_the_product_and_missing_values_come_last() -> None:
    quality = np.array([1.0, 2.0, np.nan, 3.0, 2.0])
    difficulty = np.array([1.0, 3.0, 9.0, np.nan, 3.0])
    assert order_by_priority(5, [quality, difficulty]).tolist() == [1, 4, 0, 2, 3]
    assert order_by_priority(3).tolist() == [0, 1, 2]
