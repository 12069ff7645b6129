import numpy as np
import pytest

pytest.importorskip("faiss", reason="clusters need faiss, an extra of the package")

from megatron_post.curation.duplicates.clusters import (
    assign,
    default_clusters,
    sample_rows,
    train_centroids,
)


def unit(count: int, *, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def test_the_same_seed_gives_the_same_centroids() -> None:
    vectors = unit(500)
    first, again, other = (train_centroids(vectors, 10, seed=seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)


def test_rows_go_to_the_centroid_with_the_largest_cosine() -> None:
    vectors = unit(200)
    centroids = train_centroids(vectors, 7, seed=0)
    expected = (vectors.astype(np.float32) @ centroids.T).argmax(axis=1)
    assert assign(vectors, centroids).tolist() == expected.tolist()


@pytest.mark.parametrize(("count", "clusters", "expected"), [(1, 5, 1), (3, 5, 3), (4, 1, 1)])
def test_there_are_never_more_clusters_than_rows(count: int, clusters: int, expected: int) -> None:
    centroids = train_centroids(unit(count), clusters, seed=0)
    assert centroids.shape == (expected, 8)
    assert set(assign(unit(count), centroids)) <= set(range(expected))


def test_the_sample_is_drawn_by_the_seed_alone() -> None:
    rows = np.arange(1000, 6000)
    first = sample_rows(rows, 4, seed=3)
    assert len(first) == 4 * 256 == len(set(first))
    assert (np.diff(first) > 0).all()
    assert first.tolist() == sample_rows(rows, 4, seed=3).tolist()
    assert first.tolist() != sample_rows(rows, 4, seed=4).tolist()
    assert sample_rows(rows, 100, seed=3).tolist() == rows.tolist()


def test_clusters_have_about_the_same_number_of_rows() -> None:
    assert [default_clusters(count) for count in (0, 1, 20_000, 20_001, 1_000_000)] == [1, 1, 1, 2, 50]
