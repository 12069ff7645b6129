import itertools

import numpy as np
import pytest

from megatron_post.curation.duplicates.semantic import CompareTo, select
from megatron_post.curation.duplicates.spared import Spare, SpareKeys


def keys(count: int, seed: int = 0) -> SpareKeys:
    """Few distinct values, so that many pairs are spared."""
    draw = np.random.default_rng(seed)
    masked = draw.integers(0, 4, count).astype(np.uint64)
    prompt = masked * np.uint64(10) + draw.integers(0, 2, count).astype(np.uint64)
    return SpareKeys(prompt, masked, draw.integers(0, 3, count).astype(np.uint64))


def directly(
    vectors: np.ndarray, own: SpareKeys, threshold: float, compare_to: str, spare: tuple[str, ...]
) -> list[bool]:
    """The definition, one pair at a time in float64."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    kept: list[bool] = []
    for row in range(len(vectors)):
        cosines = [
            float(unit[row] @ unit[other])
            for other in range(row)
            if (compare_to == "seen" or kept[other])
            and not (
                "numbers" in spare
                and own.masked[row] == own.masked[other]
                and own.prompt[row] != own.prompt[other]
            )
            and not (
                "answers" in spare
                and own.prompt[row] == own.prompt[other]
                and own.answer[row] != own.answer[other]
            )
        ]
        kept.append(max(cosines, default=-1.0) < threshold)
    return kept


@pytest.mark.parametrize("compare_to", ["kept", "seen"])
@pytest.mark.parametrize("spare", [(), ("numbers",), ("numbers", "answers")])
def test_blocks_equal_the_definition(
    compare_to: CompareTo, spare: Spare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are made small, so that rows are compared within blocks and across them."""
    monkeypatch.setattr("megatron_post.curation.duplicates.semantic._BLOCK", 32)
    monkeypatch.setattr("megatron_post.curation.duplicates.semantic._COLUMNS", 50)
    draw = np.random.default_rng(1)
    centres = draw.normal(size=(25, 16))
    vectors = (np.repeat(centres, 8, axis=0) + draw.normal(size=(200, 16)) * 0.35)[draw.permutation(200)]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    own = keys(200)
    found = select(vectors, own, threshold=0.9, compare_to=compare_to, spare=spare)
    assert found.kept.tolist() == directly(vectors, own, 0.9, compare_to, spare)
    assert 20 < found.kept.sum() < 190


def test_the_nearest_row_and_its_cosine_are_named() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0.001]])
    found = select(vectors, keys(4), threshold=0.95)
    assert found.kept.tolist() == [True, True, True, False]
    assert found.nearest.tolist() == [-1, 0, 1, 0]
    assert np.isnan(found.cosine[0])
    assert found.cosine[1:] == pytest.approx([0, 0.8, 1], abs=1e-6)


def test_a_row_is_compared_with_dropped_rows_only_where_all_seen_rows_count() -> None:
    """Three vectors 20 degrees apart. Neighbours have cosine 0.94, and the outer ones 0.77."""
    angles = np.radians([0, 20, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert select(vectors, keys(3), threshold=0.9).kept.tolist() == [True, False, True]
    assert select(vectors, keys(3), threshold=0.9, compare_to="seen").kept.tolist() == [True, False, False]


def test_the_threshold_itself_is_a_duplicate() -> None:
    """The cosine is exactly 0.5, which float64 tells from a threshold that is larger by 1e-9."""
    vectors = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5]])
    assert select(vectors, keys(2), threshold=0.5).kept.tolist() == [True, False]
    assert select(vectors, keys(2), threshold=0.5 + 1e-9).kept.tolist() == [True, True]


@pytest.mark.parametrize("count", [0, 1])
def test_clusters_of_no_row_and_of_one_row(count: int) -> None:
    found = select(np.ones((count, 3)), keys(count), threshold=0.5)
    assert found.kept.tolist() == [True] * count
    assert found.nearest.tolist() == [-1] * count


def test_spared_pairs_are_named_as_nearest_of_neither() -> None:
    own = SpareKeys(*(np.array(values, np.uint64) for values in ([1, 2], [5, 5], [7, 8])))
    found = select(np.ones((2, 3)), own, threshold=0.5, spare=("numbers",))
    assert found.kept.all()
    assert found.nearest.tolist() == [-1, -1]
    assert not select(np.ones((2, 3)), own, threshold=0.5, spare=("answers",)).kept.all()


def test_every_order_of_equal_rows_keeps_one() -> None:
    for order in itertools.permutations(range(3)):
        vectors = np.eye(3)[list(order)].repeat(2, axis=0)
        assert select(vectors, keys(6), threshold=1.0).kept.tolist() == [True, False] * 3
