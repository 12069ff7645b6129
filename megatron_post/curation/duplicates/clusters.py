"""Clusters of embeddings, by the k-means of faiss."""

import math

import numpy as np

from megatron_post.data.permutation import permutation

_ITERATIONS = 20
_DEFAULT_ROWS = 20_000
_ROWS_PER_CLUSTER = 256  # of the sample. faiss recommends 39 to 256


def default_clusters(num_rows: int) -> int:
    """As few clusters as have about 20,000 rows each.

    The comparisons in a cluster then take much less time than an encoder needs for its rows, and their number
    is linear in rows. More clusters would separate more duplicates from each other.
    """
    return max(1, math.ceil(num_rows / _DEFAULT_ROWS))


def sample_rows(rows: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
    """The rows that k-means is trained on, ascending int64. The same seed draws the same ones everywhere."""
    wanted = min(len(rows), clusters * _ROWS_PER_CLUSTER)
    return np.sort(rows[permutation(len(rows), seed, "k-means")[:wanted]])


def train_centroids(sample: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
    """Unit vectors, float32 [clusters, dimensions]. There are never more clusters than rows in the sample.

    sample: unit vectors, float [rows, dimensions].
    """
    import faiss

    clusters = min(clusters, len(sample))
    if clusters <= 1:
        mean = sample.astype(np.float32).mean(axis=0, keepdims=True)
        return mean / np.maximum(np.linalg.norm(mean), 1e-12)
    kmeans = faiss.Kmeans(
        sample.shape[1],
        clusters,
        niter=_ITERATIONS,
        seed=seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_ROWS_PER_CLUSTER,
    )
    kmeans.train(np.ascontiguousarray(sample, np.float32))
    return np.asarray(kmeans.centroids, np.float32)


def assign(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The cluster of each row, int32 [rows]: that of the centroid with the largest cosine."""
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    _, nearest = index.search(np.ascontiguousarray(vectors, np.float32), 1)
    return nearest[:, 0].astype(np.int32)
